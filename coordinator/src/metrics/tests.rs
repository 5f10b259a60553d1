use std::{collections::BTreeMap, fmt::Write as _, fs, time::Duration};

use baton_config::SloConfig;
use baton_core::{AggregatedReason, Decision, PoolFigures, Reason, ShedReason, Verdict};
use baton_kubernetes::Scaled;
use baton_proto as wire;
use baton_types::{Fault, FaultKind, Leg, Origin, Role};

use super::{Metrics, Path, PullOutcome, Standing, catalogue::Row};
use crate::{
    admin::{BucketCount, Latency},
    shell::WorkerStatus,
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

#[test]
fn latency_counts_all_ways_together() {
    let metrics = Metrics::new(SloConfig::default());
    metrics.requests.first_token(Path::Disaggregated, Duration::from_millis(3));
    metrics.requests.first_token(Path::Aggregated, Duration::from_millis(60));
    metrics.requests.first_token(Path::Aggregated, Duration::from_secs(600));
    metrics.requests.gaps(Path::Disaggregated, Duration::from_millis(20), 2);
    let Latency { ttft, itl } = metrics.requests.latency();
    let at = |counts: &[BucketCount], le| {
        counts.iter().find(|count| count.le_seconds == le).unwrap().count
    };
    assert_eq!(at(&ttft, Some(0.0025)), 0);
    assert_eq!(at(&ttft, Some(0.005)), 1);
    assert_eq!(at(&ttft, Some(0.1)), 2);
    assert_eq!(at(&ttft, None), 3);
    assert_eq!((at(&itl, Some(0.005)), at(&itl, Some(0.01)), at(&itl, None)), (0, 2, 2));
}

/// Metrics with a sample of each, and their page.
fn observed() -> (Metrics, String) {
    let metrics = Metrics::new(SloConfig::default());
    metrics.requests.aggregated(AggregatedReason::OneToken);
    metrics.requests.leg_failed(Leg::Decode, &Fault::new(Origin::Engine, FaultKind::Failed, "x"));
    metrics.prefixes.prompt(Leg::Prefill, 100, 50);
    metrics.prefixes.pulled(PullOutcome::Copied, 1024, 4096, Duration::from_millis(5));
    metrics.placement.decided(Path::Aggregated, "one_token");
    metrics.placement.waited(0, Duration::from_millis(1));
    metrics.placement.shed(ShedReason::QueueFull, 0);
    metrics.requests.of_tenant("somebody", "ok");
    metrics.handoffs.ended(&wire::HandoffResult {
        transport: "shm".to_owned(),
        ..wire::HandoffResult::default()
    });
    metrics.balancer.decided(&[Decision {
        verdict: Verdict::Hold,
        reason: Reason::Balanced,
        prefill: PoolFigures::default(),
        decode: PoolFigures::default(),
    }]);
    metrics.balancer.flip(Role::Prefill, "operator");
    metrics.balancer.in_flight(0);
    metrics.balancer.scaled(Role::Prefill, &Ok(Scaled { before: 1, after: 2 }));
    metrics.certificate_expires("tls", 0);
    metrics.placement.decided(Path::Aggregated, "predicted");
    metrics.placement.waited(0, Duration::from_millis(1));
    metrics.placement.shed(ShedReason::QueueFull, 0);
    let worker = WorkerStatus {
        name: "prefill-0".to_owned(),
        role: Role::Prefill,
        jobs_running: 1,
        report: wire::Report {
            handoff_bytes_sent: 4096,
            handoff_errors: [("stalled".to_owned(), 3)].into(),
            transports: vec!["shm".to_owned()],
            ..wire::Report::default()
        },
        prefix_blocks: 1,
    };
    let text = metrics.render(&Standing {
        requests_open: 1,
        waiting: BTreeMap::from([(0, 1)]),
        long_prompts_part: 0.5,
        workers: vec![worker],
    });
    (metrics, text)
}

fn rows() -> Vec<Row> {
    let (metrics, text) = observed();
    let catalogue = metrics.catalogue.lock().unwrap();
    catalogue.rows(&text)
}

#[test]
fn the_page_on_metrics_is_current() {
    let mut page = INTRODUCTION.to_owned();
    for row in rows() {
        let labels: Vec<String> = row.labels.iter().map(|label| format!("`{label}`")).collect();
        let Row { name, kind, help, .. } = row;
        writeln!(page, "| `{name}` | {kind} | {} | {help} |", labels.join(", ")).unwrap();
    }
    page.push_str(LABELS);
    if std::env::var_os("BATON_UPDATE").is_some() {
        fs::write(PAGE, &page).unwrap();
    }
    assert!(
        fs::read_to_string(PAGE).unwrap_or_default() == page,
        "docs/metrics.md is not what coordinator/src/metrics says. Run:\n  BATON_UPDATE=1 cargo \
         test -p baton-coordinator the_page_on_metrics_is_current"
    );
}

/// <https://prometheus.io/docs/practices/naming/>
#[test]
fn names_and_units_keep_to_the_conventions() {
    let rows = rows();
    assert!(rows.len() > 30, "{}", rows.len());
    for Row { name, kind, labels, help } in &rows {
        let is_plain = |text: &str| {
            text.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
        };
        assert!(name.starts_with("baton_") && is_plain(name), "{name}");
        assert!(labels.iter().all(|label| is_plain(label)), "{name}: {labels:?}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        for unit in [
            "_ms",
            "_milliseconds",
            "_micros",
            "_mb",
            "_kb",
            "_percent",
            "_gauge",
            "_count",
            "_sum",
        ] {
            assert!(!name.ends_with(unit), "{name}: base units only, and no type in the name");
        }
        assert!(kind != "histogram" || name.ends_with("_seconds"), "{name} is a time");
        assert!(help.len() > 10 && !help.ends_with('.'), "{name}: {help}");
    }
    let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows.len(), "each name stands for one thing");
}

