//! What the balancer is shown of the fleet.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use baton_types::{Leg, Role};

use super::{Core, on_demand::Use};
use crate::{
    balancer::{
        Answer, Arrival, Balancer, BalancerSettings, Decision, Promise, Verdict, WorkerSight,
    },
    fleet::{HandoffMode, WorkerDescription, WorkerKey},
    placement::Split,
    request::{Job, JobId, Phase, RequestKey, Stage},
};

/// A balancer for each kind of worker: those that can stand in for each other.
#[derive(Debug)]
pub(crate) struct Balancing {
    pub(super) settings: BalancerSettings,
    kinds: Vec<(Kind, Balancer)>,
    pub(super) last_use: Use,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Kind {
    models: Vec<String>,
    handoff: HandoffMode,
}

impl Core {
    /// Has the pools watched; [`Self::balance`] says what was found.
    #[must_use]
    pub fn balanced(mut self, settings: BalancerSettings) -> Self {
        self.balancing = Some(Balancing { settings, kinds: Vec::new(), last_use: Use::default() });
        self
    }

    /// What should change: an advice for each kind of worker. To be called once each interval of the
    /// balancer. Nothing is done about it here; see [`crate::Event::SetRole`].
    pub fn balance(&mut self, now: Duration) -> Vec<Decision> {
        let on_demand = self.balance_on_demand(now);
        // Without pools there is nothing to balance.
        if self.split_now() != Split::Always {
            return on_demand;
        }
        let Some(mut balancing) = self.balancing.take() else { return on_demand };
        let mut decisions = Vec::new();
        let waits = self.longest_waits(now);
        let (slo, targets) = (&self.settings, self.settings.targets);
        let promise = Promise {
            ttft_ms: slo.ttft.as_secs_f64() * 1000.0,
            ttft_prefill_factor: slo.ttft_prefill_factor,
            targets,
        };
        for (_, worker) in self.fleet.iter() {
            balancing.of(&worker.description.models, worker.description.handoff, promise);
        }
        let mut flips = false;
        for (kind, balancer) in &mut balancing.kinds {
            let sights: Vec<WorkerSight<'_>> = self
                .fleet
                .iter()
                .filter(|(_, worker)| {
                    kind.is(&worker.description.models, worker.description.handoff)
                })
                .map(|(key, worker)| {
                    let load = &worker.load;
                    let rate = load.prefill_rate(&targets);
                    let ahead_ms = load.dispatched_left_ms(now, rate) + worker.queue.work_ms();
                    let predicted_ms = match worker.description.role {
                        Role::Prefill => ahead_ms / rate,
                        Role::Decode => 0.0,
                    };
                    let waited_ms = waits.get(&key).copied().unwrap_or_default();
                    let (decodes, decode_context_tokens) = load.decoding();
                    WorkerSight {
                        worker: key,
                        name: &worker.description.name,
                        role: worker.description.role,
                        changes_to: worker.role_change.to(),
                        is_routable: worker.is_routable(),
                        is_ours: worker.follows,
                        model: load.model,
                        silent_for: now.saturating_sub(worker.heard_at),
                        queue_wait_ms: predicted_ms.max(waited_ms),
                        prefill_work_ms: load.prefill_work_ms(),
                        decodes,
                        decode_context_tokens,
                        kv_tokens: load.kv_tokens(),
                        observed_itl_ms: worker.gaps.mean_ms(),
                    }
                })
                .collect();
            if sights.is_empty() {
                continue;
            }
            let decision = balancer.look(now, &sights, flips);
            flips |= sights.iter().any(|worker| worker.changes_to.is_some());
            flips |= matches!(decision.verdict, Verdict::Flip { .. });
            decisions.push(decision);
        }
        self.fleet.forget_gaps();
        self.balancing = Some(balancing);
        if !on_demand.is_empty() {
            decisions.retain(|decision| !matches!(decision.verdict, Verdict::Scale { .. }));
            decisions.extend(on_demand);
        }
        decisions
    }

    /// So many tokens of a job's answer came, so long after those before them.
    pub fn tokens(&mut self, job: JobId, tokens: u32, gap: Option<Duration>) {
        let Some(job) = self.jobs.get_mut(job.0) else { return };
        job.output_tokens += tokens;
        if let (Some(gap), Some(worker)) = (gap, self.fleet.get_mut(job.worker)) {
            worker.gaps.add(gap, tokens);
        }
    }

