//! Pools that are too small for what is asked of them.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder};
use serde_json::json;

use super::stage::{Asked, Clients, Watch};

async fn moves(cluster: &Cluster, worker: &str, role: &str) {
    let path = format!("/admin/workers/{worker}/role");
    let answer = cluster.admin_post(&path, &json!({ "role": role })).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

pub(crate) async fn prefill_is_too_small(watch: Watch) {
    let cluster = ClusterBuilder::sim()
        .pools(1, 3)
        .engine("time_scale = 1.0")
        .slo("ttft_ms = 800")
        // Else those that cannot make it come last, and the others' TTFT is as it should be.
        .placement("mode = \"always\"\nlate = \"fifo\"")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 6, prompts());
    watch.fires("BatonTtftOverSlo").await;
    watch.fires("BatonPoolPressed").await;
    watch.seen(&cluster, "fires").await;
    let state = cluster.state().await;
    let phases = |name: &str| -> f64 {
        let ended = state["ended"].as_array().unwrap();
        ended.iter().filter_map(|request| request["phases"][name].as_f64()).sum()
    };
    let before_decode = phases("queue_ms") + phases("prefill_ms");
    assert!(before_decode > phases("handoff_ms") + phases("decode_ms"), "{state:#}");
    let reasons = watch.query("sum by (reason) (baton_balancer_decisions_total{JOB}) > 0").await;
    assert!(!reasons.is_empty());

    for worker in ["decode-1", "decode-2"] {
        moves(&cluster, worker, "prefill").await;
    }
    watch.clears(&["BatonTtftOverSlo", "BatonPoolPressed"]).await;
    clients.stop().await;
}

/// Each takes a quarter of a second.
fn prompts() -> Asked {
    Asked {
        prompt_tokens: 2000,
        max_tokens: 4,
        pause: Duration::from_millis(20),
        ..Asked::default()
    }
}

pub(crate) async fn more_is_asked_than_can_be_served(watch: Watch) {
    let cluster = ClusterBuilder::sim()
        .pools(1, 3)
        .engine("time_scale = 1.0")
        .slo("ttft_ms = 800")
        .admission("max_wait_seconds = 2")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    watch.over(&cluster);
    // Twice what one prefill worker can do in time, and three quarters of what three can.
    let clients = Clients::start(&cluster, 7, prompts());
    watch.fires("BatonRequestsShed").await;
    watch.seen(&cluster, "fires").await;
    let reasons = "sum(baton_requests_shed_total{JOB,reason=\"waited_too_long\"})";
    assert!(watch.query(reasons).await.iter().sum::<f64>() > 0.0);
    let state = cluster.state().await;
    let waits = |request: &serde_json::Value| request["phase"] == "queue";
    assert!(state["requests"].as_array().unwrap().iter().any(waits), "{state:#}");
    for worker in ["decode-1", "decode-2"] {
        moves(&cluster, worker, "prefill").await;
    }
    watch.clears(&["BatonRequestsShed"]).await;
    clients.stop().await;
}

pub(crate) async fn decode_is_too_small(watch: Watch) {
    // An engine whose steps grow quickly with their sequences.
    let directory = tempfile::tempdir().unwrap();
    let profile = directory.path().join("steep.json");
    let steep = json!({"name": "steep", "source": "made up for this scene",
        "prefill_ms": [5.0, 0.01, 0.0], "decode_ms": [10.0, 8.0, 0.0]});
    std::fs::write(&profile, steep.to_string()).unwrap();
    let cluster = ClusterBuilder::sim()
        .pools(3, 1)
        .engine(&format!("time_scale = 1.0\nprofile = {profile:?}"))
        .slo("ttft_ms = 5000\nitl_ms = 60")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    watch.over(&cluster);
    let asked = Asked {
        prompt_tokens: 40,
        max_tokens: 60,
        pause: Duration::from_millis(20),
        ..Asked::default()
    };
    let clients = Clients::start(&cluster, 9, asked);
    watch.fires("BatonItlOverSlo").await;
    watch.seen(&cluster, "fires").await;
    for worker in ["prefill-1", "prefill-2"] {
        moves(&cluster, worker, "decode").await;
    }
    watch.clears(&["BatonItlOverSlo"]).await;
    clients.stop().await;
}
