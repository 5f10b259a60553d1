//! Pools that are replaced worker by worker, while requests come.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use baton_tests::{Cluster, ClusterBuilder, read_events, streamed_text};
use serde_json::{Value, json};

/// The cluster's file with another `name` in place of a worker's, as the next pod of its Deployment has,
/// and on a port of its own.
fn file_of_successor(cluster: &Cluster, worker: &str, successor: &str) -> String {
    let port = cluster.transfer_port(worker);
    cluster
        .config()
        .expect("the file that it was started with")
        .replace(&format!("127.0.0.1:{port}"), "127.0.0.1:0")
        .replace(&format!("\"{worker}\""), &format!("\"{successor}\""))
}

const CLIENTS: usize = 6;

/// Clients that ask until they are told to stop, and take nothing but whole answers.
struct Clients {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    asking: Vec<tokio::task::JoinHandle<()>>,
}

impl Clients {
    fn start(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered: Arc<AtomicUsize> = Arc::default();
        let asking = (0..CLIENTS).map(|client| {
            let (http, url) = (cluster.http.clone(), cluster.url("/v1/completions"));
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            tokio::spawn(async move {
                let mut round = 0;
                while !stop.load(Relaxed) {
                    ask(&http, &url, &format!("Client {client} asks, round {round}.")).await;
                    answered.fetch_add(1, Relaxed);
                    round += 1;
                }
            })
        });
        let asking = asking.collect();
        Self { stop, answered, asking }
    }

    /// Waits until each has had some more answers.
    async fn go_on(&self) {
        let enough = self.answered.load(Relaxed) + 3 * CLIENTS;
        while self.answered.load(Relaxed) < enough {
            assert!(self.asking.iter().all(|client| !client.is_finished()), "a client failed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stop(self) {
        self.stop.store(true, Relaxed);
        for client in self.asking {
            client.await.expect("every answer was whole");
        }
    }
}

const TOKENS: u32 = 24;

async fn ask(http: &reqwest::Client, url: &str, prompt: &str) {
    let body = json!({
        "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let response = http.post(url).json(&body).send().await.expect("an answer");
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap_or_default());
    let events = read_events(response).await.expect("a whole stream");
    assert_eq!(events.last().map(|event| event.data.as_str()), Some("[DONE]"), "{events:?}");
    let usage: Value = serde_json::from_str(&events[events.len() - 2].data).expect("JSON");
    assert_eq!(usage["usage"]["completion_tokens"], TOKENS, "{events:?}");
    assert!(!streamed_text(&events).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_every_worker_is_replaced() {
    // Steps take their time, so that each worker is told to stop amid answers.
    let mut cluster = ClusterBuilder::sim()
        .engine("time_scale = 1.0")
        .pools(2, 2)
        .drain_timeout_seconds(30)
        .start()
        .await
        .unwrap();
    let clients = Clients::start(&cluster);
    for (role, index) in [("prefill", 0), ("decode", 0), ("prefill", 1), ("decode", 1)] {
        let (worker, successor) = (format!("{role}-{index}"), format!("{role}-{index}-next"));
        clients.go_on().await;
        // maxSurge: 0
        cluster.terminate(&worker).unwrap();
        let toml = file_of_successor(&cluster, &worker, &successor);
        cluster.start_worker_of(&toml, &successor, role, &successor).unwrap();
        cluster.wait_for_workers(4, Duration::from_secs(30)).await.unwrap();
    }
    clients.go_on().await;
    clients.stop().await;
    let metrics = cluster.eventually_idle().await;
    for outcome in ["server_error", "broken_off", "client_error"] {
        let label = format!("outcome=\"{outcome}\"");
        assert_eq!(metrics.sum("baton_requests_total", &[&label]), 0.0, "{outcome}");
    }
    assert_eq!(metrics.sum("baton_leg_failures_total", &[]), 0.0, "and none was tried twice");
}

#[tokio::test]
async fn prefill_and_decode_of_different_revisions_never_pair() {
    let mut cluster = ClusterBuilder::sim().engine("revision = \"old\"").start().await.unwrap();
    let mut seen = BTreeSet::new();
    // The order of a rollout: another prefill, another decode, then the old ones go.
    for worker in ["prefill-0", "decode-0"] {
        let role = worker.trim_end_matches("-0");
        let toml = file_of_successor(&cluster, worker, &format!("{role}-new"))
            .replace("revision = \"old\"", "revision = \"new\"");
        let name = format!("{role}-new");
        cluster.start_worker_of(&toml, &name, role, &name).unwrap();
        let workers = if role == "prefill" { 3 } else { 4 };
        cluster.wait_for_workers(workers, Duration::from_secs(30)).await.unwrap();
        for round in 0..12 {
            let answer = cluster.complete(format!("{role}, round {round}"), 4).await;
            answer.generated();
            assert_eq!(answer.path(), "disaggregated", "{:?}", answer.headers);
            let pair = (
                answer.header("x-baton-prefill-worker").to_owned(),
                answer.header("x-baton-decode-worker").to_owned(),
            );
            assert_eq!(pair.0.ends_with("new"), pair.1.ends_with("new"), "{pair:?}");
            seen.insert(pair);
        }
    }
    assert_eq!(seen.len(), 2, "both revisions served: {seen:?}");
    // Halfway through the end: of the old revision decode is left, of the new one prefill.
    cluster.terminate("prefill-0").unwrap();
    cluster.terminate("decode-new").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    let answer = cluster.complete("Who is left?", 4).await;
    answer.generated();
    assert_eq!(answer.header("x-baton-reason"), "no_compatible_pair");
}
