//! What an experiment found, for people (one HTML file) and for programs (JSON, CSV).
//!
//! ```text
//! Report ─ Scenario (one trace, one fleet size, one SLO) ─ Contender (one mode) ─ Goodput, RunFindings
//! ```
//!
//! Nothing in a report tells when it was made: the same experiment gives the same bytes.

mod figures;
pub mod number;
mod page;
mod plot;
mod table;

use std::{fs, io, path::Path, time::Duration};

use serde::Serialize;

pub use self::table::to_csv;
use crate::{
    outcome::{Fate, Outcome, Slo},
    summary::{FleetSample, Summary, WorkersSeconds},
};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub title: String,
    pub origin: Origin,
    pub scenarios: Vec<Scenario>,
}

/// All that it takes to run it again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin {
    /// As it was typed.
    pub command: String,
    pub version: String,
    pub seeds: Vec<u64>,
    /// What the engines' times were taken from; none where they were real.
    pub profile: Option<Input>,
    /// The server that was asked; none where all was simulated.
    pub endpoint: Option<String>,
    /// The text of the experiment's file, where there is one.
    pub experiment: Option<String>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Input {
    pub file: String,
    /// Empty where nothing was read: requests that were made up.
    pub sha256: String,
    /// One line on what it holds.
    pub about: String,
}

/// Contenders that had the same trace, the same number of workers and the same SLO.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// Short, for headings: "code ↔ conversation, 8 workers, TTFT 2 s, ITL 25 ms".
    pub name: String,
    pub trace: Input,
    /// None where the server does not tell.
    pub workers: Option<u32>,
    pub slo: Slo,
    /// How requests are ordered that are predicted to miss their TTFT; none where the server's own
    /// configuration says.
    pub late: Option<String>,
    /// Success that goodput also asks in the longest deciles of input and of output.
    pub min_decile: Option<f64>,
    /// The load of the runs whose latencies and timelines are shown, and why this one.
    pub load: Option<Load>,
    /// The first is the baseline.
    pub contenders: Vec<Contender>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Load {
    /// Of the trace's own load.
    pub scale: f64,
    /// Mean over the trace, requests per second.
    pub offered_rps: f64,
    pub reason: String,
}

/// One way to use the workers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contender {
    /// As it was asked for: "best-static".
    pub mode: String,
    /// What came of it: "static:7P1D, 2,048 tokens a step".
    pub setup: String,
    /// What was tried to find `setup`; empty where nothing was searched.
    pub searched: Vec<Searched>,
    pub goodput: Option<GoodputFindings>,
    /// Of the first seed, at the scenario's [`Load`].
    pub run: Option<RunFindings>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Searched {
    pub setup: String,
    /// The highest rate that it was seen to hold before another held more.
    pub goodput_rps: f64,
}

/// Requests per second, means over the seeds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GoodputFindings {
    /// Highest rate at which at least 90 % of all requests meet both SLOs.
    pub rps: f64,
    /// The same with 99 %, where it was sought.
    pub rps_p99: Option<f64>,
    /// Lowest and highest `rps` of the seeds.
    pub range: [f64; 2],
    /// Of the first seed, in the order of load.
    pub points: Vec<LoadPoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LoadPoint {
    pub offered_rps: f64,
    pub attainment: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RunFindings {
    pub summary: Summary,
    pub ttft_ms: Distribution,
    /// Each request counts with the mean of its longest tenth of gaps.
    pub tbt_ms: Distribution,
    pub timeline: Vec<Moment>,
}

/// A cumulative distribution over *all* requests: those that never got there keep it below 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    pub points: Vec<DistributionPoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DistributionPoint {
    pub ms: f64,
    /// Share of all requests that took at most `ms`.
    pub share: f64,
}

/// Means over one slice of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Moment {
    /// Middle of the slice, since the first arrival.
    pub at_s: f64,
    pub arrivals_per_s: f64,
    #[serde(flatten)]
    pub fleet: FleetSample,
}

impl RunFindings {
    /// What one run shows. `samples` are in the order of time.
    pub fn new(
        summary: Summary,
        outcomes: &[Outcome],
        samples: &[(Duration, FleetSample)],
    ) -> Self {
        let completed = |latency: fn(&crate::outcome::Latencies) -> f64| {
            let values = outcomes.iter().filter_map(|outcome| match &outcome.fate {
                Fate::Completed(latencies) => Some(latency(latencies)),
                Fate::Rejected | Fate::Unfinished => None,
            });
            Distribution::new(values.collect(), outcomes.len())
        };
        Self {
            ttft_ms: completed(|latencies| latencies.ttft_ms),
            tbt_ms: completed(|latencies| latencies.tbt_ms),
            timeline: timeline(outcomes, samples),
            summary,
        }
    }
}

impl RunFindings {
    /// Of an endpoint nothing is known of what stands behind it.
    pub fn knows_workers(&self) -> bool {
        let WorkersSeconds { prefill, decode, mixed } = self.summary.workers_seconds;
        prefill + decode + mixed > 0.0
    }
}

impl Distribution {
    /// `values` of those of `requests` that have one.
    pub fn new(mut values: Vec<f64>, requests: usize) -> Self {
        const POINTS: usize = 160;
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let count = values.len();
        let ranks = (1..=POINTS).map(|i| (i * count).div_ceil(POINTS)).filter(|rank| *rank > 0);
        let mut ranks: Vec<usize> = std::iter::once(1).chain(ranks).collect();
        // The last hundredth is what an SLO of 99 % asks about.
        ranks.push((995 * count).div_ceil(1_000));
        ranks.sort_unstable();
        ranks.dedup();
        let point = |rank: usize| {
            let ms = *values.get(rank.checked_sub(1)?)?;
            Some(DistributionPoint { ms, share: ratio(rank, requests) })
        };
        Self { points: ranks.into_iter().filter_map(point).collect() }
    }

