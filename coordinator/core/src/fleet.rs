use std::{collections::BTreeMap, time::Duration};

use baton_types::{Epoch, Role, StepModel};

use crate::{
    core::{Gaps, RoleChange},
    keyed::Keyed,
    policy::Targets,
    queue::Queue,
    request::{Job, Stage},
};

/// Prompts over which their usual work is averaged.
const USUAL_OVER: f64 = 8.0;
/// Steps are taken to be planned this many times shorter than the target at most.
const SLOWEST_PART: f64 = 10.0;

/// One attachment of a worker: a worker that comes back has a new key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerKey(pub(crate) u64);

/// How a worker's engine passes KV on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoffMode {
    /// It does not: aggregated work only.
    None,
    /// By Baton, fenced and checksummed, between engines whose compatibility digests are equal.
    Fenced { compatibility: [u8; 32] },
    /// By the engines themselves: decode starts with what prefill answered.
    Engine,
}

/// What a worker says of itself when it attaches.
#[derive(Clone, Debug)]
pub struct WorkerDescription {
    pub name: String,
    pub epoch: Epoch,
    pub role: Role,
    pub models: Vec<String>,
    pub handoff: HandoffMode,
    /// How long its engine's steps take, where that is known of this worker itself.
    pub model: Option<StepModel>,
    pub kv_capacity_tokens: Option<u64>,
    /// It can copy a prompt's cached start from a peer that can, before it computes the rest.
    pub pulls_prefixes: bool,
}

impl WorkerDescription {
    /// The same model in engines that can take each other's KV: likely the same hardware too.
    fn is_peer_of(&self, other: &Self) -> bool {
        self.handoff == other.handoff && self.models == other.models
    }
}

/// What a worker says of its engine, now and then.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WorkerReport {
    /// Tokens before those of the next step, over all sequences that decode.
    pub decode_context_tokens: u64,
    pub kv_used_tokens: u64,
}

/// What a worker has to do for other coordinators, as it last said. They place without asking us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// Prefill legs under way.
    pub prefills: u32,
    /// Decode legs, and requests that are not split.
    pub decodes: u32,
}

/// What a worker has to do: what it was given and has not ended, and what it last said of itself.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// Prompts that its engine has and has not computed.
    pub prefills: u32,
    pub prefill_tokens: u64,
    long_prefills: u32,
    /// Sequences that decode there, or whose KV is on its way there.
    pub decodes: u32,
    /// Prompts that wait for it here.
    pub queued: u32,
    pub elsewhere: Elsewhere,
    /// Its own model, or that of a peer as long as it has none.
    pub model: Option<StepModel>,
    /// How many times what the model says its slowest steps beside decodes take: it plans them so much shorter.
    slowest_part: f64,
    /// When it was last given work, counted in placements: equals take turns.
    pub last_placed: u64,
    kv_capacity_tokens: Option<u64>,
    /// Milliseconds of the prompts that its engine has.
    dispatched_work_ms: f64,
    queued_work_ms: f64,
    /// Of a prompt of ours, over the last dozen or so: others' are taken to be like them.
    usual_work_ms: f64,
    /// Since when it has worked on the first of them.
    working_since: Duration,
    decode_prompt_tokens: u64,
    /// What decodes have added to their prompts, as last reported.
    decode_output_tokens: u64,
    kv_used_tokens: u64,
    /// Of prompts that were sent there since `kv_used_tokens` was reported.
    kv_coming_tokens: u64,
}

impl Load {
    pub fn jobs(&self) -> u32 {
        self.prefills
            + self.decodes
            + self.queued
            + self.elsewhere.prefills
            + self.elsewhere.decodes
    }

    /// A decode step with so much more in it; 0 where the worker's model is not known.
    pub fn decode_step_ms(&self, more_sequences: u32, more_context_tokens: u32) -> f64 {
        let sequences = self.decodes + self.elsewhere.decodes + more_sequences;
        match &self.model {
            Some(model) if sequences > 0 => {
                let context = self.decode_prompt_tokens
                    + self.decode_output_tokens
                    + u64::from(more_context_tokens);
                model.decode_step_ms(sequences, context)
            }
            _ => 0.0,
        }
    }

