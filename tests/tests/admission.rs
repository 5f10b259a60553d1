//! Who waits for a turn, whose turn it is, and who is turned away.

use std::time::Duration;

use baton_tests::{Answer, Cluster, ClusterBuilder};
use serde_json::json;

/// A prompt of so many tokens that no other one begins like.
fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (seed * 37 + i * 11 + (i * seed) % 13) % 200).collect()
}

/// Asks on behalf of somebody, and answers with what came when, counted in answers.
async fn ask(
    cluster: &Cluster,
    answered: &std::sync::atomic::AtomicUsize,
    seed: u32,
    headers: &[(&str, &str)],
) -> (usize, Answer) {
    let body = json!({"prompt": prompt(seed, 1000), "max_tokens": 2, "ignore_eos": true});
    let mut request = cluster.http.post(cluster.url("/v1/completions")).json(&body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.unwrap();
    let turn = answered.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    (turn, Answer::of(response).await.unwrap())
}

/// One worker of each role, that needs about 200 ms for a prompt of a thousand tokens: nothing else
/// than their number decides who waits.
fn slow() -> ClusterBuilder {
    ClusterBuilder::sim().engine("time_scale = 2.0")
}

fn last(answers: &[(usize, Answer)]) -> usize {
    answers.iter().map(|(turn, _)| *turn).max().unwrap()
}

#[tokio::test]
async fn a_small_tenant_is_served_beside_a_large_one() {
    let cluster = slow().admission("tenant_header = \"x-tenant\"").start().await.unwrap();
    let answered = std::sync::atomic::AtomicUsize::new(0);
    let large = (0..26).map(|seed| ask(&cluster, &answered, seed, &[("x-tenant", "large")]));
    let small = async {
        // The others wait already.
        let queued = |m: &baton_tests::Metrics| m.sum("baton_requests_waiting", &[]) >= 10.0;
        cluster.eventually("a queue", queued).await;
        let small = (100..104).map(|seed| ask(&cluster, &answered, seed, &[("x-tenant", "small")]));
        futures::future::join_all(small).await
    };
    let (large, small) = tokio::join!(futures::future::join_all(large), small);
    assert!(large.iter().chain(&small).all(|(_, answer)| answer.status == 200));
    let (large, small) = (last(&large), last(&small));
    assert!(
        small < large,
        "the small tenant's last answer was number {small}, the other's {large}"
    );
}

#[tokio::test]
async fn the_important_come_first_and_of_a_full_queue_the_unimportant_go() {
    let cluster = slow().admission("max_waiting_requests = 12").start().await.unwrap();
    let answered = std::sync::atomic::AtomicUsize::new(0);
    let low = (0..30).map(|seed| ask(&cluster, &answered, seed, &[("x-baton-priority", "5")]));
    let high = async {
        let queued = |m: &baton_tests::Metrics| {
            m.sum("baton_requests_shed_total", &["reason=\"queue_full\""]) >= 1.0
        };
        cluster.eventually("a full queue", queued).await;
        let high =
            (100..106).map(|seed| ask(&cluster, &answered, seed, &[("x-baton-priority", "-1")]));
        futures::future::join_all(high).await
    };
    let (low, high) = tokio::join!(futures::future::join_all(low), high);
    for (_, answer) in &high {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    let shed: Vec<&(usize, Answer)> =
        low.iter().filter(|(_, answer)| answer.status == 429).collect();
    assert!(shed.len() >= 6, "{} were shed", shed.len());
    for (_, answer) in &shed {
        answer.assert_error(429, "queue_full");
        let seconds: u64 = answer.header("retry-after").parse().unwrap();
        // A second's work is at the worker, and two thirds of that wait: by the model, not by a table.
        assert!((1..=10).contains(&seconds), "{seconds}");
    }
    let served: Vec<_> = low.iter().filter(|(_, answer)| answer.status == 200).cloned().collect();
    let (low, high) = (last(&served), last(&high));
    assert!(high < low, "the last important answer was number {high}, the last other one {low}");
    let metrics = cluster.metrics().await;
    let of_class = |class| metrics.sum("baton_requests_shed_total", &[class]);
    assert_eq!(of_class("priority=\"5\""), shed.len() as f64);
    assert_eq!(of_class("priority=\"-1\""), 0.0);
    assert!(metrics.sum("baton_wait_seconds_count", &["priority=\"-1\""]) == 6.0);
}

#[tokio::test]
async fn who_would_be_too_late_is_told_at_once_where_that_is_wanted() {
    let cluster = slow().admission("early_rejection_priority = 1").start().await.unwrap();
    // 25,000 tokens need more than the two seconds of the SLO on any worker.
    let body =
        |priority: i32| json!({"prompt": prompt(1, 25_000), "max_tokens": 2, "priority": priority});
    let refused = cluster.post("/v1/completions", &body(1)).await;
    refused.assert_error(429, "cannot_meet_slo");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert_eq!(cluster.post("/v1/completions", &body(0)).await.status, 200, "this class waits");
    let url = cluster.url("/v1/completions");
    let bad = cluster.http.post(url).header("x-baton-priority", "high").json(&body(0));
    Answer::of(bad.send().await.unwrap()).await.unwrap().assert_error(400, "bad_priority");
}

#[tokio::test]
async fn a_request_waits_for_the_first_worker() {
    let mut cluster =
        ClusterBuilder::sim().admission("wait_for_worker_seconds = 60").start().await.unwrap();
    for name in ["prefill-0", "decode-0"] {
        cluster.kill(name);
    }
    cluster.eventually("both are gone", |m| m.sum("baton_workers", &[]) == 0.0).await;
    let url = cluster.url("/v1/completions");
    let body = json!({"prompt": "Is anybody there?", "max_tokens": 4});
    let request = cluster.http.post(url).json(&body);
    let asking = tokio::spawn(async move { request.send().await.unwrap().status().as_u16() });
    cluster.eventually("it waits", |m| m.sum("baton_requests_waiting", &[]) == 1.0).await;
    cluster.start_process("decode-0").unwrap();
    let status = tokio::time::timeout(Duration::from_secs(30), asking).await.unwrap().unwrap();
    assert_eq!(status, 200);
}
