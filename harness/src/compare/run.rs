//! All cells of an experiment, on all cores.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use baton_engine::sim::Profile;
use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::{
    experiment::{Asked, Experiment, TraceFile, What},
    way::Way,
};
use crate::{
    fleet::{Setup, SetupError, simulate},
    goodput::{Goal, Goodput, Sought, best_of, goodput},
    outcome::Slo,
    report::{
        Contender, GoodputFindings, Input, Load, LoadPoint, Origin, Report, RunFindings, Scenario,
        Searched,
        number::{figures, percent},
    },
    trace::Trace,
};

/// Around the baseline's goodput, to draw how success falls with load.
const LOADS: [f64; 9] = [0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5];
/// Of [`LOADS`], that of the runs shown in full.
const SHOWN: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error("{} cannot be read: {reason}", file.display())]
    Unreadable { file: PathBuf, reason: io::Error },
}

/// How far an experiment is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub done: usize,
    pub total: usize,
    pub doing: &'static str,
    /// What was just found, in a line: an experiment of hours that is broken off leaves that much.
    pub found: Option<String>,
}

/// One trace, fleet and SLO.
struct Cell<'e> {
    trace: &'e TraceFile,
    /// Of the trace and the SLO in the experiment.
    places: [usize; 2],
    workers: u32,
    slo: Slo,
    asked: Asked,
}

impl Cell<'_> {
    fn goal(&self) -> Goal {
        Goal { attainment: 0.9, min_decile: self.asked.min_decile.unwrap_or(0.0) }
    }
}

/// One contender of one cell, with the setups that it may come to.
struct Entry<'e> {
    cell: usize,
    way: &'e Way,
    candidates: Vec<Setup>,
}

/// Runs an experiment. `command` is what was typed, for the report.
///
/// # Errors
/// A setup that cannot be; a file that has gone since it was read.
pub fn run(
    experiment: &Experiment,
    command: &str,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report, CompareError> {
    let cells = cells(experiment);
    let entries = entries(experiment, &cells);
    let seeds = experiment.seeds.as_slice();
    let scale = match experiment.what {
        What::Goodput => None,
        What::Simulate { scale } => Some(scale),
    };
    let searched = entries.iter().filter(|entry| entry.candidates.len() > 1).count();
    let found = if scale.is_none() { entries.len() * seeds.len() } else { 0 };
    let draws = scale.is_none() && experiment.draws_loads;
    let factors: &[f64] = if draws { &LOADS } else { &LOADS[SHOWN..=SHOWN] };
    let runs = entries.len() * factors.len();
    let ticker = Ticker { done: AtomicUsize::new(0), total: searched + found + runs, progress };

    let found = search(experiment, &cells, &entries, &ticker)?;
    let (tuned, goodputs): (Vec<Tuned>, Vec<Vec<Goodput>>) = found.into_iter().unzip();
    let loads: Vec<Load> = (0..cells.len())
        .map(|cell| {
            let contenders = || (0..entries.len()).filter(|i| entries[*i].cell == cell);
            load(
                &cells[cell].trace.trace,
                seeds,
                scale,
                contenders().map(|i| (entries[i].way, &*goodputs[i])),
            )
        })
        .collect();
    let jobs: Vec<(usize, f64)> =
        (0..entries.len()).flat_map(|i| factors.iter().map(move |factor| (i, *factor))).collect();
    let ran = jobs.par_iter().map(|(i, factor)| {
        let (cell, setup) = (entries[*i].cell, &tuned[*i].setup);
        let load = cells[cell].trace.trace.at(loads[cell].scale * factor, setup.seed);
        let run = simulate(load, setup)?;
        let findings = RunFindings::new(&run.tally, &run.facts);
        let attainment = findings.summary.attainment;
        let point = LoadPoint { offered_rps: load.rate_rps(), attainment };
        let findings = (*factor == LOADS[SHOWN]).then_some(findings);
        let line = findings.is_some().then(|| {
            let (cell, way) = (name(experiment, &cells[cell]), entries[*i].way);
            let (share, rps) = (100.0 * attainment, figures(point.offered_rps));
            format!("{cell}: {way} {share:.1} % in time at {rps} requests/s")
        });
        ticker.found("running", line);
        Ok((*i, point, findings))
    });
    let ran: Vec<(usize, LoadPoint, Option<RunFindings>)> =
        ran.collect::<Result<_, SetupError>>()?;

    let mut contenders: Vec<Contender> = Vec::new();
    for (i, (entry, tuned)) in entries.iter().zip(tuned).enumerate() {
        let grid = ran.iter().filter(|r| r.0 == i).map(|r| r.1);
        let found = goodputs.get(i).filter(|found| !found.is_empty());
        let found = found.map(|found| findings(found, grid));
        contenders.push(Contender {
            mode: entry.way.to_string(),
            setup: entry.way.describe(&tuned.setup),
            searched: tuned.searched,
            goodput: found,
            run: None,
        });
    }
    for (i, _, findings) in ran {
        if let (Some(contender), Some(findings)) = (contenders.get_mut(i), findings) {
            contender.run = Some(findings);
        }
    }
    report(experiment, command, &cells, &entries, loads, contenders)
}

fn cells(experiment: &Experiment) -> Vec<Cell<'_>> {
    let mut cells = Vec::new();
    for (place, trace) in experiment.traces.iter().enumerate() {
        for workers in &experiment.workers {
            let slos = experiment.slos.iter().zip(&experiment.slo_traces).enumerate();
            for (slo_place, (slo, of)) in slos {
                if of.as_ref().is_some_and(|of| !of.contains(&place)) {
                    continue;
                }
                for asked in &experiment.goals {
                    let places = [place, slo_place];
                    let (workers, slo, asked) = (*workers, *slo, *asked);
                    cells.push(Cell { trace, places, workers, slo, asked });
                }
            }
        }
    }
    cells
}

