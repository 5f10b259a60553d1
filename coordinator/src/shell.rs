//! Carries the core's decisions out: between clients' answers on one side and workers' links on the
//! other. One lock holds it all, since all of it runs on one thread; it is never held over an await.

mod operators;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_config::SloConfig;
use baton_core::{
    Action, AnnouncedChange, BalancerSettings, Core, Elsewhere, Event, HandoffPlan, JobId,
    Rejection, RequestKey, RequestShape, Route, Settings, Tenant, WorkerDescription, WorkerKey,
    WorkerReport, policy::Policy,
};
use baton_proto as wire;
use baton_types::{Fault, FaultKind, HandoffId, Leg, Origin, Role, StepModel};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::{Mutex, MutexGuard};
use tracing::{debug, info, warn};

use crate::{
    client::{Answer, ClientError, Head, broken_stream_event},
    fleet::{Link, PeerInfo},
    handoffs::HandoffMatrix,
    journal::{Journal, unix_ms},
    metrics::{Metrics, Outcome, Path},
    placed::{Explanation, Handoff, Placed, PlacedRequests, path_of},
    prefixes::{CachedPrefix, Prefixes},
    prompt::Prompt,
    spans::{RequestTrace, Tracer},
    timeline::Timeline,
};

pub(crate) use operators::UnknownWorker;

/// Shared by every connection of this coordinator.
#[derive(Clone, Debug)]
pub(crate) struct Shell {
    state: Arc<Mutex<State>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tracer: Option<Arc<Tracer>>,
    started: Instant,
    slo: SloConfig,
    max_unread_bytes: usize,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) core: Core,
    prefixes: Prefixes,
    tidy_at: Duration,
    placed: PlacedRequests,
    clients: HashMap<RequestKey, Client>,
    links: HashMap<WorkerKey, Attached>,
    /// `kv_transfer_params` that prefill jobs answered, until their decode leg takes them.
    engine_handoffs: HashMap<JobId, Bytes>,
    slo: SloConfig,
    handoffs: HandoffMatrix,
    pub(crate) journal: Journal,
    /// Kept between calls for its memory.
    actions: Vec<Action>,
}

const TIDY_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Attached {
    link: Arc<Link>,
    peer: Option<PeerInfo>,
    models: Vec<String>,
    max_model_tokens: u32,
    kv_capacity_tokens: Option<u64>,
    engine: String,
    since_unix_ms: u64,
    report: wire::Report,
}

/// One request's side towards its client.
#[derive(Debug)]
struct Client {
    answer: Arc<Answer>,
    /// Kept for another try, until the first answer.
    request: Option<ForwardedRequest>,
    prompt: Option<KnownPrompt>,
    request_id: HeaderValue,
    streams: bool,
    timeline: Timeline,
    trace: Option<Box<RequestTrace>>,
    model: Option<String>,
    relaying: Option<Relaying>,
    tenant: Tenant,
    placed: Placed,
}

#[derive(Debug)]
struct Relaying {
    job: JobId,
    path: Path,
    route: Route,
    status: StatusCode,
    event_stream: bool,
    last_tokens: Option<Instant>,
}

/// What is known of a request's prompt, and who holds how much of it.
#[derive(Debug)]
struct KnownPrompt {
    prompt: Prompt,
    model: Option<String>,
    cached: CachedPrefix,
}

/// What goes to the engine: as the client sent it.
#[derive(Clone, Debug)]
pub(crate) struct ForwardedRequest {
    pub(crate) path: String,
    pub(crate) headers: Vec<wire::Header>,
    pub(crate) body: Bytes,
}

/// A request as it came in.
#[derive(Debug)]
pub(crate) struct IncomingRequest {
    pub(crate) shape: RequestShape,
    pub(crate) prompt: Option<Prompt>,
    pub(crate) streams: bool,
    pub(crate) request_id: HeaderValue,
    pub(crate) arrived: Instant,
    pub(crate) trace: Option<Box<RequestTrace>>,
    pub(crate) forward: ForwardedRequest,
}

/// A request in flight. Dropping it tells the engines that the client went away, unless the answer was
/// complete.
#[derive(Debug)]
pub(crate) struct InFlight {
    shell: Shell,
    request: RequestKey,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.shell.client_gone(self.request);
    }
}

