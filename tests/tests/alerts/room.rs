//! Nowhere to put it: KV caches and arenas that are full.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder};

use super::stage::{Asked, Clients, Watch};

/// A decode worker whose cache holds a sixteenth of what the prefill worker's holds.
async fn with_tight_decode(arena: &str, stall_timeout_s: u32) -> Cluster {
    let mut cluster = ClusterBuilder::sim()
        .engine("time_scale = 0.3\nmax_model_tokens = 4096\nkv_blocks = 4096")
        .transfer("", &format!("stall_timeout_seconds = {stall_timeout_s}"))
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    let tight = cluster.config().unwrap().replace("kv_blocks = 4096", "kv_blocks = 256");
    let small = cluster.config().unwrap().replace("48 MiB", arena);
    cluster.terminate("decode-0").unwrap();
    cluster.start_worker_of(&tight, "tight", "decode", "decode-0").unwrap();
    cluster.terminate("prefill-0").unwrap();
    cluster.start_worker_of(&small, "small", "prefill", "prefill-0").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    cluster
}

/// With the memory for its cache that it should have had.
async fn give_decode_room(cluster: &mut Cluster) {
    cluster.kill("tight");
    cluster.start_process("decode-0").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
}

pub(crate) async fn the_cache_of_decode_is_too_small(watch: Watch) {
    let mut cluster = with_tight_decode("48 MiB", 30).await;
    watch.over(&cluster);
    let asked = Asked { prompt_tokens: 100, max_tokens: 200, ..Asked::default() };
    let clients = Clients::start(&cluster, 40, asked);
    let alert = watch.fires("BatonKvCacheFull").await;
    assert_eq!(alert["labels"]["role"], "decode");
    watch.fires("BatonEnginesQueue").await;
    watch.seen(&cluster, "fires").await;
    give_decode_room(&mut cluster).await;
    watch.clears(&["BatonKvCacheFull", "BatonEnginesQueue"]).await;
    clients.stop().await;
}

/// One prompt at a time has room in decode, for seconds.
fn long() -> Asked {
    Asked { prompt_tokens: 2000, max_tokens: 1900, ..Asked::default() }
}

pub(crate) async fn nobody_takes_over(watch: Watch) {
    let mut cluster = with_tight_decode("48 MiB", 1).await;
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 8, Asked { patience: Duration::from_secs(4), ..long() });
    let alert = watch.fires("BatonHandoffsExpire").await;
    assert_eq!(alert["labels"]["worker"], "prefill-0");
    watch.seen(&cluster, "fires").await;
    let log = cluster.log("small");
    assert!(log.contains("nobody took a handoff over"), "{log}");
    give_decode_room(&mut cluster).await;
    watch.clears(&["BatonHandoffsExpire"]).await;
    clients.stop().await;
}

pub(crate) async fn an_arena_is_full(watch: Watch) {
    let mut cluster = with_tight_decode("2 MiB", 60).await;
    watch.over(&cluster);
    let clients = Clients::start(&cluster, 6, long());
    let alert = watch.fires("BatonArenaFull").await;
    let labels = &alert["labels"];
    assert_eq!([&labels["worker"], &labels["half"]], ["prefill-0", "export"]);
    watch.seen(&cluster, "fires").await;
    give_decode_room(&mut cluster).await;
    watch.clears(&["BatonArenaFull"]).await;
    clients.stop().await;
}
