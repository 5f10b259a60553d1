//! What was decided for each request, what was predicted of it, and what happened: for metrics, and for
//! whoever asks of one of the last requests why it went where it went.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use baton_core::{Considered, PlacementDecision, WorkerKey};
use http::HeaderValue;
use serde::Serialize;

use crate::metrics::{Outcome, Path};

/// So many requests that have ended can be asked of.
const REMEMBERED: usize = 1024;
/// Names of workers that went away are forgotten beyond so many.
const MAX_NAMES: usize = 4096;

/// One request's record while it is open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placed {
    /// Since the coordinator started.
    pub(crate) arrived: Duration,
    pub(crate) priority: i32,
    pub(crate) tenant: Arc<str>,
    /// Of each attempt.
    pub(crate) decisions: Vec<PlacementDecision>,
    pub(crate) handoff: Option<Handoff>,
    pub(crate) pull: Option<Pull>,
    /// From its arrival on, where it could be seen.
    pub(crate) first_token: Option<Duration>,
    /// From its arrival on.
    pub(crate) last_token: Option<Duration>,
    pub(crate) output_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Handoff {
    pub(crate) bytes: u64,
    pub(crate) blocks: u32,
    pub(crate) blocks_reused: u32,
    /// From decode's subscription to its last verified block, prefill's own time included.
    pub(crate) milliseconds: f64,
}

/// Of the last attempt: the start of the prompt, to be copied from another worker's prefix cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pull {
    pub(crate) from: WorkerKey,
    pub(crate) planned_tokens: u32,
    /// Absent until it is known.
    pub(crate) outcome: Option<&'static str>,
    pub(crate) tokens: u32,
    pub(crate) bytes: u64,
    pub(crate) took: Duration,
}

impl Pull {
    pub(crate) fn planned(from: WorkerKey, planned_tokens: u32) -> Self {
        Self { from, planned_tokens, outcome: None, tokens: 0, bytes: 0, took: Duration::ZERO }
    }
}

impl Placed {
    /// Predicted time to the first token since the arrival.
    pub(crate) fn predicted_ttft(&self) -> Option<Duration> {
        self.decisions.last()?.first_token_at()?.checked_sub(self.arrived)
    }

    /// Mean of those that were seen.
    pub(crate) fn itl_ms(&self) -> Option<f64> {
        let gaps = self.output_tokens.checked_sub(1).filter(|gaps| *gaps > 0)?;
        let between = self.last_token?.checked_sub(self.first_token?)?;
        #[allow(clippy::cast_precision_loss)] // Nobody waits for so many.
        let gaps = gaps as f64;
        Some(between.as_secs_f64() * 1000.0 / gaps)
    }
}

#[derive(Debug)]
struct Ended {
    request_id: HeaderValue,
    placed: Placed,
    observed: Observed,
}

/// The last requests that ended, and the names of all workers that they may speak of.
#[derive(Debug, Default)]
pub(crate) struct PlacedRequests {
    ended: VecDeque<Ended>,
    names: HashMap<WorkerKey, Arc<str>>,
}

impl PlacedRequests {
    /// `is_attached` says of which workers the name must be kept.
    pub(crate) fn worker_attached(
        &mut self,
        worker: WorkerKey,
        name: &str,
        is_attached: impl Fn(WorkerKey) -> bool,
    ) {
        if self.names.len() >= MAX_NAMES {
            self.names.retain(|worker, _| is_attached(*worker));
        }
        self.names.insert(worker, Arc::from(name));
    }

    pub(crate) fn ended(
        &mut self,
        request_id: HeaderValue,
        placed: Placed,
        path: Path,
        outcome: Outcome,
        e2e: Duration,
    ) {
        if self.ended.len() >= REMEMBERED {
            self.ended.pop_front();
        }
        let observed = Observed {
            outcome: outcome.as_str(),
            path: path.as_str(),
            ttft_ms: placed.first_token.map(milliseconds),
            itl_ms: placed.itl_ms(),
            output_tokens: placed.output_tokens,
            e2e_ms: milliseconds(e2e),
            handoff: placed.handoff,
        };
        self.ended.push_back(Ended { request_id, placed, observed });
    }

    /// The latest of this id.
    pub(crate) fn explain(&self, request_id: &str) -> Option<Explanation> {
        let mut latest_first = self.ended.iter().rev();
        let ended =
            latest_first.find(|ended| ended.request_id.as_bytes() == request_id.as_bytes())?;
        let explanation = self.explain_open(request_id, &ended.placed);
        Some(Explanation { observed: Some(ended.observed.clone()), ..explanation })
    }

    pub(crate) fn explain_open(&self, request_id: &str, placed: &Placed) -> Explanation {
        let attempt = |decision: &PlacementDecision| self.attempt(decision, placed.arrived);
        Explanation {
            request: request_id.to_owned(),
            priority: placed.priority,
            tenant: placed.tenant.to_string(),
            attempts: placed.decisions.iter().map(attempt).collect(),
            pull: placed.pull.map(|pull| CopiedPrefix {
                from: self.name(pull.from),
                planned_tokens: pull.planned_tokens,
                outcome: pull.outcome,
                tokens: pull.tokens,
                bytes: pull.bytes,
                milliseconds: milliseconds(pull.took),
            }),
            observed: None,
        }
    }

