//! Workers that die, and come back.

use std::time::Duration;

use baton_tests::{ClusterBuilder, StreamEvent, read_events};
use serde_json::json;

fn long_stream() -> serde_json::Value {
    json!({"prompt": "Run and run.", "max_tokens": 4000, "stream": true, "ignore_eos": true})
}

#[tokio::test]
async fn a_stream_whose_decode_dies_ends_with_an_error() {
    let mut cluster = ClusterBuilder::sim().engine("time_scale = 1.0").start().await.unwrap();
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&long_stream());
    let response = request.send().await.unwrap();
    let reading = tokio::spawn(read_events(response));
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.kill("decode-0");
    let events: Vec<StreamEvent> = reading.await.unwrap().unwrap();
    assert!(events.len() > 1, "some tokens came");
    let last: serde_json::Value = serde_json::from_str(&events.last().unwrap().data).unwrap();
    assert_eq!(last["error"]["code"], "answer_broke_off");
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn a_request_that_had_no_token_yet_is_tried_elsewhere() {
    let mut cluster =
        ClusterBuilder::sim().pools(2, 2).engine("time_scale = 3.0").start().await.unwrap();
    let prompt: Vec<u32> = (0..8000).map(|i| i % 199).collect();
    for victim in ["prefill-0", "decode-1"] {
        // Two at once: one of them is on the victim, whoever that is.
        let (a, b, ()) = tokio::join!(
            cluster_complete(&cluster, &prompt),
            cluster_complete(&cluster, &prompt),
            tokio::time::sleep(Duration::from_millis(1)),
        );
        assert_eq!(a, b);
        let url = cluster.url("/v1/completions");
        let body = json!({"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "cache_salt": victim});
        let sending = (0..2).map(|_| {
            let request = cluster.http.post(&url).json(&body);
            tokio::spawn(async move { request.send().await.unwrap().status().as_u16() })
        });
        let sending: Vec<_> = sending.collect();
        tokio::time::sleep(Duration::from_millis(150)).await;
        cluster.kill(victim);
        for answer in sending {
            assert_eq!(answer.await.unwrap(), 200, "{victim} died");
        }
        cluster.eventually_idle().await;
        cluster.start_process(victim).unwrap();
        cluster.wait_for_workers(4, Duration::from_secs(30)).await.unwrap();
    }
    let metrics = cluster.metrics().await;
    // By the worker's stream that ended, or by its peer's handoff that broke off: whichever is seen first.
    assert!(metrics.sum("baton_leg_failures_total", &[]) >= 1.0, "{metrics:?}");
}

async fn cluster_complete(cluster: &baton_tests::Cluster, prompt: &[u32]) -> String {
    cluster.complete(prompt.to_vec(), 4).await.generated()
}

#[tokio::test]
async fn a_worker_that_dies_is_gone_at_once_and_rejoins_as_another() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let before = cluster.complete("One life.", 4).await.generated();
    for name in ["prefill-0", "decode-0"] {
        cluster.kill(name);
        let died = std::time::Instant::now();
        cluster.eventually("it is gone", |m| m.sum("baton_workers", &[]) == 1.0).await;
        assert!(died.elapsed() < Duration::from_secs(5), "by the stream's end, not by a timeout");
        cluster.start_process(name).unwrap();
        cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
        let after = cluster.complete("One life.", 4).await;
        assert_eq!((after.path(), after.generated()), ("disaggregated", before.clone()));
    }
    let attached: Vec<_> = cluster
        .log("coordinator")
        .lines()
        .filter(|line| line.contains("worker attached"))
        .map(|line| line.split("epoch=").nth(1).unwrap().split(' ').next().unwrap().to_owned())
        .collect();
    let distinct: std::collections::BTreeSet<_> = attached.iter().collect();
    assert_eq!((attached.len(), distinct.len()), (4, 4), "each life has its own epoch");
}

#[tokio::test]
async fn a_coordinator_that_comes_back_finds_its_workers() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    cluster.kill("coordinator");
    cluster.start_process("coordinator").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    assert_eq!(cluster.complete("Welcome back.", 4).await.path(), "disaggregated");
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_leaves_nothing() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let arenas = |cluster: &baton_tests::Cluster| {
        std::fs::read_dir(cluster.directory())
            .unwrap()
            .filter(|entry| {
                entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("baton-kv.")
            })
            .count()
    };
    assert_eq!(arenas(&cluster), 2);
    cluster.terminate("decode-0").unwrap();
    cluster.terminate("prefill-0").unwrap();
    assert_eq!(arenas(&cluster), 0);
    cluster.terminate("coordinator").unwrap();
}