    /// What a prompt costs of which so much is cached. Where the worker's model is not known a token
    /// counts as a millisecond: enough to compare by.
    pub fn prefill_ms(&self, cached_tokens: u32, prompt_tokens: u32) -> f64 {
        let cached = cached_tokens.min(prompt_tokens.saturating_sub(1));
        match &self.model {
            Some(model) => model.prefill_work_ms(cached, prompt_tokens),
            None => f64::from(prompt_tokens - cached),
        }
    }

    /// Milliseconds of prefill that are dispatched or wait.
    pub fn prefill_work_ms(&self) -> f64 {
        self.dispatched_work_ms + self.queued_work_ms + self.work_elsewhere_ms()
    }

    /// Of the prompts that its engine has, those that it has begun included.
    pub(crate) fn dispatched_ms(&self) -> f64 {
        self.dispatched_work_ms
    }

    fn work_elsewhere_ms(&self) -> f64 {
        f64::from(self.elsewhere.prefills) * self.usual_work_ms
    }

    /// The part of its time that the worker has for prefill, beside its decodes.
    pub fn prefill_rate(&self, targets: &Targets) -> f64 {
        // Alone, what is not prefill is the fixed part of each batch.
        let Some(model) = self.model.filter(|_| self.decodes > 0) else { return 0.95 };
        let planned_ms = self.planned_step_ms(targets);
        let slack_ms = planned_ms - self.decode_step_ms(0, 0);
        let factor = model.prefill_interference_factor.max(1e-3);
        (slack_ms / (planned_ms * factor)).max(0.02)
    }

    /// How much of what a step can bear beside its fixed part its decodes leave: from 1, where nothing decodes, down.
    pub(crate) fn step_left(&self, targets: &Targets) -> f64 {
        let Some(model) = self.model.filter(|_| self.decode_step_ms(0, 0) > 0.0) else {
            return 1.0;
        };
        let planned_ms = self.planned_step_ms(targets);
        let most_ms = planned_ms - model.decode_ms[0];
        // Where not even an empty step is short enough nobody's ITL is kept by waiting.
        if most_ms > 0.0 { (planned_ms - self.decode_step_ms(0, 0)) / most_ms } else { 1.0 }
    }

    /// What it lets a step with decodes take, by its model: less than the target, where steps vary.
    pub fn planned_step_ms(&self, targets: &Targets) -> f64 {
        // Whatever a worker says.
        let part = if self.slowest_part.is_finite() { self.slowest_part } else { SLOWEST_PART };
        targets.step_ms / part.clamp(1.0, SLOWEST_PART)
    }

    pub fn has_kv_room(&self, tokens: u32, up_to: f64) -> bool {
        let Some(capacity) = self.kv_capacity_tokens else { return true };
        let used = self.kv_used_tokens + self.kv_coming_tokens + u64::from(tokens);
        #[allow(clippy::cast_precision_loss)]
        let fits = used as f64 <= capacity as f64 * up_to;
        fits
    }

    /// Sequences that decode, and the tokens that lie before those of their next step.
    pub(crate) fn decoding(&self) -> (u32, u64) {
        (self.decodes, self.decode_prompt_tokens + self.decode_output_tokens)
    }

    /// KV that is used or about to be, and how much there is, where that is known.
    pub(crate) fn kv_tokens(&self) -> Option<(u64, u64)> {
        Some((self.kv_used_tokens + self.kv_coming_tokens, self.kv_capacity_tokens?))
    }

    /// Of what was dispatched, what is left by now.
    ///
    /// `rate` is its [`Self::prefill_rate`].
    pub(crate) fn dispatched_left_ms(&self, now: Duration, rate: f64) -> f64 {
        if self.dispatched_work_ms <= 0.0 {
            return self.work_elsewhere_ms();
        }
        let elapsed_ms = now.saturating_sub(self.working_since).as_secs_f64() * 1000.0;
        let done_ms = elapsed_ms * rate;
        (self.dispatched_work_ms - done_ms).max(0.05 * self.dispatched_work_ms)
            + self.work_elsewhere_ms()
    }

