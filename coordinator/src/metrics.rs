mod catalogue;
mod handoffs;
mod placement;
mod prefixes;
mod requests;
mod workers;

use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicU64},
};

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use baton_config::SloConfig;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge},
    registry::Unit,
};

pub(crate) use self::{
    catalogue::Catalogue,
    prefixes::PullOutcome,
    requests::{Outcome, Path},
};
use self::{
    handoffs::HandoffMetrics, placement::PlacementMetrics, prefixes::PrefixMetrics,
    requests::RequestMetrics, workers::WorkerMetrics,
};
use crate::{
    balancing::BalancerMetrics,
    shell::{Shell, WorkerStatus},
};

/// In Prometheus' text format.
pub(crate) fn page(shell: &Shell) -> Response {
    let text = shell.metrics.render(&Standing::of(shell));
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

/// What is not counted as it happens.
#[derive(Debug, Default)]
struct Standing {
    requests_open: usize,
    /// By priority.
    waiting: BTreeMap<i32, usize>,
    long_prompts_part: f64,
    workers: Vec<WorkerStatus>,
}

impl Standing {
    fn of(shell: &Shell) -> Self {
        Self {
            requests_open: shell.requests_open(),
            waiting: shell.waiting_by_priority(),
            long_prompts_part: shell.long_prompts_part(),
            workers: shell.workers(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TableLabels {
    table: &'static str,
}

/// The coordinator's metrics, by what they tell of.
#[derive(Debug)]
pub(crate) struct Metrics {
    catalogue: Mutex<Catalogue>,
    pub(crate) requests: RequestMetrics,
    pub(crate) handoffs: HandoffMetrics,
    pub(crate) prefixes: PrefixMetrics,
    pub(crate) placement: PlacementMetrics,
    pub(crate) balancer: BalancerMetrics,
    workers: WorkerMetrics,
    certificates: Family<TableLabels, Gauge>,
}

impl Metrics {
    pub(crate) fn new(slo: SloConfig) -> Self {
        let mut catalogue = Catalogue::new();
        let requests = RequestMetrics::register(&mut catalogue);
        let handoffs = HandoffMetrics::register(&mut catalogue);
        let prefixes = PrefixMetrics::register(&mut catalogue);
        let placement = PlacementMetrics::register(&mut catalogue);
        let balancer = BalancerMetrics::default();
        balancer.register(&mut catalogue);
        let workers = WorkerMetrics::default();
        workers.register(&mut catalogue);
        for (name, help, milliseconds) in [
            ("slo_ttft", "Target for TTFT, as configured", slo.ttft_ms),
            ("slo_itl", "Target for ITL, as configured", slo.itl_ms),
        ] {
            let gauge = Gauge::<f64, AtomicU64>::default();
            gauge.set(milliseconds / 1000.0);
            catalogue.register_with_unit(name, help, Unit::Seconds, gauge);
        }
        let certificates = Family::<TableLabels, Gauge>::default();
        catalogue.register_with_unit(
            "certificate_expiry_timestamp",
            "When a certificate of this coordinator expires, since 1970",
            Unit::Seconds,
            certificates.clone(),
        );
        let catalogue = Mutex::new(catalogue);
        Self { catalogue, requests, handoffs, prefixes, placement, balancer, workers, certificates }
    }

    /// Of this table of the configuration. Answers whether that was not known.
    pub(crate) fn certificate_expires(&self, table: &'static str, unix_s: i64) -> bool {
        self.certificates.get_or_create(&TableLabels { table }).set(unix_s) != unix_s
    }

    /// In Prometheus' text format, with how things stand now.
    fn render(&self, now: &Standing) -> String {
        self.workers.set(now.requests_open, &now.workers);
        self.placement.set(&now.waiting, now.long_prompts_part);
        let mut text = String::new();
        let catalogue = self.catalogue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing into a string does not fail.
        let _ = encode(&mut text, catalogue.registry());
        text
    }
}

#[cfg(test)]
#[path = "metrics/tests.rs"]
mod tests;
