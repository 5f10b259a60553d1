//! The modes of an experiment on a running Baton: the same requests, the same workers, one mode after the
//! other, in turns.
//!
//! A cluster drifts: caches fill, machines warm up, neighbours come and go. So each round begins with
//! another mode, and what is told of a mode is of all its rounds. Prompts are new in each run, or a prefix
//! cache would answer the second mode out of the first one's work; arrivals and lengths are the same.

use std::{error::Error, sync::Arc, time::Duration};

use baton_core::Split;
use serde_json::Map;

use super::{
    experiment::{Experiment, TraceFile, What},
    run::{CompareError, cell_name, inspect_profile, inspect_trace},
    way::{Way, WayKind},
};
use crate::{
    bench::{self, BenchOptions, BenchRun, Endpoint, EndpointError, Prompts, Surface},
    outcome::{Outcome, Slo},
    report::{Contender, Load, Origin, Report, RunFindings, Scenario},
    summary::{FleetSample, RunFacts, Tally},
    trace::Trace,
};

/// The Baton that is asked, and how.
#[derive(Clone, Debug)]
pub struct Live {
    /// Where clients ask it.
    pub url: String,
    /// The first that it lists, where none is given.
    pub model: Option<String>,
    pub api_key: Option<String>,
    /// Each mode runs so often.
    pub rounds: u32,
    /// Leaves out what arrives later.
    pub seconds: Option<f64>,
    /// Of prompts; another one for each run is derived from it.
    pub prompt_seed: u64,
    pub vocabulary: std::ops::Range<u32>,
    pub options: BenchOptions,
}

/// The coordinator of the cluster, as those who run it see it.
pub trait Coordinator {
    fn standing(&self) -> impl Future<Output = Result<Standing, OperatorError>>;

    /// From now on requests are split as this says.
    fn switch(&self, split: Split) -> impl Future<Output = Result<(), OperatorError>>;
}

/// Why a coordinator could not be asked, or ordered.
pub type OperatorError = Box<dyn Error + Send + Sync>;

/// How a cluster stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub split: Split,
    pub prefill_workers: u32,
    pub decode_workers: u32,
}

/// A run begins.
#[derive(Clone, Copy, Debug)]
pub struct LiveProgress<'a> {
    /// Runs that are done, of how many.
    pub done: usize,
    pub total: usize,
    pub mode: &'static str,
    pub trace: &'a str,
    pub requests: usize,
    /// Of this run, while it goes on.
    pub run: &'a Arc<bench::Progress>,
}

#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    #[error("{key}: {reason}")]
    Experiment { key: &'static str, reason: String },
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error(transparent)]
    Operator(OperatorError),
    #[error("stopped; nothing is reported of a comparison that is not whole")]
    Stopped,
}

/// As a coordinator's operators call it.
fn mode_name(split: Split) -> &'static str {
    match split {
        Split::Never => "aggregated",
        Split::Always => "disaggregated",
        Split::PerRequest => "adaptive",
    }
}

/// All that one mode's rounds came to, as if they had followed each other at once.
#[derive(Debug, Default)]
struct Rounds {
    outcomes: Vec<Outcome>,
    facts: RunFacts,
    samples: Vec<(Duration, FleetSample)>,
    /// One of each round.
    attainments: Vec<Vec<f64>>,
    saturated: usize,
    failed: usize,
}

impl Rounds {
    fn add(&mut self, run: BenchRun, attainments: Vec<f64>) {
        let before = self.facts.duration;
        self.outcomes.extend(
            run.outcomes
                .into_iter()
                .map(|outcome| Outcome { arrival: before + outcome.arrival, ..outcome }),
        );
        self.samples.extend(run.samples.into_iter().map(|(at, sample)| (before + at, sample)));
        self.facts.duration += run.facts.duration;
        self.attainments.push(attainments);
        self.saturated += usize::from(run.client.saturated);
        self.failed += run.errors.values().sum::<usize>();
    }

    /// What of the rounds no average tells. `slo` is the place of one.
    fn remarks(&self, slo: usize) -> String {
        let shares = || self.attainments.iter().filter_map(|of_round| of_round.get(slo));
        let lowest = shares().fold(f64::INFINITY, |a, b| a.min(*b));
        let highest = shares().fold(0.0_f64, |a, b| a.max(*b));
        let rounds = self.attainments.len();
        let mut text = match rounds {
            1 => "one round".to_owned(),
            _ => format!(
                "{rounds} rounds, within the SLOs {:.1} to {:.1} %",
                lowest * 100.0,
                highest * 100.0
            ),
        };
        if self.failed > 0 {
            text.push_str(&format!(", {} requests failed", self.failed));
        }
        if self.saturated > 0 {
            text.push_str(&format!(", the client was saturated in {}", self.saturated));
        }
        text
    }
}

