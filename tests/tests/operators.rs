//! The operators' listener: who gets in, what it shows, and what drains and modes do to live requests.

use std::time::{Duration, Instant};

use baton_tests::{Cluster, ClusterBuilder, read_events};
use serde_json::{Value, json};

async fn until(cluster: &Cluster, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let state = cluster.state().await;
        if holds(&state) {
            return state;
        }
        assert!(Instant::now() < deadline, "never held: {what}\n{state:#}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

fn worker<'a>(state: &'a Value, name: &str) -> &'a Value {
    let workers = state["workers"].as_array().unwrap();
    workers.iter().find(|worker| worker["name"] == name).unwrap()
}

#[tokio::test]
async fn nobody_gets_in_without_the_token() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    for path in ["/admin/state", "/debug/transfer", "/metrics"] {
        for token in [None, Some("0123456789abcdef0123456789abcdeF"), Some("")] {
            let mut request = cluster.http.get(cluster.admin_url(path));
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), 401, "{path} {token:?}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
    }
    let drain = cluster.admin_url("/admin/workers/prefill-0/drain");
    assert_eq!(cluster.http.post(drain).send().await.unwrap().status(), 401);
    assert_eq!(worker(&cluster.state().await, "prefill-0")["state"], "ready");
    // Clients do not reach it.
    assert_eq!(cluster.get("/admin/state").await.status, 404);
    assert_eq!(cluster.http.get(cluster.admin_url("/health")).send().await.unwrap().status(), 200);
    assert!(!cluster.log("coordinator").contains(baton_tests::ADMIN_TOKEN));
}

#[tokio::test]
async fn orders_that_make_no_sense_are_refused_with_what_would() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let refusals = [
        ("/admin/mode", json!({"mode": "split"}), 400, "\"disaggregated\" or \"adaptive\""),
        ("/admin/mode", json!({"mod": "split"}), 400, "unknown field `mod`"),
        ("/admin/mode", json!({"mode": "x".repeat(20_000)}), 413, "length limit"),
        ("/admin/workers/decode-7/drain", json!({}), 404, "attached are decode-0, prefill-0"),
        ("/admin/state", json!({}), 405, "does not take POST"),
        ("/admin/nothing", json!({}), 404, "there is no POST /admin/nothing here"),
    ];
    for (path, body, status, says) in refusals {
        let answer = cluster.admin_post(path, &body).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text);
        assert!(
            answer.text.contains(&says.replace('"', "\\\"")) || answer.text.contains(says),
            "{path}: {}",
            answer.text
        );
    }
    assert_eq!(cluster.state().await["mode"], "disaggregated");
}