#[test]
fn what_workers_count_is_a_counter_and_what_alerts_ask_for_is_there_before() {
    let (metrics, text) = observed();
    for line in [
        "baton_worker_handoff_sent_bytes_total{worker=\"prefill-0\",role=\"prefill\"} 4096",
        "baton_worker_handoff_errors_total{worker=\"prefill-0\",role=\"prefill\",name=\"stalled\"} 3",
        "baton_worker_handoff_errors_total{worker=\"prefill-0\",role=\"prefill\",name=\"corrupt\"} 0",
        "baton_worker_handoffs_ended_total{worker=\"prefill-0\",role=\"prefill\",name=\"expired\"} 0",
        "baton_requests_total{path=\"none\",outcome=\"server_error\"} 0",
        "baton_requests_shed_total{reason=\"waited_too_long\",priority=\"0\"} 0",
        "baton_long_prompt_workers_ratio 0.5",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(
        !metrics.render(&Standing::default()).contains("prefill-0"),
        "who left leaves no line behind"
    );
}

const INTRODUCTION: &str = "\
# Metrics

Each coordinator tells them at `GET /metrics`, on the clients' port, and on the operators' with their token.
What it says of workers it takes from their reports, which come twice a second; two coordinators over the same
workers say the same of them. The dashboard and the alert rules in `deploy/dashboards/` are made of these.

This page is made by a test of `coordinator/src/metrics/`: change it there.

| Name | Type | Labels | Meaning |
|---|---|---|---|
";

const LABELS: &str = "
A histogram has `_bucket`, `_sum` and `_count`.

| Label | Values |
|---|---|
| `path` | `disaggregated`, `aggregated`; `none`: it ended before a worker answered |
| `outcome` | `ok`, `client_error` (4xx), `server_error` (5xx), `broken_off` (in the middle of its answer), `cancelled` (the client went away), `too_slow` (the client left too much unread); of orders to Kubernetes, `more`, `fewer`, `unchanged`, `failed` |
| `reason` | why a request was not split: [http.md](http.md#what-is-not-split); of placement, `predicted` (by predicted TTFT and ITL), `pools` (all are split) or `no_model` (step times are not known) too; of 429, `queue_full`, `waited_too_long` or `cannot_meet_slo`; of the balancer, why it decided so |
| `priority` | a request's class: smaller numbers come first, 0 is usual |
| `direction` | `late`: later, or longer, than predicted; `early` |
| `verdict`, `to` | what the balancer advised, and the role that a worker was told to take |
| `tenant` | whose key was given; empty without one |
| `leg` | `prefill`, `decode`, `aggregated` |
| `origin`, `kind` | who is to blame for a leg's failure, and in which way |
| `worker`, `role` | a worker's name, and `prefill` or `decode` |
| `result` | of the start of a prompt that was to be copied: `copied`; `held`: it was there by then; or why the engine computed it: `too_slow`, `unavailable`, `failed` (it was no longer cached, mostly), `refused`, `timed_out`, `corrupt`, `other` |
| `half` | of an arena: `export`, for blocks that the worker sends, or `import`, for those that it receives |
| `table` | of the configuration: `tls`, `coordinator.https` |
| `name` | how a handoff failed or ended: [transfer.md](transfer.md#what-is-checked-and-where) |
";

/// A pool is shown pressed where that is known, not where nothing is.
#[test]
fn what_is_not_known_of_a_pool_is_not_shown() {
    let metrics = Metrics::new(SloConfig::default());
    let known = |workers, pressure| PoolFigures {
        workers,
        pressure,
        demand: pressure,
        ..PoolFigures::default()
    };
    let decision = |prefill, decode| Decision {
        verdict: Verdict::Hold,
        reason: Reason::Balanced,
        prefill,
        decode,
    };
    let unknown = known(2, f64::INFINITY);
    let shown = || metrics.render(&Standing::default());
    metrics
        .balancer
        .decided(&[decision(known(2, 1.5), known(1, 0.25)), decision(known(1, 0.5), unknown)]);
    let text = shown();
    for line in [
        "baton_pool_pressure{role=\"prefill\"} 1.5",
        "baton_pool_pressure{role=\"decode\"} 0.25",
        "baton_pool_workers{role=\"prefill\"} 3",
        "baton_pool_workers{role=\"decode\"} 3",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    metrics.balancer.decided(&[decision(unknown, known(1, 0.25))]);
    let text = shown();
    assert!(!text.contains("baton_pool_pressure{role=\"prefill\"}"), "{text}");
    assert!(text.contains("baton_pool_workers{role=\"prefill\"} 2"), "{text}");
}
