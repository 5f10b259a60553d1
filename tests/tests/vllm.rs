//! A real vLLM with a real model on both sides. One cluster for all scenarios, since it takes a minute to
//! start; each scenario says its name as it begins.

use std::{process::Command, time::Duration};

use baton_tests::{
    Answer, Cluster, ClusterBuilder, Metrics, Process, baton, free_port, read_events,
    streamed_text, vllm_or_skip,
};
use futures::StreamExt;
use serde_json::{Value, json};

const BLOCK_SIZE_TOKENS: usize = 32;
/// Smaller than the longest prompt, so that it is prefilled in several chunks.
const CHUNK_TOKENS: usize = 512;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vllm_on_both_sides() {
    let Some(installation) = vllm_or_skip("vllm_on_both_sides") else { return };
    let chunk = CHUNK_TOKENS.to_string();
    let arguments = [
        "--max-num-batched-tokens",
        &chunk,
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ];
    let mut cluster = ClusterBuilder::vllm(&installation)
        .vllm_arguments(&arguments)
        // Of 30 layers.
        .engine("layer_groups = 3")
        // Less than any step takes: no more of a prompt is computed beside decodes than has to be.
        .slo("itl_ms = 1.0")
        // Which copies prefixes.
        .placement("mode = \"always\"\npolicy = \"slack\"")
        .start()
        .await
        .unwrap();

    say("split answers equal aggregated ones");
    split_equals_aggregated(&cluster).await;
    say("the second turn sends only what is new");
    second_turn(&cluster).await;
    say("prefill copies what decode has cached");
    copied_from_decode(&cluster).await;
    say("usage is what an aggregated vLLM counts");
    usage(&cluster).await;
    say("parameters that cannot be split run whole");
    not_split(&cluster).await;
    say("bad requests get vLLM's own answer");
    bad_requests(&cluster).await;
    say("steps keep the pace of the SLO, and the usage counts a stream's tokens");
    steps_keep_the_pace(&cluster).await;
    tokens_of_a_stream(&cluster).await;
    say("clients that go away");
    clients_that_go_away(&cluster).await;
    say("the openai client");
    openai_client(&cluster, &installation.environment);
    say("a router with its workers in it, before a vLLM that runs already");
    one_process_before_it(&cluster).await;
    say("a worker whose vLLM dies comes back");
    engine_dies(&mut cluster).await;
}

async fn one_process_before_it(cluster: &Cluster) {
    let (clients, workers) = (free_port(), free_port());
    let config = cluster.directory().join("router.toml");
    let toml = format!(
        "[coordinator]\nlisten = \"127.0.0.1:{clients}\"\n\
         workers_listen = \"127.0.0.1:{workers}\"\n[[worker]]\nname = \"decode-0\"\n\
         role = \"decode\"\n[worker.engine]\nkind = \"vllm\"\n\
         url = \"http://127.0.0.1:{}\"\n[worker.transfer]\nlisten = \"127.0.0.1:{}\"\n",
        cluster.engine_port("decode-0"),
        free_port(),
    );
    std::fs::write(&config, toml).unwrap();
    let mut command = Command::new(baton().unwrap());
    command.args(["coordinator", "--with-workers", "--config"]).arg(&config);
    let router = Process::spawn("router", command, cluster.directory()).unwrap();

    let body = request(&prompt(77, 90), 12);
    let url = format!("http://127.0.0.1:{clients}/v1/completions");
    let mut answer = None;
    for _ in 0..300 {
        // Until the listener is there, and its worker behind it.
        if let Ok(response) = cluster.http.post(&url).json(&body).send().await
            && response.status() == 200
        {
            answer = Some(Answer::of(response).await.unwrap());
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let answer = answer.unwrap_or_else(|| panic!("no answer:\n{}", router.log()));
    assert_eq!(answer.path(), "aggregated");
    let whole = aggregated(cluster, &prompt(77, 90), 12).await;
    assert_same(&answer.json(), &whole, "through one process");
}

fn say(scenario: &str) {
    println!("-- {scenario}");
}

fn prompt(seed: usize, length: usize) -> Vec<u32> {
    // Ordinary words of the vocabulary.
    (0..length)
        .map(|i| u32::try_from(300 + (seed * 7919 + i * i * 31 + i * 17) % 9000).unwrap())
        .collect()
}

fn request(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "logprobs": 1})
}

