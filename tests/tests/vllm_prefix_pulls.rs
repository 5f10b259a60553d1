//! The start of a prompt that one real vLLM has cached is copied into another's cache, which computes the rest.

// A scenario says what must hold by panicking.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

use baton_tests::{Answer, Cluster, ClusterBuilder, Metrics, vllm_or_skip};
use futures::future::join_all;
use serde_json::{Value, json};

const BLOCK_TOKENS: u32 = 32;
const SHARED_TOKENS: u32 = 1024;
const OWN_TOKENS: u32 = 512;
/// More than the worker that holds their start is worth waiting for.
const BURST: u32 = 12;

/// Prompts that begin alike, and each go on otherwise.
fn prompt(number: u32) -> Vec<u32> {
    let shared = (0..SHARED_TOKENS).map(|i| 300 + (i * i * 31 + i * 17) % 9000);
    let own = (0..OWN_TOKENS).map(|i| 300 + (number * 7919 + i * i * 13 + i * 29) % 9000);
    shared.chain(own).collect()
}

fn body(number: u32) -> Value {
    json!({
        "prompt": prompt(number), "max_tokens": 8, "temperature": 0, "ignore_eos": true,
        "logprobs": 1,
    })
}

async fn ask(cluster: &Cluster, number: u32) -> Answer {
    let request = cluster.http.post(cluster.url("/v1/completions")).json(&body(number));
    let request = request.header("x-request-id", format!("request-{number}"));
    Answer::of(request.send().await.unwrap()).await.unwrap()
}

fn prefilled_by(answer: &Answer) -> &str {
    match answer.header("x-baton-worker") {
        "" => answer.header("x-baton-prefill-worker"),
        worker => worker,
    }
}

/// Text, and log probabilities: a small model can stammer the right tokens from wrong KV.
fn choice(answer: &Value) -> (Value, Vec<f64>) {
    let choice = &answer["choices"][0];
    let logprobs = choice["logprobs"]["token_logprobs"].clone();
    (choice["text"].clone(), serde_json::from_value(logprobs).unwrap())
}

/// Prompt tokens that a worker's vLLM did not compute because they came from elsewhere.
async fn loaded(cluster: &Cluster, worker: &str) -> f64 {
    let url = format!("http://127.0.0.1:{}/metrics", cluster.engine_port(worker));
    let page = cluster.http.get(url).send().await.unwrap().text().await.unwrap();
    Metrics::parse(&page).sum("vllm:external_prefix_cache_hits_total", &[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_vllm_copies_what_another_holds() {
    let Some(installation) = vllm_or_skip("a_real_vllm_copies_what_another_holds") else { return };
    let cluster = ClusterBuilder::vllm(installation)
        // A step is short beside what the prefix takes, so that no copy waits long for one to end.
        .vllm_arguments(&["--max-num-batched-tokens", "128"])
        .placement("mode = \"adaptive\"")
        .slo("itl_ms = 200\nttft_ms = 60000")
        .start()
        .await
        .unwrap();
    // By these it is learnt how long steps take, of many tokens and of few.
    for length in [16, 48, 80, 112, 400, 24, 64, 96] {
        let prompt: Vec<u32> = (0..length).map(|i| 400 + (length * 31 + i * 7) % 9000).collect();
        cluster.complete(prompt, 8).await.generated();
    }
    let first = ask(&cluster, 0).await;
    first.generated();
    let holder = prefilled_by(&first).to_owned();
    let blocks = f64::from((SHARED_TOKENS + OWN_TOKENS) / BLOCK_TOKENS);
    cluster
        .eventually("it is known who holds it", |metrics| {
            metrics.sum("baton_worker_prefix_blocks", &[&holder]) >= blocks
        })
        .await;

    let answers = join_all((1..=BURST).map(|number| ask(&cluster, number))).await;
    let mut copies = 0.0;
    for (number, answer) in (1..).zip(&answers) {
        answer.generated();
        let page = format!("/debug/placement?request=request-{number}");
        let explained = cluster.admin_get(&page).await.json();
        let considered = &explained["attempts"][0]["prefill"]["considered"];
        let (worker, pull) = (prefilled_by(answer), &explained["pull"]);
        println!("request {number} on {worker}: {pull}, of {considered}");
        if explained["pull"]["outcome"] != "copied" {
            continue;
        }
        copies += 1.0;
        assert_eq!(explained["pull"]["from"], json!(holder));
        assert_eq!(explained["pull"]["tokens"], json!(SHARED_TOKENS));
        assert_ne!(prefilled_by(answer), holder);
        let answer = answer.json();
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(cached, &json!(SHARED_TOKENS), "{}", answer["usage"]);
        // Asking for the prompt's log probabilities makes vLLM compute all of it.
        let mut whole = body(number);
        whole["prompt_logprobs"] = 0.into();
        let whole = cluster.post("/v1/completions", &whole).await.json();
        let ((text, logprobs), (expected, right)) = (choice(&answer), choice(&whole));
        assert_eq!(text, expected);
        for (a, b) in logprobs.iter().zip(&right) {
            assert!((a - b).abs() < 1e-3, "{logprobs:?} {right:?}");
        }
    }
    assert!(copies > 0.0, "nobody copied anything");
    let other = if holder == "prefill-0" { "decode-0" } else { "prefill-0" };
    assert!(loaded(&cluster, other).await >= copies * f64::from(SHARED_TOKENS + 1));
    let metrics = cluster.eventually_idle().await;
    assert_eq!(metrics.sum("baton_prefix_pulls_total", &["result=\"copied\""]), copies);
    assert_eq!(metrics.sum("baton_leg_failures_total", &[]), 0.0);
}
