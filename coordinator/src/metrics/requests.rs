use std::time::Duration;

use baton_core::AggregatedReason;
use baton_types::{Fault, Leg};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::Catalogue;
use crate::admin::{BucketCount, Latency};

/// The way that a request took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Disaggregated,
    Aggregated,
    /// It ended before any worker answered.
    None,
}

impl Path {
    const ALL: [Self; 3] = [Self::Disaggregated, Self::Aggregated, Self::None];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Disaggregated => "disaggregated",
            Self::Aggregated => "aggregated",
            Self::None => "none",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    /// Answered with 4xx.
    ClientError,
    /// Answered with 5xx.
    ServerError,
    /// The answer had begun and could not be finished.
    BrokenOff,
    /// The client went away.
    Cancelled,
    /// The client left too much unread.
    TooSlow,
}

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Ok,
        Self::ClientError,
        Self::ServerError,
        Self::BrokenOff,
        Self::Cancelled,
        Self::TooSlow,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::BrokenOff => "broken_off",
            Self::Cancelled => "cancelled",
            Self::TooSlow => "too_slow",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    path: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FaultLabels {
    leg: &'static str,
    origin: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabels {
    tenant: String,
    outcome: &'static str,
}

pub(super) const TTFT_BUCKETS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const ITL_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];
const E2E_BUCKETS: [f64; 14] =
    [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0];

/// What is observed at each token, looked up once.
#[derive(Clone, Debug)]
struct PathMetrics {
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    output_tokens: Counter,
}

/// How requests were answered.
#[derive(Debug)]
pub(crate) struct RequestMetrics {
    paths: [PathMetrics; 3],
    ended: Family<RequestLabels, Counter>,
    aggregated: Family<ReasonLabels, Counter>,
    leg_failures: Family<FaultLabels, Counter>,
    of_tenants: Family<TenantLabels, Counter>,
}

