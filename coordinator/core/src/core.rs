mod admitting;
mod attempt;
mod balance;
mod legs;
mod lending;
mod on_demand;
mod role_change;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use baton_types::{Fault, FaultKind, Generation, HandoffId, Leg, Origin, Role};

use crate::{
    admission::{Accounts, AdmissionSettings, Turn, WaitingRoom},
    caches::{Caches, Found},
    event::{Action, Event, Rejection},
    fleet::{Fleet, Worker, WorkerDescription, WorkerKey, WorkerView},
    keyed::Keyed,
    late_shares::LateShares,
    long_prompts::LongPrompts,
    placement::{Plan, Split},
    policy::{POLICIES, Policy, Targets},
    prefix_index::{Heard, KvUpdate, PrefixIndex},
    queue::Order,
    request::{Job, JobId, Phase, Request, RequestKey, RequestShape, RequestView},
};

use self::balance::Balancing;
pub use self::role_change::AnnouncedChange;
pub(crate) use self::{balance::Gaps, role_change::RoleChange};

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
    /// them to compute, two prompts at least, so that it never idles between them, and more
    /// where it can compute more of them together. The others wait here, where their order can still change.
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
/// - every request has at most one job that answers it, at most one prefill job, and beside them at most one
///   that lends it the start of its prompt;
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
    caches: Caches,
    requests: Keyed<Request>,
    jobs: Keyed<Job>,
    /// Of the requests that have no answer yet.
    deadlines: BTreeSet<(Duration, RequestKey)>,
    late_shares: LateShares,
    long_prompts: LongPrompts,
    /// Who waits for a turn, by model.
    rooms: BTreeMap<Option<String>, WaitingRoom>,
    accounts: Accounts,
    /// Until when each of them waits.
    patience: BTreeSet<(Duration, RequestKey)>,
    is_admitting: bool,
    /// When prefills of answers that come whole are predicted to be done.
    unseen_prefills: BTreeSet<(Duration, JobId)>,
    balancing: Option<Balancing>,
    /// Kept for its memory.
    candidates: Vec<WorkerKey>,
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
            long_prompts: LongPrompts::default(),
            fleet: Fleet::default(),
            caches: Caches::default(),
            requests: Keyed::default(),
            jobs: Keyed::default(),
            deadlines: BTreeSet::new(),
            rooms: BTreeMap::new(),
            accounts: Accounts::default(),
            patience: BTreeSet::new(),
            is_admitting: false,
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
        self.caches.worker_joined(worker);
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
            turn: if self.settings.order == Order::LateLast { due } else { now },
            turn_by: Turn::default(),
            arrived: now,
            is_counted: false,
            alone_ms: 0.0,
            is_long: false,
            avoid: Vec::new(),
            split: self.settings.split,
            plan: Plan::Split,
            admitted: false,
            waits_until: None,
            decision: None,
            waits_for: None,
            found: Found::default(),
            expected_on: None,
            handoff,
            generation: Generation::default(),
            retries_left: self.settings.retries,
            first_token_deadline,
            route: None,
            phase: Phase::Open,
            prefill: None,
            answering: None,
            lending: None,
        }));
        self.deadlines.insert((first_token_deadline, key));
        self.look_up(key);
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
            Event::ModelChanged { worker, model, slowest_part } => {
                self.fleet.model_changed(worker, model, slowest_part);
            }
            Event::BusyElsewhere { worker, elsewhere } => {
                self.fleet.busy_elsewhere(worker, elsewhere);
            }
            Event::PrefillDone { job } => self.prefill_done(job, now, actions),
            Event::Answered { job } => self.answered(job, now, actions),
            Event::Ended { job } => self.ended(job, now, actions),
            Event::LegFailed { job, fault } => self.leg_failed(job, fault, now, actions),
            Event::PullOver { job } => self.pull_over(job, now, actions),
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

    /// News of a worker's prefix cache.
    pub fn kv_told(&mut self, worker: WorkerKey, update: &KvUpdate<'_>) -> Heard {
        self.caches.hear(worker, update)
    }

    /// Which blocks the workers told that they hold.
    pub fn told(&self) -> &PrefixIndex<WorkerKey> {
        self.caches.told()
    }

    /// Gives back some of the memory that is kept for workers that are gone: for when nothing else happens.
    pub fn tidy(&mut self) {
        self.caches.tidy();
    }

    /// Tokens of a prompt's start that a worker holds, as was known when the request was last placed.
    pub fn held_tokens(&self, request: RequestKey, worker: WorkerKey) -> u32 {
        self.requests.get(request.0).map_or(0, |request| request.found.held_by(worker))
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

    /// What the workers hold of a request's prompt now.
    fn look_up(&mut self, key: RequestKey) {
        if let Some(request) = self.requests.get_mut(key.0) {
            self.caches.find(&request.shape, &mut request.found);
        }
    }

    /// A request's prompt will be computed there, and nowhere else.
    fn expect(&mut self, key: RequestKey, worker: WorkerKey) {
        if let Some(request) = self.requests.get_mut(key.0) {
            self.caches.expect(worker, &request.shape);
            request.expected_on = Some(worker);
        }
    }

    /// It is computed, or will not be.
    fn expect_no_more(&mut self, key: RequestKey) {
        if let Some(request) = self.requests.get_mut(key.0)
            && let Some(worker) = request.expected_on.take()
        {
            self.caches.expect_no_more(worker, &request.shape);
        }
    }

    /// By the SLO.
    fn due(&self, shape: &RequestShape, now: Duration) -> Duration {
        let Settings { ttft, ttft_prefill_factor, .. } = self.settings;
        let model = self.fleet.iter().find_map(|(_, worker)| worker.load.model);
        let alone_ms = model.map_or(0.0, |model| model.prefill_alone_ms(0, shape.prompt_tokens));
        now + ttft + milliseconds(ttft_prefill_factor * alone_ms)
    }

    fn worker_lost(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        let Some(lost) = self.fleet.detach(worker) else { return };
        self.caches.worker_gone(worker);
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
                [request.prefill, request.answering, request.lending].contains(&job_id),
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
            assert!(
                has_jobs || request.lending.is_none(),
                "nothing is lent to who computes nothing"
            );
            for job in jobs.into_iter().chain([request.lending]).flatten() {
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
        let expects = |(_, request): (u64, &Request)| request.expected_on.is_some();
        if !self.requests.iter().any(expects) {
            assert!(self.caches.expects_nothing(), "what is expected is expected of somebody");
        }
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
        follows: worker.follows,
        load: &worker.load,
    }
}

fn least_load() -> Box<dyn Policy> {
    let least_load = POLICIES.iter().find(|entry| entry.name == "least-load");
    (least_load.unwrap_or(&POLICIES[0]).make)(0)
}

/// A prediction is never so long that it could not be added to a time: whatever a worker's model says.
const LONGEST_PREDICTION: Duration = Duration::from_secs(1 << 40);

fn milliseconds(milliseconds: f64) -> Duration {
    let predicted = Duration::try_from_secs_f64(milliseconds / 1000.0);
    predicted.map_or(LONGEST_PREDICTION, |predicted| predicted.min(LONGEST_PREDICTION))
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "core/any_order_tests.rs"]
mod any_order_tests;

#[cfg(test)]
#[path = "core/leaving_tests.rs"]
mod leaving_tests;

#[cfg(test)]
#[path = "pull_tests.rs"]
mod pull_tests;