/// Asking for the prompt's log probabilities keeps a request on one worker, and keeps vLLM from reading
/// its prefix cache. What the reference leaves there is cleared, so that a handoff has to bring it all.
async fn aggregated(cluster: &Cluster, prompt: &[u32], max_tokens: u32) -> Value {
    let mut body = request(prompt, max_tokens);
    body["prompt_logprobs"] = 0.into();
    let answer = cluster.post("/v1/completions", &body).await;
    assert_eq!((answer.status, answer.path()), (200, "aggregated"), "{}", answer.text);
    forget(cluster, &["prefill-0", "decode-0"]).await;
    answer.json()
}

/// Clears prefix caches, until the coordinator was told so.
async fn forget(cluster: &Cluster, workers: &[&str]) {
    for worker in workers {
        let url = format!("http://127.0.0.1:{}/reset_prefix_cache", cluster.engine_port(worker));
        for patience in (0..100).rev() {
            // Nothing is cleared while blocks are still held.
            assert!(cluster.http.post(&url).send().await.unwrap().status().is_success());
            // vLLM tells with its next step.
            refresh_vllm_metrics(cluster, worker).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            if known_blocks(cluster, worker).await == 0.0 {
                break;
            }
            assert!(patience > 0, "{worker} forgets nothing");
        }
    }
}

async fn known_blocks(cluster: &Cluster, worker: &str) -> f64 {
    cluster.metrics().await.sum("baton_worker_prefix_blocks", &[worker])
}

/// The tokens are the same, and so are their probabilities: a small model can stammer the right tokens
/// from wrong KV.
fn assert_same(split: &Value, whole: &Value, what: &str) {
    let choice = |answer: &Value| answer["choices"][0].clone();
    assert_eq!(choice(split)["text"], choice(whole)["text"], "{what}");
    let of = |answer: &Value| {
        let logprobs = choice(answer)["logprobs"].clone();
        let values: Vec<f64> = serde_json::from_value(logprobs["token_logprobs"].clone()).unwrap();
        (logprobs["tokens"].clone(), values)
    };
    let ((split_tokens, split), (whole_tokens, whole)) = (of(split), of(whole));
    assert_eq!(split_tokens, whole_tokens, "{what}");
    for (a, b) in split.iter().zip(&whole) {
        assert!((a - b).abs() < 1e-3, "{what}: {split:?} {whole:?}");
    }
}

/// vLLM's own counters of one worker.
async fn vllm_metrics(cluster: &Cluster, worker: &str) -> Metrics {
    let port = cluster.engine_port(worker);
    let url = format!("http://127.0.0.1:{port}/metrics");
    Metrics::parse(&cluster.http.get(url).send().await.unwrap().text().await.unwrap())
}

/// vLLM brings its gauges up to date when a token comes out.
async fn refresh_vllm_metrics(cluster: &Cluster, worker: &str) {
    let url = format!("http://127.0.0.1:{}/v1/completions", cluster.engine_port(worker));
    let body = json!({"prompt": "x", "max_tokens": 1});
    let answer = cluster.http.post(url).json(&body).send().await.unwrap();
    assert!(answer.status().is_success());
    answer.bytes().await.unwrap();
}

