//! Where requests go, by what is predicted of each way; and what can be asked of it afterwards.

use std::collections::BTreeMap;

use baton_tests::{Answer, Cluster, ClusterBuilder, read_events};
use serde_json::json;

const ADAPTIVE: &str = "mode = \"adaptive\"";

async fn ask(cluster: &Cluster, prompt_tokens: u32, max_tokens: u32, seed: u32) -> Answer {
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| (seed * 31 + i * 7) % 200).collect();
    cluster.complete(prompt, max_tokens).await
}

/// A profile whose steps cost what is given, and little else.
fn profile(directory: &std::path::Path, decode_fixed_ms: f64, time_scale: f64) -> String {
    let file = directory.join("profile.json");
    let text = json!({
        "name": "test", "source": "made up",
        "prefill_ms": [5.0, 0.02, 0.0], "decode_ms": [decode_fixed_ms, 0.01, 0.0],
    });
    std::fs::write(&file, text.to_string()).unwrap();
    format!("time_scale = {time_scale:?}\nprofile = {file:?}")
}

#[tokio::test]
async fn an_answer_stays_where_it_was_prefilled_or_joins_others_as_the_target_makes_cheaper() {
    let directory = tempfile::tempdir().unwrap();
    for (decode_fixed_ms, splits) in [(2.0, false), (30.0, true)] {
        let cluster = ClusterBuilder::sim()
            .pools(2, 1)
            .engine(&profile(directory.path(), decode_fixed_ms, 10.0))
            // Ten times as slow as they are told, so that a busy machine's own milliseconds do not count.
            .slo("itl_ms = 500")
            .placement(ADAPTIVE)
            .start()
            .await
            .unwrap();
        // Somebody decodes while the others come: with steps of 30 ms, of which 49 are left for
        // prefill beside decodes, it pays to decode together.
        let long =
            json!({"prompt": "On and on.", "max_tokens": 300, "stream": true, "ignore_eos": true});
        let long = cluster.http.post(cluster.url("/v1/completions")).json(&long);
        let long = long.send().await.unwrap();
        let decodes_at = long.headers()["x-baton-worker"].to_str().unwrap().to_owned();

        let mut paths = BTreeMap::new();
        for seed in 0..4 {
            let answer = ask(&cluster, 400, 4, seed).await;
            answer.generated();
            *paths.entry(answer.path().to_owned()).or_insert(0) += 1;
            match answer.path() {
                "disaggregated" => assert_eq!(answer.header("x-baton-decode-worker"), decodes_at),
                _ => assert_eq!(answer.header("x-baton-reason"), "stays_by_policy"),
            }
        }
        drop(long);
        assert_eq!(paths.contains_key("disaggregated"), splits, "{paths:?}");
        let metrics = cluster.eventually_idle().await;
        let decided = |path: &str| {
            let path = format!("path=\"{path}\"");
            let labels = [path.as_str(), "reason=\"predicted\""];
            metrics.sum("baton_placement_decisions_total", &labels)
        };
        let split = f64::from(paths.get("disaggregated").copied().unwrap_or(0));
        assert_eq!((decided("disaggregated"), decided("aggregated")), (split, 5.0 - split));
    }
}

