//! A leg's way: what its worker is given, what the worker says of it, and how that becomes an answer.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use baton_core::{Event, HandoffPlan, JobId, RequestKey, Route, WorkerKey};
use baton_proto as wire;
use baton_types::{Fault, FaultKind, Generation, HandoffId, Leg, Origin};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tracing::{debug, warn};

use super::{Shell, State, client::Relaying, operators::name_of};
use crate::{
    client::Head,
    metrics::{Outcome, Path},
    placed::Handoff,
};

/// What goes to the engine: as the client sent it.
#[derive(Clone, Debug)]
pub(crate) struct ForwardedRequest {
    pub(crate) path: String,
    pub(crate) headers: Vec<wire::Header>,
    pub(crate) body: Bytes,
}

impl Shell {
    /// What a worker says of its jobs, all under one lock.
    pub(crate) fn events(&self, worker: WorkerKey, batch: wire::EventBatch) {
        let mut state = self.state.lock();
        state.look_at(&batch.events);
        let now = Instant::now();
        for event in batch.events {
            self.job_event(&mut state, worker, event, now);
        }
    }

    fn job_event(
        &self,
        state: &mut State,
        worker: WorkerKey,
        mut event: wire::Event,
        now: Instant,
    ) {
        let job = JobId(event.job);
        let Some((request, leg, owner)) = state.core.job(job) else { return };
        if owner != worker {
            debug!(job = event.job, "a worker spoke of another worker's job");
            return;
        }
        if let Some(fault) = event.fault.take() {
            let fault = Fault::try_from(fault).unwrap_or_else(|error| {
                Fault::new(Origin::Worker, FaultKind::Failed, format!("unreadable fault: {error}"))
            });
            return self.tell_core(state, Event::LegFailed { job, fault }, None);
        }
        if leg == Leg::Lend {
            if event.end {
                self.tell_core(state, Event::Ended { job }, None);
            }
            return;
        }
        if let Some(result) = event.pull.take() {
            self.pulled(state, request, &result);
            self.tell_core(state, Event::PullOver { job }, None);
        }
        if leg == Leg::Prefill && (event.status == 0 || event.status < 400) {
            if event.end {
                if !event.engine_handoff_params.is_empty() {
                    state.engine_handoffs.insert(job, event.engine_handoff_params);
                }
                if let Some(client) = state.clients.get_mut(&request) {
                    client.timeline.prefilled = Some(now);
                }
                self.tell_core(state, Event::PrefillDone { job }, None);
                state.engine_handoffs.remove(&job);
            }
            return;
        }
        if event.status != 0 {
            if let Some(moved) = event.handoff.take() {
                self.metrics.handoffs.ended(&moved);
                state.handed_over(request, worker, &moved);
                let route = state.core.request(request).and_then(|view| view.route);
                if let Some(Route::Disaggregated { prefill, decode, .. }) = route {
                    state.handoffs.add(prefill, decode, &moved);
                }
                if let Some(client) = state.clients.get_mut(&request)
                    && let Some(trace) = &mut client.trace
                {
                    trace.handed_over(&moved);
                }
            }
            self.tell_core(state, Event::Answered { job }, Some(&event));
        }
        let Some(client) = state.clients.get_mut(&request) else { return };
        if client.relaying.as_ref().is_none_or(|relaying| relaying.job != job) {
            return;
        }
        let gap = client.tokens(event.tokens, now, &self.metrics);
        state.core.tokens(job, event.tokens, gap);
        if client.answer.push(&event.payload).is_err() {
            if let Some(client) = state.clients.remove(&request) {
                self.request_ended(state, client, Outcome::TooSlow);
            }
            return self.tell_core(state, Event::ClientGone { request }, None);
        }
        if event.end {
            self.tell_core(state, Event::Ended { job }, None);
        }
    }

    /// What is said and kept of a leg that failed: where, and which two it was to pass between.
    pub(super) fn leg_failed(
        &self,
        state: &mut State,
        request: RequestKey,
        leg: Leg,
        worker: WorkerKey,
        fault: &Fault,
    ) {
        self.metrics.requests.leg_failed(leg, fault);
        let Some(client) = state.clients.get(&request) else { return };
        let pair = client.timeline.prefill_worker.zip(client.timeline.answering_worker);
        let peer = pair.map(|(prefill, decode)| if prefill == worker { decode } else { prefill });
        client.log_span().in_scope(|| {
            warn!(%leg, worker = name_of(state, worker),
                peer = peer.map(|peer| name_of(state, peer)).unwrap_or_default(),
                origin = %fault.origin, kind = %fault.kind, reason = fault.message, "leg failed");
        });
        if fault.origin == Origin::Handoff
            && let Some((prefill, decode)) = pair
        {
            state.handoffs.failed(prefill, decode);
        }
        if let Some(client) = state.clients.get_mut(&request)
            && let Some(trace) = &mut client.trace
        {
            trace.leg_failed(leg, fault);
        }
    }