impl Shell {
    pub(crate) fn new(
        settings: Settings,
        policy: Box<dyn Policy>,
        balancing: Option<BalancerSettings>,
        slo: SloConfig,
        max_unread_bytes: u64,
    ) -> Self {
        let core = Core::with_policy(settings, policy);
        let core = match balancing {
            Some(balancing) => core.balanced(balancing),
            None => core,
        };
        Self {
            state: Arc::new(Mutex::new(State {
                core,
                prefixes: Prefixes::default(),
                tidy_at: Duration::ZERO,
                placed: PlacedRequests::default(),
                clients: HashMap::new(),
                links: HashMap::new(),
                engine_handoffs: HashMap::new(),
                slo,
                handoffs: HandoffMatrix::default(),
                journal: Journal::default(),
                actions: Vec::new(),
            })),
            metrics: Arc::new(Metrics::new(slo)),
            tracer: None,
            started: Instant::now(),
            slo,
            max_unread_bytes: usize::try_from(max_unread_bytes).unwrap_or(usize::MAX),
        }
    }

    /// The same, with a trace of each request.
    pub(crate) fn traced(self, tracer: Option<Tracer>) -> Self {
        Self { tracer: tracer.map(Arc::new), ..self }
    }

    /// What engines' steps shall keep to, so that the decodes in them keep the SLO.
    #[allow(clippy::cast_possible_truncation)] // A time needs no more than seven digits.
    pub(crate) fn itl_target_ms(&self) -> f32 {
        self.slo.itl_ms as f32
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The core's time.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes a request in and sets its legs going.
    pub(crate) fn arrive(&self, mut incoming: IncomingRequest) -> (Arc<Answer>, InFlight) {
        let answer = Answer::new(self.max_unread_bytes);
        let mut state = self.state.lock();
        let mut actions = std::mem::take(&mut state.actions);
        let now = self.started.elapsed();
        let prompt = incoming.prompt.map(|prompt| {
            let model = incoming.shape.model.clone();
            let cached = state.prefixes.cached(model.as_deref(), &prompt, now);
            incoming.shape.prompt_tokens = cached.prompt_tokens;
            incoming.shape.held_tokens = cached.held_tokens.clone();
            KnownPrompt { prompt, model, cached }
        });
        let model = incoming.shape.model.clone();
        let (priority, tenant) = (incoming.shape.priority, incoming.shape.tenant.clone());
        let mut timeline = Timeline::new(incoming.arrived);
        let placed = Placed {
            arrived: now.saturating_sub(incoming.arrived.elapsed()),
            priority,
            tenant: tenant.name.clone(),
            ..Placed::default()
        };
        let choosing = Instant::now();
        let request = state.core.arrive(incoming.shape, HandoffId::random(), now, &mut actions);
        timeline.placing = Some((choosing, Instant::now()));
        state.clients.insert(
            request,
            Client {
                answer: answer.clone(),
                request: Some(incoming.forward),
                prompt,
                request_id: incoming.request_id,
                streams: incoming.streams,
                timeline,
                trace: incoming.trace,
                model,
                relaying: None,
                tenant,
                placed,
            },
        );
        self.carry_out(&mut state, actions, None);
        (answer, InFlight { shell: self.clone(), request })
    }

    fn client_gone(&self, request: RequestKey) {
        let mut state = self.state.lock();
        if let Some(client) = state.clients.remove(&request) {
            self.request_ended(&mut state, &client, Outcome::Cancelled);
            self.placement_ended(&mut state, client, Outcome::Cancelled);
            self.tell_core(&mut state, Event::ClientGone { request }, None);
        }
    }

    pub(crate) fn attach(
        &self,
        description: WorkerDescription,
        link: Arc<Link>,
        peer: Option<PeerInfo>,
        hello: &wire::Hello,
    ) -> WorkerKey {
        let mut state = self.state.lock();
        let mut actions = std::mem::take(&mut state.actions);
        info!(worker = description.name, role = %description.role, epoch = %description.epoch,
            engine = hello.engine, models = ?description.models, "worker attached");
        let attached = Attached {
            link,
            peer,
            models: description.models.clone(),
            max_model_tokens: hello.max_model_tokens,
            kv_capacity_tokens: description.kv_capacity_tokens,
            engine: hello.engine.chars().take(128).collect(),
            since_unix_ms: unix_ms(),
            report: wire::Report::default(),
        };
        state.journal.role(&description.name, description.role);
        let epoch: String = description.epoch.to_string().chars().take(8).collect();
        let how = format!("as {}, epoch {epoch}…", description.role);
        state.journal.decided("attached", &description.name, how, "worker");
        let name = description.name.clone();
        let worker = state.core.attach(description, self.started.elapsed(), &mut actions);
        // Requests may have waited for this worker: it has its link before they are sent there.
        state.links.insert(worker, attached);
        state.prefixes.worker_attached(worker, hello);
        let State { placed, links, .. } = &mut *state;
        placed.worker_attached(worker, &name, |worker| links.contains_key(&worker));
        self.carry_out(&mut state, actions, None);
        self.role_change(&mut state, worker, hello.role_change.as_ref());
        worker
    }

    pub(crate) fn worker_lost(&self, worker: WorkerKey) {
        let mut state = self.state.lock();
        if let Some(view) = state.core.worker(worker) {
            warn!(worker = view.description.name, role = %view.description.role, "worker lost");
            let name = view.description.name.clone();
            state.journal.worker_goes(worker, &name);
            state.journal.decided("lost", name, "its stream ended", "coordinator");
        }
        self.tell_core(&mut state, Event::WorkerLost { worker }, None);
        state.links.remove(&worker);
        state.prefixes.worker_gone(worker);
        state.handoffs.worker_gone(worker);
    }

    pub(crate) fn worker_leaves(&self, worker: WorkerKey) {
        let mut state = self.state.lock();
        if let Some(view) = state.core.worker(worker) {
            info!(worker = view.description.name, role = %view.description.role, "worker leaves");
        }
        self.tell_core(&mut state, Event::Drain { worker }, None);
    }

    pub(crate) fn report(&self, worker: WorkerKey, report: wire::Report) {
        let mut state = self.state.lock();
        let is_unheard = state.prefixes.is_unheard(worker);
        let elsewhere =
            Elsewhere { prefills: report.prefills_elsewhere, decodes: report.decodes_elsewhere };
        self.tell_core(&mut state, Event::BusyElsewhere { worker, elsewhere }, None);
        self.tell_core(&mut state, Event::Heard { worker, follows: report.leads }, None);
        self.role_change(&mut state, worker, report.role_change.as_ref());
        let Some(attached) = state.links.get_mut(&worker) else { return };
        let capacity_tokens = attached.kv_capacity_tokens;
        let used_ratio = report.engine_kv_used_ratio;
        let model = report.step_model.as_ref().and_then(usable_model);
        attached.report = report;
        if is_unheard {
            attached.link.restart_kv_events();
        }
        let view = state.core.worker(worker);
        if let Some(view) = view
            && let Some(capacity_tokens) = capacity_tokens
        {
            let kv_used_tokens = part_of(capacity_tokens, used_ratio);
            // What is not of prompts that are still computed is of sequences that decode.
            let decode_context_tokens = kv_used_tokens.saturating_sub(view.load.prefill_tokens);
            let report = WorkerReport { decode_context_tokens, kv_used_tokens };
            self.tell_core(&mut state, Event::Report { worker, report }, None);
        }
        if let Some(model) = model {
            self.tell_core(&mut state, Event::ModelChanged { worker, model }, None);
        }
    }

    /// Why a request, one of those that are open or one of the last that ended, went where it went.
    pub(crate) fn explain(&self, request_id: &str) -> Option<Explanation> {
        let state = self.state.lock();
        let of_id = |client: &&Client| client.request_id.as_bytes() == request_id.as_bytes();
        match state.clients.values().find(of_id) {
            Some(client) => Some(state.placed.explain_open(request_id, &client.placed)),
            None => state.placed.explain(request_id),
        }
    }

    pub(crate) fn waiting_by_priority(&self) -> BTreeMap<i32, usize> {
        self.state.lock().core.waiting_by_priority()
    }

    /// A request is over: what was predicted of it is held against what happened, and its tenant is
    /// charged for its answer.
    fn placement_ended(&self, state: &mut State, mut client: Client, outcome: Outcome) {
        client.placed.last_token = client.last_token();
        let (path, e2e) = (client.path(), client.timeline.arrived.elapsed());
        state.core.answered_tokens(&client.tenant, client.placed.output_tokens);
        if let Some(placed) = client.placed.decisions.last() {
            self.metrics.prediction(
                client.placed.predicted_ttft().zip(client.placed.first_token),
                placed.itl_ms().zip(client.placed.itl_ms()),
            );
        }
        state.placed.ended(client.request_id, client.placed, path, outcome, e2e);
    }

    /// What a worker says of its role.
    fn role_change(&self, state: &mut State, worker: WorkerKey, change: Option<&wire::RoleChange>) {
        let change = change.and_then(|change| {
            Some(AnnouncedChange { to: change.to().try_into().ok()?, number: change.number })
        });
        self.tell_core(state, Event::RoleChange { worker, change }, None);
    }

    /// What a worker says of its prefix cache.
    pub(crate) fn kv_events(&self, worker: WorkerKey, events: &wire::KvEvents) {
        let mut state = self.state.lock();
        if state.prefixes.kv_events(worker, events)
            && let Some(attached) = state.links.get(&worker)
        {
            warn!("news of a worker's prefix cache were missed: it is asked to tell it anew");
            self.metrics.kv_events_gap();
            attached.link.restart_kv_events();
        }
    }

    /// What a worker says of its jobs, all under one lock.
    pub(crate) fn events(&self, worker: WorkerKey, batch: wire::EventBatch) {
        let mut state = self.state.lock();
        let now = Instant::now();
        for event in batch.events {
            self.job_event(&mut state, worker, event, now);
        }
    }

    pub(crate) fn tick(&self) {
        let mut state = self.state.lock();
        let now = self.started.elapsed();
        if now >= state.tidy_at {
            state.prefixes.tidy(now);
            state.tidy_at = now + TIDY_INTERVAL;
        }
        self.tell_core(&mut state, Event::Tick, None);
    }

    /// Breaks every open answer off: this coordinator is going.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        for (_, client) in state.clients.drain() {
            client.break_off(&ClientError::ShuttingDown);
        }
        for attached in state.links.values() {
            attached.link.close();
        }
    }

    pub(crate) fn requests_open(&self) -> usize {
        self.state.lock().clients.len()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state.lock().core.is_ready()
    }

    /// Each model once, with the shortest of its workers' limits.
    pub(crate) fn models(&self) -> Vec<(String, u32)> {
        let mut models: Vec<(String, u32)> = Vec::new();
        for attached in self.state.lock().links.values() {
            for name in &attached.models {
                match models.iter_mut().find(|(known, _)| known == name) {
                    Some((_, limit)) => *limit = (*limit).min(attached.max_model_tokens),
                    None => models.push((name.clone(), attached.max_model_tokens)),
                }
            }
        }
        models.sort();
        models
    }

    pub(crate) fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.state.lock();
        let mut workers: Vec<_> = state
            .core
            .workers()
            .filter_map(|view| {
                let attached = state.links.get(&view.key)?;
                Some(WorkerStatus {
                    name: view.description.name.clone(),
                    role: view.description.role,
                    jobs_running: view.jobs_running,
                    prefix_blocks: state.prefixes.blocks_of(view.key),
                    report: attached.report.clone(),
                })
            })
            .collect();
        workers.sort_by(|a, b| a.name.cmp(&b.name));
        workers
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
                self.metrics.handoff(&moved);
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
                self.request_ended(state, &client, Outcome::TooSlow);
                self.placement_ended(state, client, Outcome::TooSlow);
            }
            return self.tell_core(state, Event::ClientGone { request }, None);
        }
        if event.end {
            self.tell_core(state, Event::Ended { job }, None);
        }
    }

    pub(crate) fn tell_core(&self, state: &mut State, event: Event, answer: Option<&wire::Event>) {
        let mut actions = std::mem::take(&mut state.actions);
        state.core.handle(event, self.started.elapsed(), &mut actions);
        self.carry_out(state, actions, answer);
    }

    fn carry_out(&self, state: &mut State, mut actions: Vec<Action>, answer: Option<&wire::Event>) {
        for action in actions.drain(..) {
            match action {
                // No worker says yet that it could pull a prefix.
                Action::Start { worker, job, request, leg, handoff, pull: _ } => {
                    self.prompt_goes_to(state, worker, request, leg);
                    if let Some(client) = state.clients.get_mut(&request) {
                        client.timeline.leg_given(leg, worker, Instant::now());
                    }
                    if leg != Leg::Decode {
                        self.attempted(state, request);
                    }
                    if let Some(start) = state.start_job(job, request, leg, handoff)
                        && let Some(attached) = state.links.get(&worker)
                    {
                        attached.link.start(start);
                    }
                }
                Action::Cancel { worker, job } => {
                    if let Some(attached) = state.links.get(&worker) {
                        attached.link.cancel(job.0);
                    }
                }
                Action::Relay { request, job, route } => {
                    if let Some(event) = answer {
                        self.relay(state, request, job, route, event);
                    }
                }
                Action::Reject { request, rejection } => {
                    let Some(client) = state.clients.remove(&request) else { continue };
                    if let Rejection::Overloaded { reason, .. } = &rejection {
                        self.metrics.shed(*reason, client.placed.priority);
                    }
                    let error = ClientError::from(rejection);
                    let outcome = if error.status().is_server_error() {
                        Outcome::ServerError
                    } else {
                        Outcome::ClientError
                    };
                    self.request_ended(state, &client, outcome);
                    client.break_off(&error);
                    self.placement_ended(state, client, outcome);
                }
                Action::BreakOff { request, .. } => {
                    let Some(client) = state.clients.remove(&request) else { continue };
                    self.request_ended(state, &client, Outcome::BrokenOff);
                    client.break_off(&ClientError::NoWorker);
                    self.placement_ended(state, client, Outcome::BrokenOff);
                }
                Action::Finish { request } => {
                    let Some(client) = state.clients.remove(&request) else { continue };
                    let outcome = client.outcome();
                    self.request_ended(state, &client, outcome);
                    client.answer.complete();
                    self.placement_ended(state, client, outcome);
                }
                Action::Blame { request, leg, fault } => {
                    if let Some(client) = state.clients.get_mut(&request) {
                        client.log_span().in_scope(|| {
                            warn!(%leg, origin = %fault.origin, kind = %fault.kind,
                                reason = fault.message, "leg failed");
                        });
                        if let Some(trace) = &mut client.trace {
                            trace.leg_failed(leg, &fault);
                        }
                    }
                    self.metrics.leg_failed(leg, &fault);
                }
                Action::SetRole { worker, role } => {
                    if let Some(view) = state.core.worker(worker) {
                        info!(worker = view.description.name, %role, "worker is told its role");
                    }
                    if let Some(attached) = state.links.get(&worker) {
                        attached.link.set_role(role);
                    }
                }
                Action::Release { worker, change } => {
                    if let Some(attached) = state.links.get(&worker) {
                        attached.link.release(change);
                    }
                }
                Action::Disconnect { worker } => {
                    if let Some(attached) = state.links.remove(&worker) {
                        attached.link.dismiss(
                            "another worker of the same name took this one's place".to_owned(),
                        );
                    }
                }
            }
        }
        state.actions = actions;
    }

    /// The legs of a request are set going.
    fn attempted(&self, state: &mut State, request: RequestKey) {
        let State { clients, core, .. } = state;
        let Some(client) = clients.get_mut(&request) else { return };
        let Some(decision) = core.take_decision(request) else { return };
        self.metrics.decided(path_of(&decision), decision.reason.as_str());
        if client.placed.decisions.is_empty() {
            self.metrics.waited(client.placed.priority, client.timeline.arrived.elapsed());
        }
        client.placed.decisions.push(decision);
    }

    /// A leg reads the prompt on this worker.
    fn prompt_goes_to(&self, state: &mut State, worker: WorkerKey, request: RequestKey, leg: Leg) {
        let State { clients, prefixes, .. } = state;
        let client = clients.get(&request);
        let Some(known) = client.and_then(|client| client.prompt.as_ref()) else { return };
        let KnownPrompt { prompt, model, cached } = known;
        prefixes.routed(worker, model.as_deref(), prompt, self.started.elapsed());
        self.metrics.prompt(leg, cached.prompt_tokens, cached.held_by(worker));
    }

    fn relay(
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
                self.metrics.aggregated(reason);
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
    fn handed_over(&mut self, request: RequestKey, to: WorkerKey, moved: &wire::HandoffResult) {
        let Some(client) = self.clients.get_mut(&request) else { return };
        let blocks = moved.blocks.saturating_add(moved.blocks_reused);
        if let Some(known) = &client.prompt {
            self.prefixes.prompt_had_blocks(to, &known.prompt, blocks);
        }
        client.placed.handoff = Some(Handoff {
            bytes: moved.bytes,
            blocks: moved.blocks,
            blocks_reused: moved.blocks_reused,
            milliseconds: Duration::from_micros(moved.micros).as_secs_f64() * 1000.0,
        });
    }

    fn start_job(
        &mut self,
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
        let left_ms = self.slo.ttft_ms - client.timeline.arrived.elapsed().as_secs_f64() * 1000.0;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Saturates.
        let deadline_ms = left_ms.max(1.0) as u32;
        let (fenced, engine_handoff_params) = match handoff {
            None | Some(HandoffPlan::Engine { prefill: None }) => (None, Bytes::new()),
            Some(HandoffPlan::Engine { prefill: Some(prefill) }) => {
                (None, self.engine_handoffs.remove(&prefill).unwrap_or_default())
            }
            Some(HandoffPlan::Fenced { id, generation, peer }) => {
                let peer = self.links.get(&peer).and_then(|attached| attached.peer.clone());
                let handoff = wire::Handoff {
                    id: Bytes::copy_from_slice(id.as_bytes()),
                    generation: generation.0,
                    peer: peer.map(|peer| peer.wire),
                };
                (Some(handoff), Bytes::new())
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
        })
    }
}

