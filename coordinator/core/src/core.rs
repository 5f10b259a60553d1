use std::{collections::BTreeSet, time::Duration};

use baton_types::{Fault, FaultKind, Generation, HandoffId, Leg, Origin, Role};

use crate::{
    event::{Action, Event, HandoffPlan, Rejection},
    fleet::{Fleet, WorkerDescription, WorkerKey, WorkerView},
    keyed::Keyed,
    placement::{self, AggregatedReason, NoRoute, Route},
    request::{Job, JobId, Phase, Request, RequestKey, RequestShape},
};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// A request with no first token after this time is given up.
    pub first_token_timeout: Duration,
    /// How often a request may be tried again before its first token.
    pub retries: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { first_token_timeout: Duration::from_secs(300), retries: 1 }
    }
}

/// The coordinator's state and its decisions.
///
/// What always holds between two calls:
/// - every request has at most one job that answers it, and at most one prefill job;
/// - every job runs on a worker that is attached, and belongs to a request that is not over;
/// - each request ends in exactly one of `Finish`, `Reject`, `BreakOff`, or its client's going;
/// - a handoff's name is used for one attempt only: each retry is of the next generation;
/// - a worker's count of jobs is the number of jobs that were started on it and not ended.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    fleet: Fleet,
    requests: Keyed<Request>,
    jobs: Keyed<Job>,
    /// Of the requests that have no answer yet.
    deadlines: BTreeSet<(Duration, RequestKey)>,
}

