//! One attempt at a request: who could take it, whom the policy chooses, the queue of that worker, and the
//! start of its legs.

use std::time::Duration;

use baton_types::Leg;

use super::{Core, Settings, milliseconds};
use crate::{
    admission::Turn,
    caches::Hits,
    decision::{Chosen, Considered},
    event::{Action, HandoffPlan, Rejection},
    fleet::{HandoffMode, Worker, WorkerKey},
    placement::{self, AggregatedReason, Holders, NoRoute, Plan, PrefixPull, Route},
    policy::{Candidate, Choice, Targets},
    queue::{Order, Popped, Waiting},
    request::{Request, RequestKey},
};

/// Where nothing decodes each step pays the fixed part of a prefill, once for all prompts that begin in it. Such an
/// engine is given so many times that part to do: half for the step that it is in, and half for the next,
const BATCHES_TO_FIXED: f64 = 24.0;
/// but no more than this part of the TTFT's target.
const BATCHES_TO_TTFT: f64 = 0.25;

impl Core {
    /// Chooses the worker of the first leg, and puts the request into its queue.
    pub(super) fn start_attempt(
        &mut self,
        key: RequestKey,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let split = self.split_now();
        self.expect_no_more(key);
        self.look_up(key);
        self.measure(key);
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
                self.admit(now, actions);
            }
            Err(reason) => {
                let rejection = match reason {
                    NoRoute::NoWorker => Rejection::NoWorker,
                    NoRoute::UnknownModel => self.unknown_model(key),
                };
                self.reject(key, rejection, now, actions);
            }
            Ok(plan) => {
                self.only_free(key, &mut candidates, now);
                self.decide(key, plan, now);
                let worker = self.choose(key, Leg::Prefill, None, &candidates, now);
                self.fleet.placed(worker);
                if let Some(request) = self.requests.get_mut(key.0) {
                    request.plan = plan;
                }
                if self.is_held(key, worker) {
                    self.enqueue(key, worker, now);
                    self.pump(worker, now, actions);
                } else {
                    self.dispatch(key, worker, now, actions);
                }
            }
        }
        self.candidates = candidates;
    }

    /// One of the candidates, of which there must be one.
    pub(super) fn choose(
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
        let holders = match leg {
            Leg::Decode => Holders::default(),
            _ => Holders::of(&self.fleet, &request.shape, &request.found),
        };
        let mut view = View::of(request, holders, here, targets, now);
        let mut shown = Vec::with_capacity(candidates.len());
        let workers = candidates.iter().filter_map(|key| Some((*key, self.fleet.get(*key)?)));
        shown.extend(workers.map(|(key, worker)| view.candidate(key, worker)));
        let by_prediction = request.split == self.settings.split;
        let policy = if by_prediction { &mut self.policy } else { &mut self.fallback };
        let choice = Choice {
            now,
            leg,
            request: &request.shape,
            due: request.due,
            ttft: request.due.saturating_sub(request.arrived),
            targets,
            candidates: &shown,
        };
        let place = policy.choose(&choice);
        debug_assert!(place < shown.len(), "a policy chooses one of the candidates");
        if keeps {
            let (tokens, prefills) = (request.shape.prompt_tokens, leg == Leg::Prefill);
            let delay_ms = |one: &Candidate<'_>| {
                if prefills {
                    Considered::prefill_delay_ms(one, tokens)
                } else {
                    Considered::decode_delay_ms(one, tokens, targets)
                }
            };
            let chosen = Chosen::new(&shown, place, delay_ms, |one, is_chosen| {
                if prefills {
                    let pulls = is_chosen && policy.pulls(&choice, one);
                    Considered::to_prefill(one, tokens, targets, pulls)
                } else {
                    Considered::to_decode(one, tokens, targets)
                }
            });
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
    pub(super) fn pull(
        &self,
        key: RequestKey,
        worker: WorkerKey,
        now: Duration,
    ) -> (Option<PrefixPull>, u32) {
        let (Some(request), Some(on)) = (self.requests.get(key.0), self.fleet.get(worker)) else {
            return (None, 0);
        };
        let targets = &self.settings.targets;
        let holders = Holders::of(&self.fleet, &request.shape, &request.found);
        let shown = View::of(request, holders, None, targets, now).candidate(worker, on);
        let choice = Choice {
            now,
            leg: Leg::Prefill,
            request: &request.shape,
            due: request.due,
            ttft: request.due.saturating_sub(request.arrived),
            targets,
            candidates: std::slice::from_ref(&shown),
        };
        match shown.pull {
            Some(pull) if self.policy.pulls(&choice, &shown) => (Some(pull), pull.tokens),
            _ => (None, shown.hit_tokens),
        }
    }

    pub(super) fn enqueue(&mut self, key: RequestKey, worker: WorkerKey, now: Duration) {
        let (_, cached_tokens) = self.pull(key, worker, now);
        let (Some(request), Some(on)) = (self.requests.get_mut(key.0), self.fleet.get_mut(worker))
        else {
            return;
        };
        let tokens = request.shape.prompt_tokens;
        let work_ms = on.load.prefill_ms(cached_tokens, tokens);
        let is_hurried = self.settings.order == Order::LateLast && request.turn_by == Turn::OnTime;
        if is_hurried {
            let takes_ms = work_ms / on.load.prefill_rate(&self.settings.targets);
            request.turn = self.late_shares.turn(request.due, tokens, takes_ms);
        }
        let (due, is_long) = (is_hurried.then_some(request.due), request.is_long);
        on.queue.push(key, request.place(), Waiting { work_ms, tokens, is_long, due });
        on.queue_changed();
        request.waits_for = Some(worker);
        self.expect(key, worker);
    }

    /// Gives a worker's engine what it has room for.
    pub(super) fn pump(&mut self, worker: WorkerKey, now: Duration, actions: &mut Vec<Action>) {
        let Settings { targets, ttft, engine_queue_tokens: most_tokens, .. } = self.settings;
        let ttft_ms = ttft.as_secs_f64() * 1000.0;
        while let Some(on) = self.fleet.get_mut(worker)
            && on.queue.len() > 0
        {
            let load = &on.load;
            let fixed_ms = load.model.map_or(0.0, |model| model.prefill_ms[0]);
            let rate = load.prefill_rate(&targets);
            let ahead_ms = load.dispatched_left_ms(now, rate);
            let batches_ms = match load.decodes + load.elsewhere.decodes {
                0 => (BATCHES_TO_FIXED * fixed_ms).min(BATCHES_TO_TTFT * ttft_ms),
                _ => 0.0,
            };
            let popped = on.queue.pop(
                |waiting| {
                    let left_ms = fixed_ms + (ahead_ms + waiting.work_ms) / rate;
                    waiting.due.is_some_and(|due| now + milliseconds(left_ms) > due)
                },
                |waiting| {
                    load.prefills < 2
                        || load.prefill_tokens + u64::from(waiting.tokens) <= most_tokens
                        || load.dispatched_ms() + waiting.work_ms <= batches_ms
                },
            );
            on.queue_changed();
            let Some(popped) = popped else { break };
            let (Popped::Served(key) | Popped::Late(key)) = popped;
            let Some(request) = self.requests.get_mut(key.0) else { break };
            request.waits_for = None;
            let (tokens, turn_by) = (request.shape.prompt_tokens, request.turn_by);
            let is_late = popped == Popped::Late(key);
            if is_late || turn_by == Turn::OnTime {
                self.late_shares.served(tokens, is_late, now);
                if !request.is_long {
                    self.long_prompts.other_served(is_late);
                }
            }
            if is_late {
                self.set_behind(key, now, actions);
            } else {
                self.dispatch(key, worker, now, actions);
            }
        }
        self.admit(now, actions);
    }

    /// Starts the legs of a request whose first worker is chosen.
    pub(super) fn dispatch(
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

    pub(super) fn start_aggregated(
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

    pub(super) fn start_split(
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
}

/// The workers, as one request and its policy see them.
#[derive(Debug)]
pub(super) struct View<'a> {
    request: &'a Request,
    hits: Hits<'a>,
    holders: Holders,
    here: Option<WorkerKey>,
    targets: &'a Targets,
    now: Duration,
}

impl<'a> View<'a> {
    /// `here` is who prefills, where that is decided.
    pub(super) fn of(
        request: &'a Request,
        holders: Holders,
        here: Option<WorkerKey>,
        targets: &'a Targets,
        now: Duration,
    ) -> Self {
        Self { request, hits: request.found.hits(), holders, here, targets, now }
    }

    pub(super) fn candidate<'b>(&mut self, key: WorkerKey, worker: &'b Worker) -> Candidate<'b> {
        let hit_tokens = self.hits.tokens(key);
        let prefill_rate = worker.load.prefill_rate(self.targets);
        Candidate {
            worker: key,
            load: &worker.load,
            hit_tokens,
            pull: self.holders.pull_to(key, worker, hit_tokens),
            prefill_rate,
            work_ahead_ms: worker.load.dispatched_left_ms(self.now, prefill_rate)
                + worker.queue.work_before_ms(self.request.place()),
            is_here: self.here == Some(key),
        }
    }
}