#[tokio::test]
async fn the_state_shows_workers_requests_and_handoffs() {
    let cluster = ClusterBuilder::sim().engine("time_scale = 0.2").start().await.unwrap();
    for number in 0..3 {
        let answer = cluster.complete(format!("Hand over, runner {number}. ").repeat(60), 4).await;
        assert_eq!(answer.path(), "disaggregated", "{}", answer.text);
    }
    let body = json!({"prompt": "A long lap. ".repeat(50), "max_tokens": 4000, "stream": true,
        "ignore_eos": true});
    let stream = cluster
        .http
        .post(cluster.url("/v1/completions"))
        .header("x-request-id", "the-long-lap")
        .json(&body)
        .send()
        .await
        .unwrap();
    let last = |buckets: &Value| buckets.as_array().unwrap().last().unwrap()["count"].clone();
    let state = until(&cluster, "a request decodes and reports came", |state| {
        state["requests"][0]["phase"] == "decode"
            && last(&state["latency"]["itl"]).as_u64() > Some(0)
            && worker(state, "decode-0")["handoffs"]["bytes_received"].as_u64() > Some(0)
    })
    .await;

    assert_eq!(state["requests_open"], 1);
    let request = &state["requests"][0];
    assert_eq!(request["id"], "the-long-lap");
    assert_eq!(request["path"], "disaggregated");
    assert_eq!(
        (&request["prefill_worker"], &request["decode_worker"]),
        (&json!("prefill-0"), &json!("decode-0"))
    );
    for phase in ["prefill_ms", "decode_ms"] {
        assert!(request["phases"][phase].as_f64() > Some(0.0), "{phase}: {request}");
    }
    let prefill = worker(&state, "prefill-0");
    assert_eq!((&prefill["role"], &prefill["state"]), (&json!("prefill"), &json!("ready")));
    assert_eq!(prefill["roles"][0]["role"], "prefill");
    assert_eq!(prefill["epoch"].as_str().map(str::len), Some(32), "{prefill}");
    assert!(prefill["engine"].as_str().unwrap().starts_with("sim"), "{prefill}");
    assert!(prefill["arena"]["slots"].as_u64() > Some(0));
    assert_eq!(worker(&state, "decode-0")["load"]["decodes"], 1);

    let ended = state["ended"].as_array().unwrap();
    assert_eq!(ended.len(), 3);
    assert!(ended.iter().all(|request| request["outcome"] == "ok"), "{ended:?}");
    assert_eq!(state["requests_ended"]["ok"], 3);
    let pair = &state["handoffs"]["busiest"][0];
    assert_eq!(state["handoffs"]["pairs"], 1);
    assert_eq!((&pair["from"], &pair["to"]), (&json!("prefill-0"), &json!("decode-0")));
    assert_eq!((&pair["handoffs"], &pair["transport"]), (&json!(4), &json!("shm")));
    assert!(pair["bytes"].as_u64() > Some(0) && pair["micros"].as_u64() > Some(0), "{pair}");
    assert_eq!(last(&state["latency"]["ttft"]), 1, "only a streamed answer has a first token");
    let kinds: Vec<&str> = state["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|decision| decision["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["attached", "attached"]);
    let transfer = cluster.admin_get("/debug/transfer").await.json();
    assert_eq!(transfer[0]["received_over"], json!(["shm"]), "{transfer}");
    assert_eq!(transfer[0]["transports"], json!(["shm", "quic"]), "{transfer}");
    assert_eq!(transfer[0]["address"], format!("127.0.0.1:{}", cluster.transfer_port("decode-0")));
    drop(stream);
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn a_drained_worker_ends_what_it_has_and_takes_nothing_new() {
    let mut cluster = ClusterBuilder::sim()
        .pools(1, 2)
        .engine("time_scale = 0.1")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    let body = json!({"prompt": "The last lap. ".repeat(20), "max_tokens": 300, "stream": true,
        "ignore_eos": true});
    let running = cluster.http.post(cluster.url("/v1/completions")).json(&body).send().await;
    let running = running.unwrap();
    let drained = running.headers()["x-baton-decode-worker"].to_str().unwrap().to_owned();

    let answer = cluster.admin_post(&format!("/admin/workers/{drained}/drain"), &json!({})).await;
    assert_eq!((answer.status, &answer.json()["state"]), (200, &json!("draining")));
    for _ in 0..4 {
        let answer = cluster.complete("Who runs now?", 3).await;
        assert_eq!(answer.path(), "disaggregated");
        assert_ne!(answer.header("x-baton-decode-worker"), drained);
    }
    let events = read_events(running).await.unwrap();
    assert!(events.last().unwrap().data.contains("[DONE]"), "it was let finish");
    until(&cluster, "it is drained", |state| worker(state, &drained)["state"] == "drained").await;

    // A stream that breaks off changes nothing of it; another life of its engine does.
    let process = drained.clone();
    cluster.terminate(&process).unwrap();
    until(&cluster, "it is gone", |state| state["workers"].as_array().unwrap().len() == 2).await;
    cluster.start_process(&process).unwrap();
    let state =
        until(&cluster, "it is back", |state| state["workers"].as_array().unwrap().len() == 3)
            .await;
    assert_eq!(worker(&state, &drained)["state"], "ready");
    let kinds: Vec<&str> = state["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|decision| decision["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["attached", "attached", "attached", "drain", "left", "attached"]);

    for name in ["decode-0", "decode-1"] {
        cluster.admin_post(&format!("/admin/workers/{name}/drain"), &json!({})).await;
    }
    let answer = cluster.complete("And now?", 3).await;
    assert_eq!(
        (answer.path(), answer.header("x-baton-reason")),
        ("aggregated", "no_decode_worker")
    );
    cluster.admin_post("/admin/workers/decode-0/undrain", &json!({})).await;
    let answer = cluster.complete("And now?", 3).await;
    assert_eq!(answer.header("x-baton-decode-worker"), "decode-0");
}

#[tokio::test]
async fn modes_change_while_requests_run() {
    let cluster = ClusterBuilder::sim().engine("time_scale = 0.1").start().await.unwrap();
    let body = json!({"prompt": "On and on. ".repeat(20), "max_tokens": 300, "stream": true,
        "ignore_eos": true});
    let running = cluster.http.post(cluster.url("/v1/completions")).json(&body).send().await;
    for (mode, path) in [("aggregated", "aggregated"), ("disaggregated", "disaggregated")] {
        let answer = cluster.admin_post("/admin/mode", &json!({"mode": mode})).await;
        assert_eq!((answer.status, &answer.json()["mode"]), (200, &json!(mode)));
        let answer = cluster.complete("Which way?", 3).await;
        assert_eq!(answer.path(), path);
        assert_eq!(cluster.state().await["mode"], mode);
    }
    let answer = cluster.admin_post("/admin/mode", &json!({"mode": "adaptive"})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(cluster.complete("Which way?", 3).await.status, 200);
    let events = read_events(running.unwrap()).await.unwrap();
    assert!(events.last().unwrap().data.contains("[DONE]"));
    let state = cluster.state().await;
    let last = state["decisions"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(
        (&last["kind"], &last["by"], &last["reason"]),
        (&json!("mode"), &json!("operator"), &json!("it was disaggregated"))
    );
}