async fn split_equals_aggregated(cluster: &Cluster) {
    for length in [7, 31, 32, 33, 64, 65, 100, 511, 513, 1500] {
        let tokens = prompt(length, length);
        let expected = aggregated(cluster, &tokens, 16).await;
        let before = (cluster.metrics().await, vllm_metrics(cluster, "decode-0").await);
        let answer = cluster.post("/v1/completions", &request(&tokens, 16)).await;
        assert_eq!(answer.path(), "disaggregated", "{:?}", answer.headers);
        assert_same(&answer.json(), &expected, &format!("prompt of {length} tokens"));

        // The KV crossed: decode's vLLM took the prompt from outside and computed one token of it.
        let after = (cluster.metrics().await, vllm_metrics(cluster, "decode-0").await);
        let coordinator = |name| after.0.sum(name, &[]) - before.0.sum(name, &[]);
        let vllm = |name| after.1.sum(name, &[]) - before.1.sum(name, &[]);
        let blocks = length.div_ceil(BLOCK_SIZE_TOKENS) as f64;
        assert_eq!(coordinator("baton_handoff_blocks_total"), blocks, "{length}");
        assert_eq!(vllm("vllm:external_prefix_cache_hits_total"), length as f64, "{length}");
        cluster
            .eventually("what was sent is what came", |metrics| {
                let sent = |what: &str, worker| {
                    metrics.sum(&format!("baton_worker_handoff_{what}_total"), &[worker])
                };
                sent("blocks_sent", "prefill-0") == sent("blocks_received", "decode-0")
                    && sent("sent_bytes", "prefill-0") == sent("received_bytes", "decode-0")
                    && sent("blocks_received", "decode-0")
                        == metrics.sum("baton_handoff_blocks_total", &[])
            })
            .await;
    }
    cluster.eventually_idle().await;
    // But for the first handoff, while which decode's vLLM mapped prefill's arena, it loaded them there.
    let metrics = cluster.metrics().await;
    let of_decode = |what: &str| {
        metrics.sum(&format!("baton_worker_handoff_blocks_{what}_total"), &["decode-0"])
    };
    let (mapped, received) = (of_decode("mapped"), of_decode("received"));
    assert!(mapped > received / 2.0, "{mapped} of {received} blocks");
}

async fn second_turn(cluster: &Cluster) {
    let first = prompt(4242, 320);
    let second: Vec<u32> = first.iter().copied().chain(prompt(777, 64)).collect();
    let expected = aggregated(cluster, &second, 8).await;
    cluster.post("/v1/completions", &request(&first, 4)).await.generated();
    let before = cluster.metrics().await;
    let answer = cluster.post("/v1/completions", &request(&second, 8)).await;
    assert_same(&answer.json(), &expected, "second turn");
    let after = cluster.metrics().await;
    let grown = |name| after.sum(name, &[]) - before.sum(name, &[]);
    assert_eq!(grown("baton_handoff_blocks_total"), 2.0, "two new blocks");
    assert_eq!(grown("baton_handoff_blocks_reused_total"), 10.0);
}

/// A copy that takes longer than computing would have is given up, which a busy machine brings about.
async fn copied_from_decode(cluster: &Cluster) {
    for number in 0..40 {
        if is_copied_from_decode(cluster, number).await {
            return;
        }
    }
    panic!("no copy was in time");
}

/// As when an answer is part of the next prompt: decode holds what prefill does not, or not any more.
async fn is_copied_from_decode(cluster: &Cluster, number: usize) -> bool {
    // The longer, the more a copy saves; what it takes hardly grows.
    const TOKENS: usize = 1500;
    const CACHED_BLOCKS: usize = TOKENS / BLOCK_SIZE_TOKENS;
    const CACHED_TOKENS: usize = CACHED_BLOCKS * BLOCK_SIZE_TOKENS;
    let tokens = prompt(1717 + number, TOKENS);
    let expected = aggregated(cluster, &tokens, 8).await;
    let split = cluster.post("/v1/completions", &request(&tokens, 8)).await;
    assert_same(&split.json(), &expected, "computed");
    cluster.eventually_idle().await;
    forget(cluster, &["prefill-0"]).await;
    cluster
        .eventually("it is known what decode holds", |metrics| {
            metrics.sum("baton_worker_prefix_blocks", &["decode-0"]) >= CACHED_BLOCKS as f64
        })
        .await;

    let before = (cluster.metrics().await, vllm_metrics(cluster, "prefill-0").await);
    let asking = cluster.http.post(cluster.url("/v1/completions")).json(&request(&tokens, 8));
    let asking = asking.header("x-request-id", format!("copied-{number}"));
    let answer = Answer::of(asking.send().await.unwrap()).await.unwrap();
    assert_eq!(answer.path(), "disaggregated", "{:?}", answer.headers);
    assert_same(&answer.json(), &expected, "copied");
    let placed =
        cluster.admin_get(&format!("/debug/placement?request=copied-{number}")).await.json();
    let pull = &placed["pull"];
    assert_eq!(pull["planned_tokens"], CACHED_TOKENS, "{placed}");
    if pull["outcome"] == "too_slow" {
        cluster.eventually_idle().await;
        return false;
    }
    assert_eq!(
        (&pull["from"], &pull["outcome"], &pull["tokens"]),
        (&json!("decode-0"), &json!("copied"), &json!(CACHED_TOKENS)),
        "{placed}"
    );
    let after = (cluster.metrics().await, vllm_metrics(cluster, "prefill-0").await);
    let grown = |name, labels: &[&str]| after.0.sum(name, labels) - before.0.sum(name, labels);
    assert_eq!(grown("baton_prefix_pulls_total", &["result=\"copied\""]), 1.0);
    assert_eq!(grown("baton_prefix_pulled_tokens_total", &[]), CACHED_TOKENS as f64);
    // Its vLLM found them in its own cache, when the prompt came.
    let found = |metrics: &Metrics| metrics.sum("vllm:prefix_cache_hits_total", &[]);
    assert_eq!(found(&after.1) - found(&before.1), CACHED_TOKENS as f64);
    assert_eq!(grown("baton_handoff_blocks_reused_total", &[]), CACHED_BLOCKS as f64);
    true
}

