mod admitting;
mod balance;
mod role_change;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use baton_types::{Fault, FaultKind, Generation, HandoffId, Leg, Origin, Role};

use crate::{
    admission::{Accounts, AdmissionSettings, WaitingRoom},
    decision::{Chosen, Considered},
    event::{Action, Event, HandoffPlan, Rejection},
    fleet::{Fleet, HandoffMode, Worker, WorkerDescription, WorkerKey, WorkerView},
    keyed::Keyed,
    late_shares::LateShares,
    placement::{self, AggregatedReason, Holders, NoRoute, Plan, PrefixPull, Route, Split},
    policy::{Candidate, Choice, POLICIES, Policy, Targets},
    queue::{Order, Waiting},
    recent_prefixes::RecentPrefixes,
    request::{Job, JobId, Phase, Request, RequestKey, RequestShape, RequestView, Stage},
};

use self::balance::Balancing;
pub use self::role_change::AnnouncedChange;
pub(crate) use self::{balance::Gaps, role_change::RoleChange};

/// A prompt whose like have been late often enough is served ahead of its turn by this part of what it
/// takes. With more of it others lose more than these gain.
const HEAD_START: f64 = 0.5;

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub split: Split,
    pub order: Order,
    /// The first token is due so long after the arrival, and so many times the prompt's own prefill
    /// on an idle worker.
    pub ttft: Duration,
    pub ttft_prefill_factor: f64,
    pub targets: Targets,
    /// Under [`Order::LateLast`]: a worker's engine is given prompts until it has so many tokens of
    /// them to compute, two prompts at least, so that it never idles between them. The others wait
    /// here, where their order can still change.
    pub engine_queue_tokens: u64,
    /// A request with no first token after this time is given up.
    pub first_token_timeout: Duration,
    /// A worker that was told to change its role, and has not after this time, stays as it is.
    pub role_change_timeout: Duration,
    /// How often a request may be tried again before its first token.
    pub retries: u32,
    /// What becomes of requests that could be split, while the prefill pool is empty.
    pub on_no_prefill: OnNoPrefill,
    /// Without it nobody waits for a turn.
    pub admission: Option<AdmissionSettings>,
    /// So long a request waits for a worker that could take it, where there is none.
    pub wait_for_worker: Duration,
    /// Keep what was predicted of each request, and of whom it was chosen among.
    pub keeps_decisions: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNoPrefill {
    /// Decode workers do all of it.
    #[default]
    Local,
    Reject,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            split: Split::default(),
            order: Order::default(),
            ttft: Duration::from_secs(2),
            ttft_prefill_factor: 0.0,
            targets: Targets::default(),
            engine_queue_tokens: 2048,
            first_token_timeout: Duration::from_secs(300),
            role_change_timeout: Duration::from_secs(120),
            retries: 1,
            on_no_prefill: OnNoPrefill::default(),
            admission: None,
            wait_for_worker: Duration::ZERO,
            keeps_decisions: false,
        }
    }
}

/// The coordinator's state and its decisions.
///
/// What always holds between two calls:
/// - every request has at most one job that answers it, and at most one prefill job;
/// - every job runs on a worker that is attached, and belongs to a request that is not over;
/// - each request ends in exactly one of `Finish`, `Reject`, `BreakOff`, or its client's going;
/// - a handoff's name is used for one attempt only: each retry is of the next generation;
/// - a request that has no job waits in the queue of exactly one worker, or for its turn in the one
///   waiting room of its model;
/// - a worker's count of jobs is the number of jobs that were started on it and not ended.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    policy: Box<dyn Policy>,
    /// For requests whose paths cannot be predicted.
    fallback: Box<dyn Policy>,
    fleet: Fleet,
    requests: Keyed<Request>,
    jobs: Keyed<Job>,
    /// Of the requests that have no answer yet.
    deadlines: BTreeSet<(Duration, RequestKey)>,
    late_shares: LateShares,
    /// Who waits for a turn, by model.
    rooms: BTreeMap<Option<String>, WaitingRoom>,
    accounts: Accounts,
    /// Until when each of them waits.
    patience: BTreeSet<(Duration, RequestKey)>,
    is_admitting: bool,
    /// Of the one that was admitted last.
    last_turn: Duration,
    /// When prefills of answers that come whole are predicted to be done.
    unseen_prefills: BTreeSet<(Duration, JobId)>,
    balancing: Option<Balancing>,
    /// Kept for its memory.
    candidates: Vec<WorkerKey>,
    /// The same: lengths of prompts that were found late.
    demoted: Vec<u32>,
}

