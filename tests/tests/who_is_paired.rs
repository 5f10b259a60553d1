//! Workers that are not alike, and two that claim to be one.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder};
use serde_json::json;

/// The cluster's file, with a transfer port of the worker's own choice.
fn file_for_one_more(cluster: &Cluster, worker: &str) -> String {
    let port = cluster.transfer_port(worker);
    cluster
        .config()
        .expect("the file that it was started with")
        .replace(&format!("127.0.0.1:{port}"), "127.0.0.1:0")
}

async fn ask(cluster: &Cluster, model: &str) -> baton_tests::Answer {
    let body = json!({"model": model, "prompt": "Who runs this?", "max_tokens": 4});
    cluster.post("/v1/completions", &body).await
}

#[tokio::test]
async fn a_worker_of_another_model_serves_its_own() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let toml = file_for_one_more(&cluster, "decode-0")
        .replace("\"decode-0\"", "\"other-0\"")
        .replace("kind = \"sim\"\n", "kind = \"sim\"\nmodel = \"other\"\n");
    cluster.start_worker_of(&toml, "other-0", "decode", "other-0").unwrap();
    cluster.wait_for_workers(3, Duration::from_secs(30)).await.unwrap();

    for _ in 0..4 {
        let ours = ask(&cluster, "baton-sim").await;
        ours.generated();
        assert_eq!(ours.header("x-baton-decode-worker"), "decode-0");
        let theirs = ask(&cluster, "other").await;
        theirs.generated();
        assert_eq!(
            (theirs.header("x-baton-worker"), theirs.header("x-baton-reason")),
            ("other-0", "no_prefill_worker")
        );
    }
    ask(&cluster, "neither").await.assert_error(404, "model_not_found");
    let models = cluster.get("/v1/models").await.json();
    let names: Vec<_> =
        models["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(names, ["baton-sim", "other"]);

    // Whoever names no model may be served by either, and never by a pair of both.
    for _ in 0..8 {
        let any = cluster.complete("Whoever you are.", 4).await;
        any.generated();
        if any.path() == "disaggregated" {
            assert_eq!(any.header("x-baton-decode-worker"), "decode-0");
        }
    }
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn blocks_of_another_shape_are_not_paired() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let alike = file_for_one_more(&cluster, "decode-0");
    cluster.kill("decode-0");
    for (name, key, told) in [
        ("other-0", "block_size_tokens = 32", "block_size_tokens differs: 32 here, 16 at the peer"),
        ("other-1", "layer_groups = 4", "layer_groups differs: 4 here, 1 at the peer"),
    ] {
        cluster.eventually("it is gone", |m| m.sum("baton_workers", &[]) == 1.0).await;
        let toml = alike
            .replace("\"decode-0\"", &format!("{name:?}"))
            .replace("kind = \"sim\"\n", &format!("kind = \"sim\"\n{key}\n"));
        cluster.start_worker_of(&toml, name, "decode", name).unwrap();
        cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
        let answer = ask(&cluster, "baton-sim").await;
        answer.generated();
        assert_eq!(answer.header("x-baton-reason"), "no_compatible_pair");
        cluster.wait_for_log("coordinator", told).await;
        cluster.kill(name);
    }
}

#[tokio::test]
async fn engines_that_split_their_heads_over_other_numbers_of_ranks_are_paired() {
    let mut cluster = ClusterBuilder::sim().engine("tensor_parallel = 4").start().await.unwrap();
    let prompt = "Four ranks hand over to two. ".repeat(40);
    let expected = cluster.complete(prompt.clone(), 8).await;
    assert_eq!(expected.path(), "disaggregated", "rank to rank");
    assert_eq!(expected.header("x-baton-decode-worker"), "decode-0");
    let alike = file_for_one_more(&cluster, "decode-0");
    cluster.kill("decode-0");
    for (ranks, name) in [(2, "two-0"), (8, "eight-0"), (1, "one-0")] {
        cluster.eventually("it is gone", |m| m.sum("baton_workers", &[]) == 1.0).await;
        let toml = alike
            .replace("\"decode-0\"", &format!("{name:?}"))
            .replace("tensor_parallel = 4", &format!("tensor_parallel = {ranks}"));
        cluster.start_worker_of(&toml, name, "decode", name).unwrap();
        cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
        let answer = cluster.complete(prompt.clone(), 8).await;
        assert_eq!(answer.path(), "disaggregated", "{:?}", answer.headers);
        assert_eq!(answer.header("x-baton-decode-worker"), name);
        assert_eq!(answer.generated(), expected.generated(), "over {ranks} ranks");
        cluster.eventually_idle().await;
        cluster.kill(name);
    }
}

#[tokio::test]
async fn a_second_worker_of_one_name_takes_the_place_of_the_first() {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let expected = cluster.complete("One name.", 6).await.generated();
    let toml = file_for_one_more(&cluster, "decode-0");
    cluster.start_worker_of(&toml, "second", "decode", "decode-0").unwrap();
    cluster.wait_for_log("second", "attach: attached").await;
    // The first hears of it, and does not come back to do the same to the second.
    cluster.wait_for_log("decode-0", "another worker of the same name").await;
    for _ in 0..20 {
        let answer = cluster.complete("One name.", 6).await;
        assert_eq!((answer.status, answer.path()), (200, "disaggregated"), "{}", answer.text);
        assert_eq!(answer.generated(), expected);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(cluster.log("second").matches("attach: attached").count(), 1);
    assert_eq!(cluster.metrics().await.sum("baton_workers", &[]), 2.0);
    cluster.eventually_idle().await;

    // Once it was restarted, the name is its own again.
    cluster.terminate("second").unwrap();
    cluster.terminate("decode-0").unwrap();
    cluster.start_process("decode-0").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    assert_eq!(cluster.complete("One name.", 6).await.generated(), expected);
}