    fn enter(&mut self, job: &Job, now: Duration) {
        match job.stage {
            Stage::Prefilling => {
                if self.prefills == 0 {
                    self.working_since = now;
                }
                self.prefills += 1;
                self.prefill_tokens += u64::from(job.prompt_tokens);
                self.long_prefills += u32::from(job.is_long);
                self.dispatched_work_ms += job.work_ms;
                self.usual_work_ms += (job.work_ms - self.usual_work_ms) / USUAL_OVER;
                self.kv_coming_tokens += u64::from(job.prompt_tokens);
            }
            Stage::Decoding => {
                self.decodes += 1;
                self.decode_prompt_tokens += u64::from(job.prompt_tokens);
                self.kv_coming_tokens += u64::from(job.prompt_tokens);
            }
            Stage::Holding => {}
        }
    }

    fn leave(&mut self, job: &Job, now: Duration) {
        match job.stage {
            Stage::Prefilling => {
                self.prefills = self.prefills.saturating_sub(1);
                self.long_prefills = self.long_prefills.saturating_sub(u32::from(job.is_long));
                self.prefill_tokens =
                    self.prefill_tokens.saturating_sub(u64::from(job.prompt_tokens));
                self.dispatched_work_ms = if self.prefills == 0 {
                    // Nothing is left of rounding.
                    0.0
                } else {
                    (self.dispatched_work_ms - job.work_ms).max(0.0)
                };
                self.working_since = now;
                self.forget_kv(job.prompt_tokens);
            }
            Stage::Decoding => {
                self.decodes = self.decodes.saturating_sub(1);
                self.decode_prompt_tokens =
                    self.decode_prompt_tokens.saturating_sub(u64::from(job.prompt_tokens));
                if self.decodes == 0 {
                    self.decode_output_tokens = 0;
                }
                self.forget_kv(job.prompt_tokens);
            }
            Stage::Holding => {}
        }
    }

    fn forget_kv(&mut self, tokens: u32) {
        let tokens = u64::from(tokens);
        let coming = tokens.min(self.kv_coming_tokens);
        self.kv_coming_tokens -= coming;
        self.kv_used_tokens = self.kv_used_tokens.saturating_sub(tokens - coming);
    }

    fn report(&mut self, report: &WorkerReport) {
        self.decode_output_tokens =
            report.decode_context_tokens.saturating_sub(self.decode_prompt_tokens);
        self.kv_used_tokens = report.kv_used_tokens;
        self.kv_coming_tokens = 0;
    }
}

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) description: WorkerDescription,
    pub(crate) load: Load,
    pub(crate) queue: Queue,
    /// Jobs at which its engine is at work.
    pub(crate) jobs_running: u32,
    /// Those, and prefills that only keep their exports.
    pub(crate) jobs_open: u32,
    /// An operator took it out.
    pub(crate) drains: bool,
    pub(crate) role_change: RoleChange,
    /// It takes orders from here.
    pub(crate) follows: bool,
    pub(crate) heard_at: Duration,
    pub(crate) gaps: Gaps,
}

impl Worker {
    pub(crate) fn serves(&self, model: Option<&str>) -> bool {
        model.is_none_or(|model| self.description.models.iter().any(|name| name == model))
    }

    /// Milliseconds until it is through with the prompts it has, as far as that can be predicted.
    pub(crate) fn backlog_ms(&self, now: Duration, targets: &Targets) -> Option<f64> {
        self.load.model?;
        let rate = self.load.prefill_rate(targets);
        Some((self.load.dispatched_left_ms(now, rate) + self.queue.work_ms()) / rate)
    }

    /// Nobody's prompt is before one that comes now, as far as that can be said.
    pub(crate) fn is_free(&self) -> bool {
        let prefills = self.load.prefills + self.load.elsewhere.prefills;
        self.load.model.is_none() || (prefills == 0 && self.queue.len() == 0)
    }

    /// It has a long prompt to compute.
    pub(crate) fn has_long(&self) -> bool {
        self.load.long_prefills > 0 || self.queue.has_long()
    }

    /// Whether it may be given requests for this model.
    pub(crate) fn takes(&self, model: Option<&str>) -> bool {
        self.is_routable() && self.serves(model)
    }

    /// Whether it may be given work.
    pub(crate) fn is_routable(&self) -> bool {
        !self.drains && self.role_change.to().is_none()
    }

    /// Called whenever the queue changed.
    pub(crate) fn queue_changed(&mut self) {
        self.load.queued = u32::try_from(self.queue.len()).unwrap_or(u32::MAX);
        self.load.queued_work_ms = self.queue.work_ms();
    }
}