fn entries<'e>(experiment: &'e Experiment, cells: &[Cell<'_>]) -> Vec<Entry<'e>> {
    let mut entries = Vec::new();
    for (i, cell) in cells.iter().enumerate() {
        for way in &experiment.ways {
            // The mode is each candidate's own; this one only carries the rest.
            let mode = crate::fleet::Mode::Aggregated;
            let mut plain = Setup::new(experiment.profile.1.clone(), cell.workers, mode, cell.slo);
            plain.late = cell.asked.late;
            experiment.conditions.apply(&mut plain);
            plain.reserves_output = experiment.reserves_output;
            plain.seed = experiment.seeds.first().copied().unwrap_or_default();
            entries.push(Entry { cell: i, way, candidates: way.candidates(&plain) });
        }
    }
    entries
}

struct Ticker<'p> {
    done: AtomicUsize,
    total: usize,
    progress: &'p (dyn Fn(Progress) + Sync),
}

impl Ticker<'_> {
    fn tick(&self, doing: &'static str) {
        self.found(doing, None);
    }

    fn found(&self, doing: &'static str, found: Option<String>) {
        let done = 1 + self.done.fetch_add(1, Ordering::Relaxed);
        (self.progress)(Progress { done, total: self.total, doing, found });
    }
}

/// The best of an entry's candidates, and what all of them served.
struct Tuned {
    setup: Setup,
    searched: Vec<Searched>,
}

