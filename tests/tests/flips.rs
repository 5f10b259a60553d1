//! Workers go over to the other pool under load, and no request notices.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use baton_tests::{
    Answer, Cluster, ClusterBuilder, Metrics, read_events, streamed_text, vllm_or_skip,
};
use serde_json::{Value, json};

fn request(prompt: &[u32], max_tokens: u32, stream: bool) -> Value {
    json!({
        "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": stream,
    })
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 300 + (seed * 7919 + i * i * 31 + i * 17) % 1700).collect()
}

/// What clients ask over and over, and the answers that are right.
#[derive(Clone)]
struct Questions {
    asked: Arc<Vec<(Vec<u32>, String)>>,
    max_tokens: u32,
}

impl Questions {
    /// The reference comes from one worker alone, which hands nothing over: `unsplittable` is a parameter
    /// that sees to that.
    async fn with_answers(
        cluster: &Cluster,
        lengths: &[u32],
        max_tokens: u32,
        (unsplittable, value): (&str, Value),
    ) -> Self {
        let mut asked = Vec::new();
        for (seed, length) in (1..).zip(lengths) {
            let prompt = prompt(seed, *length);
            let mut body = request(&prompt, max_tokens, false);
            body[unsplittable] = value.clone();
            let whole = cluster.post("/v1/completions", &body).await;
            assert_eq!((whole.status, whole.path()), (200, "aggregated"), "{}", whole.text);
            let split = cluster.post("/v1/completions", &request(&prompt, max_tokens, false)).await;
            assert_eq!((split.status, split.path()), (200, "disaggregated"), "{}", split.text);
            assert_eq!(split.generated(), whole.generated());
            asked.push((prompt, whole.generated()));
        }
        Self { asked: Arc::new(asked), max_tokens }
    }
}

/// Clients that ask without pause, streaming or not, until they are told to stop. Each answer has to be
/// right. Says who served them.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<Vec<(String, String)>>>,
}

impl Load {
    fn start(cluster: &Cluster, clients: usize, questions: &Questions) -> Self {
        let asked = questions.asked.clone();
        Self::asking(cluster, clients, questions.max_tokens, move |client, round| {
            let (prompt, expected) = &asked[(client + round) % asked.len()];
            (prompt.clone(), Some(expected.clone()))
        })
    }

    /// `ask` tells the prompt of a client's round, and the right answer where that is known.
    fn asking(
        cluster: &Cluster,
        clients: usize,
        max_tokens: u32,
        ask: impl Fn(usize, usize) -> (Vec<u32>, Option<String>) + Clone + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (http, url) = (cluster.http.clone(), cluster.url("/v1/completions"));
        let client = |number: usize| {
            let (http, url, stop) = (http.clone(), url.clone(), stop.clone());
            let ask = ask.clone();
            tokio::spawn(async move {
                let mut served = Vec::new();
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let (prompt, expected) = ask(number, round);
                    let streams = !(number + round).is_multiple_of(3);
                    let body = request(&prompt, max_tokens, streams);
                    let response = http.post(&url).json(&body).send().await.unwrap();
                    let (status, headers) = (response.status(), response.headers().clone());
                    let header = |name: &str| {
                        headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned()
                    };
                    let text = if streams && status.is_success() {
                        streamed_text(&read_events(response).await.unwrap())
                    } else {
                        let text = response.text().await.unwrap();
                        assert!(status.is_success(), "{status}: {text}");
                        let json: Value = serde_json::from_str(&text).unwrap();
                        json["choices"][0]["text"].as_str().unwrap().to_owned()
                    };
                    if let Some(expected) = expected {
                        assert_eq!(text, expected, "{headers:?}");
                    }
                    served
                        .push((header("x-baton-prefill-worker"), header("x-baton-decode-worker")));
                }
                served
            })
        };
        Self { clients: (0..clients).map(client).collect(), stop }
    }

    /// The pairs of prefill and decode worker of all requests; empty names where one worker did it all.
    async fn stop(self) -> Vec<(String, String)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut served = Vec::new();
        for client in self.clients {
            served.extend(client.await.expect("every answer is right"));
        }
        served
    }
}

async fn set_role(cluster: &Cluster, worker: &str, role: &str) -> Answer {
    cluster.admin_post(&format!("/admin/workers/{worker}/role"), &json!({"role": role})).await
}

/// Waits until so many workers serve in each role, and none is on its way.
async fn until_pools_are(cluster: &Cluster, prefill: f64, decode: f64) {
    until(cluster, |metrics| {
        let workers = |role: &str| metrics.sum("baton_workers", &[role]);
        (workers("role=\"prefill\""), workers("role=\"decode\"")) == (prefill, decode)
    })
    .await;
}