impl Client {
    /// What a log line about the request stands in.
    fn log_span(&self) -> tracing::Span {
        let request_id = String::from_utf8_lossy(self.request_id.as_bytes());
        tracing::info_span!("request", %request_id)
    }

    fn path(&self) -> Path {
        self.relaying.as_ref().map_or(Path::None, |relaying| relaying.path)
    }

    fn outcome(&self) -> Outcome {
        match self.relaying.as_ref().map(|relaying| relaying.status) {
            Some(status) if status.is_client_error() => Outcome::ClientError,
            Some(status) if status.is_server_error() => Outcome::ServerError,
            _ => Outcome::Ok,
        }
    }

    /// Answers how long after those before them they came, where somebody could see that.
    fn tokens(&mut self, tokens: u32, now: Instant, metrics: &Metrics) -> Option<Duration> {
        let relaying = self.relaying.as_mut().filter(|_| tokens > 0)?;
        metrics.tokens(relaying.path, tokens);
        self.placed.output_tokens += u64::from(tokens);
        // An answer that comes whole has no first token that anybody could see.
        match relaying.last_tokens.filter(|_| relaying.event_stream) {
            Some(last) => {
                let gap = now.duration_since(last);
                metrics.gaps(relaying.path, gap, tokens);
                relaying.last_tokens = Some(now);
                return Some(gap);
            }
            None if relaying.event_stream => {
                let ttft = now.duration_since(self.timeline.arrived);
                metrics.first_token(relaying.path, ttft);
                self.placed.first_token = Some(ttft);
            }
            None => {}
        }
        relaying.last_tokens = Some(now);
        None
    }