async fn usage(cluster: &Cluster) {
    let tokens = prompt(99, 200);
    let answer = cluster.post("/v1/completions", &request(&tokens, 5)).await;
    let usage = answer.json()["usage"].clone();
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(200), &json!(5)));
    let cached =
        |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    assert_eq!(cached(&usage), 0, "what was handed over was not cached: {usage}");
    let mut body = request(&tokens, 5);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let events = cluster.stream("/v1/completions", &body).await.unwrap();
    let last: Value = serde_json::from_str(&events[events.len() - 2].data).unwrap();
    assert_eq!(last["usage"]["prompt_tokens"], 200);
    // Prefill has it in its prefix cache now, as an aggregated vLLM would.
    assert_eq!(cached(&last["usage"]), 192, "{last}");
    assert_eq!(streamed_text(&events), answer.generated());
}

async fn not_split(cluster: &Cluster) {
    let cases = [
        (json!({"max_tokens": 1}), "one_token"),
        (json!({"n": 2, "temperature": 1}), "n"),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"echo": true}), "echo"),
    ];
    for (extra, reason) in cases {
        let mut body = request(&prompt(5, 40), 4);
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let answer = cluster.post("/v1/completions", &body).await;
        assert_eq!(
            (answer.status, answer.header("x-baton-reason")),
            (200, reason),
            "{}",
            answer.text
        );
    }
    let tokens = cluster.post("/tokenize", &json!({"prompt": "The baton passes."})).await.json();
    assert!(tokens["count"].as_u64().unwrap() > 2, "{tokens}");
    let back = cluster.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(back["prompt"], "The baton passes.");
    let responses = json!({"model": "smollm2", "input": "Say hello.", "max_output_tokens": 8});
    let responses = cluster.post("/v1/responses", &responses).await;
    assert_eq!((responses.status, responses.path()), (200, "aggregated"), "{}", responses.text);
}

async fn bad_requests(cluster: &Cluster) {
    let long = cluster.post("/v1/completions", &request(&prompt(1, 2100), 4)).await;
    assert_eq!(long.status, 400, "{}", long.text);
    let message = long.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("2048"), "{message}");
    let hot = json!({"prompt": "x", "temperature": -1, "max_tokens": 4});
    let hot = cluster.post("/v1/completions", &hot).await;
    assert_eq!(hot.status, 400, "{}", hot.text);
    assert!(hot.json()["error"]["message"].is_string());
    cluster.eventually_idle().await;
}