async fn until(cluster: &Cluster, is_so: impl Fn(&Metrics) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let metrics = cluster.metrics().await;
        if is_so(&metrics) {
            return;
        }
        assert!(Instant::now() < deadline, "it never came to that: {metrics:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn no_request_failed(metrics: &Metrics, requests: usize) {
    let ended = |labels: &[&str]| metrics.sum("baton_requests_total", labels);
    assert_eq!(ended(&["outcome=\"ok\""]), ended(&[]), "{metrics:#?}");
    assert!(ended(&[]) >= requests as f64);
    assert_eq!(metrics.sum("baton_leg_failures_total", &[]), 0.0, "{metrics:#?}");
    assert_eq!(metrics.sum("baton_worker_handoff_errors_total", &[]), 0.0, "{metrics:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_flip_under_load_and_no_request_fails() {
    let cluster = ClusterBuilder::sim()
        .pools(2, 2)
        .engine("time_scale = 0.1")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    let lengths = [20, 33, 150, 400, 1000, 1700];
    let questions = Questions::with_answers(&cluster, &lengths, 24, ("n", 2.into())).await;
    let load = Load::start(&cluster, 6, &questions);

    let unknown = set_role(&cluster, "decode-9", "prefill").await;
    assert_eq!(unknown.status, 404, "{}", unknown.text);
    let wrong = set_role(&cluster, "decode-0", "encode").await;
    assert_eq!(wrong.status, 400, "{}", wrong.text);
    let flips = [
        ("decode-0", "prefill", 3.0, 1.0),
        ("prefill-0", "decode", 2.0, 2.0),
        ("prefill-1", "decode", 1.0, 3.0),
        ("decode-0", "decode", 0.0, 4.0),
        ("decode-1", "prefill", 1.0, 3.0),
        ("prefill-0", "prefill", 2.0, 2.0),
    ];
    for (worker, role, prefill, decode) in flips {
        let ordered = set_role(&cluster, worker, role).await;
        assert_eq!(ordered.status, 200, "{}", ordered.text);
        until_pools_are(&cluster, prefill, decode).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let served = load.stop().await;
    let metrics = cluster.eventually_idle().await;
    no_request_failed(&metrics, served.len());
    assert_eq!(metrics.sum("baton_flips_total", &["reason=\"operator\""]), flips.len() as f64);
    // Whoever went over served in its new role.
    let pairs: BTreeSet<_> = served.into_iter().collect();
    let prefilled = |worker: &str| pairs.iter().any(|(prefill, _)| prefill == worker);
    let decoded = |worker: &str| pairs.iter().any(|(_, decode)| decode == worker);
    assert!(prefilled("decode-0") && prefilled("decode-1"), "{pairs:?}");
    assert!(decoded("prefill-0") && decoded("prefill-1"), "{pairs:?}");
    for worker in ["prefill-0", "prefill-1", "decode-0", "decode-1"] {
        assert_eq!(cluster.log(worker).matches("the engine serves").count(), 1, "no restart");
    }
}

/// Nobody tells the balancer: traffic of long prompts takes a worker to prefill, and when traffic of long answers
/// follows, decode is given one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_follow_the_load_by_themselves() {
    // A prompt of 2000 tokens takes 105 ms, twenty answers at once take steps of 105 ms.
    let profile = json!({
        "name": "steep", "source": "made up", "prefill_ms": [5.0, 0.05, 0.0], "decode_ms": [5.0, 5.0, 0.0],
        "prefill_interference_factor": 1.0,
    });
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("steep.json");
    std::fs::write(&file, profile.to_string()).unwrap();
    let cluster = ClusterBuilder::sim()
        .pools(2, 2)
        .engine(&format!("time_scale = 1.0\nprofile = {file:?}"))
        .slo("ttft_ms = 1000\nitl_ms = 100")
        .balancer("dwell_seconds = 3")
        .start()
        .await
        .unwrap();
    let flipped = |metrics: &Metrics, reason: &str| {
        metrics.sum("baton_flips_total", &[&format!("reason=\"{reason}\"")]) > 0.0
    };
    // No two prompts begin alike, so that no cache spares anybody the work.
    let fresh = |length| {
        move |client: usize, round: usize| {
            let seed = u32::try_from(64 * round + client).unwrap();
            (prompt(seed, length), None)
        }
    };
    let long_prompts = Load::asking(&cluster, 24, 2, fresh(2000));
    until(&cluster, |metrics| flipped(metrics, "prefill_pressed")).await;
    until_pools_are(&cluster, 3.0, 1.0).await;
    let mut served = long_prompts.stop().await.len();
    let long_answers = Load::asking(&cluster, 40, 40, fresh(16));
    until(&cluster, |metrics| flipped(metrics, "decode_pressed")).await;
    until(&cluster, |metrics| metrics.sum("baton_workers", &["role=\"decode\""]) >= 2.0).await;
    served += long_answers.stop().await.len();
    let metrics = cluster.eventually_idle().await;
    no_request_failed(&metrics, served);
    for worker in ["prefill-0", "prefill-1", "decode-0", "decode-1"] {
        assert_eq!(cluster.log(worker).matches("the engine serves").count(), 1, "no restart");
    }
}

/// The pair of real engines swaps its roles: no restart, no failed request, and the right tokens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_of_vllm_swaps_its_roles_under_load() {
    let Some(installation) = vllm_or_skip("a_pair_of_vllm_swaps_its_roles_under_load") else {
        return;
    };
    let cluster = ClusterBuilder::vllm(&installation)
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    let unsplittable = ("prompt_logprobs", 0.into());
    let questions = Questions::with_answers(&cluster, &[40, 100, 300], 12, unsplittable).await;
    let load = Load::start(&cluster, 3, &questions);
    for (worker, role, prefill, decode) in
        [("decode-0", "prefill", 2.0, 0.0), ("prefill-0", "decode", 1.0, 1.0)]
    {
        let ordered = set_role(&cluster, worker, role).await;
        assert_eq!(ordered.status, 200, "{}", ordered.text);
        until_pools_are(&cluster, prefill, decode).await;
    }
    // A while in the new order.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let served = load.stop().await;
    let metrics = cluster.eventually_idle().await;
    no_request_failed(&metrics, served.len());
    let swapped = ("decode-0".to_owned(), "prefill-0".to_owned());
    assert!(served.contains(&swapped), "{served:?}");
    assert!(
        metrics.sum("baton_worker_handoff_blocks_received_total", &["worker=\"prefill-0\""]) > 0.0
    );
    for worker in ["prefill-0", "decode-0"] {
        assert_eq!(cluster.log(worker).matches("the engine serves").count(), 1, "no restart");
    }
}