impl Core {
    /// With the policy `least-load`.
    pub fn new(settings: Settings) -> Self {
        Self::with_policy(settings, least_load())
    }

    pub fn with_policy(settings: Settings, policy: Box<dyn Policy>) -> Self {
        Self {
            settings,
            policy,
            fallback: least_load(),
            balancing: None,
            candidates: Vec::new(),
            late_shares: LateShares::default(),
            demoted: Vec::new(),
            fleet: Fleet::default(),
            requests: Keyed::default(),
            jobs: Keyed::default(),
            deadlines: BTreeSet::new(),
            rooms: BTreeMap::new(),
            accounts: Accounts::default(),
            patience: BTreeSet::new(),
            is_admitting: false,
            last_turn: Duration::ZERO,
            unseen_prefills: BTreeSet::new(),
        }
    }

    /// A worker is there and can take work. One of the same name is taken to be its former self.
    pub fn attach(
        &mut self,
        description: WorkerDescription,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> WorkerKey {
        if let Some(former) = self.fleet.named(&description.name) {
            actions.push(Action::Disconnect { worker: former });
            self.handle(Event::WorkerLost { worker: former }, now, actions);
        }
        let worker = self.fleet.attach(description, now);
        self.admit(now, actions);
        worker
    }

    /// A client asks. `handoff` names the handoff, should there be one.
    pub fn arrive(
        &mut self,
        shape: RequestShape,
        handoff: HandoffId,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> RequestKey {
        let first_token_deadline = now + self.settings.first_token_timeout;
        let due = self.due(&shape, now);
        let key = RequestKey(self.requests.insert(Request {
            shape,
            due,
            turn: due,
            arrived: now,
            is_counted: false,
            avoid: Vec::new(),
            split: self.settings.split,
            plan: Plan::Split,
            admitted: false,
            waits_until: None,
            queued_ms: 0.0,
            decision: None,
            waits_for: None,
            handoff,
            generation: Generation::default(),
            retries_left: self.settings.retries,
            first_token_deadline,
            route: None,
            phase: Phase::Open,
            prefill: None,
            answering: None,
        }));
        self.deadlines.insert((first_token_deadline, key));
        if !self.rejects_early(key, now, actions) {
            self.start_attempt(key, now, actions);
        }
        key
    }

    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::WorkerLost { worker } => self.worker_lost(worker, now, actions),
            Event::Drain { worker } => self.drain(worker, now, actions),
            Event::Undrain { worker } => {
                self.fleet.set_drains(worker, false);
                self.admit(now, actions);
            }
            Event::Report { worker, report } => self.fleet.report(worker, &report, now),
            Event::ModelChanged { worker, model } => self.fleet.model_changed(worker, model),
            Event::BusyElsewhere { worker, elsewhere } => {
                self.fleet.busy_elsewhere(worker, elsewhere);
            }
            Event::PrefillDone { job } => self.prefill_done(job, now, actions),
            Event::Answered { job } => self.answered(job, now, actions),
            Event::Ended { job } => self.ended(job, now, actions),
            Event::LegFailed { job, fault } => self.leg_failed(job, fault, now, actions),
            Event::ClientGone { request } => self.forget(request, now, actions),
            Event::SetRole { worker, role } => self.set_role(worker, role, now, actions),
            Event::RoleChange { worker, change } => {
                self.role_change_announced(worker, change, now, actions);
            }
            Event::Heard { worker, follows } => self.fleet.heard(worker, follows, now),
            Event::Tick => {
                self.expire(now, actions);
                self.watch_role_changes(now, actions);
            }
        }
    }

    pub fn split(&self) -> Split {
        self.settings.split
    }

    /// From here on requests are split like this. Those that have their route go on as they are.
    pub fn set_split(&mut self, split: Split) {
        self.settings.split = split;
    }

