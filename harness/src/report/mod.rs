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

use std::{fs, io, path::Path};

use serde::Serialize;

pub use self::table::to_csv;
use crate::{
    outcome::Slo,
    summary::{FleetSample, Ranks, RunFacts, Slot, Summary, Tally, Timeline, WorkersSeconds},
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
    pub fn new(tally: &Tally, facts: &RunFacts) -> Self {
        Self {
            ttft_ms: Distribution::new(&tally.ttft_ms().ranks(), tally.requests()),
            tbt_ms: Distribution::new(&tally.tbt_ms().ranks(), tally.requests()),
            timeline: timeline(tally.timeline()),
            summary: tally.summary(facts),
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
    pub fn new(values: &Ranks, requests: usize) -> Self {
        const POINTS: usize = 160;
        let count = values.count();
        let ranks = (1..=POINTS).map(|i| (i * count).div_ceil(POINTS)).filter(|rank| *rank > 0);
        let mut ranks: Vec<usize> = std::iter::once(1).chain(ranks).collect();
        // The last hundredth is what an SLO of 99 % asks about.
        ranks.push((995 * count).div_ceil(1_000));
        ranks.sort_unstable();
        ranks.dedup();
        let point = |rank: usize| {
            let share = ratio(rank, requests);
            values.value(rank).map(|ms| DistributionPoint { ms, share })
        };
        Self { points: ranks.into_iter().filter_map(point).collect() }
    }

    /// What the given share of all requests took at most; `None` where fewer got there.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        self.points.iter().find(|point| point.share >= share - 1e-9).map(|point| point.ms)
    }
}

fn timeline(timeline: &Timeline) -> Vec<Moment> {
    const SLICES: usize = 200;
    let (seconds, slots) = timeline.slices(SLICES);
    let mut held = FleetSample::default();
    let moment = |(i, slot): (usize, Slot)| {
        held = slot.fleet().unwrap_or(held);
        Moment {
            at_s: (float(i) + 0.5) * seconds,
            arrivals_per_s: float(slot.arrivals) / seconds,
            fleet: held,
        }
    };
    slots.into_iter().enumerate().map(moment).collect()
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { float(part) / float(whole) }
}

#[allow(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn float(count: usize) -> f64 {
    count as f64
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
    use std::time::Duration;

    use super::*;
    use crate::{
        outcome::{Fate, Latencies, Outcome},
        summary::Spread,
    };

    const SLO: Slo = Slo { ttft_ms: 1.0, ttft_prefill_factor: 0.0, itl_ms: 1.0 };

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
        let tally = Tally::of(&outcomes, &[], &[], &SLO, |_| 0.0);
        let run = RunFindings::new(&tally, &RunFacts::default());
        let end = run.ttft_ms.points.last().unwrap();
        assert_eq!((end.ms, end.share), (900.0, 0.9));
        assert!((run.ttft_ms.quantile(0.5).unwrap() - 500.0).abs() < 6.0);
        assert!((run.tbt_ms.quantile(0.5).unwrap() - 1_000.0).abs() < 12.0);
        assert_eq!(run.ttft_ms.quantile(0.9), Some(900.0));
        assert_eq!(run.ttft_ms.quantile(0.95), None);
        assert!(run.ttft_ms.points.len() < 200);
        assert!(Distribution::new(&Spread::default().ranks(), 10).points.is_empty());
    }

    #[test]
    fn a_timeline_counts_arrivals_and_holds_what_was_sampled_last() {
        let sample = |queued| FleetSample { requests_queued: queued, ..FleetSample::default() };
        let samples = [(0, 4.0), (500, 6.0), (1_500, 1.0)]
            .map(|(at, q)| (Duration::from_millis(at), sample(q)));
        let outcomes = [0, 100, 200, 2_500].map(|at| outcome(at, Fate::Unfinished));
        let tally = Tally::of(&outcomes, &samples, &[], &SLO, |_| 0.0);
        let moments = timeline(tally.timeline());
        let shown: Vec<_> =
            moments.iter().map(|m| (m.at_s, m.arrivals_per_s, m.fleet.requests_queued)).collect();
        assert_eq!(shown, [(0.5, 3.0, 5.0), (1.5, 0.0, 1.0), (2.5, 1.0, 1.0)]);
        assert!(timeline(Tally::default().timeline()).is_empty());
    }
}
