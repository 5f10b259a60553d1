use std::time::Duration;

use baton_proto as wire;
use baton_types::{FaultKind, Leg};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Unit,
};

use super::Catalogue;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LegLabels {
    leg: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PullLabels {
    result: &'static str,
}

/// What became of a prompt's start that a worker was to copy from another's prefix cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PullOutcome {
    Copied,
    /// It was all there by then.
    Held,
    /// Computing would have been done by then.
    TooSlow,
    Failed(FaultKind),
    /// For a reason that is not known here.
    Other,
}

impl PullOutcome {
    pub(crate) fn of(result: &wire::PullResult) -> Self {
        let fault = || FaultKind::ALL.into_iter().find(|kind| kind.as_str() == result.failure);
        match result.failure.as_str() {
            "" if result.handoff.is_some() => Self::Copied,
            "" => Self::Held,
            "too_slow" => Self::TooSlow,
            _ => fault().map_or(Self::Other, Self::Failed),
        }
    }

    /// A name for metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Copied => "copied",
            Self::Held => "held",
            Self::TooSlow => "too_slow",
            Self::Failed(kind) => kind.as_str(),
            Self::Other => "other",
        }
    }
}

const PULL_BUCKETS: [f64; 12] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// What the index of the workers' prefix caches was worth.
#[derive(Debug)]
pub(crate) struct PrefixMetrics {
    prompt_tokens: Family<LegLabels, Counter>,
    hit_tokens: Family<LegLabels, Counter>,
    gaps: Counter,
    pulls: Family<PullLabels, Counter>,
    pulled_tokens: Counter,
    pulled_bytes: Counter,
    pull_seconds: Histogram,
}

impl PrefixMetrics {
    pub(super) fn register(catalogue: &mut Catalogue) -> Self {
        let prompt_tokens = Family::<LegLabels, Counter>::default();
        catalogue.register(
            "prompt_tokens",
            "Tokens of the prompts that legs were started with, where they are known here",
            prompt_tokens.clone(),
        );
        let hit_tokens = Family::<LegLabels, Counter>::default();
        catalogue.register(
            "prefix_hit_tokens",
            "Those of them that the leg's worker was predicted to have cached",
            hit_tokens.clone(),
        );
        let gaps = Counter::default();
        catalogue.register(
            "kv_events_gaps",
            "Times that news of a worker's prefix cache were missed and asked for anew",
            gaps.clone(),
        );
        let pulls = Family::<PullLabels, Counter>::default();
        catalogue.register(
            "prefix_pulls",
            "Starts of prompts that a worker was to copy from another's prefix cache, by what became of it",
            pulls.clone(),
        );
        let pulled_tokens = Counter::default();
        catalogue.register(
            "prefix_pulled_tokens",
            "Tokens whose KV was copied from another worker's prefix cache",
            pulled_tokens.clone(),
        );
        let pulled_bytes = Counter::default();
        catalogue.register_with_unit(
            "prefix_pulled",
            "KV that was copied from another worker's prefix cache",
            Unit::Bytes,
            pulled_bytes.clone(),
        );
        let pull_seconds = Histogram::new(PULL_BUCKETS);
        catalogue.register_with_unit(
            "prefix_pull",
            "How long a prompt waited for what was to be copied for it",
            Unit::Seconds,
            pull_seconds.clone(),
        );
        Self { prompt_tokens, hit_tokens, gaps, pulls, pulled_tokens, pulled_bytes, pull_seconds }
    }

    pub(crate) fn pulled(&self, outcome: PullOutcome, tokens: u32, bytes: u64, took: Duration) {
        self.pulls.get_or_create(&PullLabels { result: outcome.as_str() }).inc();
        self.pulled_tokens.inc_by(tokens.into());
        self.pulled_bytes.inc_by(bytes);
        self.pull_seconds.observe(took.as_secs_f64());
    }

    /// A leg was started whose worker was predicted to hold some of its prompt.
    pub(crate) fn prompt(&self, leg: Leg, prompt_tokens: u32, hit_tokens: u32) {
        let labels = LegLabels { leg: leg.as_str() };
        self.prompt_tokens.get_or_create(&labels).inc_by(prompt_tokens.into());
        self.hit_tokens.get_or_create(&labels).inc_by(hit_tokens.into());
    }

    pub(crate) fn gap(&self) {
        self.gaps.inc();
    }
}