/// A worker as others may see it.
#[derive(Clone, Copy, Debug)]
pub struct WorkerView<'a> {
    pub key: WorkerKey,
    pub description: &'a WorkerDescription,
    pub jobs_running: u32,
    /// Those, and prefills whose exports others have not taken yet: 0 once it has drained.
    pub jobs_open: u32,
    /// An operator took it out: it is given nothing more.
    pub drains: bool,
    /// It is on its way to this role, and given nothing more.
    pub changes_to: Option<Role>,
    /// It takes orders from here.
    pub follows: bool,
    pub load: &'a Load,
}

/// The workers that are attached now.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    workers: Keyed<Worker>,
    placements: u64,
    /// Workers of which nothing is known that their steps could be predicted by.
    without_model: usize,
    /// Workers that an operator took out, by name, and the life for which this holds.
    drained: BTreeMap<String, Epoch>,
}

impl Fleet {
    pub(crate) fn attach(&mut self, description: WorkerDescription, now: Duration) -> WorkerKey {
        let load = Load {
            model: description.model.or_else(|| self.model_of_a_peer(&description)),
            kv_capacity_tokens: description.kv_capacity_tokens,
            ..Load::default()
        };
        self.without_model += usize::from(load.model.is_none());
        // One that only lost its stream is the same that was taken out.
        let drains = self.drained.get(&description.name) == Some(&description.epoch);
        if !drains {
            self.drained.remove(&description.name);
        }
        let key = WorkerKey(self.workers.insert(Worker {
            description,
            load,
            queue: Queue::default(),
            jobs_running: 0,
            jobs_open: 0,
            drains,
            role_change: RoleChange::default(),
            follows: true,
            heard_at: now,
            gaps: Gaps::default(),
        }));
        if let Some(model) = self.workers.get(key.0).and_then(|worker| worker.description.model) {
            self.lend(key, model);
        }
        key
    }

    pub(crate) fn detach(&mut self, key: WorkerKey) -> Option<Worker> {
        let worker = self.workers.remove(key.0)?;
        self.without_model -= usize::from(worker.load.model.is_none());
        Some(worker)
    }

    /// The steps of every worker can be predicted.
    pub(crate) fn is_predictable(&self) -> bool {
        self.without_model == 0
    }

    pub(crate) fn model_changed(&mut self, key: WorkerKey, model: StepModel, slowest_part: f64) {
        let Some(worker) = self.workers.get_mut(key.0) else { return };
        worker.load.slowest_part = slowest_part;
        if worker.description.model == Some(model) {
            return;
        }
        worker.description.model = Some(model);
        self.without_model -= usize::from(worker.load.model.is_none());
        worker.load.model = Some(model);
        self.lend(key, model);
    }

    /// A worker that was not observed yet is taken to be like its peers that were.
    fn lend(&mut self, from: WorkerKey, model: StepModel) {
        let Some(lender) = self.workers.get(from.0).map(|worker| worker.description.clone()) else {
            return;
        };
        for worker in self.workers.iter_mut() {
            if worker.description.model.is_none() && worker.description.is_peer_of(&lender) {
                self.without_model -= usize::from(worker.load.model.is_none());
                worker.load.model = Some(model);
            }
        }
    }

    fn model_of_a_peer(&self, description: &WorkerDescription) -> Option<StepModel> {
        let mut peers =
            self.iter().filter(|(_, worker)| worker.description.is_peer_of(description));
        peers.find_map(|(_, worker)| worker.description.model)
    }

    pub(crate) fn get(&self, key: WorkerKey) -> Option<&Worker> {
        self.workers.get(key.0)
    }