impl RequestMetrics {
    pub(super) fn register(catalogue: &mut Catalogue) -> Self {
        let by_path = |buckets: &'static [f64]| {
            Family::<PathLabels, Histogram, _>::new_with_constructor(move || {
                Histogram::new(buckets.iter().copied())
            })
        };
        let ttft = by_path(&TTFT_BUCKETS);
        catalogue.register_with_unit(
            "ttft",
            "From a request's arrival to its first token, queueing and handoff included",
            Unit::Seconds,
            ttft.clone(),
        );
        let itl = by_path(&ITL_BUCKETS);
        catalogue.register_with_unit(
            "itl",
            "Between tokens of one answer",
            Unit::Seconds,
            itl.clone(),
        );
        let e2e = by_path(&E2E_BUCKETS);
        catalogue.register_with_unit(
            "e2e",
            "From a request's arrival to the end of its answer",
            Unit::Seconds,
            e2e.clone(),
        );
        let output_tokens = Family::<PathLabels, Counter>::default();
        catalogue.register("output_tokens", "Tokens sent to clients", output_tokens.clone());
        let ended = Family::<RequestLabels, Counter>::default();
        catalogue.register(
            "requests",
            "Requests ended, by the way they took and how they ended",
            ended.clone(),
        );
        let aggregated = Family::<ReasonLabels, Counter>::default();
        catalogue.register(
            "aggregated_requests",
            "Requests that were not split, by reason",
            aggregated.clone(),
        );
        let leg_failures = Family::<FaultLabels, Counter>::default();
        catalogue.register(
            "leg_failures",
            "Legs that failed, by who is to blame",
            leg_failures.clone(),
        );
        let of_tenants = Family::<TenantLabels, Counter>::default();
        catalogue.register(
            "tenant_requests",
            "Requests that came to be let in, where API keys are asked for",
            of_tenants.clone(),
        );
        // What can be alerted on is there before it happens.
        for path in Path::ALL {
            for outcome in Outcome::ALL {
                let labels = RequestLabels { path: path.as_str(), outcome: outcome.as_str() };
                ended.get_or_create(&labels).inc_by(0);
            }
        }
        for reason in [
            AggregatedReason::NoPrefillWorker,
            AggregatedReason::NoDecodeWorker,
            AggregatedReason::NoCompatiblePair,
            AggregatedReason::HandoffFailed,
        ] {
            aggregated.get_or_create(&ReasonLabels { reason: reason.as_str() }).inc_by(0);
        }
        let paths = Path::ALL.map(|path| {
            let labels = PathLabels { path: path.as_str() };
            PathMetrics {
                ttft: ttft.get_or_create(&labels).clone(),
                itl: itl.get_or_create(&labels).clone(),
                e2e: e2e.get_or_create(&labels).clone(),
                output_tokens: output_tokens.get_or_create(&labels).clone(),
            }
        });
        Self { paths, ended, aggregated, leg_failures, of_tenants }
    }

    pub(crate) fn tokens(&self, path: Path, tokens: u32) {
        self.paths[path as usize].output_tokens.inc_by(tokens.into());
    }

    pub(crate) fn first_token(&self, path: Path, ttft: Duration) {
        self.paths[path as usize].ttft.observe(ttft.as_secs_f64());
    }

    /// Tokens that came together share the time since the ones before them.
    pub(crate) fn gaps(&self, path: Path, gap: Duration, tokens: u32) {
        let metrics = &self.paths[path as usize];
        let each = gap.as_secs_f64() / f64::from(tokens.max(1));
        for _ in 0..tokens {
            metrics.itl.observe(each);
        }
    }

    pub(crate) fn ended(&self, path: Path, outcome: Outcome, e2e: Duration) {
        let labels = RequestLabels { path: path.as_str(), outcome: outcome.as_str() };
        self.ended.get_or_create(&labels).inc();
        if outcome == Outcome::Ok {
            self.paths[path as usize].e2e.observe(e2e.as_secs_f64());
        }
    }

    /// `tenant` is empty where nobody's key was given.
    pub(crate) fn of_tenant(&self, tenant: &str, outcome: &'static str) {
        let labels = TenantLabels { tenant: tenant.to_owned(), outcome };
        self.of_tenants.get_or_create(&labels).inc();
    }

    pub(crate) fn aggregated(&self, reason: AggregatedReason) {
        self.aggregated.get_or_create(&ReasonLabels { reason: reason.as_str() }).inc();
    }

    pub(crate) fn leg_failed(&self, leg: Leg, fault: &Fault) {
        let labels = FaultLabels {
            leg: leg.as_str(),
            origin: fault.origin.as_str(),
            kind: fault.kind.as_str(),
        };
        self.leg_failures.get_or_create(&labels).inc();
    }

    pub(crate) fn output_tokens(&self) -> u64 {
        self.paths.iter().map(|path| path.output_tokens.get()).sum()
    }

    /// Over all ways that requests took.
    pub(crate) fn latency(&self) -> Latency {
        let over_all = |of: fn(&PathMetrics) -> &Histogram| cumulative(self.paths.iter().map(of));
        Latency { ttft: over_all(|path| &path.ttft), itl: over_all(|path| &path.itl) }
    }
}

/// A histogram tells its counts in no other way than by being encoded.
fn cumulative<'a>(histograms: impl Iterator<Item = &'a Histogram>) -> Vec<BucketCount> {
    let mut registry = Registry::default();
    for histogram in histograms {
        registry.register("x", "x", histogram.clone());
    }
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = encode(&mut text, &registry);
    let mut counts: Vec<BucketCount> = Vec::new();
    for line in text.lines() {
        let Some((le, count)) =
            line.strip_prefix("x_bucket{le=\"").and_then(|rest| rest.split_once("\"} "))
        else {
            continue;
        };
        let le_seconds = le.parse().ok().filter(|le: &f64| le.is_finite());
        let count: u64 = count.parse().unwrap_or_default();
        match counts.iter_mut().find(|known| known.le_seconds == le_seconds) {
            Some(known) => known.count += count,
            None => counts.push(BucketCount { le_seconds, count }),
        }
    }
    counts
}
