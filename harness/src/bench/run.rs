use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{MissedTickBehavior, interval_at},
};

use super::{
    answer::{Answer, End},
    arrivals,
    endpoint::Endpoint,
    health::{ClientHealth, TICK, Watch, ms},
    prompts::Prompts,
};
use crate::{
    outcome::{Fate, Latencies, Outcome},
    summary::{FleetSample, RunFacts},
    trace::{Trace, TraceRequest},
};

const SAMPLE_EVERY: Duration = Duration::from_secs(1);
const WARMUPS_AT_ONCE: usize = 4;

#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// Requests that are sent and answered before the first one counts, of the lengths of the
    /// trace's first ones and with prompts of their own.
    pub warmup: usize,
    /// After the last arrival, this long; what has no last token by then is unfinished.
    pub patience: Duration,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BenchRun {
    /// In the order of the trace; of a run that was stopped, those that were sent.
    pub outcomes: Vec<Outcome>,
    /// When since the start of the run, and how the server stood as far as clients see; in the order of time.
    pub samples: Vec<(Duration, FleetSample)>,
    pub facts: RunFacts,
    pub client: ClientHealth,
    /// How often each error was told.
    pub errors: BTreeMap<String, usize>,
    /// Prompt tokens that the server counted in completed requests, for each that was asked for; 0
    /// where it does not count.
    pub prompt_tokens_ratio: f64,
}

/// How far a run is, for whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    pub warmed_up: AtomicUsize,
    pub sent: AtomicUsize,
    /// With a first token, or ended without one.
    pub begun: AtomicUsize,
    pub ended: AtomicUsize,
    pub failed: AtomicUsize,
}

impl Progress {
    fn sample(&self) -> FleetSample {
        let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let (sent, begun, ended) = (of(&self.sent), of(&self.begun), of(&self.ended));
        FleetSample {
            requests_queued: sent.saturating_sub(begun) as f64,
            requests_running: begun.saturating_sub(ended) as f64,
            ..FleetSample::default()
        }
    }
}

/// Replays `trace` against `endpoint`, until all is answered, patience is at its end, or `stop`
/// resolves. Best on a runtime of one thread that nothing else uses.
pub async fn run(
    endpoint: &Endpoint,
    trace: &Arc<Trace>,
    prompts: &Prompts,
    options: &BenchOptions,
    progress: &Arc<Progress>,
    stop: impl Future<Output = ()>,
) -> BenchRun {
    let mut stop = std::pin::pin!(stop);
    tokio::select! {
        () = warm_up(endpoint, trace, prompts, options, progress) => {}
        () = &mut stop => return BenchRun::default(),
    }
    let mut watch = Watch::start();
    let start = Instant::now();
    let (sender, mut due) = mpsc::unbounded_channel();
    let stopped = Arc::new(AtomicBool::new(false));
    let arrivals = std::thread::spawn({
        let (trace, endpoint, prompts, stopped) =
            (trace.clone(), endpoint.clone(), prompts.clone(), stopped.clone());
        move || arrivals::keep(&trace, &endpoint, &prompts, start, &sender, &stopped)
    });
    let mut ledger = Ledger::new(trace, start);
    let mut in_flight = JoinSet::new();
    let mut tick = interval_at((start + TICK).into(), TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sample = interval_at(start.into(), SAMPLE_EVERY);
    let end = tokio::time::sleep_until((start + trace.duration() + options.patience).into());
    let mut end = std::pin::pin!(end);
    let mut is_all_sent = false;
    while !(is_all_sent && in_flight.is_empty()) {
        tokio::select! {
            // Sending first: it is what the schedule is about.
            biased;
            next = due.recv(), if !is_all_sent => match next {
                Some(next) => {
                    watch.send_lags_ms.push(ms(next.at.elapsed()));
                    progress.sent.fetch_add(1, Ordering::Relaxed);
                    ledger.sent(next.index);
                    let (endpoint, progress) = (endpoint.clone(), progress.clone());
                    in_flight.spawn(async move {
                        let begun = || { progress.begun.fetch_add(1, Ordering::Relaxed); };
                        let answer = endpoint.ask(next.body, begun).await;
                        progress.begun.fetch_add(usize::from(answer.first().is_none()), Ordering::Relaxed);
                        progress.ended.fetch_add(1, Ordering::Relaxed);
                        progress.failed.fetch_add(usize::from(answer.end != End::Complete), Ordering::Relaxed);
                        (next.index, answer)
                    });
                }
                None => is_all_sent = true,
            },
            Some(ended) = in_flight.join_next() => {
                if let Ok((index, answer)) = ended {
                    ledger.ended(index, &answer);
                }
            }
            at = tick.tick() => watch.tick(at.into_std()),
            at = sample.tick() => {
                ledger.samples.push((at.into_std().saturating_duration_since(start), progress.sample()));
            }
            () = &mut end => break,
            () = &mut stop => break,
        }
    }
    stopped.store(true, Ordering::Relaxed);
    drop(due);
    in_flight.abort_all();
    // It notices within a tenth of a second, and cannot fail.
    let _ = arrivals.join();
    ledger.close(watch.verdict())
}

async fn warm_up(
    endpoint: &Endpoint,
    trace: &Trace,
    prompts: &Prompts,
    options: &BenchOptions,
    progress: &Arc<Progress>,
) {
    // Neither prefixes nor indices of the run.
    let prompts = Prompts { seed: !prompts.seed, ..prompts.clone() };
    let mut in_flight = JoinSet::new();
    for (index, request) in trace.requests.iter().cycle().take(options.warmup).enumerate() {
        if in_flight.len() >= WARMUPS_AT_ONCE {
            in_flight.join_next().await;
        }
        let request = TraceRequest { prefix_blocks: Box::default(), ..request.clone() };
        let body = endpoint.body(&prompts, index as u64, &request);
        let (endpoint, progress) = (endpoint.clone(), progress.clone());
        in_flight.spawn(async move {
            // What goes wrong here goes wrong again where it counts.
            endpoint.ask(body, || ()).await;
            progress.warmed_up.fetch_add(1, Ordering::Relaxed);
        });
    }
    in_flight.join_all().await;
}

/// Turns answers into outcomes.
struct Ledger<'a> {
    trace: &'a Trace,
    start: Instant,
    /// By the trace's index; none of what was not sent.
    outcomes: Vec<Option<Outcome>>,
    last_end: Duration,
    samples: Vec<(Duration, FleetSample)>,
    errors: BTreeMap<String, usize>,
    prompt_tokens_asked: u64,
    prompt_tokens_counted: u64,
}

