//! A run in numbers.
//!
//! A percentile is the nearest rank: of n values in order, the ⌈p·n/100⌉th; it is always a value that
//! was measured. A share of nothing, or a percentile of nothing, is 0, so that no NaN is ever told.

mod by_minute;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use crate::outcome::{Fate, Kept, Latencies, Outcome, Slo};

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
    /// When since the start of the run, and how the fleet stood; in any order.
    pub samples: Vec<(Duration, FleetSample)>,
}

impl Summary {
    /// Sums up a run. `trace_phases` are the names that outcomes' phases refer to;
    /// `unloaded_prefill_ms` tells what the prefill of so many tokens takes on an idle worker with an
    /// empty cache.
    pub fn of(
        outcomes: &[Outcome],
        trace_phases: &[String],
        slo: &Slo,
        unloaded_prefill_ms: impl Fn(u32) -> f64,
        run: &RunFacts,
    ) -> Self {
        let kept: Vec<Kept> = outcomes
            .iter()
            .map(|outcome| slo.kept(&outcome.fate, unloaded_prefill_ms(outcome.input_tokens)))
            .collect();
        let judged = || outcomes.iter().zip(&kept);
        let completed = || outcomes.iter().filter(|outcome| latencies(outcome).is_some());
        let duration_s = run.duration.as_secs_f64();
        let per_second = |count: f64| if duration_s > 0.0 { count / duration_s } else { 0.0 };
        let good = kept.iter().filter(|kept| kept.both()).count();
        let tokens = |of: fn(&Outcome) -> u32| completed().map(|o| u64::from(of(o))).sum::<u64>();
        let phase_name = |outcome: &Outcome| trace_phases.get(usize::from(outcome.phase?));
        Self {
            requests: outcomes.len(),
            completed: completed().count(),
            rejected: count(outcomes, |outcome| outcome.fate == Fate::Rejected),
            unfinished: count(outcomes, |outcome| outcome.fate == Fate::Unfinished),
            duration_s,
            goodput_rps: per_second(good as f64),
            attainment: share(kept.iter().map(|kept| kept.both())),
            attainment_ttft: share(kept.iter().map(|kept| kept.ttft)),
            attainment_tbt: share(kept.iter().map(|kept| kept.tbt)),
            attainment_longest_input_decile: of_longest_decile(judged(), |o| o.input_tokens),
            attainment_longest_output_decile: of_longest_decile(judged(), |o| o.output_tokens),
            attainment_by_phase: trace_phases
                .iter()
                .map(|phase| {
                    let of_phase =
                        judged().filter(|(outcome, _)| phase_name(outcome) == Some(phase));
                    (phase.clone(), share(of_phase.map(|(_, kept)| kept.both())))
                })
                .collect(),
            ttft_ms: Percentiles::of(outcomes, |_, latencies| Some(latencies.ttft_ms)),
            tbt_ms: Percentiles::of(outcomes, |o, l| (o.output_tokens > 1).then_some(l.tbt_ms)),
            tpot_ms: Percentiles::of(outcomes, |o, l| (o.output_tokens > 1).then_some(l.tpot_ms)),
            e2e_ms: Percentiles::of(outcomes, |_, latencies| Some(latencies.e2e_ms)),
            output_tokens_per_s: per_second(tokens(|outcome| outcome.output_tokens) as f64),
            prefix_hit_ratio: ratio(
                tokens(|outcome| outcome.cached_tokens) as f64,
                tokens(|outcome| outcome.input_tokens) as f64,
            ),
            kv_bytes_moved: outcomes.iter().map(|outcome| outcome.kv_bytes_moved).sum(),
            disaggregated: count(outcomes, |outcome| outcome.disaggregated),
            flips: run.flips,
            workers_seconds: run.workers_seconds,
            by_minute: by_minute::of(judged(), &run.samples),
        }
    }
}

impl Percentiles {
    /// Of what `value` picks of each completed request.
    fn of(outcomes: &[Outcome], value: impl Fn(&Outcome, &Latencies) -> Option<f64>) -> Self {
        let mut values: Vec<f64> = outcomes
            .iter()
            .filter_map(|outcome| latencies(outcome).and_then(|of_it| value(outcome, of_it)))
            .collect();
        Self::of_values(&mut values)
    }

    /// Sorts the values.
    pub fn of_values(values: &mut [f64]) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (values.len() * percent).div_ceil(100);
            rank.checked_sub(1).map_or(0.0, |index| values[index])
        };
        Self { p50: rank(50), p90: rank(90), p99: rank(99) }
    }
}

fn latencies(outcome: &Outcome) -> Option<&Latencies> {
    match &outcome.fate {
        Fate::Completed(latencies) => Some(latencies),
        Fate::Rejected | Fate::Unfinished => None,
    }
}

fn count(outcomes: &[Outcome], is_one: impl Fn(&Outcome) -> bool) -> usize {
    outcomes.iter().filter(|outcome| is_one(outcome)).count()
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn share(kept: impl Iterator<Item = bool>) -> f64 {
    let (kept, all) = kept.fold((0_u64, 0_u64), |(kept, all), is| (kept + u64::from(is), all + 1));
    ratio(kept as f64, all as f64)
}

fn of_longest_decile<'a>(
    judged: impl Iterator<Item = (&'a Outcome, &'a Kept)>,
    tokens: fn(&Outcome) -> u32,
) -> f64 {
    let judged: Vec<_> = judged.map(|(outcome, kept)| (tokens(outcome), kept.both())).collect();
    let mut lengths: Vec<_> = judged.iter().map(|(tokens, _)| *tokens).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let last = lengths.len().div_ceil(10).checked_sub(1);
    let shortest = last.map_or(0, |last| lengths[last]);
    share(judged.iter().filter(|(tokens, _)| *tokens >= shortest).map(|(_, both)| *both))
}
