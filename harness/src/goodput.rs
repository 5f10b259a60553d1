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
    fleet::{Hope, Mode, Setup, SetupError, simulate_while_hopeful},
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
    /// The same for 99 %, where it was sought.
    pub goodput_rps_p99: Option<f64>,
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

/// What is sought of one setup.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sought {
    /// As in [`Goal`].
    pub min_decile: f64,
    /// The load for 99 % too, which takes as long again.
    pub p99: bool,
    /// A load that is near the answer, where one is known. It only saves runs.
    pub near: Option<f64>,
}

/// How finely the highest load is found, as a part of it.
const PRECISION: f64 = 0.01;
/// Loads that are tried, relative to that of the trace.
const LOWEST_SCALE: f64 = 1.0 / 256.0;
const HIGHEST_SCALE: f64 = 65_536.0;

/// Searches the load of a trace that one setup holds, for 90 %, and for 99 %. `progress` is told each load
/// that was tried.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn goodput(
    trace: &Trace,
    setup: &Setup,
    sought: Sought,
    threads: usize,
    progress: &(dyn Fn(&LoadPoint) + Sync),
) -> Result<Goodput, SetupError> {
    setup.check()?;
    let Sought { min_decile, p99, near } = sought;
    let mut search = Search { trace, setup, threads: threads.max(1), progress, points: Vec::new() };
    let (scale, summary) = search.highest(Goal { attainment: 0.9, min_decile }, near)?;
    let rps = |scale: f64, summary: &Option<Summary>| {
        summary.as_ref().map_or(0.0, |_| trace.at(scale, setup.seed).rate_rps())
    };
    let goodput_rps_p99 = if p99 {
        let near = (scale > 0.0).then_some(scale * 0.7);
        let (scale, summary) = search.highest(Goal { attainment: 0.99, min_decile }, near)?;
        Some(rps(scale, &summary))
    } else {
        None
    };
    let mut points = search.points;
    points.sort_by(|a, b| a.scale.total_cmp(&b.scale));
    Ok(Goodput {
        goodput_rps: rps(scale, &summary),
        goodput_rps_p99,
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

/// Only the load for 90 %, of the trace's own, and how that run went; `near` as in [`Sought`].
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn highest_scale(
    trace: &Trace,
    setup: &Setup,
    goal: Goal,
    near: Option<f64>,
) -> Result<(f64, Option<Summary>), SetupError> {
    setup.check()?;
    let mut search = Search { trace, setup, threads: 1, progress: &|_| {}, points: Vec::new() };
    search.highest(goal, near)
}

/// From one load to another until one is held and a higher one is not. From a guess in strides that are short at
/// first, so that a good guess is rewarded and a bad one not punished.
#[derive(Clone, Copy, Debug)]
struct Strides {
    scale: f64,
    stride: f64,
    held: Option<f64>,
    failed: Option<f64>,
}

impl Strides {
    fn from(near: Option<f64>) -> Self {
        let (scale, stride) = near.map_or((1.0, 2.0), |near| (near, 1.04));
        Self { scale, stride, held: None, failed: None }
    }

    /// The next load to be tried; none where both are found, or nothing is.
    fn next(&self) -> Option<f64> {
        let is_open = self.held.is_none() || self.failed.is_none();
        let is_there = (LOWEST_SCALE..=HIGHEST_SCALE).contains(&self.scale);
        (is_open && is_there).then_some(self.scale)
    }

    fn tried(&mut self, holds: bool) {
        if holds {
            self.held = Some(self.scale);
            self.scale *= self.stride;
        } else {
            self.failed = Some(self.scale);
            self.scale /= self.stride;
        }
        self.stride = f64::min(2.0, self.stride * self.stride);
    }
}

/// A load, and how its run went if it met the goal.
type Tried = Result<(LoadPoint, Option<Summary>), SetupError>;

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
    /// The loads that count do not depend on the number of threads: each round has the same three inner points
    /// up to the first that fails, whoever computes them.
    fn highest(
        &mut self,
        goal: Goal,
        near: Option<f64>,
    ) -> Result<(f64, Option<Summary>), SetupError> {
        let mut best = None;
        let mut strides = Strides::from(near);
        while let Some(scale) = strides.next() {
            let held = self.try_upwards(&[scale], goal)?.pop();
            strides.tried(held.is_some());
            best = held.map(|summary| (scale, summary)).or(best);
        }
        let (mut low, mut high) = match (best, strides.failed) {
            (Some(low), Some(high)) => (low, high),
            // Of a few requests any load is held.
            (Some((scale, summary)), None) => return Ok((scale, Some(summary))),
            (None, _) => return Ok((0.0, None)),
        };
        while high / low.0 > 1.0 + PRECISION {
            let ratio = (high / low.0).powf(0.25);
            let inner = [low.0 * ratio, low.0 * ratio * ratio, high / ratio];
            let held = self.try_upwards(&inner, goal)?;
            high = inner.get(held.len()).copied().unwrap_or(high);
            low = inner.into_iter().zip(held).next_back().unwrap_or(low);
        }
        Ok((low.0, Some(low.1)))
    }

    /// Of these loads, the lowest first, the summaries of those that meet the goal before the first that does not:
    /// attainment need not fall evenly, and the first that fails ends what is trusted.
    fn try_upwards(&mut self, scales: &[f64], goal: Goal) -> Result<Vec<Summary>, SetupError> {
        let mut ahead = if self.threads > 1 && scales.len() > 1 {
            self.try_at_once(scales, goal).into_iter()
        } else {
            Vec::new().into_iter()
        };
        let mut held = Vec::with_capacity(scales.len());
        for scale in scales {
            let (point, summary) =
                ahead.next().flatten().unwrap_or_else(|| self.try_one(*scale, goal))?;
            self.points.push(point);
            match summary {
                Some(summary) => held.push(summary),
                None => break,
            }
        }
        Ok(held)
    }

    fn try_at_once(&self, scales: &[f64], goal: Goal) -> Vec<Option<Tried>> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(scales.iter().map(|_| None).collect::<Vec<_>>());
        thread::scope(|scope| {
            for _ in 0..self.threads.min(scales.len()) {
                scope.spawn(|| {
                    loop {
                        let turn = next.fetch_add(1, Ordering::Relaxed);
                        let Some(scale) = scales.get(turn) else { break };
                        let tried = self.try_one(*scale, goal);
                        let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                        results[turn] = Some(tried);
                    }
                });
            }
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_one(&self, scale: f64, goal: Goal) -> Tried {
        let load = self.trace.at(scale, self.setup.seed);
        let hope = Hope::of(&load.extent(), goal.attainment, goal.min_decile);
        let run = simulate_while_hopeful(load, self.setup, hope)?;
        let mut point = LoadPoint {
            scale,
            rps: load.rate_rps(),
            attainment: 0.0,
            attainment_longest_input_decile: 0.0,
            attainment_longest_output_decile: 0.0,
            is_met: false,
        };
        if run.given_up {
            (self.progress)(&point);
            return Ok((point, None));
        }
        let summary = run.summary();
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
/// `near` as in [`Sought`].
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn best_of(
    trace: &Trace,
    setups: &[Setup],
    goal: Goal,
    near: Option<f64>,
    threads: usize,
) -> Result<Tuned, SetupError> {
    for setup in setups {
        setup.check()?;
    }
    let mut held = vec![0.0; setups.len()];
    let mut left: Vec<usize> = (0..setups.len()).collect();
    let mut who_hold_more = |left: &mut Vec<usize>, scale: f64| {
        let holding = who_hold(trace, setups, left, scale, goal, threads)?;
        let is_held = !holding.is_empty();
        if is_held {
            for place in &holding {
                held[*place] = scale;
            }
            *left = holding;
        }
        Ok::<_, SetupError>(is_held)
    };
    let mut strides = Strides::from(near);
    while let (2.., Some(scale)) = (left.len(), strides.next()) {
        let is_held = who_hold_more(&mut left, scale)?;
        strides.tried(is_held);
    }
    if let (Some(mut low), Some(mut high)) = (strides.held, strides.failed) {
        while left.len() > 1 && high / low > 1.0 + PRECISION {
            let scale = f64::sqrt(low * high);
            let is_held = who_hold_more(&mut left, scale)?;
            (low, high) = if is_held { (scale, high) } else { (low, scale) };
        }
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
