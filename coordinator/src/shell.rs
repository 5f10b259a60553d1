//! Carries the core's decisions out: between clients' answers on one side and workers' links on the
//! other. One lock holds it all, since all of it runs on one thread; it is never held over an await.

mod client;
mod ending;
mod legs;
mod operators;
mod pulls;
mod workers;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_config::SloConfig;
use baton_core::{
    Action, BalancerSettings, Core, Event, JobId, Rejection, RequestKey, RequestShape, Settings,
    WorkerKey, policy::Policy,
};
use baton_proto as wire;
use baton_types::{HandoffId, Leg};
use bytes::Bytes;
use http::HeaderValue;
use parking_lot::{Mutex, MutexGuard};
use tracing::info;

use crate::{
    client::{Answer, ClientError, TokenBudget},
    handoffs::HandoffMatrix,
    journal::Journal,
    metrics::{Metrics, Outcome},
    placed::{Explanation, Placed, PlacedRequests, path_of},
    prefixes::Prefixes,
    prompt::Prompt,
    spans::{RequestTrace, Tracer},
    timeline::Timeline,
};

use self::{
    client::Client,
    pulls::{PromptIds, Pulling},
    workers::Attached,
};
pub(crate) use self::{
    legs::ForwardedRequest,
    operators::UnknownWorker,
    workers::{WorkerStatus, usable_model},
};

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
    /// Each apart: a table in which half of the places are free has small places.
    clients: HashMap<RequestKey, Box<Client>>,
    links: HashMap<WorkerKey, Attached>,
    /// `kv_transfer_params` that prefill jobs answered, until their decode leg takes them.
    engine_handoffs: HashMap<JobId, Bytes>,
    handoffs: HandoffMatrix,
    pub(crate) journal: Journal,
    /// Kept between calls for its memory.
    actions: Vec<Action>,
}

const TIDY_INTERVAL: Duration = Duration::from_millis(100);