    /// What the given share of all requests took at most; `None` where fewer got there.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        self.points.iter().find(|point| point.share >= share - 1e-9).map(|point| point.ms)
    }
}

fn timeline(outcomes: &[Outcome], samples: &[(Duration, FleetSample)]) -> Vec<Moment> {
    const SLICES: u32 = 200;
    let last_arrival = outcomes.iter().map(|outcome| outcome.arrival).max().unwrap_or_default();
    let last_sample = samples.last().map(|(at, _)| *at).unwrap_or_default();
    // Shorter slices than samples, or than a second, would show noise and holes.
    let steps = samples.windows(2).filter_map(|pair| match pair {
        [a, b] => Some(b.0.saturating_sub(a.0)),
        _ => None,
    });
    let finest = steps.max().unwrap_or_default().max(Duration::from_secs(1));
    let slice = (last_arrival.max(last_sample) / SLICES).max(finest).as_secs_f64();
    let index = |at: Duration| whole(at.as_secs_f64() / slice);

    let slices = index(last_arrival.max(last_sample)) + 1;
    let mut arrivals = vec![0_usize; slices];
    for outcome in outcomes {
        if let Some(count) = arrivals.get_mut(index(outcome.arrival)) {
            *count += 1;
        }
    }
    let mut sums = vec![(FleetSample::default(), 0_usize); slices];
    for (at, sample) in samples {
        if let Some((sum, count)) = sums.get_mut(index(*at)) {
            add(sum, sample, 1.0);
            *count += 1;
        }
    }
    let mut held = FleetSample::default();
    let mut moments = Vec::with_capacity(slices);
    for (i, (arrivals, (sum, count))) in arrivals.into_iter().zip(sums).enumerate() {
        if count > 0 {
            held = FleetSample::default();
            add(&mut held, &sum, 1.0 / float(count));
        }
        moments.push(Moment {
            at_s: (float(i) + 0.5) * slice,
            arrivals_per_s: float(arrivals) / slice,
            fleet: held,
        });
    }
    moments
}

fn add(sum: &mut FleetSample, sample: &FleetSample, weight: f64) {
    sum.workers_prefill += sample.workers_prefill * weight;
    sum.workers_decode += sample.workers_decode * weight;
    sum.workers_mixed += sample.workers_mixed * weight;
    sum.requests_queued += sample.requests_queued * weight;
    sum.requests_running += sample.requests_running * weight;
    sum.kv_used_ratio += sample.kv_used_ratio * weight;
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { float(part) / float(whole) }
}

#[allow(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn float(count: usize) -> f64 {
    count as f64
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of slices of a run, never negative"
)]
fn whole(value: f64) -> usize {
    value as usize
}

impl Report {
    /// One page that needs nothing else: no network, no script.
    pub fn to_html(&self) -> String {
        page::page(self)
    }

    /// # Errors
    /// A number that JSON does not have, which a report never holds.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// Writes `report.html`, `results.json` and `results.csv` into `directory`, making it where it is
    /// missing.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        fs::write(directory.join("report.html"), self.to_html())?;
        fs::write(directory.join("results.json"), self.to_json()? + "\n")?;
        fs::write(directory.join("results.csv"), to_csv(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Latencies;

    fn outcome(arrival_ms: u64, fate: Fate) -> Outcome {
        Outcome {
            arrival: Duration::from_millis(arrival_ms),
            input_tokens: 1,
            output_tokens: 1,
            phase: None,
            fate,
            cached_tokens: 0,
            kv_bytes_moved: 0,
            disaggregated: false,
        }
    }

    #[test]
    fn a_distribution_stops_where_requests_were_lost() {
        let took = |ms: f64| {
            Fate::Completed(Latencies { ttft_ms: ms, tbt_ms: 2.0 * ms, tpot_ms: ms, e2e_ms: ms })
        };
        let mut outcomes: Vec<_> =
            (1..=900_u32).map(|i| outcome(i.into(), took(i.into()))).collect();
        outcomes.extend((0..100).map(|i| outcome(i, Fate::Rejected)));
        let run = RunFindings::new(Summary::default(), &outcomes, &[]);
        let end = run.ttft_ms.points.last().unwrap();
        assert_eq!((end.ms, end.share), (900.0, 0.9));
        assert!((run.ttft_ms.quantile(0.5).unwrap() - 500.0).abs() < 6.0);
        assert!((run.tbt_ms.quantile(0.5).unwrap() - 1_000.0).abs() < 12.0);
        assert_eq!(run.ttft_ms.quantile(0.9), Some(900.0));
        assert_eq!(run.ttft_ms.quantile(0.95), None);
        assert!(run.ttft_ms.points.len() < 200);
        assert!(Distribution::new(Vec::new(), 10).points.is_empty());
    }

    #[test]
    fn a_timeline_counts_arrivals_and_holds_what_was_sampled_last() {
        let outcomes: Vec<_> = [0, 100, 200, 2_500].map(|at| outcome(at, Fate::Unfinished)).into();
        let sample = |queued| FleetSample { requests_queued: queued, ..FleetSample::default() };
        let samples = [(0, 4.0), (500, 6.0), (1_500, 1.0)]
            .map(|(at, q)| (Duration::from_millis(at), sample(q)));
        let moments = timeline(&outcomes, &samples);
        let shown: Vec<_> =
            moments.iter().map(|m| (m.at_s, m.arrivals_per_s, m.fleet.requests_queued)).collect();
        assert_eq!(shown, [(0.5, 3.0, 5.0), (1.5, 0.0, 1.0), (2.5, 1.0, 1.0)]);
        assert_eq!(timeline(&[], &[]).len(), 1);
    }
}
