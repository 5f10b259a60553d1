//! The coordinator knows which blocks each engine holds.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder, Metrics};

const WORKERS: [&str; 4] = ["prefill-0", "prefill-1", "decode-0", "decode-1"];

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| seed.wrapping_mul(31).wrapping_add(i.wrapping_mul(7)) % 200).collect()
}

fn known(metrics: &Metrics, worker: &str) -> f64 {
    metrics.sum("baton_worker_prefix_blocks", &[worker])
}

/// Waits until of each worker as many blocks are known as its engine says that it holds.
async fn eventually_agreed(cluster: &Cluster, workers: &[&str], at_least: f64) -> Metrics {
    cluster
        .eventually("the index has what the engines say", |metrics| {
            let held = |worker| metrics.sum("baton_worker_engine_kv_blocks_cached", &[worker]);
            let agreed = workers.iter().all(|worker| known(metrics, worker) == held(worker));
            agreed && workers.iter().map(|worker| known(metrics, worker)).sum::<f64>() >= at_least
        })
        .await
}

#[tokio::test]
async fn a_conversations_first_turn_is_known_on_the_workers_that_hold_it() {
    let cluster = ClusterBuilder::sim().pools(2, 2).start().await.unwrap();
    let first = prompt(3, 320);
    let answer = cluster.complete(first.clone(), 4).await;
    answer.generated();
    let served = ["prefill", "decode"]
        .map(|role| answer.headers[format!("x-baton-{role}-worker")].to_str().unwrap().to_owned());
    let metrics = eventually_agreed(&cluster, &WORKERS, 40.0).await;
    for worker in WORKERS {
        let expected = if served.iter().any(|name| name == worker) { 20.0 } else { 0.0 };
        assert_eq!(known(&metrics, worker), expected, "{worker}");
    }
    assert_eq!(metrics.sum("baton_prefix_hit_tokens_total", &[]), 0.0);

    // The second turn, until it meets one of them again.
    let second: Vec<u32> = first.iter().copied().chain(prompt(77, 64)).collect();
    cluster.complete(second.clone(), 4).await.generated();
    cluster.complete(second, 4).await.generated();
    let metrics = cluster.metrics().await;
    for leg in ["leg=\"prefill\"", "leg=\"decode\""] {
        assert_eq!(metrics.sum("baton_prompt_tokens_total", &[leg]), 320.0 + 2.0 * 384.0);
        let hits = metrics.sum("baton_prefix_hit_tokens_total", &[leg]);
        assert!(hits >= 320.0 && hits % 16.0 == 0.0, "{leg}: {hits}");
    }
}

#[tokio::test]
async fn evictions_and_restarts_are_followed() {
    // Room for few prompts: they evict one another.
    let keys = "kv_blocks = 64\nmax_model_tokens = 512";
    let mut cluster = ClusterBuilder::sim().engine(keys).start().await.unwrap();
    for seed in 0..20 {
        cluster.complete(prompt(seed, 400), 4).await.generated();
    }
    let workers = ["prefill-0", "decode-0"];
    let metrics = eventually_agreed(&cluster, &workers, 64.0).await;
    for worker in workers {
        assert!(known(&metrics, worker) <= 64.0, "{worker} has no room for more");
    }

    cluster.kill("decode-0");
    cluster.wait_for_workers(1, Duration::from_secs(30)).await.unwrap();
    cluster.start_process("decode-0").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    let metrics = cluster.metrics().await;
    assert_eq!(known(&metrics, "decode-0"), 0.0, "its engine began anew");
    assert!(known(&metrics, "prefill-0") > 0.0);

    // A coordinator that begins anew is told what is held.
    cluster.complete(prompt(50, 400), 4).await.generated();
    cluster.eventually("decode tells", |metrics| known(metrics, "decode-0") >= 25.0).await;
    let before = eventually_agreed(&cluster, &workers, 25.0).await;
    cluster.kill("coordinator");
    cluster.start_process("coordinator").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    let after = eventually_agreed(&cluster, &workers, 25.0).await;
    for worker in workers {
        assert_eq!(known(&after, worker), known(&before, worker), "{worker}");
    }
}