    pub(super) fn relay(
        &self,
        state: &mut State,
        request: RequestKey,
        job: JobId,
        route: Route,
        event: &wire::Event,
    ) {
        let name = |worker: WorkerKey| {
            let view = state.core.worker(worker)?;
            HeaderValue::from_str(&view.description.name).ok()
        };
        let mut headers = end_to_end_headers(&event.headers);
        let (path, workers) = match route {
            Route::Disaggregated { prefill, decode, by_engine } => {
                if by_engine {
                    headers.insert("x-baton-handoff", HeaderValue::from_static("engine"));
                }
                (
                    Path::Disaggregated,
                    [
                        ("x-baton-prefill-worker", Some(prefill)),
                        ("x-baton-decode-worker", Some(decode)),
                    ],
                )
            }
            Route::Aggregated { worker, reason } => {
                self.metrics.requests.aggregated(reason);
                headers.insert("x-baton-reason", HeaderValue::from_static(reason.as_str()));
                (Path::Aggregated, [("x-baton-worker", Some(worker)), ("", None)])
            }
        };
        headers.insert("x-baton-path", HeaderValue::from_static(path.as_str()));
        for (header, worker) in workers {
            if let Some(value) = worker.and_then(name) {
                headers.insert(header, value);
            }
        }
        let Some(client) = state.clients.get_mut(&request) else { return };
        headers.insert("x-request-id", client.request_id.clone());
        let status = u16::try_from(event.status)
            .ok()
            .and_then(|status| StatusCode::from_u16(status).ok())
            .unwrap_or(StatusCode::BAD_GATEWAY);
        client.request = None;
        client.prompt = None;
        client.prompt_ids = None;
        client.timeline.answered = Some(Instant::now());
        client.relaying = Some(Relaying {
            job,
            path,
            route,
            status,
            event_stream: client.streams && status.is_success(),
            last_tokens: None,
        });
        client.answer.begin(Head { status, headers });
    }
}

impl State {
    /// Looks at what each event is about, and does nothing with it. Streams that leave time between their tokens are in
    /// no cache by the next one. Taken up one by one, each would have its own wait for memory; here all wait at once.
    fn look_at(&self, events: &[wire::Event]) {
        let jobs = events.iter().map(|event| self.core.job(JobId(event.job)));
        for (request, ..) in jobs.flatten() {
            black_box(self.clients.get(&request).map(|client| client.at_hand()));
        }
    }

    fn handed_over(&mut self, request: RequestKey, to: WorkerKey, moved: &wire::HandoffResult) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        let blocks = moved.blocks.saturating_add(moved.blocks_reused);
        if let Some(prompt) = &client.prompt {
            self.prefixes.prompt_had_blocks(to, prompt, blocks);
        }
        client.placed.handoff = Some(Handoff {
            bytes: moved.bytes,
            blocks: moved.blocks,
            blocks_reused: moved.blocks_reused,
            milliseconds: Duration::from_micros(moved.micros).as_secs_f64() * 1000.0,
        });
    }

    pub(super) fn start_job(
        &mut self,
        ttft_target_ms: f64,
        worker: WorkerKey,
        job: JobId,
        request: RequestKey,
        leg: Leg,
        handoff: Option<HandoffPlan>,
    ) -> Option<wire::StartJob> {
        let client = self.clients.get(&request)?;
        let mut forward = client.request.clone()?;
        if let Some(trace) = &client.trace {
            trace.passed_on(leg, &mut forward.headers);
        }
        let deadline_ms = client.timeline.due_in_ms(ttft_target_ms);
        let (fenced, engine_handoff_params) = match handoff {
            None | Some(HandoffPlan::Engine { prefill: None }) => (None, Bytes::new()),
            Some(HandoffPlan::Engine { prefill: Some(prefill) }) => {
                (None, self.engine_handoffs.remove(&prefill).unwrap_or_default())
            }
            Some(HandoffPlan::Fenced { id, generation, peer }) => {
                (Some(self.handoff(id, generation, peer, worker)), Bytes::new())
            }
        };
        Some(wire::StartJob {
            job: job.0,
            leg: wire::Leg::from(leg).into(),
            path: forward.path,
            headers: forward.headers,
            body: forward.body,
            handoff: fenced,
            engine_handoff_params,
            deadline_ms,
            pull: client
                .pulling
                .filter(|_| leg != Leg::Decode)
                .and_then(|pulling| self.to_pull(client, pulling)),
        })
    }

    /// The name of a handoff, as one of its two workers is told it, and how it reaches the other.
    pub(super) fn handoff(
        &self,
        id: HandoffId,
        generation: Generation,
        peer: WorkerKey,
        told: WorkerKey,
    ) -> wire::Handoff {
        let known = |worker| self.links.get(worker).and_then(|it| it.peer.as_ref());
        wire::Handoff {
            id: Bytes::copy_from_slice(id.as_bytes()),
            generation: generation.0,
            peer: known(&peer).map(|peer| peer.told_to(known(&told))),
        }
    }
}

fn end_to_end_headers(headers: &[wire::Header]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(headers.len() + 4);
    for header in headers {
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(header.name.as_bytes()),
            HeaderValue::from_maybe_shared(header.value.clone()),
        ) && !crate::client::is_hop_by_hop(&name)
        {
            map.append(name, value);
        }
    }
    map
}
