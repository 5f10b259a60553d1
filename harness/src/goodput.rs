//! The highest load at which enough requests still meet their SLOs.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use serde::Serialize;

use crate::{
    fleet::{Mode, Setup, SetupError, simulate_while_hopeful},
    summary::Summary,
    trace::Trace,
};

/// What counts as good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Part of all requests that meet both SLOs.
    pub attainment: f64,
    /// Part of the tenth of requests with the longest prompts, and of those with the longest answers;
    /// 0 where nothing is asked of them.
    pub min_decile: f64,
}

/// One load that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LoadPoint {
    pub scale: f64,
    pub rps: f64,
    pub attainment: f64,
    pub attainment_longest_input_decile: f64,
    pub attainment_longest_output_decile: f64,
    /// Whether the goal was met. Of a load that was given up the shares are not known, and 0.
    pub is_met: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goodput {
    /// Requests per second at the highest load at which 90 % of them meet both SLOs.
    pub goodput_rps: f64,
    /// The same for 99 %.
    pub goodput_rps_p99: f64,
    /// Of the trace's load, at `goodput_rps`.
    pub scale: f64,
    pub mode: String,
    pub chunk_tokens: u32,
    pub attainment_by_phase: BTreeMap<String, f64>,
    /// In the order of load.
    pub points: Vec<LoadPoint>,
    /// At `goodput_rps`; none where no load met the goal.
    pub summary: Option<Summary>,
}

/// How finely the highest load is found, as a part of it.
const PRECISION: f64 = 0.01;
/// Loads that are tried, relative to that of the trace.
const LOWEST_SCALE: f64 = 1.0 / 256.0;
const HIGHEST_SCALE: f64 = 65_536.0;

/// Bisects the load of a trace on one setup, for 90 % and for 99 %. `progress` is told each load that
/// was tried.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn goodput(
    trace: &Trace,
    setup: &Setup,
    min_decile: f64,
    threads: usize,
    progress: &(dyn Fn(&LoadPoint) + Sync),
) -> Result<Goodput, SetupError> {
    setup.check()?;
    let mut search = Search { trace, setup, threads: threads.max(1), progress, points: Vec::new() };
    let (scale, summary) = search.highest(Goal { attainment: 0.9, min_decile }, 1.0)?;
    let strict = Goal { attainment: 0.99, min_decile: min_decile.max(0.0) };
    let start = if scale > 0.0 { scale * 0.7 } else { 1.0 };
    let (strict_scale, strict_summary) = search.highest(strict, start)?;
    let rps = |scale: f64, summary: &Option<Summary>| {
        summary.as_ref().map_or(0.0, |_| trace.scaled(scale, setup.seed).rate_rps())
    };
    let mut points = search.points;
    points.sort_by(|a, b| a.scale.total_cmp(&b.scale));
    Ok(Goodput {
        goodput_rps: rps(scale, &summary),
        goodput_rps_p99: rps(strict_scale, &strict_summary),
        scale,
        mode: setup.mode.to_string(),
        chunk_tokens: setup.chunk_tokens,
        attainment_by_phase: summary
            .as_ref()
            .map(|summary| summary.attainment_by_phase.clone())
            .unwrap_or_default(),
        points,
        summary,
    })
}

/// Only the load for 90 %: what a comparison of many setups needs.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn highest_scale(
    trace: &Trace,
    setup: &Setup,
    goal: Goal,
    start: f64,
) -> Result<(f64, Option<Summary>), SetupError> {
    setup.check()?;
    let mut search = Search { trace, setup, threads: 1, progress: &|_| {}, points: Vec::new() };
    search.highest(goal, start)
}

struct Search<'a> {
    trace: &'a Trace,
    setup: &'a Setup,
    threads: usize,
    progress: &'a (dyn Fn(&LoadPoint) + Sync),
    points: Vec<LoadPoint>,
}