/// A decode is given one token with each step: those that it gets while a prompt is computed beside it
/// tell how many steps the prompt took.
async fn steps_keep_the_pace(cluster: &Cluster) {
    const LEAST_CHUNK_TOKENS: usize = 32;
    const PROMPT_TOKENS: usize = 1500;
    let url = format!("http://127.0.0.1:{}/v1/completions", cluster.engine_port("prefill-0"));
    let mut body = request(&prompt(71, 20), 1900);
    body["stream"] = true.into();
    let decoding = cluster.http.post(&url).json(&body).send().await.unwrap();
    let mut tokens = decoding.bytes_stream();
    // By these the worker learns how long a step takes, if it did not know, and has time to say so.
    let mut seen = 0;
    while seen < 300 {
        let chunk = tokens.next().await.unwrap().unwrap();
        seen += chunk.windows(5).filter(|part| *part == b"data:").count();
    }
    let generated =
        async || vllm_metrics(cluster, "prefill-0").await.sum("vllm:generation_tokens_total", &[]);
    let before = generated().await;
    let body = request(&prompt(72, PROMPT_TOKENS), 1);
    let answer = cluster.http.post(&url).json(&body).send().await.unwrap();
    assert!(answer.status().is_success());
    answer.bytes().await.unwrap();
    let steps = generated().await - before;
    let least = PROMPT_TOKENS.div_ceil(LEAST_CHUNK_TOKENS) as f64;
    assert!(steps >= least, "{PROMPT_TOKENS} tokens of prompt in {steps} steps, not {least}");
    drop(tokens);
    cluster.eventually_idle().await;
}

async fn tokens_of_a_stream(cluster: &Cluster) {
    let counted = async || cluster.metrics().await.sum("baton_output_tokens_total", &[]);
    for asks in [true, false] {
        let mut body = request(&prompt(73, 40), 30);
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": asks});
        let before = counted().await;
        let events = cluster.stream("/v1/completions", &body).await.unwrap();
        assert_eq!(counted().await - before, 30.0, "{asks}");
        let usage = events.iter().any(|event| event.data.contains("completion_tokens"));
        assert_eq!(usage, asks, "{events:?}");
    }
}

async fn clients_that_go_away(cluster: &Cluster) {
    for (index, moment) in [0, 10, 50, 200, 600, 1500, 3000].into_iter().enumerate() {
        let mut body = request(&prompt(2000 + index, 1000), 400);
        body["stream"] = true.into();
        let sending = cluster.http.post(cluster.url("/v1/completions")).json(&body);
        let _ = tokio::time::timeout(Duration::from_millis(moment), async move {
            let mut chunks = sending.send().await.unwrap().bytes_stream();
            while chunks.next().await.is_some() {}
        })
        .await;
        cluster.eventually_idle().await;
        for worker in ["prefill-0", "decode-0"] {
            refresh_vllm_metrics(cluster, worker).await;
            let used = vllm_metrics(cluster, worker).await.sum("vllm:kv_cache_usage_perc", &[]);
            assert_eq!(used, 0.0, "blocks are left in {worker} after {moment} ms");
        }
    }
}

fn openai_client(cluster: &Cluster, environment: &std::path::Path) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/openai_client.py");
    let vllm = format!("http://127.0.0.1:{}/v1", cluster.engine_port("prefill-0"));
    let output = Command::new(environment.join("bin/python"))
        .args([script, &cluster.url("/v1"), &vllm, "smollm2"])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    print!("{}", text(&output.stdout));
}

async fn engine_dies(cluster: &mut Cluster) {
    let mut body = request(&prompt(31, 100), 500);
    body["stream"] = true.into();
    let response =
        cluster.http.post(cluster.url("/v1/completions")).json(&body).send().await.unwrap();
    let reading = tokio::spawn(read_events(response));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let port = cluster.engine_port("decode-0").to_string();
    let killed =
        Command::new("pkill").args(["-KILL", "-f", "--", &format!("--port {port}")]).status();
    assert!(killed.unwrap().success());
    let events = reading.await.unwrap().unwrap();
    let last: Value = serde_json::from_str(&events.last().unwrap().data).unwrap();
    assert!(last["error"]["message"].is_string(), "{last}");
    cluster
        .eventually("it is out of placement", |m| m.sum("baton_workers", &["decode"]) == 0.0)
        .await;
    let alone = cluster.post("/v1/completions", &request(&prompt(32, 40), 4)).await;
    assert_eq!(alone.header("x-baton-reason"), "no_decode_worker");
    cluster.wait_for_workers(2, Duration::from_secs(300)).await.unwrap();
    let again = cluster.post("/v1/completions", &request(&prompt(33, 40), 4)).await;
    assert_eq!((again.status, again.path()), (200, "disaggregated"), "{}", again.text);
}