/// Of each entry the best of its candidates and, where goodput is asked for, what that one serves with each
/// seed.
///
/// The entries of one trace, SLO and way are a chain: what one serves is where the search of the next begins.
/// Chains do not know of one another, so that a mode's figures are the same whatever it is compared with.
fn search(
    experiment: &Experiment,
    cells: &[Cell<'_>],
    entries: &[Entry<'_>],
    ticker: &Ticker<'_>,
) -> Result<Vec<(Tuned, Vec<Goodput>)>, SetupError> {
    let ways = experiment.ways.len();
    let mut chains: BTreeMap<([usize; 2], usize), Vec<usize>> = BTreeMap::new();
    for (i, entry) in entries.iter().enumerate() {
        chains.entry((cells[entry.cell].places, i % ways)).or_default().push(i);
    }
    let chains: Vec<Vec<usize>> = chains.into_values().collect();
    let found = chains.par_iter().map(|chain| {
        let mut found: Vec<(usize, Tuned, Vec<Goodput>)> = Vec::with_capacity(chain.len());
        for i in chain {
            let cell = &cells[entries[*i].cell];
            // Of the cell before: as many requests for each worker.
            let near = found.last().and_then(|(before, _, goodputs)| {
                let before = &cells[entries[*before].cell];
                let scale =
                    goodputs.first().map(|found| found.scale).filter(|scale| *scale > 0.0)?;
                Some(scale * f64::from(cell.workers) / f64::from(before.workers))
            });
            let (tuned, near) = tune(cell, &entries[*i], near, ticker)?;
            let goodputs = match experiment.what {
                What::Goodput => {
                    goodputs(experiment, cell, entries[*i].way, &tuned.setup, near, ticker)?
                }
                What::Simulate { .. } => Vec::new(),
            };
            found.push((*i, tuned, goodputs));
        }
        Ok(found)
    });
    let mut found: Vec<_> =
        found.collect::<Result<Vec<_>, SetupError>>()?.into_iter().flatten().collect();
    found.sort_by_key(|(i, ..)| *i);
    Ok(found.into_iter().map(|(_, tuned, goodputs)| (tuned, goodputs)).collect())
}

/// By goodput, with the first seed; the first among equals. And a load that is near the most it holds.
fn tune(
    cell: &Cell<'_>,
    Entry { way, candidates, .. }: &Entry<'_>,
    near: Option<f64>,
    ticker: &Ticker<'_>,
) -> Result<(Tuned, Option<f64>), SetupError> {
    if candidates.len() < 2 {
        return Ok((Tuned { setup: candidates[0].clone(), searched: Vec::new() }, near));
    }
    let trace = &cell.trace.trace;
    let tuned = best_of(trace, candidates, cell.goal(), near, 1)?;
    let searched = candidates.iter().zip(&tuned.held).map(|(candidate, scale)| Searched {
        setup: way.describe(candidate),
        goodput_rps: match scale {
            0.0 => 0.0,
            scale => trace.at(*scale, candidate.seed).rate_rps(),
        },
    });
    ticker.tick("tuning");
    let held = Some(tuned.held[tuned.best]).filter(|scale| *scale > 0.0);
    Ok((Tuned { setup: candidates[tuned.best].clone(), searched: searched.collect() }, held))
}

/// With each seed.
fn goodputs(
    experiment: &Experiment,
    cell: &Cell<'_>,
    way: &Way,
    setup: &Setup,
    mut near: Option<f64>,
    ticker: &Ticker<'_>,
) -> Result<Vec<Goodput>, SetupError> {
    let mut goodputs = Vec::with_capacity(experiment.seeds.len());
    for seed in &experiment.seeds {
        let setup = Setup { seed: *seed, ..setup.clone() };
        let sought = Sought { min_decile: cell.goal().min_decile, p99: experiment.finds_p99, near };
        let found = goodput(&cell.trace.trace, &setup, sought, 1, &|_| {})?;
        near = Some(found.scale).filter(|scale| *scale > 0.0);
        let (cell, with, rps) =
            (name(experiment, cell), way.describe(&setup), figures(found.goodput_rps));
        let line = format!("{cell}: {way} {rps} requests/s ({with}, seed {seed})");
        ticker.found("searching the highest load", Some(line));
        goodputs.push(found);
    }
    Ok(goodputs)
}

/// The load at which all contenders of a cell are shown: the most that the baseline holds, so that it
/// is seen who does better and who worse; if it holds none, of the first that holds any.
fn load<'g>(
    trace: &Trace,
    seeds: &[u64],
    scale: Option<f64>,
    contenders: impl Iterator<Item = (&'g Way, &'g [Goodput])>,
) -> Load {
    let seed = seeds.first().copied().unwrap_or_default();
    let at = |scale: f64, reason: String| Load {
        scale,
        offered_rps: trace.at(scale, seed).rate_rps(),
        reason,
    };
    if let Some(scale) = scale {
        return at(scale, "as the experiment asks".to_owned());
    }
    let held: Vec<(&Way, f64)> = contenders
        .filter_map(|(way, found)| Some((way, found.first()?.scale)))
        .filter(|(_, scale)| *scale > 0.0)
        .collect();
    let first_held = held.first().map(|(way, scale)| (*way, *scale));
    match first_held {
        Some((way, scale)) => at(scale, format!("the most that {way} holds")),
        None => at(1.0, "no mode holds any load".to_owned()),
    }
}

fn findings(found: &[Goodput], grid: impl Iterator<Item = LoadPoint>) -> GoodputFindings {
    let rates = || found.iter().map(|found| found.goodput_rps);
    let mean = |sum: f64| sum / found.len().max(1) as f64;
    // What the search gave up has no shares to show.
    let whole = found.first().into_iter().flat_map(|found| &found.points);
    let whole = whole.filter(|point| point.attainment > 0.0);
    let mut points: Vec<LoadPoint> = whole
        .map(|point| LoadPoint { offered_rps: point.rps, attainment: point.attainment })
        .chain(grid)
        .collect();
    points.sort_by(|a, b| a.offered_rps.total_cmp(&b.offered_rps));
    points.dedup_by(|a, b| a.offered_rps == b.offered_rps);
    GoodputFindings {
        rps: mean(rates().sum()),
        rps_p99: found.iter().map(|found| found.goodput_rps_p99).sum::<Option<f64>>().map(mean),
        range: [rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max)],
        points,
    }
}

