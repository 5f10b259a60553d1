//! A run in numbers.
//!
//! A [`Tally`] counts requests as they end; a [`Spread`] keeps what is needed of their latencies.
//!
//! A percentile is the nearest rank: of n values in order, the ⌈p·n/100⌉th; it is always a value that
//! was measured, if not that very one then another less than 0.013 % above it. A share of nothing, or a
//! percentile of nothing, is 0, so that no NaN is ever told.

mod by_minute;
mod spread;
mod tally;
#[cfg(test)]
mod tests;
mod timeline;

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

pub use self::{
    spread::{Ranks, Spread},
    tally::Tally,
    timeline::{Slot, Timeline},
};
use crate::outcome::{Fate, Latencies, Outcome};

/// The object that `--json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub requests: usize,
    pub completed: usize,
    pub rejected: usize,
    pub unfinished: usize,
    /// From the first arrival to the end of the run.
    pub duration_s: f64,
    /// Requests per second that met both SLOs.
    pub goodput_rps: f64,
    /// Share of all requests that met both SLOs.
    pub attainment: f64,
    pub attainment_ttft: f64,
    pub attainment_tbt: f64,
    /// Of the tenth of requests with the longest inputs, and all that are as long as the shortest of
    /// these.
    pub attainment_longest_input_decile: f64,
    /// The same by output tokens.
    pub attainment_longest_output_decile: f64,
    pub attainment_by_phase: BTreeMap<String, f64>,
    pub ttft_ms: Percentiles,
    /// Of answers of two tokens or more, as is `tpot_ms`.
    pub tbt_ms: Percentiles,
    pub tpot_ms: Percentiles,
    pub e2e_ms: Percentiles,
    /// Of completed requests.
    pub output_tokens_per_s: f64,
    /// Of the prompt tokens of completed requests, those that a prefix cache held.
    pub prefix_hit_ratio: f64,
    pub kv_bytes_moved: u64,
    pub disaggregated: usize,
    pub flips: u64,
    pub workers_seconds: WorkersSeconds,
    /// In order; a minute in which nothing arrived and no sample was taken is left out.
    pub by_minute: Vec<Minute>,
}

/// Of the completed requests; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WorkersSeconds {
    pub prefill: f64,
    pub decode: f64,
    /// Workers that do both.
    pub mixed: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    /// Since the start of the run, from 0.
    pub minute: u32,
    /// All that follows but `fleet` is of the requests that arrived in it.
    pub arrivals: usize,
    pub completed: usize,
    pub attainment: f64,
    pub ttft_ms_p50: f64,
    pub ttft_ms_p90: f64,
    pub tbt_ms_p90: f64,
    /// Means over the minute's samples of the fleet.
    pub fleet: FleetSample,
}

/// How the fleet stood at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FleetSample {
    pub workers_prefill: f64,
    pub workers_decode: f64,
    pub workers_mixed: f64,
    /// Requests that have no first token yet.
    pub requests_queued: f64,
    pub requests_running: f64,
    /// Of all workers' KV capacity.
    pub kv_used_ratio: f64,
}

/// What outcomes do not tell of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunFacts {
    /// From the first arrival to the end of the run.
    pub duration: Duration,
    pub flips: u64,
    pub workers_seconds: WorkersSeconds,
}

impl FleetSample {
    fn plus(&self, other: &Self) -> Self {
        Self {
            workers_prefill: self.workers_prefill + other.workers_prefill,
            workers_decode: self.workers_decode + other.workers_decode,
            workers_mixed: self.workers_mixed + other.workers_mixed,
            requests_queued: self.requests_queued + other.requests_queued,
            requests_running: self.requests_running + other.requests_running,
            kv_used_ratio: self.kv_used_ratio + other.kv_used_ratio,
        }
    }

    fn divided_by(&self, count: f64) -> Self {
        Self {
            workers_prefill: self.workers_prefill / count,
            workers_decode: self.workers_decode / count,
            workers_mixed: self.workers_mixed / count,
            requests_queued: self.requests_queued / count,
            requests_running: self.requests_running / count,
            kv_used_ratio: self.kv_used_ratio / count,
        }
    }
}

impl Percentiles {
    /// Sorts the values.
    pub fn of_values(values: &mut [f64]) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        Self::of(values.len(), |rank| values.get(rank.checked_sub(1)?).copied())
    }

    /// Of so many values, of which `value` tells the one of a rank from 1 on.
    fn of(count: usize, value: impl Fn(usize) -> Option<f64>) -> Self {
        let percentile = |percent: usize| match (count * percent).div_ceil(100) {
            0 => 0.0,
            rank => value(rank).unwrap_or(0.0),
        };
        Self { p50: percentile(50), p90: percentile(90), p99: percentile(99) }
    }
}

/// How many of some requests kept both promises, or one.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    kept: usize,
    all: usize,
}

impl Share {
    fn count(&mut self, kept: bool) {
        self.kept += usize::from(kept);
        self.all += 1;
    }

    fn ratio(self) -> f64 {
        ratio(self.kept as f64, self.all as f64)
    }
}

fn latencies(outcome: &Outcome) -> Option<&Latencies> {
    match &outcome.fate {
        Fate::Completed(latencies) => Some(latencies),
        Fate::Rejected | Fate::Unfinished => None,
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
