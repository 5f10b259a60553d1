//! Where the legs of a request run.
//!
//! The simplest rule that is fair: the worker with the fewest jobs, and among equals the one that waited
//! longest. A request that can be split is split whenever a prefill and a decode worker can hand over to
//! each other.

use std::fmt;

use baton_types::Role;

use crate::{
    fleet::{Fleet, HandoffMode, Worker, WorkerKey},
    request::RequestShape,
};

/// The way of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Disaggregated { prefill: WorkerKey, decode: WorkerKey, by_engine: bool },
    Aggregated { worker: WorkerKey, reason: AggregatedReason },
}

/// Why a request was not split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AggregatedReason {
    /// Prefill's own token is the whole answer.
    OneToken,
    /// A parameter (or endpoint) that cannot be split.
    Unsplittable(&'static str),
    NoPrefillWorker,
    NoDecodeWorker,
    /// There are both, but none can take the other's KV.
    NoCompatiblePair,
    /// It was split, and its KV did not come.
    HandoffFailed,
}

impl AggregatedReason {
    /// A name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OneToken => "one_token",
            Self::Unsplittable(what) => what,
            Self::NoPrefillWorker => "no_prefill_worker",
            Self::NoDecodeWorker => "no_decode_worker",
            Self::NoCompatiblePair => "no_compatible_pair",
            Self::HandoffFailed => "handoff_failed",
        }
    }
}

impl fmt::Display for AggregatedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoute {
    NoWorker,
    UnknownModel,
}

/// Finds a route that keeps away from `avoid` (workers that failed this request) where it can.
pub(crate) fn place(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
) -> Result<Route, NoRoute> {
    if fleet.len() == 0 {
        return Err(NoRoute::NoWorker);
    }
    let pool = |role| best(fleet, shape, avoid, |worker| worker.description.role == role);
    let aggregated = |preferred: Role, reason| {
        let worker = pool(preferred)
            .or_else(|| best(fleet, shape, avoid, |_| true))
            .ok_or(NoRoute::UnknownModel)?;
        Ok(Route::Aggregated { worker, reason })
    };

    if let Some(what) = shape.unsplittable {
        return aggregated(Role::Decode, AggregatedReason::Unsplittable(what));
    }
    if shape.max_output_tokens == Some(1) {
        return aggregated(Role::Prefill, AggregatedReason::OneToken);
    }
    let Some(first_prefill) = pool(Role::Prefill) else {
        return aggregated(Role::Decode, AggregatedReason::NoPrefillWorker);
    };
    if pool(Role::Decode).is_none() {
        return aggregated(Role::Prefill, AggregatedReason::NoDecodeWorker);
    }
    pair_with(fleet, shape, avoid, first_prefill)
        .or_else(|| {
            // The best prefill worker finds no partner: any that does is better than none.
            fleet
                .iter()
                .filter(|(_, worker)| worker.description.role == Role::Prefill)
                .filter(|(_, worker)| worker.serves(shape.model.as_deref()))
                .filter_map(|(key, worker)| {
                    let order = (avoid.contains(&key), worker.load_order());
                    Some((order, pair_with(fleet, shape, avoid, key)?))
                })
                .min_by_key(|(order, _)| *order)
                .map(|(_, route)| route)
        })
        .map_or_else(|| aggregated(Role::Decode, AggregatedReason::NoCompatiblePair), Ok)
}

fn pair_with(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
    prefill: WorkerKey,
) -> Option<Route> {
    let handoff = fleet.get(prefill)?.description.handoff;
    if handoff == HandoffMode::None {
        return None;
    }
    let decode = best(fleet, shape, avoid, |worker| {
        worker.description.role == Role::Decode && worker.description.handoff == handoff
    })?;
    Some(Route::Disaggregated { prefill, decode, by_engine: handoff == HandoffMode::Engine })
}

fn best(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
    admits: impl Fn(&Worker) -> bool,
) -> Option<WorkerKey> {
    fleet
        .iter()
        .filter(|(_, worker)| admits(worker) && worker.serves(shape.model.as_deref()))
        .min_by_key(|(key, worker)| (avoid.contains(key), worker.load_order()))
        .map(|(key, _)| key)
}