fn report(
    experiment: &Experiment,
    command: &str,
    cells: &[Cell<'_>],
    entries: &[Entry<'_>],
    loads: Vec<Load>,
    contenders: Vec<Contender>,
) -> Result<Report, CompareError> {
    let mut scenarios = Vec::new();
    let mut contenders: Vec<Option<Contender>> = contenders.into_iter().map(Some).collect();
    for ((i, cell), load) in cells.iter().enumerate().zip(loads) {
        let own = entries.iter().zip(&mut contenders).filter(|(entry, _)| entry.cell == i);
        scenarios.push(Scenario {
            name: name(experiment, cell),
            trace: inspect_trace(cell.trace)?,
            workers: Some(cell.workers),
            slo: cell.slo,
            late: Some(cell.asked.late.to_string()),
            min_decile: cell.asked.min_decile,
            load: Some(load),
            contenders: own.filter_map(|(_, contender)| contender.take()).collect(),
        });
    }
    let (file, profile) = &experiment.profile;
    Ok(Report {
        title: experiment.title.clone(),
        origin: Origin {
            command: command.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seeds: experiment.seeds.clone(),
            profile: Some(inspect_profile(file, profile)?),
            endpoint: None,
            experiment: Some(experiment.text.clone()),
        },
        scenarios,
    })
}

/// One run, or one search and a run at the load that it found, as a report of its own.
#[derive(Debug)]
pub struct Single<'s> {
    pub trace: &'s TraceFile,
    pub profile_file: &'s Path,
    pub setup: &'s Setup,
    /// Of the trace's own load, in `run`.
    pub scale: f64,
    pub goodput: Option<&'s Goodput>,
    pub min_decile: Option<f64>,
    pub run: Option<RunFindings>,
}

impl Single<'_> {
    /// # Errors
    /// A file that has gone since it was read.
    pub fn into_report(self, command: &str) -> Result<Report, CompareError> {
        let Self { trace, setup, scale, goodput, .. } = self;
        let offered_rps = trace.trace.at(scale, setup.seed).rate_rps();
        let reason = match goodput {
            Some(_) => "the most that it holds",
            None => "as it was asked",
        };
        let contender = Contender {
            mode: setup.mode.to_string(),
            setup: format!("{} tokens a step, by {}", setup.chunk_tokens, setup.policy_name()),
            searched: Vec::new(),
            goodput: goodput.map(|found| findings(std::slice::from_ref(found), std::iter::empty())),
            run: self.run,
        };
        let scenario = Scenario {
            name: cell_name(&trace.trace, setup.workers, &setup.slo),
            trace: inspect_trace(trace)?,
            workers: Some(setup.workers),
            slo: setup.slo,
            late: Some(setup.late.to_string()),
            min_decile: self.min_decile,
            load: Some(Load { scale, offered_rps, reason: reason.to_owned() }),
            contenders: vec![contender],
        };
        Ok(Report {
            title: format!("{} on {}", setup.mode, trace.trace.name),
            origin: Origin {
                command: command.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                seeds: vec![setup.seed],
                profile: Some(inspect_profile(self.profile_file, &setup.profile)?),
                endpoint: None,
                experiment: None,
            },
            scenarios: vec![scenario],
        })
    }
}