    fn name(&self, worker: WorkerKey) -> String {
        self.names
            .get(&worker)
            .map_or_else(|| "a worker that is gone".to_owned(), |n| n.to_string())
    }

    fn attempt(&self, decision: &PlacementDecision, arrived: Duration) -> Attempt {
        let since_arrival = |at: Duration| milliseconds(at.saturating_sub(arrived));
        let considered = |considered: &Considered| {
            let predicted = considered.predicted;
            ConsideredWorker {
                worker: self.name(considered.worker),
                cached_tokens: considered.hit_tokens,
                pulled_tokens: considered.pulled_tokens,
                has_kv_room: considered.has_kv_room,
                queue_ms: predicted.map(|predicted| predicted.queue_ms),
                prefill_ms: predicted.map(|predicted| predicted.prefill_ms),
                transfer_ms: predicted.map(|predicted| predicted.handoff_ms),
                itl_ms: predicted.map(|predicted| predicted.step_ms),
            }
        };
        let choice = |chosen: &baton_core::Chosen| Choice {
            worker: self.name(chosen.worker),
            candidates: chosen.candidates,
            considered: chosen.considered.iter().map(considered).collect(),
        };
        Attempt {
            path: path_of(decision).as_str(),
            reason: decision.reason.as_str(),
            placed_after_ms: since_arrival(decision.at),
            ttft_target_ms: since_arrival(decision.due),
            prompt_tokens: decision.prompt_tokens,
            predicted_ttft_ms: decision.first_token_at().map(since_arrival),
            predicted_itl_ms: decision.itl_ms(),
            prefill: decision.first.as_ref().map(choice),
            decode: decision.decode.as_ref().map(choice),
        }
    }
}

/// The way that a decision takes.
pub(crate) fn path_of(decision: &PlacementDecision) -> Path {
    if decision.split_to().is_some() { Path::Disaggregated } else { Path::Aggregated }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Why a request went where it went. Times are in milliseconds, from its arrival on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Explanation {
    pub(crate) request: String,
    pub(crate) priority: i32,
    pub(crate) tenant: String,
    /// None as long as it waits for its turn, or if it never had one.
    pub(crate) attempts: Vec<Attempt>,
    /// Present where the last attempt was to copy the start of its prompt from another worker first.
    pub(crate) pull: Option<CopiedPrefix>,
    /// Absent while it is open.
    pub(crate) observed: Option<Observed>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct CopiedPrefix {
    pub(crate) from: String,
    pub(crate) planned_tokens: u32,
    /// Absent until it is known.
    pub(crate) outcome: Option<&'static str>,
    /// What came.
    pub(crate) tokens: u32,
    pub(crate) bytes: u64,
    /// How long the prompt waited for it.
    pub(crate) milliseconds: f64,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Attempt {
    pub(crate) path: &'static str,
    pub(crate) reason: &'static str,
    pub(crate) placed_after_ms: f64,
    pub(crate) ttft_target_ms: f64,
    pub(crate) prompt_tokens: u32,
    /// Absent where some worker's step times are not known.
    pub(crate) predicted_ttft_ms: Option<f64>,
    pub(crate) predicted_itl_ms: Option<f64>,
    /// Of the worker that prefills; without a `decode`, or with the same one, it does both.
    pub(crate) prefill: Option<Choice>,
    pub(crate) decode: Option<Choice>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Choice {
    pub(crate) worker: String,
    pub(crate) candidates: usize,
    /// The chosen one and those that seemed quickest.
    pub(crate) considered: Vec<ConsideredWorker>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct ConsideredWorker {
    pub(crate) worker: String,
    pub(crate) cached_tokens: u32,
    /// Those that shall be there once a peer has lent some; 0 where none is asked to.
    pub(crate) pulled_tokens: u32,
    pub(crate) has_kv_room: bool,
    pub(crate) queue_ms: Option<f64>,
    pub(crate) prefill_ms: Option<f64>,
    pub(crate) transfer_ms: Option<f64>,
    pub(crate) itl_ms: Option<f64>,
}

/// What happened.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Observed {
    pub(crate) outcome: &'static str,
    pub(crate) path: &'static str,
    /// Of answers that were streamed.
    pub(crate) ttft_ms: Option<f64>,
    pub(crate) itl_ms: Option<f64>,
    pub(crate) output_tokens: u64,
    pub(crate) e2e_ms: f64,
    pub(crate) handoff: Option<Handoff>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_requests_are_remembered_and_no_more() {
        let mut requests = PlacedRequests::default();
        for index in 0..=REMEMBERED {
            let id = HeaderValue::from_str(&format!("r{index}")).unwrap();
            let placed = Placed {
                output_tokens: 3,
                first_token: Some(Duration::from_millis(10)),
                last_token: Some(Duration::from_millis(50)),
                ..Placed::default()
            };
            requests.ended(id, placed, Path::Aggregated, Outcome::Ok, Duration::from_millis(60));
        }
        assert!(requests.explain("r0").is_none());
        let observed = requests.explain("r1").unwrap().observed.unwrap();
        assert_eq!((observed.ttft_ms, observed.itl_ms), (Some(10.0), Some(20.0)));
        assert_eq!(requests.ended.len(), REMEMBERED);
    }
}
