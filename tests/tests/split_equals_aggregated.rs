//! A split answer is the aggregated answer, token for token, and its KV really crossed.

use baton_tests::{ClusterBuilder, read_events, streamed_text};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngSeed, TestRunner},
};
use serde_json::json;

const BLOCK_SIZE_TOKENS: usize = 16;
const KV_BYTES_PER_TOKEN: usize = 1024;

fn prompt(seed: u32, length: usize) -> Vec<u32> {
    // Token ids below 256 are bytes, which every vocabulary has.
    (0u32..)
        .take(length)
        .map(|i| seed.wrapping_mul(31).wrapping_add(i.wrapping_mul(7)) % 200)
        .collect()
}

#[tokio::test]
async fn several_hundred_prompts_with_shared_prefixes() {
    let split = ClusterBuilder::sim().pools(2, 2).start().await.unwrap();
    // A decode worker alone: everything is aggregated.
    let whole = ClusterBuilder::sim().pools(0, 1).not_ready().start().await.unwrap();
    let mut whole = whole;
    whole.wait_for_workers(1, std::time::Duration::from_secs(30)).await.unwrap();

    let mut lengths = vec![1, 2, 15, 16, 17, 31, 32, 33, 100, 2047, 2048, 2049, 5000];
    let random = (1..1500usize, 0..4u32);
    let mut runner = TestRunner::new(Config { rng_seed: RngSeed::Fixed(20), ..Config::default() });
    let mut prompts: Vec<_> = lengths.drain(..).map(|length| prompt(9, length)).collect();
    for _ in 0..300 {
        // Few seeds: prompts share prefixes with one another.
        let (length, seed) = random.new_tree(&mut runner).unwrap().current();
        prompts.push(prompt(seed, length));
    }
    let mut split_count = 0;
    for tokens in prompts {
        let length = tokens.len();
        let (a, b) = tokio::join!(split.complete(tokens.clone(), 8), whole.complete(tokens, 8));
        assert_eq!(b.path(), "aggregated");
        assert_eq!(a.path(), "disaggregated", "{:?}", a.headers);
        assert_eq!(a.generated(), b.generated(), "prompt of {length} tokens");
        assert_eq!(a.json()["usage"], b.json()["usage"], "prompt of {length} tokens");
        split_count += 1;
    }
    let metrics = split.eventually_idle().await;
    let ended = metrics.sum("baton_requests_total", &["disaggregated", "outcome=\"ok\""]);
    assert_eq!(ended, f64::from(split_count));
}

/// In steps that take their time, so that each layer group leaves before the step ends.
#[tokio::test]
async fn layer_group_by_layer_group() {
    let engine = "time_scale = 0.02\nmax_step_tokens = 256\nlayer_groups = 8";
    let split = ClusterBuilder::sim().pools(2, 1).engine(engine).start().await.unwrap();
    let mut whole = ClusterBuilder::sim().pools(0, 1).not_ready().start().await.unwrap();
    whole.wait_for_workers(1, std::time::Duration::from_secs(30)).await.unwrap();
    let random = (1..1500usize, 0..4u32);
    let mut runner = TestRunner::new(Config { rng_seed: RngSeed::Fixed(21), ..Config::default() });
    for _ in 0..60 {
        let (length, seed) = random.new_tree(&mut runner).unwrap().current();
        let tokens = prompt(seed, length);
        let (a, b) = tokio::join!(split.complete(tokens.clone(), 8), whole.complete(tokens, 8));
        assert_eq!((a.path(), b.path()), ("disaggregated", "aggregated"), "{:?}", a.headers);
        assert_eq!(a.generated(), b.generated(), "prompt of {length} tokens");
    }
    split.eventually_idle().await;
}

#[tokio::test]
async fn the_counters_agree_with_each_other_and_with_the_prompt() {
    counters_agree(1).await;
}

#[tokio::test]
async fn a_block_counts_once_however_many_layer_groups_it_has() {
    counters_agree(4).await;
}

async fn counters_agree(layer_groups: u32) {
    let engine = format!("layer_groups = {layer_groups}");
    let cluster = ClusterBuilder::sim().engine(&engine).start().await.unwrap();
    let block_bytes = (BLOCK_SIZE_TOKENS * KV_BYTES_PER_TOKEN) as f64;
    let mut blocks = 0.0;
    for (seed, length) in [(50, 15), (51, 16), (52, 17), (53, 200)] {
        cluster.complete(prompt(seed, length), 4).await.generated();
        blocks += length.div_ceil(BLOCK_SIZE_TOKENS) as f64;
        let metrics = cluster
            .eventually("all blocks are counted", |metrics| {
                metrics.sum("baton_worker_handoff_blocks_received_total", &["decode-0"]) == blocks
                    && metrics.sum("baton_worker_handoff_blocks_sent_total", &["prefill-0"])
                        == blocks
            })
            .await;
        let bytes = blocks * block_bytes;
        for (name, worker, expected) in [
            ("baton_worker_handoff_blocks_sent_total", "prefill-0", blocks),
            ("baton_worker_handoff_sent_bytes_total", "prefill-0", bytes),
            ("baton_worker_handoff_received_bytes_total", "decode-0", bytes),
            ("baton_worker_handoff_blocks_sent_total", "decode-0", 0.0),
        ] {
            assert_eq!(metrics.sum(name, &[worker]), expected, "{name} of {worker}");
        }
        assert_eq!(metrics.sum("baton_handoff_blocks_total", &[]), blocks);
        assert_eq!(metrics.sum("baton_handoff_bytes_total", &[]), bytes);
    }
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn the_second_turn_sends_only_what_is_new() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let first = prompt(3, 320);
    cluster.complete(first.clone(), 4).await.generated();
    let sent = |metrics: &baton_tests::Metrics| metrics.sum("baton_handoff_blocks_total", &[]);
    assert_eq!(sent(&cluster.metrics().await), 20.0);

    let second: Vec<u32> = first.iter().copied().chain(prompt(77, 64)).collect();
    cluster.complete(second, 4).await.generated();
    let metrics = cluster.metrics().await;
    assert_eq!(sent(&metrics), 24.0, "four new blocks");
    assert_eq!(metrics.sum("baton_handoff_blocks_reused_total", &[]), 20.0);
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let mut body = json!({
        "model": "baton-sim", "max_tokens": 40, "temperature": 0, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Tell me of the relay race."}],
    });
    let whole = cluster.post("/v1/chat/completions", &body).await;
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let request = cluster.http.post(cluster.url("/v1/chat/completions")).json(&body);
    let response = request.header("x-request-id", "mine-7").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-7");
    assert_eq!(response.headers()["x-baton-path"], "disaggregated");
    assert_eq!(response.headers()["x-baton-prefill-worker"], "prefill-0");
    assert_eq!(response.headers()["x-baton-decode-worker"], "decode-0");
    let events = read_events(response).await.unwrap();
    assert_eq!(events.last().unwrap().data, "[DONE]");
    assert_eq!(streamed_text(&events), whole.generated());
    let usage: serde_json::Value = serde_json::from_str(&events[events.len() - 2].data).unwrap();
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(usage["usage"][count], whole.json()["usage"][count], "{count}");
    }
    assert!(whole.generated().split_whitespace().count() > 10, "words: {}", whole.generated());
}
