//! What operators see, gathered when they look, and what they do.

use std::time::Instant;

use baton_core::{Event, RequestKey, Route, WorkerKey, WorkerView};
use baton_proto as wire;
use baton_types::Role;
use http::HeaderValue;
use tracing::info;

use super::{Shell, State, workers::Attached};
use crate::{
    admin::{
        ArenaState, ClusterState, EndedRequest, EngineState, HandoffCounters, HandoffPair,
        Handoffs, InFlightRequest, LoadState, Mode, SloState, TransferState, WorkerState,
    },
    journal::{Ended, unix_ms, unix_ms_of},
    metrics::Path,
};

/// Shown at once, whatever there is.
const MOST_REQUESTS: usize = 300;
const MOST_PAIRS: usize = 1024;

#[derive(Debug, thiserror::Error)]
#[error("worker: {name:?} is not attached; attached are {}", attached(others))]
pub(crate) struct UnknownWorker {
    name: String,
    others: Vec<String>,
}

fn attached(names: &[String]) -> String {
    const SHOWN: usize = 20;
    match names.len() {
        0 => "none".to_owned(),
        count if count > SHOWN => {
            format!("{} and {} others", names[..SHOWN].join(", "), count - SHOWN)
        }
        _ => names.join(", "),
    }
}

impl Shell {
    pub(crate) fn cluster_state(&self) -> ClusterState {
        let state = self.state.lock();
        let now = Instant::now();
        let (open, oldest) = oldest(&state, MOST_REQUESTS);
        let mut workers: Vec<WorkerState> = state
            .core
            .workers()
            .filter_map(|view| {
                let attached = state.links.get(&view.key)?;
                Some(worker_state(&state, &view, attached))
            })
            .collect();
        workers.sort_by(|a, b| a.name.cmp(&b.name));
        ClusterState {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            at_unix_ms: unix_ms(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            mode: state.core.split().into(),
            slo: SloState { ttft_ms: self.slo.ttft_ms, itl_ms: self.slo.itl_ms },
            latency: self.metrics.requests.latency(),
            output_tokens: self.metrics.requests.output_tokens(),
            requests_ended: state.journal.ended_by_outcome(),
            requests_split: state.journal.ended_split(),
            requests_open: open,
            requests: oldest.into_iter().map(|key| in_flight(&state, key, now)).collect(),
            ended: state.journal.ended_last().map(|e| ended_request(&state, e)).collect(),
            workers,
            handoffs: handoffs(&state, self.metrics.handoffs.bytes()),
            decisions: state.journal.decisions(),
        }
    }

    /// What carries each worker's blocks.
    pub(crate) fn transfer_state(&self) -> Vec<TransferState> {
        let state = self.state.lock();
        let received_over = |worker: WorkerKey| {
            let pairs = state.handoffs.busiest(usize::MAX);
            let mut transports: Vec<String> = pairs
                .into_iter()
                .filter(|((_, to), _)| *to == worker)
                .map(|(_, pair)| pair.transport.clone())
                .collect();
            transports.sort();
            transports.dedup();
            transports
        };
        let mut workers: Vec<TransferState> = state
            .core
            .workers()
            .filter_map(|view| {
                let attached = state.links.get(&view.key)?;
                let peer = attached.peer.as_ref().map(|peer| peer.wire.address.clone());
                Some(TransferState {
                    worker: view.description.name.clone(),
                    role: view.description.role.to_string(),
                    handoff: match view.description.handoff {
                        baton_core::HandoffMode::None => "none",
                        baton_core::HandoffMode::Engine => "engine",
                        baton_core::HandoffMode::Fenced { .. } => "fenced",
                    }
                    .to_owned(),
                    address: peer.unwrap_or_default(),
                    transports: attached.report.transports.clone(),
                    received_over: received_over(view.key),
                    handoffs: handoff_counters(&attached.report),
                })
            })
            .collect();
        workers.sort_by(|a, b| a.worker.cmp(&b.worker));
        workers
    }

    /// Counts for the requests that come after it.
    pub(crate) fn set_mode(&self, mode: Mode) {
        let mut state = self.state.lock();
        let before = Mode::from(state.core.split());
        state.core.set_split(mode.into());
        info!(%before, %mode, "an operator switched the mode");
        state.journal.decided("mode", mode.as_str(), format!("it was {before}"), "operator");
    }

    /// Answers the worker's state from here on. An order holds until its opposite, or until the
    /// worker's engine begins another life.
    pub(crate) fn set_drains(
        &self,
        name: &str,
        drains: bool,
    ) -> Result<&'static str, UnknownWorker> {
        let mut state = self.state.lock();
        let worker = named(&state, name)?;
        let order = if drains { Event::Drain { worker } } else { Event::Undrain { worker } };
        self.tell_core(&mut state, order, None);
        let kind = if drains { "drain" } else { "undrain" };
        info!(worker = name, kind, "an operator's order");
        state.journal.decided(kind, name, "", "operator");
        let view = state.core.worker(worker);
        let report = state.links.get(&worker).map(|attached| &attached.report);
        Ok(view.zip(report).map_or("gone", |(view, report)| standing(&view, report)))
    }

