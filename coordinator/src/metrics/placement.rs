use std::{collections::BTreeMap, sync::atomic::AtomicU64, time::Duration};

use baton_core::ShedReason;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Unit,
};

use super::{Catalogue, Path, requests::TTFT_BUCKETS};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    path: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PriorityLabels {
    priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShedLabels {
    reason: &'static str,
    priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

const PREDICTION_ERROR_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What came later than predicted, and what came earlier: a histogram has no negative side.
#[derive(Clone, Debug)]
struct PredictionError {
    late: Histogram,
    early: Histogram,
}

impl PredictionError {
    fn register(r: &mut Catalogue, name: &str, help: &str) -> Self {
        let family = Family::<DirectionLabels, Histogram, _>::new_with_constructor(
            (|| Histogram::new(PREDICTION_ERROR_BUCKETS)) as fn() -> Histogram,
        );
        r.register_with_unit(name, help, Unit::Seconds, family.clone());
        let of = |direction| family.get_or_create(&DirectionLabels { direction }).clone();
        Self { late: of("late"), early: of("early") }
    }

    fn observe(&self, predicted_seconds: f64, observed_seconds: f64) {
        let error = observed_seconds - predicted_seconds;
        let side = if error >= 0.0 { &self.late } else { &self.early };
        side.observe(error.abs());
    }
}

/// What was decided of requests, when, and how well it was foreseen.
#[derive(Debug)]
pub(crate) struct PlacementMetrics {
    decisions: Family<DecisionLabels, Counter>,
    ttft_error: PredictionError,
    itl_error: PredictionError,
    wait: Family<PriorityLabels, Histogram, fn() -> Histogram>,
    waiting: Family<PriorityLabels, Gauge>,
    long_prompt_workers: Gauge<f64, AtomicU64>,
    shed: Family<ShedLabels, Counter>,
}

impl PlacementMetrics {
    pub(super) fn register(catalogue: &mut Catalogue) -> Self {
        let decisions = Family::<DecisionLabels, Counter>::default();
        catalogue.register(
            "placement_decisions",
            "Attempts at requests, by the path that was chosen and why",
            decisions.clone(),
        );
        let ttft_error = PredictionError::register(
            catalogue,
            "prediction_error_ttft",
            "How much later, or earlier, first tokens came than was predicted when they were placed",
        );
        let itl_error = PredictionError::register(
            catalogue,
            "prediction_error_itl",
            "How much longer, or shorter, a streamed answer's mean ITL was than predicted",
        );
        let wait = Family::<PriorityLabels, Histogram, _>::new_with_constructor(
            (|| Histogram::new(TTFT_BUCKETS)) as fn() -> Histogram,
        );
        catalogue.register_with_unit(
            "wait",
            "From a request's arrival until its first leg was given to a worker",
            Unit::Seconds,
            wait.clone(),
        );
        let waiting = Family::<PriorityLabels, Gauge>::default();
        catalogue.register(
            "requests_waiting",
            "Requests that wait here for their turn, or for a worker",
            waiting.clone(),
        );
        let long_prompt_workers = Gauge::<f64, AtomicU64>::default();
        catalogue.register(
            "long_prompt_workers_ratio",
            "Part of the workers that may prefill long prompts at once: below 1 while others are late",
            long_prompt_workers.clone(),
        );
        let shed = Family::<ShedLabels, Counter>::default();
        catalogue.register("requests_shed", "Requests that were answered with 429", shed.clone());
        // A rate needs what was there before.
        for reason in ShedReason::ALL {
            shed.get_or_create(&ShedLabels { reason: reason.as_str(), priority: 0 }).inc_by(0);
        }
        Self { decisions, ttft_error, itl_error, wait, waiting, long_prompt_workers, shed }
    }

    pub(crate) fn decided(&self, path: Path, reason: &'static str) {
        let labels = DecisionLabels { path: path.as_str(), reason };
        self.decisions.get_or_create(&labels).inc();
    }

    /// What was predicted, and what came of it: TTFT, and ITL in milliseconds.
    pub(crate) fn prediction(
        &self,
        ttft: Option<(Duration, Duration)>,
        itl_ms: Option<(f64, f64)>,
    ) {
        if let Some((predicted, observed)) = ttft {
            let [predicted, observed] = [predicted, observed].map(|time| time.as_secs_f64());
            self.ttft_error.observe(predicted, observed);
        }
        if let Some((predicted_ms, observed_ms)) = itl_ms {
            self.itl_error.observe(predicted_ms / 1000.0, observed_ms / 1000.0);
        }
    }

    pub(crate) fn waited(&self, priority: i32, wait: Duration) {
        self.wait.get_or_create(&PriorityLabels { priority }).observe(wait.as_secs_f64());
    }

    pub(crate) fn shed(&self, reason: ShedReason, priority: i32) {
        self.shed.get_or_create(&ShedLabels { reason: reason.as_str(), priority }).inc();
    }

    /// How many wait just now, by priority, and the part of the workers that may have long prompts.
    pub(super) fn set(&self, waiting: &BTreeMap<i32, usize>, long_prompt_workers: f64) {
        self.long_prompt_workers.set(long_prompt_workers);
        self.waiting.clear();
        for (&priority, &count) in waiting {
            let gauge = self.waiting.get_or_create(&PriorityLabels { priority });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}