/// With what distinguishes it from the other cells.
fn name(experiment: &Experiment, cell: &Cell<'_>) -> String {
    let mut name = cell_name(&cell.trace.trace, cell.workers, &cell.slo);
    let goals = &experiment.goals;
    let Asked { late, min_decile } = cell.asked;
    if goals.iter().any(|goal| goal.late != late) {
        name.push_str(&format!(", late: {late}"));
    }
    if goals.iter().any(|goal| goal.min_decile != min_decile)
        && let Some(share) = min_decile
    {
        name.push_str(&format!(", longest tenths ≥ {}", percent(share)));
    }
    name
}

pub(super) fn cell_name(trace: &Trace, workers: u32, slo: &Slo) -> String {
    let unit = if workers == 1 { "worker" } else { "workers" };
    format!("{}, {workers} {unit}, {}", trace.name, in_words(slo))
}

/// "TTFT 2000 ms + 2 × prefill, ITL 25 ms"
fn in_words(slo: &Slo) -> String {
    let factor = match slo.ttft_prefill_factor {
        0.0 => String::new(),
        factor => format!(" + {factor} × prefill"),
    };
    format!("TTFT {} ms{factor}, ITL {} ms", slo.ttft_ms, slo.itl_ms)
}

/// A trace for a report.
///
/// # Errors
/// The file has gone since it was read.
pub fn inspect_trace(TraceFile { file, trace }: &TraceFile) -> Result<Input, CompareError> {
    let requests = trace.requests.len();
    let mean = |of: fn(&crate::trace::TraceRequest) -> u32| {
        let sum: u64 = trace.requests.iter().map(|request| u64::from(of(request))).sum();
        sum as f64 / requests.max(1) as f64
    };
    let about = format!(
        "{requests} requests in {:.1} minutes, on average {:.0} tokens in and {:.0} out",
        trace.duration().as_secs_f64() / 60.0,
        mean(|request| request.input_tokens),
        mean(|request| request.output_tokens),
    );
    Ok(Input { file: file.display().to_string(), sha256: sha256(file)?, about })
}

/// A profile for a report.
///
/// # Errors
/// The file has gone since it was read.
pub(super) fn inspect_profile(file: &Path, profile: &Profile) -> Result<Input, CompareError> {
    let [a, b, c] = profile.model.prefill_ms;
    let [d, e, f] = profile.model.decode_ms;
    let about = format!(
        "{}; prefill of n tokens: {a} + {b}·n + {c}·n² ms; decode step: {d} + {e}·sequences + {f}·Σcontext ms",
        profile.name
    );
    Ok(Input { file: file.display().to_string(), sha256: sha256(file)?, about })
}

fn sha256(file: &Path) -> Result<String, CompareError> {
    let bytes = fs::read(file)
        .map_err(|reason| CompareError::Unreadable { file: file.to_owned(), reason })?;
    Ok(Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}