    /// A request came, whether or not it is placed at once; those who could take it are known.
    pub(super) fn count_arrival(&mut self, key: RequestKey, candidates: &[WorkerKey]) {
        let Some(balancing) = &mut self.balancing else { return };
        let Some(request) = self.requests.get_mut(key.0).filter(|request| !request.is_counted)
        else {
            return;
        };
        let Some(first) = candidates.iter().find_map(|key| self.fleet.get(*key)) else { return };
        request.is_counted = true;
        // It will go where most of it is cached, as far as that matters.
        let mut hits = request.found.hits();
        let hit_tokens = candidates.iter().map(|key| hits.tokens(*key)).max().unwrap_or_default();
        let arrival = Arrival { prompt_tokens: request.shape.prompt_tokens, hit_tokens };
        let WorkerDescription { models, handoff, .. } = &first.description;
        if let Some(balancer) = balancing.watching(models, *handoff) {
            balancer.arrived(&arrival);
        }
    }

    /// A job that answered is through.
    pub(super) fn count_answer(&mut self, job: &Job) {
        let (Some(balancing), Some(on)) = (&mut self.balancing, self.fleet.get(job.worker)) else {
            return;
        };
        let answer =
            Answer { prompt_tokens: job.prompt_tokens, output_tokens: job.output_tokens.max(1) };
        if let Some(balancer) = balancing.watching(&on.description.models, on.description.handoff) {
            balancer.answered(&answer);
        }
    }

    /// Of each worker that has them, how long the longest of its requests has waited, in
    /// milliseconds: prompts for their turn, answers for room once their prompt was computed.
    fn longest_waits(&self, now: Duration) -> HashMap<WorkerKey, f64> {
        let mut waits: HashMap<WorkerKey, f64> = HashMap::new();
        let mut note = |worker, since: Duration, own_ms: f64| {
            let waited_ms = now.saturating_sub(since).as_secs_f64() * 1000.0 - own_ms;
            let longest = waits.entry(worker).or_default();
            *longest = longest.max(waited_ms);
        };
        for (_, job) in self.jobs.iter() {
            match (job.stage, job.leg) {
                (Stage::Prefilling, _) => note(job.worker, job.since, job.work_ms),
                (Stage::Holding, Leg::Prefill) => {
                    let request = self.requests.get(job.request.0);
                    let answering = request
                        .filter(|request| request.phase == Phase::Open)
                        .and_then(|request| request.answering)
                        .and_then(|answering| self.jobs.get(answering.0));
                    if let Some(answering) = answering {
                        let targets = &self.settings.targets;
                        let thousands = f64::from(job.prompt_tokens) / 1000.0;
                        let handoff_ms =
                            targets.handoff_ms + targets.handoff_ms_per_thousand_tokens * thousands;
                        note(answering.worker, job.since, handoff_ms + targets.step_ms);
                    }
                }
                _ => {}
            }
        }
        // Of those who wait to be admitted, for each model the one that came first.
        let mut outside: BTreeMap<Option<&str>, Duration> = BTreeMap::new();
        for (_, request) in self.requests.iter().filter(|(_, one)| one.waits_until.is_some()) {
            let first = outside.entry(request.shape.model.as_deref()).or_insert(request.arrived);
            *first = request.arrived.min(*first);
        }
        for (key, worker) in self.fleet.iter() {
            for waiting in worker.queue.keys() {
                if let Some(request) = self.requests.get(waiting.0) {
                    note(key, request.arrived, 0.0);
                }
            }
            // Admission waits for prefill.
            let prefills = worker.description.role == Role::Prefill;
            for (_, since) in outside.iter().filter(|(model, _)| prefills && worker.serves(**model))
            {
                note(key, *since, 0.0);
            }
        }
        waits
    }
}

impl Balancing {
    /// The balancer of this kind, made where there is none.
    fn of(&mut self, models: &[String], handoff: HandoffMode, promise: Promise) {
        if self.watching(models, handoff).is_none() {
            let kind = Kind { models: models.to_vec(), handoff };
            self.kinds.push((kind, Balancer::new(self.settings, promise)));
        }
    }

    fn watching(&mut self, models: &[String], handoff: HandoffMode) -> Option<&mut Balancer> {
        let mut kinds = self.kinds.iter_mut();
        kinds.find(|(kind, _)| kind.is(models, handoff)).map(|(_, balancer)| balancer)
    }
}

impl Kind {
    fn is(&self, models: &[String], handoff: HandoffMode) -> bool {
        self.handoff == handoff && self.models == models
    }
}

/// The times between tokens of a worker's answers since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gaps {
    total: Duration,
    tokens: u32,
}

impl Gaps {
    /// Tokens that came together share the time since the ones before them.
    fn add(&mut self, gap: Duration, tokens: u32) {
        self.total += gap;
        self.tokens += tokens;
    }

    fn mean_ms(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.total.as_secs_f64() * 1000.0 / f64::from(self.tokens))
    }
}
