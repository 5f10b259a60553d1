//! Whose turn it is: what of [`admission`](crate::admission) concerns the whole of the core.

use std::{collections::BTreeMap, time::Duration};

use baton_types::Leg;

use super::{Core, OnNoPrefill, attempt::View, milliseconds};
use crate::{
    admission::{Among, OUTPUT_TOKEN_WEIGHT, ShedReason, Tenant, Turn, Waits},
    decision::{Considered, DecisionReason, PlacementDecision},
    event::{Action, Rejection},
    fleet::WorkerKey,
    long_prompts::LongPrompts,
    placement::{self, AggregatedReason, Holders, NoRoute, Plan, Split},
    queue::Order,
    request::{Job, JobId, Request, RequestKey, Stage},
};

/// What a client is told to wait where nothing can be predicted.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const MOST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// While others are at stake, who is late goes only where decodes leave this part of what steps can bear.
const LEFT_FOR_LATE: f64 = 0.6;

impl Core {
    /// What was decided of a request's current attempt, and predicted of it, for whoever asks first.
    pub fn take_decision(&mut self, key: RequestKey) -> Option<PlacementDecision> {
        self.requests.get_mut(key.0)?.decision.take().map(|decision| *decision)
    }

    /// Charges a tenant for what it was answered.
    pub fn answered_tokens(&mut self, tenant: &Tenant, tokens: u64) {
        #[allow(clippy::cast_precision_loss)]
        let tokens = tokens as f64;
        self.accounts.charge(tenant, OUTPUT_TOKEN_WEIGHT * tokens);
    }

    /// How many requests wait, here or in a worker's queue, of each priority.
    pub fn waiting_by_priority(&self) -> BTreeMap<i32, usize> {
        let mut waiting = BTreeMap::new();
        for (_, request) in self.requests.iter() {
            if request.waits_for.is_some() || request.waits_until.is_some() {
                *waiting.entry(request.shape.priority).or_default() += 1;
            }
        }
        waiting
    }

    /// Nothing is decided by predictions as long as there are none.
    pub(super) fn split_now(&self) -> Split {
        match self.settings.split {
            Split::PerRequest if !self.fleet.is_predictable() => Split::Always,
            split => split,
        }
    }

    pub(super) fn rejects_local(&self) -> bool {
        self.settings.on_no_prefill == OnNoPrefill::Reject
    }

    pub(super) fn waits_for_workers(&self) -> bool {
        !self.settings.wait_for_worker.is_zero()
    }

    /// Whether a request is held in the worker's queue here. It is not where nothing could be gained: of those that
    /// are served as they come only that is held of which more may be cached, or copied, once it is its turn.
    pub(super) fn is_held(&self, key: RequestKey, worker: WorkerKey) -> bool {
        let has_blocks = |request: &Request| !request.shape.blocks.is_empty();
        if self.settings.order == Order::Arrival
            && !(self.settings.split == Split::PerRequest
                && self.requests.get(key.0).is_some_and(has_blocks))
        {
            return false;
        }
        let has_model = self.fleet.get(worker).is_some_and(|on| on.load.model.is_some());
        let has_work = |request: &Request| request.shape.prompt_tokens > 0;
        has_model && self.requests.get(key.0).is_some_and(has_work)
    }

    pub(super) fn decide(&mut self, key: RequestKey, plan: Plan, now: Duration) {
        let per_request = self.settings.split == Split::PerRequest;
        if !self.settings.keeps_decisions {
            return;
        }
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let reason = match plan {
            Plan::Aggregated(reason) => DecisionReason::Aggregated(reason.as_str()),
            Plan::Split if request.split == Split::PerRequest => DecisionReason::Predicted,
            Plan::Split if per_request => DecisionReason::NoModel,
            Plan::Split => DecisionReason::Pools,
        };
        request.decision = Some(Box::new(PlacementDecision {
            at: now,
            due: request.due,
            prompt_tokens: request.shape.prompt_tokens,
            reason,
            first: None,
            decode: None,
        }));
    }

