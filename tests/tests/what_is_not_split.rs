//! Requests that stay on one worker, each counted with its reason.

use baton_tests::ClusterBuilder;
use serde_json::json;

#[tokio::test]
async fn each_says_why() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let cases = [
        (json!({"prompt": "Say it twice.", "max_tokens": 4, "n": 2}), "n", "decode-0"),
        (json!({"prompt": ["One.", "Two."], "max_tokens": 4}), "prompts", "decode-0"),
        (json!({"prompt": "Just the one.", "max_tokens": 1}), "one_token", "prefill-0"),
    ];
    for (body, reason, worker) in cases {
        let answer = cluster.post("/v1/completions", &body).await;
        answer.generated();
        assert_eq!(answer.path(), "aggregated");
        assert_eq!(
            (answer.header("x-baton-reason"), answer.header("x-baton-worker")),
            (reason, worker)
        );
        let label = format!("reason=\"{reason}\"");
        let counted = cluster.metrics().await.sum("baton_aggregated_requests_total", &[&label]);
        assert_eq!(counted, 1.0, "{reason}");
    }
    let two = json!({"prompt": "Say it twice.", "max_tokens": 4, "n": 2});
    let two = cluster.post("/v1/completions", &two).await.json();
    assert_eq!(two["choices"].as_array().unwrap().len(), 2);
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn other_endpoints_pass_whole() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let tokens = cluster.post("/tokenize", &json!({"prompt": "The baton passes."})).await.json();
    let back = cluster.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.json();
    assert_eq!(back["prompt"], "The baton passes.");

    let embedding = json!({"model": "baton-sim", "input": "The baton passes."});
    let embedding = cluster.post("/v1/embeddings", &embedding).await;
    assert_eq!((embedding.status, embedding.path()), (200, "aggregated"), "{}", embedding.text);

    let unknown = cluster.post("/v1/no/such/thing", &json!({})).await;
    assert_eq!(unknown.status, 404, "{}", unknown.text);
    let models = cluster.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "baton-sim");
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_pool_that_is_empty_is_done_without() {
    let mut cluster = ClusterBuilder::sim().not_ready().start().await.unwrap();
    cluster.wait_for_workers(2, std::time::Duration::from_secs(30)).await.unwrap();
    assert_eq!(cluster.get("/ready").await.status, 200);
    let split = cluster.complete("The baton passes from hand to hand.", 6).await;

    cluster.kill("decode-0");
    cluster.eventually("it is gone", |m| m.sum("baton_workers", &["decode"]) == 0.0).await;
    assert_eq!(cluster.get("/ready").await.status, 503);
    let alone = cluster.complete("The baton passes from hand to hand.", 6).await;
    assert_eq!(alone.header("x-baton-reason"), "no_decode_worker");
    assert_eq!(alone.generated(), split.generated());

    cluster.kill("prefill-0");
    cluster.eventually("both are gone", |m| m.sum("baton_workers", &[]) == 0.0).await;
    let nobody = cluster.complete("The baton passes from hand to hand.", 6).await;
    nobody.assert_error(503, "no_worker");
    assert_eq!(nobody.header("retry-after"), "1");
}