    /// Orders a worker to the other pool, or back to its own where it is on its way. It finishes what
    /// it has first.
    pub(crate) fn set_role(&self, name: &str, role: Role) -> Result<(), UnknownWorker> {
        let mut state = self.state.lock();
        let worker = named(&state, name)?;
        if state.core.worker(worker).is_some_and(|view| view.description.role != role) {
            self.metrics.balancer.flip(role, "operator");
        }
        self.tell_core(&mut state, Event::SetRole { worker, role }, None);
        state.journal.decided("role", name, format!("to {role}"), "operator");
        Ok(())
    }
}

pub(super) fn ended_request(state: &State, ended: &Ended) -> EndedRequest {
    let timeline = &ended.timeline;
    let name = |worker: Option<WorkerKey>| worker.map_or(String::new(), |key| name_of(state, key));
    EndedRequest {
        id: shown(&ended.request_id),
        path: ended.path.as_str().to_owned(),
        outcome: ended.outcome.as_str().to_owned(),
        prefill_worker: name(timeline.prefill_worker),
        decode_worker: name(timeline.answering_worker),
        attempts: timeline.attempts,
        ended_unix_ms: unix_ms_of(ended.at),
        phases: timeline.phases(ended.path == Path::Disaggregated, ended.at),
    }
}

pub(super) fn name_of(state: &State, worker: WorkerKey) -> String {
    match state.core.worker(worker) {
        Some(view) => view.description.name.clone(),
        None => state.journal.departed(worker).unwrap_or_default().to_owned(),
    }
}

fn named(state: &State, name: &str) -> Result<WorkerKey, UnknownWorker> {
    let found = state.core.workers().find(|view| view.description.name == name);
    found.map(|view| view.key).ok_or_else(|| {
        let mut others: Vec<String> =
            state.core.workers().map(|view| view.description.name.clone()).collect();
        others.sort();
        UnknownWorker { name: name.chars().take(128).collect(), others }
    })
}

/// How many requests are open, and the first of them to arrive.
fn oldest(state: &State, most: usize) -> (usize, Vec<RequestKey>) {
    let mut open: Vec<(Instant, RequestKey)> =
        state.clients.iter().map(|(key, client)| (client.timeline.arrived, *key)).collect();
    let count = open.len();
    if count > most {
        open.select_nth_unstable(most);
        open.truncate(most);
    }
    open.sort_unstable();
    (count, open.into_iter().map(|(_, key)| key).collect())
}

fn in_flight(state: &State, key: RequestKey, now: Instant) -> InFlightRequest {
    let view = state.core.request(key);
    let route = view.and_then(|view| view.route);
    let client = state.clients.get(&key);
    let [prefill_worker, decode_worker] = route_names(state, route);
    let is_split = matches!(route, Some(Route::Disaggregated { .. }));
    let (path, reason) = match route {
        None => ("", ""),
        Some(Route::Disaggregated { .. }) => (Path::Disaggregated.as_str(), ""),
        Some(Route::Aggregated { reason, .. }) => (Path::Aggregated.as_str(), reason.as_str()),
    };
    let timeline = client.map(|client| client.timeline);
    let phase = match timeline {
        Some(timeline) if timeline.answered.is_some() => "decode",
        Some(timeline) if timeline.prefilled.is_some() && is_split => "handoff",
        Some(timeline) if timeline.placed.is_some() && route.is_some() => "prefill",
        _ => "queue",
    };
    let timeline = timeline.unwrap_or(crate::timeline::Timeline::new(now));
    InFlightRequest {
        id: client.map(|client| shown(&client.request_id)).unwrap_or_default(),
        model: view.and_then(|view| view.shape.model.clone()).unwrap_or_default(),
        phase: phase.to_owned(),
        path: path.to_owned(),
        reason: reason.to_owned(),
        prefill_worker,
        decode_worker,
        prompt_tokens: view.map_or(0, |view| view.shape.prompt_tokens),
        attempts: timeline.attempts,
        phases: timeline.phases(is_split, now),
    }
}