/// Runs an experiment on a live cluster, which keeps its mode afterwards, also where it fails or `stop`
/// resolves. `command` is what was typed, for the report.
///
/// # Errors
/// An experiment that cannot be run live, or on this cluster; a server that cannot be asked.
pub async fn run_live(
    experiment: &Experiment,
    live: &Live,
    coordinator: &impl Coordinator,
    command: &str,
    progress: impl Fn(LiveProgress<'_>),
    stop: impl Future<Output = ()>,
) -> Result<Report, LiveError> {
    let before = coordinator.standing().await.map_err(LiveError::Operator)?;
    let scale = scale(experiment)?;
    let modes = modes(experiment, &before)?;
    let result = tokio::select! {
        ran = all(experiment, live, coordinator, &modes, scale, progress) => ran,
        () = stop => Err(LiveError::Stopped),
    };
    let restored = coordinator.switch(before.split).await;
    let (model, ran) = result?;
    restored.map_err(LiveError::Operator)?;
    let Standing { prefill_workers: prefill, decode_workers: decode, .. } = before;
    let endpoint =
        format!("{}, model {model}, {prefill} prefill and {decode} decode workers", live.url);
    report(experiment, command, &modes, ran, scale, prefill + decode, endpoint)
}

fn scale(experiment: &Experiment) -> Result<f64, LiveError> {
    let refused = |key, reason: &str| Err(LiveError::Experiment { key, reason: reason.to_owned() });
    if experiment.goals.len() > 1 {
        return refused(
            "late",
            "a live cluster orders late requests as its own configuration says",
        );
    }
    match experiment.what {
        What::Simulate { scale } => Ok(scale),
        What::Goodput => refused(
            "what",
            "\"goodput\" is searched in simulation alone; live, give what = \"simulate\" and a scale",
        ),
    }
}

fn modes(experiment: &Experiment, standing: &Standing) -> Result<Vec<Split>, LiveError> {
    let Standing { prefill_workers: prefill, decode_workers: decode, .. } = *standing;
    let workers = prefill + decode;
    if experiment.workers != [workers] {
        let reason = format!("{:?}, and the cluster has {workers}", experiment.workers);
        return Err(LiveError::Experiment { key: "workers", reason });
    }
    let mut modes = Vec::new();
    for way in &experiment.ways {
        let mode = mode(way, prefill, decode).map_err(|reason| LiveError::Experiment {
            key: "modes",
            reason: format!("{way}: {reason}"),
        })?;
        if modes.contains(&mode) {
            let reason =
                format!("{way}: live, this is {}, which is there already", mode_name(mode));
            return Err(LiveError::Experiment { key: "modes", reason });
        }
        modes.push(mode);
    }
    Ok(modes)
}

fn mode(way: &Way, prefill: u32, decode: u32) -> Result<Split, String> {
    if way.policy.is_some() {
        return Err("a live cluster places by the policy of its own configuration".to_owned());
    }
    match way.kind {
        WayKind::Aggregated { chunk_tokens: None } => Ok(Split::Never),
        WayKind::Aggregated { chunk_tokens: Some(_) } => {
            Err("the engines' chunk budget is set where they are started".to_owned())
        }
        WayKind::Static { prefill: p, decode: d } if (p, d) == (prefill, decode) => {
            Ok(Split::Always)
        }
        WayKind::Static { .. } => Err(format!("the cluster's pools are {prefill}P{decode}D")),
        WayKind::Flip { .. } => {
            Err("whether its pools flip, a live cluster's own file says".to_owned())
        }
        WayKind::BestStatic => Err(format!(
            "no search is done live; name the cluster's split, static:{prefill}P{decode}D"
        )),
        WayKind::Adaptive => Ok(Split::PerRequest),
    }
}

/// Of each trace, each mode's rounds.
type Ran = Vec<Vec<Rounds>>;

async fn all(
    experiment: &Experiment,
    live: &Live,
    coordinator: &impl Coordinator,
    modes: &[Split],
    scale: f64,
    progress: impl Fn(LiveProgress<'_>),
) -> Result<(String, Ran), LiveError> {
    let key = live.api_key.as_deref();
    let model = match &live.model {
        Some(model) => model.clone(),
        None => Endpoint::first_model(&live.url, key).await?,
    };
    let endpoint = Endpoint::new(&live.url, &model, Surface::Completions, key, Map::new())?;
    let rounds = usize::try_from(live.rounds.max(1)).unwrap_or(usize::MAX);
    let total = experiment.traces.len() * rounds * modes.len();
    let (mut done, mut ran) = (0, Ran::new());
    for TraceFile { trace, .. } in &experiment.traces {
        let trace = Arc::new(part(trace, experiment, live, scale));
        let mut of_modes: Vec<Rounds> = modes.iter().map(|_| Rounds::default()).collect();
        for round in 0..rounds {
            for turn in 0..modes.len() {
                // Another one begins each round.
                let place = (round + turn) % modes.len();
                coordinator.switch(modes[place]).await.map_err(LiveError::Operator)?;
                let of_run = Arc::new(bench::Progress::default());
                progress(LiveProgress {
                    done,
                    total,
                    mode: mode_name(modes[place]),
                    trace: &trace.name,
                    requests: trace.requests.len(),
                    run: &of_run,
                });
                let prompts = Prompts {
                    seed: live.prompt_seed.wrapping_add(done as u64),
                    vocabulary: live.vocabulary.clone(),
                    prefix_block_tokens: trace.prefix_block_tokens,
                };
                let run = bench::run(
                    &endpoint,
                    &trace,
                    &prompts,
                    &live.options,
                    &of_run,
                    std::future::pending(),
                )
                .await;
                let attainments = experiment.slos.iter().map(|slo| {
                    tally(experiment, (&run.outcomes, &run.samples), &trace, slo)
                        .summary(&run.facts)
                        .attainment
                });
                let attainments = attainments.collect();
                of_modes[place].add(run, attainments);
                done += 1;
            }
        }
        ran.push(of_modes);
    }
    Ok((model, ran))
}

fn part(trace: &Trace, experiment: &Experiment, live: &Live, scale: f64) -> Trace {
    let mut part = trace.scaled(scale, experiment.seeds.first().copied().unwrap_or_default());
    if let Some(seconds) = live.seconds {
        part.requests.retain(|request| request.arrival.as_secs_f64() < seconds);
    }
    part
}

fn tally(
    experiment: &Experiment,
    (outcomes, samples): (&[Outcome], &[(Duration, FleetSample)]),
    trace: &Trace,
    slo: &Slo,
) -> Tally {
    let model = &experiment.profile.1.model;
    Tally::of(outcomes, samples, &trace.phases, slo, |tokens| model.prefill_alone_ms(0, tokens))
}

fn report(
    experiment: &Experiment,
    command: &str,
    modes: &[Split],
    ran: Ran,
    scale: f64,
    workers: u32,
    endpoint: String,
) -> Result<Report, LiveError> {
    let mut scenarios = Vec::new();
    for (file, of_modes) in experiment.traces.iter().zip(ran) {
        for (place, slo) in experiment.slos.iter().enumerate() {
            let seed = experiment.seeds.first().copied().unwrap_or_default();
            let contenders = modes.iter().zip(&of_modes).map(|(mode, rounds)| {
                let Rounds { outcomes, samples, facts, .. } = rounds;
                let tally = tally(experiment, (outcomes, samples), &file.trace, slo);
                Contender {
                    mode: mode_name(*mode).to_owned(),
                    setup: rounds.remarks(place),
                    searched: Vec::new(),
                    goodput: None,
                    run: Some(RunFindings::new(&tally, facts)),
                }
            });
            scenarios.push(Scenario {
                name: cell_name(&file.trace, workers, slo),
                trace: inspect_trace(file)?,
                workers: Some(workers),
                slo: *slo,
                late: None,
                min_decile: None,
                load: Some(Load {
                    scale,
                    offered_rps: file.trace.at(scale, seed).rate_rps(),
                    reason: "live, the engines' chunk budget as they were started".to_owned(),
                }),
                contenders: contenders.collect(),
            });
        }
    }
    let (file, profile) = &experiment.profile;
    Ok(Report {
        title: experiment.title.clone(),
        origin: Origin {
            command: command.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seeds: experiment.seeds.clone(),
            profile: Some(inspect_profile(file, profile)?),
            endpoint: Some(endpoint),
            experiment: Some(experiment.text.clone()),
        },
        scenarios,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ways_are_modes_of_the_cluster_that_is_there() {
        let mode = |text: &str| mode(&text.parse().unwrap(), 1, 2);
        assert_eq!(mode("aggregated"), Ok(Split::Never));
        assert_eq!(mode("static:1P2D"), Ok(Split::Always));
        assert_eq!(mode("adaptive"), Ok(Split::PerRequest));
        insta::assert_snapshot!(
            ["static:2P1D", "best-static", "aggregated:512", "adaptive by random"]
                .map(|text| mode(text).unwrap_err())
                .join("\n"),
            @r"
        the cluster's pools are 1P2D
        no search is done live; name the cluster's split, static:1P2D
        the engines' chunk budget is set where they are started
        a live cluster places by the policy of its own configuration
        "
        );
    }

    #[test]
    fn rounds_follow_each_other() {
        let run = |seconds| BenchRun {
            outcomes: vec![Outcome {
                arrival: Duration::from_secs(1),
                input_tokens: 1,
                output_tokens: 1,
                phase: None,
                fate: crate::outcome::Fate::Rejected,
                cached_tokens: 0,
                kv_bytes_moved: 0,
                disaggregated: false,
            }],
            facts: RunFacts { duration: Duration::from_secs(seconds), ..RunFacts::default() },
            ..BenchRun::default()
        };
        let mut rounds = Rounds::default();
        rounds.add(run(10), vec![0.5, 0.25]);
        rounds.add(run(20), vec![0.75, 1.0]);
        let arrivals: Vec<_> =
            rounds.outcomes.iter().map(|outcome| outcome.arrival.as_secs()).collect();
        assert_eq!((arrivals, rounds.facts.duration.as_secs()), (vec![1, 11], 30));
        assert_eq!(rounds.remarks(1), "2 rounds, within the SLOs 25.0 to 100.0 %");
    }
}