impl<'a> Ledger<'a> {
    fn new(trace: &'a Trace, start: Instant) -> Self {
        Self {
            trace,
            start,
            outcomes: vec![None; trace.requests.len()],
            last_end: Duration::ZERO,
            samples: Vec::new(),
            errors: BTreeMap::new(),
            prompt_tokens_asked: 0,
            prompt_tokens_counted: 0,
        }
    }

    fn sent(&mut self, index: usize) {
        let request = &self.trace.requests[index];
        self.outcomes[index] = Some(Outcome {
            arrival: request.arrival,
            input_tokens: request.input_tokens,
            output_tokens: request.output_tokens,
            phase: request.phase,
            fate: Fate::Unfinished,
            cached_tokens: 0,
            kv_bytes_moved: 0,
            disaggregated: false,
        });
    }

    fn ended(&mut self, index: usize, answer: &Answer) {
        let since_start = |at: Instant| at.saturating_duration_since(self.start);
        self.last_end = self.last_end.max(since_start(answer.last().unwrap_or_else(Instant::now)));
        let Some(outcome) = self.outcomes.get_mut(index).and_then(Option::as_mut) else { return };
        outcome.disaggregated = answer.disaggregated;
        let (first, last) = (answer.first(), answer.last());
        match (answer.end.clone(), first, last) {
            (End::Complete, Some(first), Some(last)) => {
                outcome.output_tokens = answer.tokens();
                outcome.cached_tokens = answer.cached_tokens.min(outcome.input_tokens);
                if let Some(counted) = answer.prompt_tokens {
                    self.prompt_tokens_asked += u64::from(outcome.input_tokens);
                    self.prompt_tokens_counted += u64::from(counted);
                }
                outcome.fate = Fate::Completed(Latencies::of_gaps(
                    outcome.arrival,
                    since_start(first),
                    since_start(last),
                    &mut answer.gaps(),
                ));
            }
            (End::Refused(error), ..) => {
                outcome.fate = Fate::Rejected;
                *self.errors.entry(error).or_default() += 1;
            }
            (End::BrokeOff(error), first, _) => {
                outcome.fate = if first.is_some() { Fate::Unfinished } else { Fate::Rejected };
                *self.errors.entry(error).or_default() += 1;
            }
            (End::Complete, ..) => outcome.fate = Fate::Unfinished,
        }
    }

    fn close(self, client: ClientHealth) -> BenchRun {
        let outcomes: Vec<Outcome> = self.outcomes.into_iter().flatten().collect();
        let has_open = outcomes.iter().any(|outcome| outcome.fate == Fate::Unfinished);
        // A run with open requests lasted until it was given up.
        let duration = if has_open { self.start.elapsed() } else { self.last_end };
        let (asked, counted) = (self.prompt_tokens_asked, self.prompt_tokens_counted);
        BenchRun {
            outcomes,
            samples: self.samples,
            facts: RunFacts { duration, ..RunFacts::default() },
            client,
            errors: self.errors,
            prompt_tokens_ratio: if asked > 0 { counted as f64 / asked as f64 } else { 0.0 },
        }
    }
}
