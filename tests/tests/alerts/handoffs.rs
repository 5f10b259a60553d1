//! What passes between two workers.

use std::{
    fs::File,
    net::UdpSocket,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use baton_tests::{Cluster, ClusterBuilder};

use super::stage::{Asked, Clients, Watch, ask};

fn prompts() -> Asked {
    Asked { prompt_tokens: 400, pause: Duration::from_millis(50), ..Asked::default() }
}

/// The file that a worker shares with its engine.
fn arena_of(cluster: &Cluster, worker: &str) -> PathBuf {
    let files = std::fs::read_dir(cluster.directory()).unwrap().flatten();
    let named = |file: &std::fs::DirEntry| {
        let is_large = file.metadata().is_ok_and(|about| about.len() > 1 << 20);
        is_large && file.file_name().to_string_lossy().contains(worker)
    };
    let arenas: Vec<_> = files.filter(named).map(|file| file.path()).collect();
    assert_eq!(arenas.len(), 1, "{arenas:?}");
    arenas[0].clone()
}

pub(crate) async fn memory_goes_bad(watch: Watch) {
    let builder = ClusterBuilder::sim().pools(2, 1).engine("time_scale = 0.1");
    let cluster = builder.balancer("actuator = \"advise\"").start().await.unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 3, prompts());
    clients.answered(3).await;
    watch.is_quiet().await;

    // Bits of prefill-1's memory do not keep what was written there.
    let arena = File::options().write(true).open(arena_of(&cluster, "prefill-1")).unwrap();
    let bytes = arena.metadata().unwrap().len();
    let bad = Arc::new(AtomicBool::new(true));
    let decay = std::thread::spawn({
        let bad = bad.clone();
        move || {
            while bad.load(Ordering::Relaxed) {
                for place in (0..bytes).step_by(4096) {
                    arena.write_at(&[0x5A], place).unwrap();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    });
    let alert = watch.fires("BatonHandoffCorrupt").await;
    assert_eq!(alert["labels"]["worker"], "decode-0");
    watch.seen(&cluster, "fires").await;
    let log = cluster.log("decode-0");
    let failed = log.lines().find(|line| line.contains("a handoff failed"));
    assert!(failed.is_some_and(|line| line.contains("producer=\"prefill-1\"")), "{log}");
    let (_, said) = ask(&cluster, &["status"]).await;
    assert!(said.contains("prefill-1 → decode-0: ") && !said.contains("prefill-0 →"), "{said}");

    assert_eq!(ask(&cluster, &["drain", "prefill-1", "--wait"]).await.0, 0);
    watch.clears(&["BatonHandoffCorrupt"]).await;
    bad.store(false, Ordering::Relaxed);
    decay.join().unwrap();
    clients.stop().await;
}

pub(crate) async fn a_port_is_blocked(watch: Watch) {
    let mut cluster = ClusterBuilder::sim()
        .pools(2, 1)
        .engine("time_scale = 0.1")
        .transfer("", "transport = \"quic\"\nstall_timeout_seconds = 1")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 3, prompts());
    clients.answered(3).await;
    watch.is_quiet().await;

    // What is sent to prefill-1 arrives nowhere.
    let hole = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listen = format!("listen = \"127.0.0.1:{}\"", cluster.transfer_port("prefill-1"));
    let advertise = format!("{listen}\nadvertise = \"{}\"", hole.local_addr().unwrap());
    let blocked = cluster.config().unwrap().replace(&listen, &advertise);
    cluster.terminate("prefill-1").unwrap();
    cluster.start_worker_of(&blocked, "blocked", "prefill", "prefill-1").unwrap();
    watch.fires("BatonHandoffsFail").await;
    watch.fires("BatonLegsFail").await;
    watch.seen(&cluster, "fires").await;
    let unreachable = "baton_worker_handoff_errors_total{JOB, name=\"unreachable\"} > 0";
    assert!(!watch.query(unreachable).await.is_empty());
    let (_, said) = ask(&cluster, &["status"]).await;
    assert!(said.contains("prefill-1 → decode-0: ") && !said.contains("prefill-0 →"), "{said}");
    let told = cluster.admin_get("/debug/transfer").await.text;
    assert!(told.contains(&hole.local_addr().unwrap().to_string()), "{told}");

    assert_eq!(ask(&cluster, &["drain", "prefill-1", "--wait"]).await.0, 0);
    watch.clears(&["BatonHandoffsFail", "BatonLegsFail"]).await;
    clients.stop().await;
}