    pub fn worker(&self, key: WorkerKey) -> Option<WorkerView<'_>> {
        self.fleet.get(key).map(|worker| view(key, worker))
    }

    pub fn workers(&self) -> impl Iterator<Item = WorkerView<'_>> {
        self.fleet.iter().map(|(key, worker)| view(key, worker))
    }

    /// Whom a job works for, as what and where, while it counts.
    pub fn job(&self, job: JobId) -> Option<(RequestKey, Leg, WorkerKey)> {
        self.jobs.get(job.0).map(|job| (job.request, job.leg, job.worker))
    }

    pub fn request(&self, key: RequestKey) -> Option<RequestView<'_>> {
        self.requests.get(key.0).map(|request| request.view(key))
    }

    /// Those that have not ended.
    pub fn requests(&self) -> impl Iterator<Item = RequestView<'_>> {
        self.requests.iter().map(|(key, request)| request.view(RequestKey(key)))
    }

    /// Each role has a worker.
    pub fn is_ready(&self) -> bool {
        Role::ALL.into_iter().all(|role| self.fleet.count(role) > 0)
    }

    pub fn requests_open(&self) -> usize {
        self.requests.len()
    }

    /// By the SLO.
    fn due(&self, shape: &RequestShape, now: Duration) -> Duration {
        let Settings { ttft, ttft_prefill_factor, .. } = self.settings;
        let model = self.fleet.iter().find_map(|(_, worker)| worker.load.model);
        let alone_ms = model.map_or(0.0, |model| model.prefill_alone_ms(0, shape.prompt_tokens));
        now + ttft + milliseconds(ttft_prefill_factor * alone_ms)
    }

    /// Chooses the worker of the first leg, and puts the request into its queue.
    fn start_attempt(&mut self, key: RequestKey, now: Duration, actions: &mut Vec<Action>) {
        let split = self.split_now();
        let Some(request) = self.requests.get_mut(key.0) else { return };
        request.split = split;
        let mut candidates = std::mem::take(&mut self.candidates);
        let Request { shape, avoid, .. } = request;
        let plan = placement::plan(&self.fleet, shape, avoid, split, &mut candidates);
        self.count_arrival(key, &candidates);
        match plan {
            Err(NoRoute::NoWorker) if self.waits_for_workers() => {
                self.wait(key, now + self.settings.wait_for_worker, now, actions);
            }
            Ok(Plan::Aggregated(AggregatedReason::NoPrefillWorker)) if self.rejects_local() => {
                if self.waits_for_workers() {
                    self.wait(key, now + self.settings.wait_for_worker, now, actions);
                } else {
                    self.reject(key, Rejection::NoPrefillWorker, now, actions);
                }
            }
            Ok(_) if self.has_to_wait(key, &candidates, now) => {
                let max_wait = self.settings.admission.unwrap_or_default().max_wait;
                self.wait(key, now + max_wait, now, actions);
            }
            Err(reason) => {
                let rejection = match reason {
                    NoRoute::NoWorker => Rejection::NoWorker,
                    NoRoute::UnknownModel => self.unknown_model(key),
                };
                self.reject(key, rejection, now, actions);
            }
            Ok(plan) => {
                self.decide(key, plan, now);
                let worker = self.choose(key, Leg::Prefill, None, &candidates, now);
                self.fleet.placed(worker);
                if let Some(request) = self.requests.get_mut(key.0) {
                    request.plan = plan;
                }
                match self.settings.order {
                    _ if !self.is_held(key, worker) => self.dispatch(key, worker, now, actions),
                    Order::Arrival => self.dispatch(key, worker, now, actions),
                    Order::LateLast => {
                        self.enqueue(key, worker, now);
                        self.pump(worker, now, actions);
                    }
                }
            }
        }
        self.candidates = candidates;
    }

    /// One of the candidates, of which there must be one.
    fn choose(
        &mut self,
        key: RequestKey,
        leg: Leg,
        here: Option<WorkerKey>,
        candidates: &[WorkerKey],
        now: Duration,
    ) -> WorkerKey {
        let keeps = self.settings.keeps_decisions;
        if let ([only], false) = (candidates, keeps) {
            return *only;
        }
        let Some(request) = self.requests.get(key.0) else { return candidates[0] };
        let targets = &self.settings.targets;
        let holders = Holders::of(&self.fleet, &request.shape);
        let shown: Vec<Candidate<'_>> = candidates
            .iter()
            .filter_map(|worker| Some((*worker, self.fleet.get(*worker)?)))
            .map(|(worker, on)| candidate(request, worker, on, here, &holders, targets, now))
            .collect();
        let by_prediction = request.split == self.settings.split;
        let policy = if by_prediction { &mut self.policy } else { &mut self.fallback };
        let place = policy.choose(&Choice {
            now,
            leg,
            request: &request.shape,
            deadline: Some(request.due),
            targets,
            candidates: &shown,
        });
        debug_assert!(place < shown.len(), "a policy chooses one of the candidates");
        if keeps {
            let (tokens, prefills) = (request.shape.prompt_tokens, leg == Leg::Prefill);
            let predict = if prefills { Considered::to_prefill } else { Considered::to_decode };
            let considered = shown.iter().map(|one| predict(one, tokens, targets)).collect();
            let chosen = Chosen::new(considered, place);
            if let Some(request) = self.requests.get_mut(key.0)
                && let Some(decision) = &mut request.decision
            {
                *(if prefills { &mut decision.first } else { &mut decision.decode }) = chosen;
            }
        }
        candidates[place.min(candidates.len() - 1)]
    }

    /// What a request that prefills there shall copy from a peer first, and the tokens of its prompt that
    /// are not to be computed then.
    fn pull(&self, key: RequestKey, worker: WorkerKey, now: Duration) -> (Option<PrefixPull>, u32) {
        let (Some(request), Some(on)) = (self.requests.get(key.0), self.fleet.get(worker)) else {
            return (None, 0);
        };
        let targets = &self.settings.targets;
        let holders = Holders::of(&self.fleet, &request.shape);
        let shown = candidate(request, worker, on, None, &holders, targets, now);
        let choice = Choice {
            now,
            leg: Leg::Prefill,
            request: &request.shape,
            deadline: Some(request.due),
            targets,
            candidates: std::slice::from_ref(&shown),
        };
        match shown.pull {
            Some(pull) if self.policy.pulls(&choice, &shown) => (Some(pull), pull.tokens),
            _ => (None, shown.hit_tokens),
        }
    }

    fn enqueue(&mut self, key: RequestKey, worker: WorkerKey, now: Duration) {
        let (_, cached_tokens) = self.pull(key, worker, now);
        let (Some(request), Some(on)) = (self.requests.get_mut(key.0), self.fleet.get_mut(worker))
        else {
            return;
        };
        let tokens = request.shape.prompt_tokens;
        let work_ms = on.load.prefill_ms(cached_tokens, tokens);
        let due = request.turn;
        if self.settings.admission.is_none() && self.late_shares.are_spent(tokens) {
            let takes_ms = work_ms / on.load.prefill_rate(&self.settings.targets);
            request.turn = due.saturating_sub(milliseconds(HEAD_START * takes_ms));
        }
        on.queue.push(key, request.turn, Waiting { work_ms, tokens, due });
        on.queued_ms += work_ms;
        on.queue_changed();
        (request.waits_for, request.queued_ms) = (Some(worker), work_ms);
    }

    /// Gives a worker's engine what it has room for.
    fn pump(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        let Settings { targets, engine_queue_tokens: most_tokens, .. } = self.settings;
        while let Some(on) = self.fleet.get_mut(worker)
            && on.queue.len() > 0
        {
            let load = &on.load;
            let fixed_ms = load.model.map_or(0.0, |model| model.prefill_ms[0]);
            let (ahead_ms, rate) =
                (load.dispatched_left_ms(now, &targets), load.prefill_rate(&targets));
            let next = on.queue.pop(
                |waiting| {
                    let left_ms = fixed_ms + (ahead_ms + waiting.work_ms) / rate;
                    now + milliseconds(left_ms) > waiting.due
                },
                |waiting| {
                    load.prefills < 2
                        || load.prefill_tokens + u64::from(waiting.tokens) <= most_tokens
                },
                &mut self.demoted,
            );
            on.queue_changed();
            for tokens in self.demoted.drain(..) {
                self.late_shares.served(tokens, true);
            }
            let Some((key, is_late)) = next else { break };
            if !is_late && let Some(request) = self.requests.get(key.0) {
                self.late_shares.served(request.shape.prompt_tokens, false);
            }
            if let Some(request) = self.requests.get_mut(key.0) {
                request.waits_for = None;
                on.queued_ms -= request.queued_ms;
            }
            if on.queue.len() == 0 {
                // Nothing is left of rounding.
                on.queued_ms = 0.0;
            }
            self.dispatch(key, worker, now, actions);
        }
        self.admit(now, actions);
    }

    /// Starts the legs of a request whose first worker is chosen.
    fn dispatch(
        &mut self,
        key: RequestKey,
        worker: WorkerKey,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get(key.0) else { return };
        let reason = match request.plan {
            Plan::Aggregated(reason) => reason,
            Plan::Split => {
                let mut partners = Vec::new();
                placement::partners(
                    &self.fleet,
                    &request.shape,
                    &request.avoid,
                    request.split,
                    worker,
                    &mut partners,
                );
                if partners.is_empty() {
                    // Whoever could decode went away meanwhile.
                    AggregatedReason::NoDecodeWorker
                } else {
                    let decode = self.choose(key, Leg::Decode, Some(worker), &partners, now);
                    if decode != worker {
                        self.fleet.placed(decode);
                        return self.start_split(key, worker, decode, now, actions);
                    }
                    AggregatedReason::StaysByPolicy
                }
            }
        };
        self.start_aggregated(key, worker, reason, now, actions);
    }

    fn start_aggregated(
        &mut self,
        key: RequestKey,
        worker: WorkerKey,
        reason: AggregatedReason,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let job = self.start(key, worker, Leg::Aggregated, None, now, actions);
        if let Some(request) = self.requests.get_mut(key.0) {
            request.route = Some(Route::Aggregated { worker, reason });
            (request.prefill, request.answering) = (None, Some(job));
        }
    }

    fn start_split(
        &mut self,
        key: RequestKey,
        prefill: WorkerKey,
        decode: WorkerKey,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get(key.0) else { return };
        let (id, generation) = (request.handoff, request.generation);
        let mode = self.fleet.get(prefill).map(|worker| worker.description.handoff);
        let by_engine = mode == Some(HandoffMode::Engine);
        let jobs = if by_engine {
            let plan = HandoffPlan::Engine { prefill: None };
            (self.start(key, prefill, Leg::Prefill, Some(plan), now, actions), None)
        } else {
            let fenced = |peer| Some(HandoffPlan::Fenced { id, generation, peer });
            let first = self.start(key, prefill, Leg::Prefill, fenced(decode), now, actions);
            let second = self.start(key, decode, Leg::Decode, fenced(prefill), now, actions);
            (first, Some(second))
        };
        if let Some(request) = self.requests.get_mut(key.0) {
            request.route = Some(Route::Disaggregated { prefill, decode, by_engine });
            (request.prefill, request.answering) = (Some(jobs.0), jobs.1);
        }
    }

    fn start(
        &mut self,
        key: RequestKey,
        worker: WorkerKey,
        leg: Leg,
        handoff: Option<HandoffPlan>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> JobId {
        let mut job = Job {
            request: key,
            worker,
            leg,
            stage: if leg == Leg::Decode { Stage::Decoding } else { Stage::Prefilling },
            since: now,
            prompt_tokens: 0,
            output_tokens: 0,
            work_ms: 0.0,
        };
        let (pull, cached_tokens) = match leg {
            Leg::Decode => (None, 0),
            Leg::Prefill | Leg::Aggregated => self.pull(key, worker, now),
        };
        if let (Some(request), Some(on)) = (self.requests.get(key.0), self.fleet.get_mut(worker)) {
            let shape = &request.shape;
            job.prompt_tokens = shape.prompt_tokens;
            job.work_ms = on.load.prefill_ms(cached_tokens, shape.prompt_tokens);
            on.prefixes.used(&shape.prefix_blocks, shape.prefix_block_tokens);
        }
        let id = JobId(self.jobs.insert(job));
        self.foresee_unseen(id, &job, now);
        self.fleet.job_started(&job, now);
        actions.push(Action::Start { worker, job: id, request: key, leg, handoff, pull });
        id
    }

    /// The job is over, of itself or by our will: nothing that its worker still says of it counts.
    fn close(&mut self, id: JobId, now: Duration) -> Option<Job> {
        let job = self.jobs.remove(id.0)?;
        self.fleet.job_ended(&job, now);
        if let Some(request) = self.requests.get_mut(job.request.0) {
            for place in [&mut request.prefill, &mut request.answering] {
                if *place == Some(id) {
                    *place = None;
                }
            }
        }
        Some(job)
    }

    /// The job goes on in another way.
    fn advance(&mut self, id: JobId, stage: Stage, now: Duration) {
        let Some(job) = self.jobs.get_mut(id.0).filter(|job| job.stage != stage) else { return };
        self.fleet.job_ended(job, now);
        (job.stage, job.since) = (stage, now);
        self.fleet.job_started(job, now);
    }

    fn cancel(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        if let Some(job) = self.close(id, now) {
            actions.push(Action::Cancel { worker: job.worker, job: id });
            self.pump(job.worker, now, actions);
        }
    }

    /// Nothing is done for the request any more, and it waits for nobody.
    fn withdraw(&mut self, key: RequestKey, now: Duration, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let (jobs, turn) = ([request.prefill, request.answering], request.turn);
        let queued_ms = request.queued_ms;
        if let Some(worker) = request.waits_for.take()
            && let Some(on) = self.fleet.get_mut(worker)
        {
            on.queue.remove(key, turn);
            on.queued_ms = if on.queue.len() == 0 { 0.0 } else { on.queued_ms - queued_ms };
            on.queue_changed();
        }
        self.stop_waiting(key);
        for job in jobs.into_iter().flatten() {
            self.cancel(job, now, actions);
        }
    }

    fn prefill_done(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, .. }) =
            self.jobs.get(id.0).filter(|job| job.leg == Leg::Prefill)
        else {
            return;
        };
        self.advance(id, Stage::Holding, now);
        self.pump(worker, now, actions);
        let Some(request) = self.requests.get(key.0) else { return };
        match request.route {
            // The worker keeps the exports until decode has them all; the job stays ours until decode
            // answers, so that a request given up meanwhile is given up there too.
            Some(Route::Disaggregated { by_engine: false, .. }) => {}
            Some(Route::Disaggregated { decode: chosen, by_engine: true, .. }) => {
                let Some(decode) = self.still_decodes(key, worker, chosen, now) else {
                    let message = "the decode worker went away during prefill";
                    let fault = Fault::new(Origin::Worker, FaultKind::Unavailable, message);
                    return self.leg_failed(id, fault, now, actions);
                };
                self.close(id, now);
                let plan = HandoffPlan::Engine { prefill: Some(id) };
                let job = self.start(key, decode, Leg::Decode, Some(plan), now, actions);
                if let Some(request) = self.requests.get_mut(key.0) {
                    request.answering = Some(job);
                    let route = Route::Disaggregated { prefill: worker, decode, by_engine: true };
                    request.route = Some(route);
                }
            }
            Some(Route::Aggregated { .. }) | None => {
                debug_assert!(false, "only a disaggregated request has a prefill job");
            }
        }
    }

    /// Who decodes what was prefilled for an engine's own handoff: the one that was chosen, or another
    /// where that one is given nothing more.
    fn still_decodes(
        &mut self,
        key: RequestKey,
        prefill: WorkerKey,
        chosen: WorkerKey,
        now: Duration,
    ) -> Option<WorkerKey> {
        let known = self.fleet.get(chosen);
        if known.is_some_and(Worker::is_routable) {
            return Some(chosen);
        }
        let is_there = known.is_some();
        let Request { shape, avoid, split, .. } = self.requests.get(key.0)?;
        let mut partners = Vec::new();
        placement::partners(&self.fleet, shape, avoid, *split, prefill, &mut partners);
        partners.retain(|worker| *worker != prefill);
        if partners.is_empty() {
            return is_there.then_some(chosen);
        }
        Some(self.choose(key, Leg::Decode, Some(prefill), &partners, now))
    }

    fn answered(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, .. }) = self.jobs.get(id.0) else { return };
        let Some(request) = self.requests.get_mut(key.0) else { return };
        if request.phase == Phase::Relaying {
            return;
        }
        let Some(route) = request.route else { return };
        request.phase = Phase::Relaying;
        self.deadlines.remove(&(request.first_token_deadline, key));
        // Decode answers, so whatever prefill still does or holds for this request is not needed; or
        // one leg's engine refused the request, and the other's would.
        let sibling = if request.prefill == Some(id) {
            request.prefill = None;
            request.answering.replace(id)
        } else {
            request.prefill
        };
        if let Some(sibling) = sibling {
            self.cancel(sibling, now, actions);
        }
        self.advance(id, Stage::Decoding, now);
        actions.push(Action::Relay { request: key, job: id, route });
        self.pump(worker, now, actions);
    }

    fn ended(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, .. }) = self.jobs.get(id.0) else { return };
        let Some(request) = self.requests.get(key.0) else { return };
        if request.answering != Some(id) {
            return;
        }
        if request.phase == Phase::Open {
            // An end without an answer before it.
            let fault = Fault::new(
                Origin::Worker,
                FaultKind::Failed,
                format!("{} ended the request without an answer", self.name(worker)),
            );
            return self.leg_failed(id, fault, now, actions);
        }
        if let Some(job) = self.close(id, now) {
            self.count_answer(&job);
        }
        self.forget(key, now, actions);
        actions.push(Action::Finish { request: key });
        self.pump(worker, now, actions);
    }

    fn leg_failed(&mut self, id: JobId, fault: Fault, now: Duration, actions: &mut Vec<Action>) {
        let Some(Job { request: key, worker, leg, .. }) = self.close(id, now) else { return };
        self.leg_lost(key, worker, leg, fault, now, actions);
        self.pump(worker, now, actions);
    }

    /// What becomes of a request that lost a leg.
    fn leg_lost(
        &mut self,
        key: RequestKey,
        worker: WorkerKey,
        leg: Leg,
        fault: Fault,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        actions.push(Action::Blame { request: key, leg, fault: fault.clone() });

        if request.phase == Phase::Relaying {
            if request.answering.is_some() {
                // A prefill that fails after decode has answered harms nobody.
                return;
            }
            self.forget(key, now, actions);
            actions.push(Action::BreakOff { request: key, fault });
            return;
        }

        let may_retry = fault.is_retryable() && request.retries_left > 0;
        if may_retry {
            request.retries_left -= 1;
            request.generation = request.generation.next();
        }
        // Decode's own engine can compute the prompt, where it was the handoff that failed again.
        let in_one = match (fault.origin, request.route) {
            (Origin::Handoff, Some(Route::Disaggregated { decode, by_engine: false, .. })) => {
                Some(decode).filter(|_| !may_retry)
            }
            _ => None,
        };
        // A handoff that failed says nothing of which side was at fault: keep away from both.
        request.avoid = match (fault.origin, request.route) {
            (Origin::Handoff, Some(Route::Disaggregated { prefill, decode, .. })) => {
                vec![prefill, decode]
            }
            _ => vec![worker],
        };
        self.withdraw(key, now, actions);
        if may_retry {
            self.start_attempt(key, now, actions);
        } else if let Some(worker) = in_one.filter(|worker| self.fleet.get(*worker).is_some()) {
            let reason = AggregatedReason::HandoffFailed;
            self.decide(key, Plan::Aggregated(reason), now);
            self.start_aggregated(key, worker, reason, now, actions);
        } else {
            self.reject(key, Rejection::LegFailed { leg, fault }, now, actions);
        }
    }

    fn worker_lost(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        let Some(lost) = self.fleet.detach(worker) else { return };
        let jobs: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.worker == worker)
            .map(|(id, _)| JobId(id))
            .collect();
        for job in jobs {
            let message = format!("worker {} went away", lost.description.name);
            let fault = Fault::new(Origin::Worker, FaultKind::Unavailable, message);
            self.leg_failed(job, fault, now, actions);
        }
        self.place_anew(lost.queue.keys(), now, actions);
        // Nobody is there to hear it.
        actions
            .retain(|action| !matches!(action, Action::Cancel { worker: w, .. } if *w == worker));
    }

    fn drain(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        self.fleet.set_drains(worker, true);
        self.empty_queue(worker, now, actions);
    }

    /// What waits for a worker that is given nothing more is placed elsewhere.
    fn empty_queue(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        let Some(on) = self.fleet.get_mut(worker) else { return };
        let queue = std::mem::take(&mut on.queue);
        on.queued_ms = 0.0;
        on.queue_changed();
        self.place_anew(queue.keys(), now, actions);
    }

    /// Requests whose place in a queue is gone. Nothing of theirs was begun: no try is lost.
    fn place_anew(
        &mut self,
        queued: impl Iterator<Item = RequestKey>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        for key in queued {
            if let Some(request) = self.requests.get_mut(key.0) {
                request.waits_for = None;
                self.start_attempt(key, now, actions);
            }
        }
    }

    fn unknown_model(&self, key: RequestKey) -> Rejection {
        let model = self.requests.get(key.0).and_then(|request| request.shape.model.clone());
        Rejection::UnknownModel { model: model.unwrap_or_default() }
    }

    fn reject(
        &mut self,
        key: RequestKey,
        rejection: Rejection,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        self.forget(key, now, actions);
        actions.push(Action::Reject { request: key, rejection });
    }

    fn expire(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while let Some(&(deadline, key)) = self.deadlines.first()
            && deadline <= now
        {
            self.reject(key, Rejection::FirstTokenTimeout, now, actions);
        }
        self.prefills_unseen(now, actions);
        self.lose_patience(now, actions);
        self.admit(now, actions);
    }

    /// The request is over.
    fn forget(&mut self, key: RequestKey, now: Duration, actions: &mut Vec<Action>) {
        self.withdraw(key, now, actions);
        if let Some(request) = self.requests.remove(key.0) {
            self.deadlines.remove(&(request.first_token_deadline, key));
        }
    }

    fn name(&self, worker: WorkerKey) -> &str {
        self.fleet.get(worker).map_or("a worker", |worker| &worker.description.name)
    }

    #[cfg(test)]
    fn check_invariants(&self) {
        for (id, job) in self.jobs.iter() {
            let request = self.requests.get(job.request.0).expect("a job has a request");
            let job_id = Some(JobId(id));
            assert!(
                request.prefill == job_id || request.answering == job_id,
                "a job is its request's"
            );
            assert!(self.fleet.get(job.worker).is_some(), "a job's worker is attached");
        }
        for (key, request) in self.requests.iter() {
            let jobs = [request.prefill, request.answering];
            let has_jobs = jobs.iter().any(Option::is_some);
            let waits = [request.waits_for.is_some(), request.waits_until.is_some()];
            let places = [has_jobs, waits[0], waits[1]].into_iter().filter(|place| *place).count();
            assert_eq!(places, 1, "request {key} waits for something");
            if let Some(worker) = request.waits_for {
                let worker = self.fleet.get(worker).expect("a queue is a worker's");
                let places = worker.queue.keys().filter(|waiting| waiting.0 == key).count();
                assert_eq!(places, 1, "who waits has one place");
            }
            for job in jobs.into_iter().flatten() {
                assert!(self.jobs.get(job.0).is_some(), "a request's jobs are open");
            }
        }
        let waiting: usize = self.fleet.iter().map(|(_, worker)| worker.queue.len()).sum();
        let waits = |(_, request): &(u64, &Request)| request.waits_for.is_some();
        assert_eq!(waiting, self.requests.iter().filter(waits).count(), "nobody gone is queued");
        let in_rooms: usize = self.rooms.values().map(WaitingRoom::len).sum();
        let waits = |(_, request): &(u64, &Request)| request.waits_until.is_some();
        assert_eq!(in_rooms, self.requests.iter().filter(waits).count(), "rooms have who waits");
        assert_eq!(in_rooms, self.patience.len(), "who waits does not wait for ever");
        for (_, worker) in self.fleet.iter() {
            let waiting = worker.queue.keys().filter_map(|key| self.requests.get(key.0));
            let queued_ms: f64 = waiting.map(|request| request.queued_ms).sum();
            assert!((queued_ms - worker.queued_ms).abs() < 1e-3, "a queue's work adds up");
        }
        let running: u32 = self.fleet.iter().map(|(_, worker)| worker.jobs_running).sum();
        let computing = self.jobs.iter().filter(|(_, job)| job.stage.is_running()).count();
        assert_eq!(running as usize, computing, "counts agree");
        let open: u32 = self.fleet.iter().map(|(_, worker)| worker.jobs_open).sum();
        assert_eq!(open as usize, self.jobs.iter().count(), "counts agree");
        for (_, worker) in self.fleet.iter().filter(|(_, worker)| !worker.is_routable()) {
            assert_eq!(worker.queue.len(), 0, "nobody waits for a worker that is given nothing");
        }
        let open = self.requests.iter().filter(|(_, request)| request.phase == Phase::Open).count();
        assert_eq!(self.deadlines.len(), open, "who has no answer has a deadline");
    }
}

