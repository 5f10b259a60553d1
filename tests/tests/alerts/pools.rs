//! Who is there: a coordinator, workers, pools that fit one another, certificates.

use std::{fs, net::TcpListener, process::Command, time::Duration};

use baton_proto as wire;
use baton_tests::{ClusterBuilder, TlsPem, baton};
use futures::StreamExt as _;
use serde_json::json;
use tonic::transport::Endpoint;

use super::stage::{Asked, Clients, Watch, ask};

pub(crate) async fn a_coordinator_does_not_start(watch: Watch) {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    watch.over(&cluster);
    cluster.kill("coordinator");
    // Somebody else has its port.
    let taken = loop {
        match TcpListener::bind(cluster.address()) {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    cluster.start_process("coordinator").unwrap();
    watch.fires("BatonCoordinatorDown").await;
    let address = cluster.address().to_owned();
    cluster.wait_for_log("coordinator", &address).await;
    watch.seen(&cluster, "fires").await;
    let last = cluster.log("coordinator");
    assert!(last.contains("in use") && last.contains(&address), "{last}");
    assert!(cluster.log("decode-0").contains("not attached"));

    drop(taken);
    cluster.kill("coordinator");
    cluster.start_process("coordinator").unwrap();
    watch.clears(&["BatonCoordinatorDown"]).await;
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    assert_eq!(cluster.complete("Back again.", 4).await.path(), "disaggregated");
}

pub(crate) async fn a_pool_is_empty(watch: Watch) {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 1, Asked::default());
    cluster.kill("decode-0");
    let alert = watch.fires("BatonPoolEmpty").await;
    assert_eq!(alert["labels"]["role"], "decode");
    let (code, said) = ask(&cluster, &["status", "--check"]).await;
    assert!(code == 2 && said.contains("1 prefill and 0 decode workers"), "{said}");
    assert!(said.contains("decode-0: lost "), "{said}");
    let answer = cluster.complete("Answered still.", 4).await;
    assert_eq!((answer.status, answer.path()), (200, "aggregated"));
    watch.seen(&cluster, "fires").await;

    // It comes back with a wrong address in its file: its log says what keeps it away.
    let right = cluster.config().unwrap();
    let port = cluster.workers_port();
    let wrong = right.replace(&format!("127.0.0.1:{port}"), "127.0.0.1:9");
    cluster.start_worker_of(&wrong, "astray", "decode", "decode-0").unwrap();
    cluster.wait_for_log("astray", "not attached").await;
    assert!(cluster.log("astray").contains("127.0.0.1:9"), "{}", cluster.log("astray"));
    cluster.terminate("astray").unwrap();
    cluster.start_process("decode-0").unwrap();
    watch.clears(&["BatonPoolEmpty", "BatonNotSplit"]).await;
    assert_eq!(ask(&cluster, &["status", "--check"]).await.0, 0);
    clients.stop().await;
}

pub(crate) async fn a_pool_is_drained(watch: Watch) {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 1, Asked::default());
    assert_eq!(ask(&cluster, &["drain", "prefill-0", "--wait"]).await.0, 0);
    watch.fires("BatonNotSplit").await;
    watch.seen(&cluster, "fires").await;
    let reason = "baton_aggregated_requests_total{JOB, reason=\"no_prefill_worker\"} > 0";
    assert_eq!(watch.query(reason).await.len(), 1);
    let (code, said) = ask(&cluster, &["status", "--check"]).await;
    assert!(code == 2 && said.contains("drained"), "{said}");

    assert_eq!(ask(&cluster, &["drain", "prefill-0", "--undrain"]).await.0, 0);
    watch.clears(&["BatonNotSplit"]).await;
    clients.stop().await;
}

pub(crate) async fn pools_of_different_revisions(watch: Watch) {
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 1, Asked::default());
    clients.answered(3).await;
    let other = cluster.config().unwrap().replace("[engine]\n", "[engine]\nrevision = \"next\"\n");
    cluster.terminate("decode-0").unwrap();
    cluster.start_worker_of(&other, "next", "decode", "decode-0").unwrap();
    watch.fires("BatonNotSplit").await;
    watch.seen(&cluster, "fires").await;
    let reason = "baton_aggregated_requests_total{JOB, reason=\"no_compatible_pair\"} > 0";
    assert_eq!(watch.query(reason).await.len(), 1);
    let log = cluster.log("coordinator");
    let said = log.lines().find(|line| line.contains("KV cannot pass between these workers"));
    assert!(said.is_some_and(|line| line.contains("revision") && line.contains("next")), "{log}");
    let (_, said) = ask(&cluster, &["status"]).await;
    assert!(said.contains("decode-0: mismatch ") && said.contains("prefill-0: revision"), "{said}");

    // The rollout goes on to its end.
    cluster.terminate("prefill-0").unwrap();
    cluster.start_worker_of(&other, "next-prefill", "prefill", "prefill-0").unwrap();
    watch.clears(&["BatonNotSplit", "BatonPoolEmpty"]).await;
    let (_, said) = ask(&cluster, &["status"]).await;
    assert!(!said.contains("mismatch"), "{said}");
    clients.stop().await;
}

