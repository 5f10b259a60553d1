//! Those who ask: as they should, and as they should not.

use std::time::Duration;

use baton_tests::ClusterBuilder;
use serde_json::json;

use super::stage::{Asked, Clients, Watch};

pub(crate) async fn a_healthy_cluster_is_quiet(watch: Watch) {
    let cluster = ClusterBuilder::sim()
        .pools(2, 2)
        .engine("time_scale = 0.3")
        .balancer("actuator = \"advise\"")
        .slo("ttft_ms = 1500\nitl_ms = 200")
        .start()
        .await
        .unwrap();
    watch.over(&cluster);
    let asked = Asked {
        prompt_tokens: 400,
        max_tokens: 20,
        pause: Duration::from_millis(50),
        ..Asked::default()
    };
    let clients = Clients::start(&cluster, 6, asked);
    for _ in 0..45 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        watch.is_quiet().await;
    }
    clients.answered(1).await;
    let ever = watch.query("count_over_time(ALERTS{JOB, alertstate=\"firing\"}[10m])").await;
    assert!(ever.is_empty(), "{ever:?}");
    clients.stop().await;
}

pub(crate) async fn clients_do_not_read(watch: Watch) {
    let cluster = ClusterBuilder::sim().limits("max_unread_bytes = 65536").start().await.unwrap();
    watch.over(&cluster);
    let body = json!({
        "prompt": "Go on and on.", "max_tokens": 30000, "stream": true, "ignore_eos": true,
    });
    let fires = {
        let watch = watch.clone();
        tokio::spawn(async move { watch.fires("BatonSlowClients").await })
    };
    let mut unread = Vec::new();
    while !fires.is_finished() {
        let asked = cluster.http.post(cluster.url("/v1/completions")).json(&body);
        // One that was given up before its head had left is no answer.
        unread.extend(asked.send().await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    fires.await.unwrap();
    watch.seen(&cluster, "fires").await;
    let log = cluster.log("coordinator");
    let said = log.lines().find(|line| line.contains("too_slow"));
    assert!(said.is_some_and(|line| line.contains("request_id")), "{log}");
    drop(unread);
    watch.clears(&["BatonSlowClients"]).await;
}
