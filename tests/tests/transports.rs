//! By whatever way the blocks go: the answer is the same, and what carried them is told.

use std::env;

use baton_tests::{Cluster, ClusterBuilder, Metrics};

const PROMPTS: [&str; 3] = ["One word.", "The wind has blown since the morning.", "Who is there?"];

/// More tokens than an import arena of the test has slots for.
fn prompts() -> impl Iterator<Item = String> {
    PROMPTS.into_iter().map(str::to_owned).chain(["Once more. ".repeat(400)])
}

/// Every prompt is answered after a handoff, as an engine answers it that computes everything.
async fn same_answers(cluster: &Cluster) -> Metrics {
    let mut whole = ClusterBuilder::sim().pools(0, 1).not_ready().start().await.unwrap();
    whole.wait_for_workers(1, std::time::Duration::from_secs(30)).await.unwrap();
    for prompt in prompts() {
        let (split, expected) =
            tokio::join!(cluster.complete(prompt.clone(), 8), whole.complete(prompt, 8));
        assert_eq!(split.path(), "disaggregated", "{:?}", split.headers);
        assert_eq!(split.generated(), expected.generated());
    }
    cluster.eventually_idle().await
}

fn by(metrics: &Metrics, transport: &str) -> f64 {
    metrics.sum("baton_handoffs_total", &[&format!("transport=\"{transport}\"")])
}

/// What a worker says that it can use.
fn names(metrics: &Metrics, worker: &str, transport: &str) -> bool {
    let labels = [format!("worker=\"{worker}\""), format!("transport=\"{transport}")];
    metrics.sum("baton_transfer_info", &[&labels[0], &labels[1]]) > 0.0
}

fn all() -> f64 {
    f64::from(u32::try_from(prompts().count()).unwrap())
}

#[tokio::test]
async fn on_one_host_blocks_go_through_shared_memory() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let metrics = same_answers(&cluster).await;
    assert_eq!((by(&metrics, "shm"), by(&metrics, "quic")), (all(), 0.0));
    for worker in ["prefill-0", "decode-0"] {
        let metrics =
            cluster.eventually("it reports", |metrics| names(metrics, worker, "shm")).await;
        assert!(names(&metrics, worker, "quic"));
    }
}

#[tokio::test]
async fn a_named_transport_is_the_only_one() {
    for transport in ["shm", "quic"] {
        let keys = format!("transport = \"{transport}\"");
        let cluster = ClusterBuilder::sim().transfer("", &keys).start().await.unwrap();
        let metrics = same_answers(&cluster).await;
        assert_eq!(by(&metrics, transport), all());
        let metrics =
            cluster.eventually("it reports", |metrics| names(metrics, "decode-0", transport)).await;
        assert_eq!(metrics.sum("baton_transfer_info", &["worker=\"decode-0\""]), 1.0);
    }
}

#[tokio::test]
async fn blocks_go_by_quic_under_a_mac() {
    let keys = "transport = \"quic\"\ncheck = \"blake3\"";
    let cluster = ClusterBuilder::sim().transfer("", keys).start().await.unwrap();
    assert_eq!(by(&same_answers(&cluster).await, "quic"), all());
}

#[tokio::test]
async fn workers_that_differ_use_what_both_have() {
    for (role, other) in [("prefill", "decode"), ("decode", "prefill")] {
        let cluster = ClusterBuilder::sim()
            .transfer(role, "transport = \"quic\"")
            .transfer(other, "transport = \"auto\"")
            .start()
            .await
            .unwrap();
        assert_eq!(by(&same_answers(&cluster).await, "quic"), all());
    }
}

#[tokio::test]
async fn workers_with_nothing_in_common_leave_the_answer_to_one() {
    let cluster = ClusterBuilder::sim()
        .transfer("prefill", "transport = \"quic\"")
        .transfer("decode", "transport = \"shm\"")
        .start()
        .await
        .unwrap();
    let answer = cluster.complete(PROMPTS[1], 8).await;
    answer.generated();
    assert_eq!((answer.path(), answer.header("x-baton-reason")), ("aggregated", "handoff_failed"));
    cluster
        .eventually("the reason is told", |metrics| {
            metrics.sum("baton_worker_handoff_errors_total", &["name=\"unreachable\""]) > 0.0
        })
        .await;
    cluster.eventually_idle().await;
}

/// Over the real library. Where there is none that is said, and with BATON_REQUIRE_UCX it is a failure.
#[tokio::test]
async fn blocks_go_by_ucx_and_what_it_picked_is_told() {
    if env::var_os("BATON_UCX_LIBRARY").is_none() {
        let demanded = env::var_os("BATON_REQUIRE_UCX").is_some_and(|value| value != "0");
        assert!(!demanded, "BATON_REQUIRE_UCX is set, and BATON_UCX_LIBRARY is not");
        eprintln!("SKIPPED, not run: BATON_UCX_LIBRARY is not set");
        return;
    }
    let cluster = ClusterBuilder::sim().transfer("", "transport = \"ucx\"").start().await.unwrap();
    assert_eq!(by(&same_answers(&cluster).await, "ucx"), all());
    cluster.eventually("it was used", |metrics| names(metrics, "prefill-0", "ucx:")).await;
}
