//! A client may leave at any moment: both engines stop, and nothing of its request is left.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder};
use futures::StreamExt;
use serde_json::json;

/// Slow enough that every stage of a request lasts a while.
async fn slow_cluster() -> Cluster {
    ClusterBuilder::sim().engine("time_scale = 4.0").start().await.unwrap()
}

fn long_request() -> serde_json::Value {
    let prompt: Vec<u32> = (0..6000).map(|i| i % 199).collect();
    json!({"prompt": prompt, "max_tokens": 2000, "stream": true, "ignore_eos": true})
}

async fn leave_after(cluster: &Cluster, patience: Duration) {
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&long_request());
    // Whether it times out before the head or in the body, the connection is closed.
    let _ = tokio::time::timeout(patience, async move {
        let mut chunks = request.send().await.unwrap().bytes_stream();
        while chunks.next().await.is_some() {}
    })
    .await;
}

/// And what they held was given back, not taken back in the end.
async fn nothing_is_left(cluster: &Cluster) {
    let metrics = cluster.eventually_idle().await;
    let expired = metrics.sum("baton_worker_handoffs_ended_total", &["name=\"expired\""]);
    assert_eq!(expired, 0.0, "{metrics:#?}");
}

#[tokio::test]
async fn at_any_moment() {
    let cluster = slow_cluster().await;
    let moments = [0, 1, 5, 20, 60, 150, 400, 1000, 2500];
    for moment in moments {
        leave_after(&cluster, Duration::from_millis(moment)).await;
        nothing_is_left(&cluster).await;
    }
    let metrics = cluster.metrics().await;
    let cancelled = metrics.sum("baton_requests_total", &["outcome=\"cancelled\""]);
    assert!(
        cancelled >= moments.len() as f64 - 2.0,
        "the first may not even have arrived: {cancelled}"
    );
}

#[tokio::test]
async fn many_at_once() {
    let cluster = slow_cluster().await;
    let leaving = (0..40).map(|index| leave_after(&cluster, Duration::from_millis(index * 37)));
    futures::future::join_all(leaving).await;
    nothing_is_left(&cluster).await;
    let answer = cluster.complete("And the next one is served.", 4).await;
    assert_eq!(answer.path(), "disaggregated", "{}", answer.text);
}

#[tokio::test]
async fn one_that_does_not_read_is_cut_off_and_harms_nobody() {
    // Less could come before the connection has its turn, on a machine that is busy elsewhere.
    let cluster = ClusterBuilder::sim().limits("max_unread_bytes = 1048576").start().await.unwrap();
    let body = json!({
        "prompt": "Go on and on.", "max_tokens": 30000, "stream": true, "ignore_eos": true,
    });
    let unread =
        cluster.http.post(cluster.url("/v1/completions")).json(&body).send().await.unwrap();
    cluster
        .eventually("it was too slow", |metrics| {
            metrics.sum("baton_requests_total", &["outcome=\"too_slow\""]) == 1.0
        })
        .await;
    cluster.complete("Others are served meanwhile.", 4).await.generated();
    let (mut chunks, mut broke) = (unread.bytes_stream(), false);
    while let Some(chunk) = chunks.next().await {
        broke |= chunk.is_err();
    }
    assert!(broke, "a cut answer does not look like a whole one");
    cluster.eventually_idle().await;
}