    /// Turns a request away that no path can serve in time, where its class is to be.
    pub(super) fn rejects_early(
        &mut self,
        key: RequestKey,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> bool {
        let from = self.settings.admission.and_then(|admission| admission.early_rejection);
        let Some(request) = self.requests.get(key.0) else { return false };
        if from.is_none_or(|from| request.shape.priority < from) {
            return false;
        }
        let Some(delay) = self.least_delay(request, now) else { return false };
        let Some(too_late) = (now + delay).checked_sub(request.due) else { return false };
        let retry_after = too_late.max(RETRY_AFTER).min(MOST_RETRY_AFTER);
        let reason = ShedReason::CannotMeetSlo;
        self.reject(key, Rejection::Overloaded { reason, retry_after }, now, actions);
        true
    }

    /// From now to the first token on the best path, if every path can be predicted.
    fn least_delay(&self, request: &Request, now: Duration) -> Option<Duration> {
        let Request { shape, avoid, .. } = request;
        let targets = &self.settings.targets;
        let mut candidates = Vec::new();
        placement::plan(&self.fleet, shape, avoid, self.split_now(), &mut candidates).ok()?;
        let mut view = View::of(request, Holders::default(), None, targets, now);
        let (mut least_ms, mut rates) = (f64::INFINITY, 0.0);
        for key in candidates {
            let worker = self.fleet.get(key)?;
            let candidate = view.candidate(key, worker);
            let considered =
                Considered::to_prefill(&candidate, shape.prompt_tokens, targets, false);
            let predicted = considered.predicted?;
            least_ms = least_ms.min(predicted.queue_ms + predicted.prefill_ms);
            rates += worker.load.prefill_rate(targets);
        }
        let room = self.rooms.get(&shape.model);
        let ahead_ms = room.map_or(0.0, |room| room.before_ms(shape.priority)) / rates;
        least_ms.is_finite().then(|| milliseconds(ahead_ms + least_ms))
    }

    /// When the work that is here for this kind of request is predicted to be done.
    fn retry_after(&self, request: &Request, now: Duration) -> Duration {
        let Request { shape, .. } = request;
        let targets = &self.settings.targets;
        let mut candidates = Vec::new();
        let plan = placement::plan(&self.fleet, shape, &[], self.split_now(), &mut candidates);
        let room = self.rooms.get(&shape.model);
        let (mut work_ms, mut rates) = (room.map_or(0.0, |room| room.alone_ms()), 0.0);
        for worker in candidates.iter().filter_map(|key| self.fleet.get(*key)) {
            let Some(backlog_ms) = worker.backlog_ms(now, targets) else { return RETRY_AFTER };
            let rate = worker.load.prefill_rate(targets);
            work_ms += backlog_ms * rate;
            rates += rate;
        }
        if plan.is_err() || rates <= 0.0 {
            return RETRY_AFTER;
        }
        milliseconds(work_ms / rates).clamp(RETRY_AFTER, MOST_RETRY_AFTER)
    }

    /// Whether a request that could go to one of the candidates has to wait for its turn. From where it
    /// has not, it is admitted.
    pub(super) fn has_to_wait(
        &mut self,
        key: RequestKey,
        candidates: &[WorkerKey],
        now: Duration,
    ) -> bool {
        let Some(request) = self.requests.get(key.0) else { return false };
        if request.admitted || self.settings.admission.is_none() {
            return false;
        }
        let others_wait = self.rooms.get(&request.shape.model).is_some_and(|room| !room.is_empty());
        let has_to_wait =
            others_wait || self.gives_way(key, candidates) || !self.has_room(candidates, now);
        if request.shape.prompt_tokens > 0 && has_to_wait {
            return true;
        }
        self.admitted(key);
        false
    }

    /// What its prompt takes, and whether that is long, by what is cached of it now.
    pub(super) fn measure(&mut self, key: RequestKey) {
        let model = self.fleet.iter().find_map(|(_, worker)| worker.load.model);
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let (cached_tokens, tokens) = (request.found.most_tokens(), request.shape.prompt_tokens);
        request.alone_ms = model.map_or(0.0, |it| it.prefill_alone_ms(cached_tokens, tokens));
        request.is_long = self.settings.order == Order::LateLast
            && LongPrompts::is_long(request.alone_ms, self.settings.ttft);
    }

    /// Whether it is long, and as many of the candidates prefill such prompts as may.
    fn gives_way(&self, key: RequestKey, candidates: &[WorkerKey]) -> bool {
        if !self.requests.get(key.0).is_some_and(|request| request.is_long) {
            return false;
        }
        let on = candidates.iter().filter_map(|worker| self.fleet.get(*worker));
        let busy = on.filter(|worker| worker.has_long()).count();
        busy >= self.long_prompts.most_of(candidates.len())
    }

    /// The part of the workers that may prefill long prompts at once.
    pub fn long_prompts_part(&self) -> f64 {
        self.long_prompts.part()
    }

    fn has_room(&self, candidates: &[WorkerKey], now: Duration) -> bool {
        let Some(admission) = self.settings.admission else { return true };
        let most_ms = admission.backlog.as_secs_f64() * 1000.0;
        candidates.iter().filter_map(|worker| self.fleet.get(*worker)).any(|worker| {
            let backlog_ms = worker.backlog_ms(now, &self.settings.targets);
            backlog_ms.is_none_or(|backlog_ms| backlog_ms < most_ms)
        })
    }

    fn admitted(&mut self, key: RequestKey) {
        if let Some(request) = self.requests.get_mut(key.0).filter(|request| !request.admitted) {
            request.admitted = true;
            let shape = &request.shape;
            self.accounts.charge(&shape.tenant, shape.prompt_tokens.into());
        }
    }

    /// Sets a request behind those that wait already; somebody goes if that is one too many.
    pub(super) fn wait(
        &mut self,
        key: RequestKey,
        until: Duration,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let shape = &request.shape;
        let room = self.rooms.entry(shape.model.clone()).or_default();
        let most = self.settings.admission.unwrap_or_default().max_waiting;
        let gives_way = (room.len() >= most)
            .then(|| room.gives_way(shape.priority, &shape.tenant.name).unwrap_or(key));
        if gives_way != Some(key) {
            let (tokens, alone_ms) = (shape.prompt_tokens, request.alone_ms);
            if self.settings.order == Order::LateLast {
                request.turn = self.late_shares.turn(request.due, tokens, alone_ms);
            }
            let waits = Waits {
                priority: shape.priority,
                tenant: shape.tenant.name.clone(),
                arrived: request.arrived,
                turn: request.turn,
                due: request.due,
                prompt_tokens: tokens,
                alone_ms,
                is_long: request.is_long,
                is_late: request.turn_by == Turn::Late,
            };
            room.push(key, waits, &mut self.accounts);
            request.waits_until = Some(until);
            self.patience.insert((until, key));
        }
        if let Some(key) = gives_way {
            self.shed(key, ShedReason::QueueFull, now, actions);
        }
    }

    fn shed(
        &mut self,
        key: RequestKey,
        reason: ShedReason,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(request) = self.requests.get(key.0) else { return };
        let retry_after = self.retry_after(request, now);
        self.reject(key, Rejection::Overloaded { reason, retry_after }, now, actions);
    }

    /// It waits for its turn no more.
    pub(super) fn stop_waiting(&mut self, key: RequestKey) {
        let Some(request) = self.requests.get_mut(key.0) else { return };
        let Some(until) = request.waits_until.take() else { return };
        self.patience.remove(&(until, key));
        if let Some(room) = self.rooms.get_mut(&request.shape.model) {
            room.remove(key);
            if room.is_empty() {
                self.rooms.remove(&request.shape.model);
            }
        }
    }

    /// Sends those whose turn it is on to workers, as long as one has little to do.
    pub(super) fn admit(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.is_admitting || self.rooms.is_empty() {
            return;
        }
        self.is_admitting = true;
        let mut candidates = Vec::new();
        let models: Vec<Option<String>> = self.rooms.keys().cloned().collect();
        for model in models {
            while let Some((key, turn_by)) = self.next_in(&model, now, &mut candidates) {
                if let Some(room) = self.rooms.get_mut(&model) {
                    room.admit(key, &mut self.accounts);
                }
                self.stop_waiting(key);
                self.admitted(key);
                if let Some(request) = self.requests.get_mut(key.0) {
                    request.turn_by = turn_by;
                }
                self.start_attempt(key, now, actions);
            }
        }
        self.is_admitting = false;
    }

    /// Whose turn it is for this model, if somebody has room for it: some work may be before one that is on time, so
    /// that no engine idles between two prompts, and none before one that is late, so that it delays nobody. One that
    /// is long lets the others pass while as many are computed as may.
    fn next_in(
        &mut self,
        model: &Option<String>,
        now: Duration,
        candidates: &mut Vec<WorkerKey>,
    ) -> Option<(RequestKey, Turn)> {
        let split = self.split_now();
        for of in [Among::All, Among::NotLong] {
            let (key, turn_by) = self.turn_in(model, of, now)?;
            let Request { shape, avoid, .. } = self.requests.get(key.0)?;
            let plan = placement::plan(&self.fleet, shape, avoid, split, candidates).ok()?;
            let local = plan == Plan::Aggregated(AggregatedReason::NoPrefillWorker);
            if local && self.rejects_local() {
                return None;
            }
            if turn_by != Turn::Oldest && self.gives_way(key, candidates) {
                continue;
            }
            let has_room = match turn_by {
                Turn::Late => candidates.iter().any(|worker| self.is_free(*worker, now)),
                Turn::OnTime | Turn::Oldest => self.has_room(candidates, now),
            };
            return has_room.then_some((key, turn_by));
        }
        None
    }

    fn turn_in(
        &mut self,
        model: &Option<String>,
        of: Among,
        now: Duration,
    ) -> Option<(RequestKey, Turn)> {
        let room = self.rooms.get_mut(model)?;
        let order = self.settings.order;
        let (late_shares, long_prompts) = (&mut self.late_shares, &mut self.long_prompts);
        room.next(&self.accounts, of, |waits| {
            let is_late =
                order == Order::LateLast && now + milliseconds(waits.alone_ms) > waits.due;
            if is_late {
                late_shares.served(waits.prompt_tokens, true, now);
                if !waits.is_long {
                    long_prompts.other_served(true);
                }
            }
            is_late
        })
    }

    /// Whether one that is late may go there: nobody's prompt waits for it; and its answer, which takes time from the
    /// prompts of others for long, comes to few others while there is something at stake.
    fn is_free(&self, worker: WorkerKey, now: Duration) -> bool {
        let targets = &self.settings.targets;
        self.fleet.get(worker).is_some_and(|worker| {
            let leaves_time = worker.load.step_left(targets) >= LEFT_FOR_LATE;
            worker.is_free() && (leaves_time || !self.late_shares.are_at_stake(now))
        })
    }

    /// Who is late goes to those who have nobody else's prompt, as long as there are any.
    pub(super) fn only_free(
        &self,
        key: RequestKey,
        candidates: &mut Vec<WorkerKey>,
        now: Duration,
    ) {
        let is_late = self.requests.get(key.0).is_some_and(|request| request.turn_by == Turn::Late);
        if is_late && candidates.iter().any(|worker| self.is_free(*worker, now)) {
            candidates.retain(|worker| self.is_free(*worker, now));
        }
    }

    /// It had its turn, and is late all the same: it waits behind all who can still make it.
    pub(super) fn set_behind(&mut self, key: RequestKey, now: Duration, actions: &mut Vec<Action>) {
        self.expect_no_more(key);
        if let Some(request) = self.requests.get_mut(key.0) {
            request.turn_by = Turn::Late;
            let max_wait = self.settings.admission.map_or(Duration::MAX, |it| it.max_wait);
            self.wait(key, now.saturating_add(max_wait), now, actions);
        }
    }

    pub(super) fn lose_patience(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while let Some(&(until, key)) = self.patience.first()
            && until <= now
        {
            let Some(Request { shape, .. }) = self.requests.get(key.0) else { return };
            let mut candidates = Vec::new();
            let plan = placement::plan(&self.fleet, shape, &[], self.split_now(), &mut candidates);
            let local = Plan::Aggregated(AggregatedReason::NoPrefillWorker);
            let rejection = match plan {
                Err(NoRoute::UnknownModel) => self.unknown_model(key),
                Err(NoRoute::NoWorker) => Rejection::NoWorker,
                Ok(plan) if plan == local && self.rejects_local() => Rejection::NoPrefillWorker,
                Ok(_) => {
                    self.shed(key, ShedReason::WaitedTooLong, now, actions);
                    continue;
                }
            };
            self.reject(key, rejection, now, actions);
        }
    }

    /// Of an answer that comes whole nobody says when its prompt is computed: it is taken to be when
    /// it was predicted, so that the next prompt is not held back until the answer's end.
    pub(super) fn foresee_unseen(&mut self, id: JobId, job: &Job, now: Duration) {
        let Some(request) = self.requests.get(job.request.0) else { return };
        let unseen = job.leg == Leg::Aggregated && request.shape.answers_whole;
        if let Some(on) = self.fleet.get(job.worker)
            && unseen
            && let Some(model) = on.load.model
        {
            let rate = on.load.prefill_rate(&self.settings.targets);
            let work_ms = on.load.dispatched_left_ms(now, rate) + job.work_ms;
            let delay_ms = model.prefill_ms[0] + work_ms / rate;
            self.unseen_prefills.insert((now + milliseconds(delay_ms), id));
        }
    }

    pub(super) fn prefills_unseen(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while let Some(&(at, id)) = self.unseen_prefills.first()
            && at <= now
        {
            self.unseen_prefills.remove(&(at, id));
            let Some(&Job { worker, stage, .. }) = self.jobs.get(id.0) else { continue };
            if stage == Stage::Prefilling {
                self.advance(id, Stage::Decoding, now);
                self.pump(worker, now, actions);
            }
        }
    }
}

#[cfg(test)]
#[path = "admitting_tests.rs"]
mod tests;
