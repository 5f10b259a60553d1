//! Each alert is brought about, seen to fire in a real Prometheus, and seen to end by what docs/operations.md
//! says is to be done. The rules are the deployed ones at sixty times their pace.
//!
//! `BATON_ALERT=BatonArenaFull` plays the scenes of one alert; `BATON_SEEN=DIRECTORY` keeps what operators see
//! while it fires, and `BATON_SCREENSHOTS=DIRECTORY` beside it what the live page shows.

mod answers;
mod handoffs;
mod pools;
mod room;
mod slo;
mod stage;

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Instant};

use baton_tests::{Prometheus, prometheus_or_skip};
use tokio::{sync::Semaphore, task::JoinSet};

use stage::{Scene, Watch};

/// Most of a scene is waiting.
const AT_ONCE: usize = 6;

/// What is brought about, the alerts that must fire for it and end with it, and how.
type Plot = (&'static str, &'static [&'static str], fn(Watch) -> Scene);

fn scenes() -> Vec<Plot> {
    vec![
        ("healthy", &[], |watch| Box::pin(answers::a_healthy_cluster_is_quiet(watch))),
        ("port-taken", &["BatonCoordinatorDown"], |watch| {
            Box::pin(pools::a_coordinator_does_not_start(watch))
        }),
        ("worker-dead", &["BatonPoolEmpty"], |watch| Box::pin(pools::a_pool_is_empty(watch))),
        ("drained", &["BatonNotSplit"], |watch| Box::pin(pools::a_pool_is_drained(watch))),
        ("revisions", &["BatonNotSplit"], |watch| {
            Box::pin(pools::pools_of_different_revisions(watch))
        }),
        ("crash-loop", &["BatonRequestsFail"], |watch| {
            Box::pin(pools::a_decode_worker_dies_again_and_again(watch))
        }),
        ("prompts", &["BatonTtftOverSlo", "BatonPoolPressed"], |watch| {
            Box::pin(slo::prefill_is_too_small(watch))
        }),
        ("too-many", &["BatonRequestsShed"], |watch| {
            Box::pin(slo::more_is_asked_than_can_be_served(watch))
        }),
        ("batches", &["BatonItlOverSlo"], |watch| Box::pin(slo::decode_is_too_small(watch))),
        ("bad-memory", &["BatonHandoffCorrupt"], |watch| {
            Box::pin(handoffs::memory_goes_bad(watch))
        }),
        ("udp-blocked", &["BatonHandoffsFail", "BatonLegsFail"], |watch| {
            Box::pin(handoffs::a_port_is_blocked(watch))
        }),
        ("small-cache", &["BatonKvCacheFull", "BatonEnginesQueue"], |watch| {
            Box::pin(room::the_cache_of_decode_is_too_small(watch))
        }),
        ("not-taken", &["BatonHandoffsExpire"], |watch| Box::pin(room::nobody_takes_over(watch))),
        ("small-arena", &["BatonArenaFull"], |watch| Box::pin(room::an_arena_is_full(watch))),
        ("news-lost", &["BatonPrefixNewsMissed"], |watch| {
            Box::pin(pools::a_worker_loses_its_news(watch))
        }),
        ("unread", &["BatonSlowClients"], |watch| Box::pin(answers::clients_do_not_read(watch))),
        ("certificate", &["BatonCertificateExpires"], |watch| {
            Box::pin(pools::a_certificate_is_about_to_expire(watch))
        }),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_alert_fires_for_what_it_means_and_ends_by_what_the_page_says() {
    let test = "each_alert_fires_for_what_it_means_and_ends_by_what_the_page_says";
    let Some(programs) = prometheus_or_skip(test) else { return };
    let deployed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/dashboards/alerts.yaml");
    let directory = tempfile::tempdir().unwrap();
    let rules = directory.path().join("alerts.yaml");
    let deployed = std::fs::read_to_string(deployed).unwrap();
    std::fs::write(&rules, stage::hurried_rules(&deployed)).unwrap();
    let prometheus = Arc::new(Prometheus::start_without_targets(&programs, &rules).await.unwrap());

    let alerts = prometheus.alert_rules().await.unwrap();
    let all: BTreeSet<&str> = alerts.iter().filter_map(|alert| alert["name"].as_str()).collect();
    let played: BTreeSet<&str> =
        scenes().iter().flat_map(|(_, alerts, _)| *alerts).copied().collect();
    assert_eq!(all, played, "each alert has its scene");

    let asked_for = std::env::var("BATON_ALERT").ok();
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut playing = JoinSet::new();
    for (job, alerts, scene) in scenes() {
        let is_asked_for = |name: &String| job == name || alerts.contains(&name.as_str());
        if asked_for.as_ref().is_some_and(|name| !is_asked_for(name)) {
            continue;
        }
        let (turns, watch) = (turns.clone(), Watch { prometheus: prometheus.clone(), job });
        playing.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            let began = Instant::now();
            let played = tokio::spawn(scene(watch)).await;
            println!("{job}: {:.0} s", began.elapsed().as_secs_f64());
            (job, played.is_ok())
        });
    }
    let played = playing.join_all().await;
    assert!(!played.is_empty(), "no scene is of {asked_for:?}");
    let failed: Vec<_> = played.iter().filter(|(_, well)| !well).map(|(job, _)| job).collect();
    assert!(failed.is_empty(), "{failed:?}: what went wrong stands above");
}