fn view(key: WorkerKey, worker: &Worker) -> WorkerView<'_> {
    WorkerView {
        key,
        description: &worker.description,
        jobs_running: worker.jobs_running,
        jobs_open: worker.jobs_open,
        drains: worker.drains,
        changes_to: worker.role_change.to(),
        load: &worker.load,
    }
}

/// A worker as a policy sees it.
fn candidate<'a>(
    request: &Request,
    key: WorkerKey,
    worker: &'a crate::fleet::Worker,
    here: Option<WorkerKey>,
    holders: &Holders,
    targets: &Targets,
    now: Duration,
) -> Candidate<'a> {
    let hit_tokens = hit_tokens(key, &worker.prefixes, &request.shape);
    Candidate {
        worker: key,
        load: &worker.load,
        hit_tokens,
        pull: holders.pull_to(key, worker, hit_tokens),
        work_ahead_ms: worker.load.dispatched_left_ms(now, targets)
            + worker.queue.work_before_ms(request.turn),
        is_here: here == Some(key),
    }
}

/// Tokens of the prompt's start whose KV a worker is believed to hold.
pub(crate) fn hit_tokens(
    worker: WorkerKey,
    prefixes: &RecentPrefixes,
    shape: &RequestShape,
) -> u32 {
    let told = shape.held_by(worker);
    if shape.prefix_blocks.is_empty() {
        return told.min(shape.prompt_tokens.saturating_sub(1));
    }
    let blocks = u32::try_from(prefixes.matched(&shape.prefix_blocks)).unwrap_or(u32::MAX);
    let tokens = blocks.saturating_mul(shape.prefix_block_tokens).max(told);
    tokens.min(shape.prompt_tokens.saturating_sub(1))
}

fn least_load() -> Box<dyn Policy> {
    let least_load = POLICIES.iter().find(|entry| entry.name == "least-load");
    (least_load.unwrap_or(&POLICIES[0]).make)(0)
}

fn milliseconds(milliseconds: f64) -> Duration {
    Duration::try_from_secs_f64(milliseconds / 1000.0).unwrap_or(Duration::MAX)
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "pull_tests.rs"]
mod pull_tests;