impl Core {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            fleet: Fleet::default(),
            requests: Keyed::default(),
            jobs: Keyed::default(),
            deadlines: BTreeSet::new(),
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
        self.fleet.attach(description)
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
        let key = RequestKey(self.requests.insert(Request {
            shape,
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
        self.start_attempt(key, &[], actions);
        key
    }

    pub fn handle(&mut self, event: Event, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::WorkerLost { worker } => self.worker_lost(worker, actions),
            Event::PrefillDone { job } => self.prefill_done(job, actions),
            Event::Answered { job } => self.answered(job, actions),
            Event::Ended { job } => self.ended(job, actions),
            Event::LegFailed { job, fault } => self.leg_failed(job, fault, actions),
            Event::ClientGone { request } => self.forget(request, actions),
            Event::Tick => self.expire(now, actions),
        }
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

    /// Each role has a worker.
    pub fn is_ready(&self) -> bool {
        Role::ALL.into_iter().all(|role| self.fleet.count(role) > 0)
    }

    pub fn requests_open(&self) -> usize {
        self.requests.len()
    }

    fn start_attempt(&mut self, key: RequestKey, avoid: &[WorkerKey], actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get(key.0) else { return };
        match placement::place(&self.fleet, &request.shape, avoid) {
            Err(reason) => {
                let rejection = match reason {
                    NoRoute::NoWorker => Rejection::NoWorker,
                    NoRoute::UnknownModel => Rejection::UnknownModel {
                        model: request.shape.model.clone().unwrap_or_default(),
                    },
                };
                self.reject(key, rejection, actions);
            }
            Ok(route) => {
                let (id, generation) = (request.handoff, request.generation);
                self.start_legs(key, route, id, generation, actions);
            }
        }
    }

    fn start_legs(
        &mut self,
        key: RequestKey,
        route: Route,
        id: HandoffId,
        generation: Generation,
        actions: &mut Vec<Action>,
    ) {
        let (prefill_job, answering_job) = match route {
            Route::Aggregated { worker, .. } => {
                (None, Some(self.start(key, worker, Leg::Aggregated, None, actions)))
            }
            Route::Disaggregated { prefill, by_engine: true, .. } => {
                let plan = HandoffPlan::Engine { prefill: None };
                (Some(self.start(key, prefill, Leg::Prefill, Some(plan), actions)), None)
            }
            Route::Disaggregated { prefill, decode, by_engine: false } => {
                let fenced = |peer| Some(HandoffPlan::Fenced { id, generation, peer });
                let first = self.start(key, prefill, Leg::Prefill, fenced(decode), actions);
                let second = self.start(key, decode, Leg::Decode, fenced(prefill), actions);
                (Some(first), Some(second))
            }
        };
        if let Some(request) = self.requests.get_mut(key.0) {
            request.route = Some(route);
            (request.prefill, request.answering) = (prefill_job, answering_job);
        }
    }

    fn start(
        &mut self,
        request: RequestKey,
        worker: WorkerKey,
        leg: Leg,
        handoff: Option<HandoffPlan>,
        actions: &mut Vec<Action>,
    ) -> JobId {
        let job = JobId(self.jobs.insert(Job { request, worker, leg, computing: true }));
        self.fleet.job_started(worker, leg);
        actions.push(Action::Start { worker, job, request, leg, handoff });
        job
    }

    /// The job is over, of itself or by our will: nothing that its worker still says of it counts.
    fn close(&mut self, id: JobId) -> Option<Job> {
        let job = self.jobs.remove(id.0)?;
        if job.computing {
            self.fleet.job_ended(job.worker, job.leg);
        }
        if let Some(request) = self.requests.get_mut(job.request.0) {
            for place in [&mut request.prefill, &mut request.answering] {
                if *place == Some(id) {
                    *place = None;
                }
            }
        }
        Some(job)
    }

    fn cancel(&mut self, id: JobId, actions: &mut Vec<Action>) {
        if let Some(job) = self.close(id) {
            actions.push(Action::Cancel { worker: job.worker, job: id });
        }
    }

    fn cancel_all(&mut self, key: RequestKey, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get(key.0) else { return };
        for job in [request.prefill, request.answering].into_iter().flatten() {
            self.cancel(job, actions);
        }
    }

    fn prefill_done(&mut self, id: JobId, actions: &mut Vec<Action>) {
        let Some(job) = self.jobs.get_mut(id.0).filter(|job| job.leg == Leg::Prefill) else {
            return;
        };
        let Job { request: key, worker, leg, computing } = *job;
        job.computing = false;
        if computing {
            self.fleet.job_ended(worker, leg);
        }
        let Some(request) = self.requests.get(key.0) else { return };
        match request.route {
            // The worker keeps the exports until decode has them all; the job stays ours until decode
            // answers, so that a request given up meanwhile is given up there too.
            Some(Route::Disaggregated { by_engine: false, .. }) => {}
            Some(Route::Disaggregated { decode, by_engine: true, .. }) => {
                if self.fleet.get(decode).is_none() {
                    let message = "the decode worker went away during prefill";
                    let fault = Fault::new(Origin::Worker, FaultKind::Unavailable, message);
                    return self.leg_failed(id, fault, actions);
                }
                self.close(id);
                let plan = HandoffPlan::Engine { prefill: Some(id) };
                let job = self.start(key, decode, Leg::Decode, Some(plan), actions);
                if let Some(request) = self.requests.get_mut(key.0) {
                    request.answering = Some(job);
                }
            }
            Some(Route::Aggregated { .. }) | None => {
                debug_assert!(false, "only a disaggregated request has a prefill job");
            }
        }
    }

    fn answered(&mut self, id: JobId, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, .. }) = self.jobs.get(id.0) else { return };
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
            self.cancel(sibling, actions);
        }
        actions.push(Action::Relay { request: key, job: id, route });
    }

    fn ended(&mut self, id: JobId, actions: &mut Vec<Action>) {
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
            return self.leg_failed(id, fault, actions);
        }
        self.close(id);
        self.forget(key, actions);
        actions.push(Action::Finish { request: key });
    }

    fn leg_failed(&mut self, id: JobId, fault: Fault, actions: &mut Vec<Action>) {
        let Some(Job { request: key, worker, leg, .. }) = self.close(id) else { return };
        let Some(request) = self.requests.get_mut(key.0) else { return };
        actions.push(Action::Blame { leg, fault: fault.clone() });

        if request.phase == Phase::Relaying {
            if request.answering.is_some() {
                // A prefill that fails after decode has answered harms nobody.
                return;
            }
            self.forget(key, actions);
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
        let (id, generation) = (request.handoff, request.generation);
        // A handoff that failed says nothing of which side was at fault: keep away from both.
        let avoid: Vec<WorkerKey> = match (fault.origin, request.route) {
            (Origin::Handoff, Some(Route::Disaggregated { prefill, decode, .. })) => {
                vec![prefill, decode]
            }
            _ => vec![worker],
        };
        self.cancel_all(key, actions);
        if may_retry {
            self.start_attempt(key, &avoid, actions);
        } else if let Some(worker) = in_one.filter(|worker| self.fleet.get(*worker).is_some()) {
            let reason = AggregatedReason::HandoffFailed;
            self.start_legs(key, Route::Aggregated { worker, reason }, id, generation, actions);
        } else {
            self.reject(key, Rejection::LegFailed { leg, fault }, actions);
        }
    }

    fn worker_lost(&mut self, worker: WorkerKey, actions: &mut Vec<Action>) {
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
            self.leg_failed(job, fault, actions);
        }
        // Nobody is there to hear it.
        actions
            .retain(|action| !matches!(action, Action::Cancel { worker: w, .. } if *w == worker));
    }

    fn reject(&mut self, key: RequestKey, rejection: Rejection, actions: &mut Vec<Action>) {
        self.forget(key, actions);
        actions.push(Action::Reject { request: key, rejection });
    }

    fn expire(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while let Some(&(deadline, key)) = self.deadlines.first()
            && deadline <= now
        {
            self.reject(key, Rejection::FirstTokenTimeout, actions);
        }
    }

    /// The request is over.
    fn forget(&mut self, key: RequestKey, actions: &mut Vec<Action>) {
        self.cancel_all(key, actions);
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
            assert!(jobs.iter().any(Option::is_some), "request {key} waits for something");
            for job in jobs.into_iter().flatten() {
                assert!(self.jobs.get(job.0).is_some(), "a request's jobs are open");
            }
        }
        let running: u32 = self.fleet.iter().map(|(_, worker)| worker.jobs_running()).sum();
        let computing = self.jobs.iter().filter(|(_, job)| job.computing).count();
        assert_eq!(running as usize, computing, "counts agree");
        let open = self.requests.iter().filter(|(_, request)| request.phase == Phase::Open).count();
        assert_eq!(self.deadlines.len(), open, "who has no answer has a deadline");
    }
}

fn view(key: WorkerKey, worker: &crate::fleet::Worker) -> WorkerView<'_> {
    WorkerView { key, description: &worker.description, jobs_running: worker.jobs_running() }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