pub(crate) async fn a_decode_worker_dies_again_and_again(watch: Watch) {
    let builder = ClusterBuilder::sim().pools(1, 2).engine("time_scale = 0.5");
    let mut cluster = builder.start().await.unwrap();
    watch.over(&cluster);
    let long = Asked {
        prompt_tokens: 40,
        max_tokens: 300,
        pause: Duration::from_millis(100),
        ..Asked::default()
    };
    let clients = Clients::start(&cluster, 4, long);
    let fires = {
        let watch = watch.clone();
        tokio::spawn(async move { watch.fires("BatonRequestsFail").await })
    };
    while !fires.is_finished() {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        cluster.kill("decode-1");
        cluster.start_process("decode-1").unwrap();
    }
    fires.await.unwrap();
    watch.seen(&cluster, "fires").await;
    let broken_off = "baton_requests_total{JOB, outcome=\"broken_off\"} > 0";
    assert!(!watch.query(broken_off).await.is_empty());
    let away = "baton_leg_failures_total{JOB, origin=\"worker\"} > 0";
    assert!(!watch.query(away).await.is_empty());
    let log = cluster.log("coordinator");
    let failed = log.lines().filter(|line| line.contains("leg failed"));
    let of_it = failed.filter(|line| line.contains("worker=\"decode-1\"")).count();
    assert!(of_it > 0, "{log}");

    // Taken out until its host is mended.
    cluster.terminate("decode-1").unwrap();
    watch.clears(&["BatonRequestsFail", "BatonLegsFail"]).await;
    clients.stop().await;
}

pub(crate) async fn a_certificate_is_about_to_expire(watch: Watch) {
    let directory = tempfile::tempdir().unwrap();
    let certs = directory.path().join("certs");
    let make = |arguments: &[&str]| {
        let mut command = Command::new(baton().unwrap());
        let made = command.arg("certs").args(arguments).current_dir(&directory).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap()
    };
    let read = |file: &str| fs::read_to_string(certs.join("127.0.0.1").join(file)).unwrap();
    make(&["init"]);
    make(&["issue", "127.0.0.1", "--days", "10"]);
    let tls =
        TlsPem { ca: read("ca.pem"), certificate: read("host.pem"), private_key: read("host.key") };
    let cluster = ClusterBuilder::sim().tls(tls).start().await.unwrap();
    watch.over(&cluster);
    let alert = watch.fires("BatonCertificateExpires").await;
    assert_eq!(alert["labels"]["table"], json!("tls"));
    watch.seen(&cluster, "fires").await;
    cluster.wait_for_log("coordinator", "this certificate expires soon").await;
    let shown = make(&["show"]);
    assert!(shown.contains("127.0.0.1"), "{shown}");

    make(&["issue", "127.0.0.1", "--renew"]);
    for file in ["host.key", "host.pem"] {
        fs::write(cluster.directory().join("tls").join(file), read(file)).unwrap();
    }
    watch.clears(&["BatonCertificateExpires"]).await;
}

/// No worker of ours loses its news on the way: this one is of another making, and cannot count.
pub(crate) async fn a_worker_loses_its_news(watch: Watch) {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    watch.over(&cluster);
    let hello = wire::Hello {
        protocol_version: wire::PROTOCOL_VERSION,
        worker_name: "forgetful".to_owned(),
        epoch: vec![7; 16].into(),
        role: wire::Role::Decode.into(),
        handoff_mode: wire::HandoffMode::None.into(),
        models: vec!["another-model".to_owned()],
        kv_cache: Some(wire::KvCache { block_size_tokens: 16, ..wire::KvCache::default() }),
        ..wire::Hello::default()
    };
    let said = |frame| wire::WorkerFrame { frame: Some(frame) };
    let news = futures::stream::unfold(0, |number: u64| async move {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let restart = number.is_multiple_of(2);
        let news =
            wire::KvEvents { sequence: 1 + 2 * number, restart, ..wire::KvEvents::default() };
        Some((news, number + 1))
    });
    let (leave, leaves) = tokio::sync::oneshot::channel::<()>();
    let frames = futures::stream::once(async { wire::worker_frame::Frame::Hello(hello) })
        .chain(news.map(wire::worker_frame::Frame::KvEvents))
        .map(said)
        .take_until(leaves);
    let coordinator = format!("http://127.0.0.1:{}", cluster.workers_port());
    let channel = Endpoint::from_shared(coordinator).unwrap().connect().await.unwrap();
    let mut client = wire::fleet_client::FleetClient::new(channel);
    let mut stream = client.attach(frames).await.unwrap().into_inner();
    let attached = tokio::spawn(async move { while let Ok(Some(_)) = stream.message().await {} });
    cluster.wait_for_log("coordinator", "forgetful").await;
    cluster.wait_for_log("coordinator", "news of a worker's prefix cache were missed").await;
    watch.fires("BatonPrefixNewsMissed").await;
    watch.seen(&cluster, "fires").await;
    let log = cluster.log("coordinator");
    let line =
        log.lines().find(|line| line.contains("news of a worker's prefix cache were missed"));
    assert!(line.is_some_and(|line| line.contains("forgetful")), "{line:?}");

    leave.send(()).unwrap();
    attached.await.unwrap();
    watch.clears(&["BatonPrefixNewsMissed"]).await;
}