    /// When the last tokens came, if anybody could see them come.
    fn last_token(&self) -> Option<Duration> {
        let last = self.relaying.as_ref()?.last_tokens?;
        self.placed.first_token?;
        Some(last.duration_since(self.timeline.arrived))
    }

    /// Says `error` in whatever way the answer still allows.
    fn break_off(&self, error: &ClientError) {
        match &self.relaying {
            None => {
                let (mut head, body) = error.to_parts();
                head.headers.insert("x-request-id", self.request_id.clone());
                self.answer.begin(head);
                // A fresh answer has room for an error.
                let _ = self.answer.push(&body);
                self.answer.complete();
            }
            Some(relaying) if relaying.event_stream => {
                let _ = self.answer.push(&broken_stream_event());
                self.answer.complete();
            }
            Some(_) => self.answer.break_off(),
        }
    }
}

/// A worker as status pages and metrics show it.
#[derive(Clone, Debug)]
pub(crate) struct WorkerStatus {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) jobs_running: u32,
    pub(crate) report: wire::Report,
    /// Blocks of its prefix cache that are known here.
    pub(crate) prefix_blocks: usize,
}

/// Of an engine whose steps take no time nothing could be predicted.
pub(crate) fn usable_model(model: &wire::StepModel) -> Option<StepModel> {
    let model = StepModel::try_from(model).ok()?;
    let takes_time = |times: [f64; 3]| times.iter().any(|time| *time > 0.0);
    (takes_time(model.prefill_ms) && takes_time(model.decode_ms)).then_some(model)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]
fn part_of(whole: u64, ratio: f32) -> u64 {
    // Saturates.
    (whole as f64 * f64::from(ratio.clamp(0.0, 1.0))) as u64
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