#[tokio::test]
async fn of_each_request_can_be_asked_why_it_went_where_it_went() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = ClusterBuilder::sim()
        .pools(2, 1)
        .engine(&profile(directory.path(), 2.0, 1.0))
        .placement(ADAPTIVE)
        .start()
        .await
        .unwrap();
    let body = json!({
        "prompt": "Why here?", "max_tokens": 20, "stream": true, "ignore_eos": true, "priority": 2,
    });
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&body);
    let response = request.header("x-request-id", "the-one").send().await.unwrap();
    let worker = response.headers()["x-baton-worker"].to_str().unwrap().to_owned();
    read_events(response).await.unwrap();

    let explained = cluster.admin_get("/debug/placement?request=the-one").await.json();
    assert_eq!((&explained["request"], &explained["priority"]), (&json!("the-one"), &json!(2)));
    let attempt = &explained["attempts"][0];
    assert_eq!((&attempt["path"], &attempt["reason"]), (&json!("aggregated"), &json!("predicted")));
    let prefill = &attempt["prefill"];
    assert_eq!((&prefill["worker"], &prefill["candidates"]), (&json!(worker), &json!(3)));
    let considered = prefill["considered"].as_array().unwrap();
    assert_eq!((considered.len(), &considered[0]["worker"]), (3, &json!(worker)));
    // The profile's prefill takes 5 ms at least, its decode steps 2 ms.
    assert!(considered.iter().all(|one| one["prefill_ms"].as_f64().unwrap() >= 5.0), "{prefill}");
    assert!(attempt["predicted_ttft_ms"].as_f64().unwrap() >= 5.0, "{attempt}");
    assert!((2.0..3.0).contains(&attempt["predicted_itl_ms"].as_f64().unwrap()), "{attempt}");
    let observed = &explained["observed"];
    assert_eq!((&observed["outcome"], &observed["output_tokens"]), (&json!("ok"), &json!(20)));
    assert!(observed["ttft_ms"].as_f64().unwrap() >= 5.0, "{observed}");
    assert!(observed["itl_ms"].as_f64().unwrap() > 1.0, "{observed}");

    let metrics = cluster.metrics().await;
    for of in ["ttft", "itl"] {
        let name = format!("baton_prediction_error_{of}_seconds_count");
        assert_eq!(metrics.sum(&name, &[]), 1.0, "{of}");
    }
    for (path, status) in [("?request=another", 404), ("", 400)] {
        let answer = cluster.admin_get(&format!("/debug/placement{path}")).await;
        assert_eq!(answer.status, status, "{}", answer.text);
    }
    let stranger = cluster.http.get(cluster.admin_url("/debug/placement?request=the-one"));
    assert_eq!(stranger.send().await.unwrap().status(), 401);
}

#[tokio::test]
async fn without_step_times_adaptive_is_as_always() {
    let cluster = ClusterBuilder::sim().placement(ADAPTIVE).start().await.unwrap();
    for seed in 0..3 {
        assert_eq!(ask(&cluster, 100, 4, seed).await.path(), "disaggregated");
    }
    let metrics = cluster.metrics().await;
    let labels = ["path=\"disaggregated\"", "reason=\"no_model\""];
    assert_eq!(metrics.sum("baton_placement_decisions_total", &labels), 3.0, "{metrics:?}");
}

#[tokio::test]
async fn never_splits_and_a_policy_by_name() {
    let keys = "mode = \"never\"\npolicy = \"round-robin\"\nlate = \"fifo\"";
    let cluster = ClusterBuilder::sim().placement(keys).start().await.unwrap();
    let mut workers = BTreeMap::new();
    for seed in 0..4 {
        let answer = ask(&cluster, 100, 4, seed).await;
        assert_eq!(answer.header("x-baton-reason"), "turned_off");
        *workers.entry(answer.header("x-baton-worker").to_owned()).or_insert(0) += 1;
    }
    assert_eq!(workers, BTreeMap::from([("decode-0".into(), 2), ("prefill-0".into(), 2)]));
}

#[tokio::test]
async fn decode_workers_do_not_prefill_where_that_is_not_wanted() {
    let keys = "mode = \"always\"\non_no_prefill = \"reject\"";
    let mut cluster = ClusterBuilder::sim()
        .placement(keys)
        .admission("wait_for_worker_seconds = 0")
        .start()
        .await
        .unwrap();
    cluster.kill("prefill-0");
    cluster.eventually("it is gone", |m| m.sum("baton_workers", &["prefill"]) == 0.0).await;
    ask(&cluster, 100, 4, 1).await.assert_error(503, "no_prefill_worker");
}

#[tokio::test]
async fn a_burst_does_not_pile_onto_one_worker() {
    let cluster = ClusterBuilder::sim()
        .pools(2, 2)
        .engine("time_scale = 1.0")
        .placement(ADAPTIVE)
        .start()
        .await
        .unwrap();
    // Within less than the time between two reports.
    let asking = (0..16).map(|seed| ask(&cluster, 300, 40, seed));
    let answers = futures::future::join_all(asking).await;
    let mut prefilled = BTreeMap::new();
    for answer in &answers {
        answer.generated();
        let split = answer.header("x-baton-prefill-worker");
        let worker = if split.is_empty() { answer.header("x-baton-worker") } else { split };
        *prefilled.entry(worker.to_owned()).or_insert(0) += 1;
    }
    assert_eq!(prefilled.len(), 4, "{prefilled:?}");
    assert!(prefilled.values().all(|count| *count <= 6), "{prefilled:?}");
}