/// A request as it came in.
#[derive(Debug)]
pub(crate) struct IncomingRequest {
    pub(crate) shape: RequestShape,
    pub(crate) prompt: Option<Prompt>,
    pub(crate) streams: bool,
    pub(crate) request_id: HeaderValue,
    pub(crate) arrived: Instant,
    pub(crate) trace: Option<Box<RequestTrace>>,
    /// What its tenant may use.
    pub(crate) budget: Option<Arc<TokenBudget>>,
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
        precise: bool,
    ) -> Self {
        let core = Core::with_policy(settings, policy);
        let core = match balancing {
            Some(balancing) => core.balanced(balancing),
            None => core,
        };
        Self {
            state: Arc::new(Mutex::new(State {
                core,
                prefixes: Prefixes::new(precise),
                tidy_at: Duration::ZERO,
                placed: PlacedRequests::default(),
                clients: HashMap::new(),
                links: HashMap::new(),
                engine_handoffs: HashMap::new(),
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
        let mut prompt_ids = None;
        let prompt = incoming.prompt.map(|prompt| {
            let model = incoming.shape.model.clone();
            let cached = state.prefixes.cached(model.as_deref(), &prompt, now);
            incoming.shape.prompt_tokens = cached.prompt_tokens;
            incoming.shape.blocks = cached.blocks.clone();
            incoming.shape.held_tokens = cached.held_tokens.clone();
            prompt_ids = PromptIds::of(prompt);
            cached
        });
        incoming.shape.prompt_unknown = prompt_ids.is_none();
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
        let client = Client {
            answer: answer.clone(),
            request: Some(incoming.forward),
            prompt,
            prompt_ids,
            pulling: None,
            request_id: incoming.request_id,
            streams: incoming.streams,
            timeline,
            trace: incoming.trace,
            model,
            relaying: None,
            tenant,
            budget: incoming.budget,
            placed,
        };
        state.clients.insert(request, Box::new(client));
        self.carry_out(&mut state, actions, None);
        (answer, InFlight { shell: self.clone(), request })
    }

    fn client_gone(&self, request: RequestKey) {
        let mut state = self.state.lock();
        if let Some(client) = state.clients.remove(&request) {
            self.request_ended(&mut state, client, Outcome::Cancelled);
            self.tell_core(&mut state, Event::ClientGone { request }, None);
        }
    }

    /// Why a request, one of those that are open or one of the last that ended, went where it went.
    pub(crate) fn explain(&self, request_id: &str) -> Option<Explanation> {
        let state = self.state.lock();
        let mut open = state.clients.values();
        match open.find(|client| client.request_id.as_bytes() == request_id.as_bytes()) {
            Some(client) => Some(state.placed.explain_open(request_id, &client.placed)),
            None => state.placed.explain(request_id),
        }
    }

    pub(crate) fn long_prompts_part(&self) -> f64 {
        self.state.lock().core.long_prompts_part()
    }

    pub(crate) fn waiting_by_priority(&self) -> BTreeMap<i32, usize> {
        self.state.lock().core.waiting_by_priority()
    }

    pub(crate) fn tick(&self) {
        let mut state = self.state.lock();
        let now = self.started.elapsed();
        if now >= state.tidy_at {
            state.prefixes.tidy(now);
            state.core.tidy();
            state.tidy_at = now + TIDY_INTERVAL;
        }
        self.tell_core(&mut state, Event::Tick, None);
    }

    /// Breaks every open answer off, and hangs up on the workers: this coordinator is going.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        for (_, client) in state.clients.drain() {
            client.break_off(&ClientError::ShuttingDown);
        }
        for (_, attached) in state.links.drain() {
            attached.link.close();
        }
    }

    pub(crate) fn requests_open(&self) -> usize {
        self.state.lock().clients.len()
    }

    pub(crate) fn tell_core(&self, state: &mut State, event: Event, answer: Option<&wire::Event>) {
        let mut actions = std::mem::take(&mut state.actions);
        state.core.handle(event, self.started.elapsed(), &mut actions);
        self.carry_out(state, actions, answer);
    }

    fn carry_out(&self, state: &mut State, mut actions: Vec<Action>, answer: Option<&wire::Event>) {
        for action in actions.drain(..) {
            match action {
                Action::Lend { job, request, to, pull, id, generation, worth } => {
                    let pulling =
                        Pulling { from: pull.from, to, tokens: pull.tokens, id, generation, worth };
                    if let Some(start) = state.lend_job(self.slo.ttft_ms, job, request, pulling)
                        && let Some(attached) = state.links.get(&pull.from)
                    {
                        attached.link.start(start);
                    }
                }
                Action::Start { worker, job, request, leg, handoff, pull } => {
                    self.prompt_goes_to(state, worker, request, leg);
                    if let Some(client) = state.clients.get_mut(&request) {
                        client.timeline.leg_given(leg, worker, Instant::now());
                        if leg != Leg::Decode && pull.is_none() {
                            // Of an attempt before this one.
                            (client.pulling, client.placed.pull) = (None, None);
                        }
                    }
                    if leg != Leg::Decode {
                        self.attempted(state, request);
                    }
                    if let Some(start) =
                        state.start_job(self.slo.ttft_ms, worker, job, request, leg, handoff)
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
                        self.metrics.placement.shed(*reason, client.placed.priority);
                    }
                    let error = ClientError::from(rejection);
                    let outcome = if error.status().is_server_error() {
                        Outcome::ServerError
                    } else {
                        Outcome::ClientError
                    };
                    client.break_off(&error);
                    self.request_ended(state, client, outcome);
                }
                Action::BreakOff { request, .. } => {
                    let Some(client) = state.clients.remove(&request) else { continue };
                    client.break_off(&ClientError::NoWorker);
                    self.request_ended(state, client, Outcome::BrokenOff);
                }
                Action::Finish { request } => {
                    let Some(client) = state.clients.remove(&request) else { continue };
                    let outcome = client.outcome();
                    client.answer.complete();
                    self.request_ended(state, client, outcome);
                }
                Action::Blame { request, leg, worker, fault } => {
                    self.leg_failed(state, request, leg, worker, &fault);
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
        self.metrics.placement.decided(path_of(&decision), decision.reason.as_str());
        if client.placed.decisions.is_empty() {
            self.metrics
                .placement
                .waited(client.placed.priority, client.timeline.arrived.elapsed());
        }
        // Most requests have one.
        client.placed.decisions.reserve_exact(1);
        client.placed.decisions.push(decision);
    }

    /// A leg reads the prompt on this worker.
    fn prompt_goes_to(&self, state: &mut State, worker: WorkerKey, request: RequestKey, leg: Leg) {
        let State { core, clients, prefixes, .. } = state;
        let client = clients.get(&request);
        let Some(prompt) = client.and_then(|client| client.prompt.as_ref()) else { return };
        prefixes.routed(worker, prompt, self.started.elapsed());
        let held_tokens = core.held_tokens(request, worker);
        self.metrics.prefixes.prompt(leg, prompt.prompt_tokens, held_tokens);
    }
}