/// The two workers' names; of an aggregated request only the second.
fn route_names(state: &State, route: Option<Route>) -> [String; 2] {
    let name = |worker: WorkerKey| name_of(state, worker);
    match route {
        None => [String::new(), String::new()],
        Some(Route::Disaggregated { prefill, decode, .. }) => [name(prefill), name(decode)],
        Some(Route::Aggregated { worker, .. }) => [String::new(), name(worker)],
    }
}

fn worker_state(state: &State, view: &WorkerView<'_>, attached: &Attached) -> WorkerState {
    let report = &attached.report;
    WorkerState {
        name: view.description.name.clone(),
        role: view.description.role.to_string(),
        state: standing(view, report).to_owned(),
        epoch: view.description.epoch.to_string(),
        engine: attached.engine.clone(),
        models: attached.models.clone(),
        attached_unix_ms: attached.since_unix_ms,
        jobs: view.jobs_running,
        load: LoadState {
            prefills: view.load.prefills,
            prefill_tokens: view.load.prefill_tokens,
            decodes: view.load.decodes,
            queued: view.load.queued,
        },
        engine_load: EngineState {
            running: report.engine_requests_running,
            waiting: report.engine_requests_waiting,
            // JSON has no other numbers.
            kv_used_ratio: Some(report.engine_kv_used_ratio)
                .filter(|ratio| ratio.is_finite())
                .unwrap_or_default(),
            kv_blocks_cached: report.engine_kv_blocks_cached,
        },
        arena: ArenaState {
            slots: report.arena_slots,
            slots_used: report.arena_slots_used,
            import_slots: report.arena_import_slots,
            import_slots_used: report.arena_import_slots_used,
        },
        handoffs: handoff_counters(report),
        prefix_blocks: state.core.told().blocks_of(view.key),
        roles: state.journal.roles_of(&view.description.name),
    }
}

fn standing(view: &WorkerView<'_>, report: &wire::Report) -> &'static str {
    let is_out = view.drains || view.changes_to.is_some();
    match (is_out, view.jobs_open, report.handoffs_open) {
        (false, ..) => "ready",
        (true, 0, 0) => "drained",
        (true, ..) => "draining",
    }
}

fn handoff_counters(report: &wire::Report) -> HandoffCounters {
    HandoffCounters {
        open: report.handoffs_open,
        blocks_sent: report.handoff_blocks_sent,
        bytes_sent: report.handoff_bytes_sent,
        blocks_received: report.handoff_blocks_received,
        bytes_received: report.handoff_bytes_received,
        blocks_mapped: report.handoff_blocks_mapped,
        blocks_reused: report.handoff_blocks_reused,
        errors: report.handoff_errors.clone().into_iter().collect(),
        ended: report.handoffs_ended.clone().into_iter().collect(),
    }
}

fn handoffs(state: &State, bytes: u64) -> Handoffs {
    let pairs = state.handoffs.busiest(MOST_PAIRS).into_iter();
    let busiest = pairs.map(|((from, to), pair)| HandoffPair {
        from: name_of(state, from),
        to: name_of(state, to),
        handoffs: pair.handoffs,
        failed: pair.failed,
        blocks: pair.blocks,
        bytes: pair.bytes,
        micros: pair.micros,
        transport: pair.transport.clone(),
    });
    Handoffs { bytes, pairs: state.handoffs.len(), busiest: busiest.collect() }
}

/// A client's own words may be long, and no text.
fn shown(request_id: &HeaderValue) -> String {
    const LONGEST_CHARS: usize = 64;
    String::from_utf8_lossy(request_id.as_bytes()).chars().take(LONGEST_CHARS).collect()
}
