//! The start of a prompt that one worker has cached is copied into another's cache, which computes the rest.

use baton_tests::{Answer, Cluster, ClusterBuilder};
use futures::future::join_all;
use serde_json::{Value, json};

const SHARED_TOKENS: u32 = 2048;
const OWN_TOKENS: u32 = 1024;
/// Of 16 tokens, of 1 KiB each; with the one that both engines compute.
const COPIED_BYTES: f64 = 129.0 * 16.0 * 1024.0;

/// Prompts that begin alike, and each go on otherwise.
fn prompt(number: u32) -> Vec<u32> {
    let shared = (0..SHARED_TOKENS).map(|i| 300 + i * 7 % 3000);
    let own = (0..OWN_TOKENS).map(|i| 300 + (number * 1013 + i * 11) % 3000);
    shared.chain(own).collect()
}

async fn ask(cluster: &Cluster, number: u32) -> Answer {
    let body = json!({
        "prompt": prompt(number), "max_tokens": 8, "temperature": 0, "ignore_eos": true,
    });
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&body);
    let request = request.header("x-request-id", format!("request-{number}"));
    Answer::of(request.send().await.unwrap()).await.unwrap()
}

fn text(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["choices"][0]["text"].clone()
}

/// A token takes 0.2 ms, so that some prompts keep a worker busy, and none waits long for a step of it to end.
fn engine(directory: &std::path::Path) -> String {
    let file = directory.join("profile.json");
    let profile = json!({
        "name": "test", "source": "made up",
        "prefill_ms": [2.0, 0.2, 0.0], "decode_ms": [2.0, 0.01, 0.0],
    });
    std::fs::write(&file, profile.to_string()).unwrap();
    format!("time_scale = 1.0\nmax_step_tokens = 256\nprofile = {file:?}")
}

/// One prompt is computed; then others come at once that begin like it, more than its worker is worth waiting for.
async fn a_burst_of_what_one_worker_holds(cluster: &Cluster, first_leg: &str) {
    const BURST: u32 = 12;
    let reference = ClusterBuilder::sim().placement("mode = \"never\"").start().await.unwrap();
    let right = join_all((0..=BURST).map(|number| ask(&reference, number))).await;

    let first = ask(cluster, 0).await;
    assert_eq!(text(&first), text(&right[0]));
    // A worker that decodes holds the prompt too, once it was handed over.
    let holders = [first_leg, "x-baton-decode-worker"].map(|header| first.header(header));
    let holders: Vec<_> = holders.into_iter().filter(|worker| !worker.is_empty()).collect();
    let blocks = f64::from((SHARED_TOKENS + OWN_TOKENS) / 16);
    cluster
        .eventually("it is known who holds it", |metrics| {
            let known = |worker| metrics.sum("baton_worker_prefix_blocks", &[worker]);
            holders.iter().all(|holder| known(holder) >= blocks)
        })
        .await;

    let answers = join_all((1..=BURST).map(|number| ask(cluster, number))).await;
    let mut copies = 0.0;
    let mut between = Vec::new();
    for (number, answer) in (1..).zip(&answers) {
        assert_eq!(text(answer), text(&right[number]), "{number}");
        let page = format!("/debug/placement?request=request-{number}");
        let explained = cluster.admin_get(&page).await.json();
        let pull = &explained["pull"];
        if pull.is_null() {
            continue;
        }
        copies += 1.0;
        let to = answer.header(first_leg);
        assert!(!holders.contains(&to));
        between.push((pull["from"].clone(), json!(to)));
        assert!(holders.contains(&pull["from"].as_str().unwrap()), "{pull}");
        assert_eq!(
            (&pull["outcome"], &pull["tokens"], &pull["planned_tokens"]),
            (&json!("copied"), &json!(SHARED_TOKENS), &json!(SHARED_TOKENS)),
            "{pull}"
        );
        // By what it would copy, or by what somebody before it was to have computed there.
        let chosen = &explained["attempts"][0]["prefill"]["considered"][0];
        let tokens = ["cached_tokens", "pulled_tokens"].map(|of| chosen[of].as_u64().unwrap());
        assert_eq!(tokens.iter().sum::<u64>(), u64::from(SHARED_TOKENS), "{chosen}");
    }
    assert!(copies > 0.0, "nobody copied anything");
    // Nobody who computes the first leg is handed anything else.
    let state = cluster.admin_get("/admin/state").await.json();
    let pairs = state["handoffs"]["busiest"].as_array().unwrap();
    for (from, to) in &between {
        let copies = between.iter().filter(|other| **other == (from.clone(), to.clone())).count();
        let is_it = |pair: &&Value| (&pair["from"], &pair["to"]) == (from, to);
        let pair = pairs.iter().find(is_it).unwrap();
        assert_eq!((&pair["handoffs"], &pair["failed"]), (&json!(copies), &json!(0)), "{pair}");
    }
    let metrics = cluster.eventually_idle().await;
    for (name, labels, expected) in [
        ("baton_prefix_pulls_total", &["result=\"copied\""][..], copies),
        ("baton_prefix_pulls_total", &[], copies),
        ("baton_prefix_pull_seconds_count", &[], copies),
        ("baton_prefix_pulled_tokens_total", &[], copies * f64::from(SHARED_TOKENS)),
        ("baton_prefix_pulled_bytes_total", &[], copies * COPIED_BYTES),
        ("baton_leg_failures_total", &[], 0.0),
    ] {
        assert_eq!(metrics.sum(name, labels), expected, "{name} {labels:?}");
    }
}

#[tokio::test]
async fn a_worker_that_does_both_copies_what_another_holds() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = ClusterBuilder::sim()
        .engine(&engine(directory.path()))
        .placement("mode = \"adaptive\"")
        .slo("itl_ms = 25")
        .start()
        .await
        .unwrap();
    a_burst_of_what_one_worker_holds(&cluster, "x-baton-worker").await;
}

#[tokio::test]
async fn a_prefill_worker_copies_what_another_holds_and_hands_all_of_it_over() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = ClusterBuilder::sim()
        .pools(2, 1)
        .engine(&engine(directory.path()))
        .placement("mode = \"always\"\npolicy = \"slack\"")
        .slo("itl_ms = 25")
        .start()
        .await
        .unwrap();
    a_burst_of_what_one_worker_holds(&cluster, "x-baton-prefill-worker").await;
}