    pub(crate) fn get_mut(&mut self, key: WorkerKey) -> Option<&mut Worker> {
        self.workers.get_mut(key.0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (WorkerKey, &Worker)> {
        self.workers.iter().map(|(key, worker)| (WorkerKey(key), worker))
    }

    pub(crate) fn named(&self, name: &str) -> Option<WorkerKey> {
        self.iter().find(|(_, worker)| worker.description.name == name).map(|(key, _)| key)
    }

    pub(crate) fn count(&self, role: Role) -> usize {
        self.iter().filter(|(_, worker)| worker.description.role == role).count()
    }

    /// Some worker may be given work.
    pub(crate) fn is_routable(&self) -> bool {
        self.iter().any(|(_, worker)| worker.is_routable())
    }

    pub(crate) fn set_drains(&mut self, key: WorkerKey, drains: bool) {
        let Some(worker) = self.workers.get_mut(key.0) else { return };
        worker.drains = drains;
        let WorkerDescription { name, epoch, .. } = &worker.description;
        if drains {
            self.drained.insert(name.clone(), *epoch);
        } else {
            self.drained.remove(name);
        }
    }

    /// A worker was chosen: it waited least of all now.
    pub(crate) fn placed(&mut self, key: WorkerKey) {
        self.placements += 1;
        let placements = self.placements;
        if let Some(worker) = self.workers.get_mut(key.0) {
            worker.load.last_placed = placements;
        }
    }

    pub(crate) fn job_started(&mut self, job: &Job, now: Duration) {
        if let Some(worker) = self.workers.get_mut(job.worker.0) {
            worker.jobs_running += u32::from(job.stage.is_running());
            worker.jobs_open += 1;
            worker.load.enter(job, now);
        }
    }

    pub(crate) fn job_ended(&mut self, job: &Job, now: Duration) {
        if let Some(worker) = self.workers.get_mut(job.worker.0) {
            let running = u32::from(job.stage.is_running());
            debug_assert!(worker.jobs_running >= running, "a job ends once");
            worker.jobs_running = worker.jobs_running.saturating_sub(running);
            worker.jobs_open = worker.jobs_open.saturating_sub(1);
            worker.load.leave(job, now);
        }
    }

    pub(crate) fn busy_elsewhere(&mut self, key: WorkerKey, elsewhere: Elsewhere) {
        if let Some(worker) = self.workers.get_mut(key.0) {
            worker.load.elsewhere = elsewhere;
        }
    }

    pub(crate) fn heard(&mut self, key: WorkerKey, follows: bool, now: Duration) {
        if let Some(worker) = self.workers.get_mut(key.0) {
            (worker.follows, worker.heard_at) = (follows, now);
        }
    }

    pub(crate) fn forget_gaps(&mut self) {
        let keys: Vec<u64> = self.workers.iter().map(|(key, _)| key).collect();
        for key in keys {
            if let Some(worker) = self.workers.get_mut(key) {
                worker.gaps = Gaps::default();
            }
        }
    }

    pub(crate) fn report(&mut self, key: WorkerKey, report: &WorkerReport, now: Duration) {
        if let Some(worker) = self.workers.get_mut(key.0) {
            worker.heard_at = now;
            worker.load.report(report);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: StepModel = StepModel {
        prefill_ms: [20.0, 0.05, 1e-6],
        decode_ms: [10.0, 0.05, 1e-5],
        prefill_interference_factor: 0.8,
    };

    /// What is learnt of an engine whose steps take no time may be anything.
    #[test]
    fn however_dear_a_mixture_is_said_to_be_it_has_a_rate() {
        for prefill_interference_factor in [0.0, 0.8, 225.0, f64::MAX] {
            let model = StepModel { prefill_interference_factor, ..MODEL };
            let load = Load { model: Some(model), decodes: 1, ..Load::default() };
            let rate = load.prefill_rate(&Targets::default());
            assert!(rate.is_finite() && rate >= 0.02, "{prefill_interference_factor}: {rate}");
        }
    }

    #[test]
    fn who_plans_shorter_steps_has_less_time_for_prefill() {
        let targets = Targets { step_ms: 50.0, ..Targets::default() };
        let said = |slowest_part: f64| {
            let load = Load { model: Some(MODEL), decodes: 100, slowest_part, ..Load::default() };
            (load.planned_step_ms(&targets), load.prefill_rate(&targets))
        };
        // 15 ms of decodes leave 35 of 50, and 25 of 40.
        assert_eq!([said(1.0), said(1.25)], [(50.0, 0.875), (40.0, 0.78125)]);
        // Nothing was said, or it is faster than its model; a target is a target.
        assert_eq!([said(0.0), said(0.5), said(-3.0)], [said(1.0); 3]);
        for nonsense in [f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(said(nonsense), (5.0, 0.02), "as if it were ten times");
        }
    }
}