impl Search<'_> {
    /// The highest scale that meets the goal, and how that run went; 0 where none does.
    ///
    /// The loads that are tried do not depend on the number of threads: each round tries the same three
    /// inner points, whoever computes them.
    fn highest(&mut self, goal: Goal, start: f64) -> Result<(f64, Option<Summary>), SetupError> {
        let mut best: Option<(f64, Summary)> = None;
        let mut worst = None;
        let mut scale = start;
        while best.is_none() || worst.is_none() {
            match self.try_all(&[scale], goal)?.pop().flatten() {
                Some(summary) => {
                    best = Some((scale, summary));
                    scale = worst.map_or(scale * 2.0, |_| scale);
                }
                None => {
                    worst = Some(scale);
                    scale = if best.is_some() { scale } else { scale / 2.0 };
                }
            }
            if !(LOWEST_SCALE..=HIGHEST_SCALE).contains(&scale) {
                break;
            }
        }
        let (mut low, mut high) = match (best, worst) {
            (Some(low), Some(high)) => (low, high),
            // Of a few requests any load is held.
            (Some((scale, summary)), None) => return Ok((scale, Some(summary))),
            (None, _) => return Ok((0.0, None)),
        };
        while high / low.0 > 1.0 + PRECISION {
            let ratio = (high / low.0).powf(0.25);
            let inner = [low.0 * ratio, low.0 * ratio * ratio, high / ratio];
            let tried = self.try_all(&inner, goal)?;
            // Attainment need not fall evenly: the first that fails ends what is trusted.
            for (scale, summary) in inner.into_iter().zip(tried) {
                match summary {
                    Some(summary) => low = (scale, summary),
                    None => {
                        high = scale;
                        break;
                    }
                }
            }
        }
        Ok((low.0, Some(low.1)))
    }

    /// Of each load its summary, if it meets the goal.
    fn try_all(&mut self, scales: &[f64], goal: Goal) -> Result<Vec<Option<Summary>>, SetupError> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(vec![None; scales.len()]);
        let work = || {
            while let Some(scale) = scales.get(next.fetch_add(1, Ordering::Relaxed)) {
                let tried = self.try_one(*scale, goal);
                let place = scales.iter().position(|other| other == scale).unwrap_or_default();
                results.lock().unwrap_or_else(PoisonError::into_inner)[place] = Some(tried);
            }
        };
        if self.threads == 1 || scales.len() == 1 {
            work();
        } else {
            thread::scope(|scope| {
                for _ in 0..self.threads.min(scales.len()) {
                    scope.spawn(work);
                }
            });
        }
        let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut met = Vec::with_capacity(scales.len());
        for tried in results.into_iter().flatten() {
            let (point, summary) = tried?;
            self.points.push(point);
            met.push(summary);
        }
        Ok(met)
    }

    fn try_one(&self, scale: f64, goal: Goal) -> Result<(LoadPoint, Option<Summary>), SetupError> {
        let trace = self.trace.scaled(scale, self.setup.seed);
        // So many may miss.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let most_misses = ((1.0 - goal.attainment) * trace.requests.len() as f64).floor() as usize;
        let run = simulate_while_hopeful(&trace, self.setup, most_misses)?;
        let mut point = LoadPoint {
            scale,
            rps: trace.rate_rps(),
            attainment: 0.0,
            attainment_longest_input_decile: 0.0,
            attainment_longest_output_decile: 0.0,
            is_met: false,
        };
        if run.given_up {
            (self.progress)(&point);
            return Ok((point, None));
        }
        let summary = run.summary(&trace, self.setup);
        point.attainment = summary.attainment;
        point.attainment_longest_input_decile = summary.attainment_longest_input_decile;
        point.attainment_longest_output_decile = summary.attainment_longest_output_decile;
        point.is_met = summary.attainment >= goal.attainment
            && summary.attainment_longest_input_decile >= goal.min_decile
            && summary.attainment_longest_output_decile >= goal.min_decile;
        (self.progress)(&point);
        let is_met = point.is_met;
        Ok((point, is_met.then_some(summary)))
    }
}

/// Chunk budgets that are tried to tune an aggregated worker.
pub const CHUNK_TOKENS: [u32; 8] = [256, 512, 768, 1024, 1536, 2048, 4096, 8192];

/// The best of several setups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuned {
    /// Its place.
    pub best: usize,
    /// Of each setup the highest load that it was seen to hold, as a part of the trace's; 0 where none.
    /// A setup is given up where another holds more.
    pub held: Vec<f64>,
}

/// The best of several setups, by goodput at 90 %; the first among equals. All are tried at one load after
/// another, and who does not hold one that another holds is out: who loses costs a few runs, not a search.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn best_of(
    trace: &Trace,
    setups: &[Setup],
    goal: Goal,
    threads: usize,
) -> Result<Tuned, SetupError> {
    for setup in setups {
        setup.check()?;
    }
    let mut held = vec![0.0; setups.len()];
    let mut left: Vec<usize> = (0..setups.len()).collect();
    let (mut scale, mut lowest, mut highest) = (1.0, None, None);
    while left.len() > 1 && (LOWEST_SCALE..=HIGHEST_SCALE).contains(&scale) {
        let holding = who_hold(trace, setups, &left, scale, goal, threads)?;
        if holding.is_empty() {
            highest = Some(scale);
        } else {
            for place in &holding {
                held[*place] = scale;
            }
            left = holding;
            lowest = Some(scale);
        }
        scale = match (lowest, highest) {
            (Some(low), None) => low * 2.0,
            (None, _) => scale / 2.0,
            (Some(low), Some(high)) if high / low > 1.0 + PRECISION => f64::sqrt(low * high),
            (Some(_), Some(_)) => break,
        };
    }
    Ok(Tuned { best: left.first().copied().unwrap_or_default(), held })
}

/// Of the setups in these places, in their order, those that meet the goal at this load.
fn who_hold(
    trace: &Trace,
    setups: &[Setup],
    places: &[usize],
    scale: f64,
    goal: Goal,
    threads: usize,
) -> Result<Vec<usize>, SetupError> {
    let next = AtomicUsize::new(0);
    let holds = Mutex::new(vec![None; places.len()]);
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, places.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    let Some(setup) = places.get(turn).and_then(|place| setups.get(*place)) else {
                        break;
                    };
                    let search =
                        Search { trace, setup, threads: 1, progress: &|_| {}, points: Vec::new() };
                    let tried = search.try_one(scale, goal).map(|(point, _)| point.is_met);
                    holds.lock().unwrap_or_else(PoisonError::into_inner)[turn] = Some(tried);
                }
            });
        }
    });
    let holds = holds.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut holding = Vec::new();
    for (place, tried) in places.iter().zip(holds) {
        if tried.unwrap_or(Ok(false))? {
            holding.push(*place);
        }
    }
    Ok(holding)
}

/// Every way to part so many workers into two pools.
pub fn splits(workers: u32) -> impl Iterator<Item = Mode> {
    (1..workers).map(move |prefill| Mode::Static { prefill, decode: workers - prefill })
}
