//! The life of a leg: it starts, it goes on, and it ends by itself, by our will, or by a fault.

use std::time::Duration;

use baton_types::{Fault, FaultKind, Leg, Origin};

use super::Core;
use crate::{
    event::{Action, HandoffPlan, Rejection},
    fleet::{Worker, WorkerKey},
    placement::{self, AggregatedReason, Plan, Route},
    request::{Job, JobId, Phase, Request, RequestKey, Stage},
};

impl Core {
    pub(super) fn start(
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
            is_long: false,
        };
        let (pull, cached_tokens) = match leg {
            Leg::Decode | Leg::Lend => (None, 0),
            Leg::Prefill | Leg::Aggregated => {
                self.expect_no_more(key);
                self.look_up(key);
                self.expect(key, worker);
                self.pull(key, worker, now)
            }
        };
        if let (Some(request), Some(on)) = (self.requests.get(key.0), self.fleet.get_mut(worker)) {
            let shape = &request.shape;
            job.prompt_tokens = shape.prompt_tokens;
            job.is_long = request.is_long;
            job.work_ms = on.load.prefill_ms(cached_tokens, shape.prompt_tokens);
        }
        let id = JobId(self.jobs.insert(job));
        self.foresee_unseen(id, &job, now);
        self.fleet.job_started(&job, now);
        if let Some(pull) = pull {
            self.lend(key, worker, pull, now, actions);
        }
        actions.push(Action::Start { worker, job: id, request: key, leg, handoff, pull });
        id
    }

    /// The job is over, of itself or by our will: nothing that its worker still says of it counts.
    pub(super) fn close(&mut self, id: JobId, now: Duration) -> Option<Job> {
        let job = self.jobs.remove(id.0)?;
        self.fleet.job_ended(&job, now);
        if let Some(request) = self.requests.get_mut(job.request.0) {
            let places = [&mut request.prefill, &mut request.answering, &mut request.lending];
            for place in places {
                if *place == Some(id) {
                    *place = None;
                }
            }
        }
        Some(job)
    }

    /// The job goes on in another way.
    pub(super) fn advance(&mut self, id: JobId, stage: Stage, now: Duration) {
        let Some(job) = self.jobs.get_mut(id.0).filter(|job| job.stage != stage) else { return };
        self.fleet.job_ended(job, now);
        (job.stage, job.since) = (stage, now);
        self.fleet.job_started(job, now);
    }

    pub(super) fn cancel(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        if let Some(job) = self.close(id, now) {
            actions.push(Action::Cancel { worker: job.worker, job: id });
            if job.leg != Leg::Lend {
                self.pump(job.worker, now, actions);
            }
        }
    }

    /// Nothing is done for the request any more, and it waits for nobody.
    pub(super) fn withdraw(&mut self, key: RequestKey, now: Duration, actions: &mut Vec<Action>) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let jobs = [request.prefill, request.answering, request.lending];
        let place = request.place();
        if let Some(worker) = request.waits_for.take()
            && let Some(on) = self.fleet.get_mut(worker)
        {
            on.queue.remove(key, place);
            on.queue_changed();
        }
        self.stop_waiting(key);
        self.expect_no_more(key);
        for job in jobs.into_iter().flatten() {
            self.cancel(job, now, actions);
        }
    }

    pub(super) fn prefill_done(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, .. }) =
            self.jobs.get(id.0).filter(|job| job.leg == Leg::Prefill)
        else {
            return;
        };
        self.advance(id, Stage::Holding, now);
        self.expect_no_more(key);
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
    pub(super) fn still_decodes(
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

    pub(super) fn answered(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, leg, .. }) = self.jobs.get(id.0) else { return };
        let Some(request) = self.requests.get_mut(key.0) else { return };
        if request.phase == Phase::Relaying || leg == Leg::Lend {
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
        let lending = request.lending;
        for job in sibling.into_iter().chain(lending) {
            self.cancel(job, now, actions);
        }
        self.advance(id, Stage::Decoding, now);
        self.expect_no_more(key);
        actions.push(Action::Relay { request: key, job: id, route });
        self.pump(worker, now, actions);
    }

    pub(super) fn ended(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request: key, worker, leg, .. }) = self.jobs.get(id.0) else { return };
        if leg == Leg::Lend {
            self.close(id, now);
            return;
        }
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

    pub(super) fn leg_failed(
        &mut self,
        id: JobId,
        fault: Fault,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(Job { request: key, worker, leg, .. }) = self.close(id, now) else { return };
        if leg == Leg::Lend {
            // Whoever was to have it hears of that from the lender itself, and computes.
            return;
        }
        self.leg_lost(key, worker, leg, fault, now, actions);
        self.pump(worker, now, actions);
    }

    /// What becomes of a request that lost a leg.
    pub(super) fn leg_lost(
        &mut self,
        key: RequestKey,
        worker: WorkerKey,
        leg: Leg,
        fault: Fault,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        actions.push(Action::Blame { request: key, leg, worker, fault: fault.clone() });

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
}
