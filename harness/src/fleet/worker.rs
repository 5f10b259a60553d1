use baton_core::{JobId, WorkerKey, WorkerReport};
use baton_engine::{
    FittedSteps, Pacing,
    sim::{NeverFits, NewSequence, Scheduler, SequenceId, Step},
};
use baton_types::{Leg, StepModel};

use super::{link::LinkUse, nanos};
use crate::fleet::Nanos;

/// One engine.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) key: WorkerKey,
    pub(super) scheduler: Scheduler,
    pub(super) link: LinkUse,
    /// The step that is computed now, or the last one.
    step: Step,
    pub(super) is_stepping: bool,
    /// By the index of their sequence.
    tasks: Vec<Option<Task>>,
    model: StepModel,
    noise: Option<(f64, fastrand::Rng)>,
    /// What it learns of its steps. With a target it sizes them by the slack that ITL leaves; without one the chunk
    /// budget alone does.
    pacing: Pacing,
}

/// What a sequence is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task {
    pub(super) sequence: SequenceId,
    pub(super) job: JobId,
    pub(super) flight: usize,
    pub(super) leg: Leg,
}

impl Worker {
    pub(super) fn new(
        key: WorkerKey,
        scheduler: Scheduler,
        model: StepModel,
        noise: Option<(f64, fastrand::Rng)>,
        pacing: Pacing,
    ) -> Self {
        Self {
            key,
            pacing,
            scheduler,
            link: LinkUse::default(),
            step: Step::default(),
            is_stepping: false,
            tasks: Vec::new(),
            model,
            noise,
        }
    }

    pub(super) fn add(
        &mut self,
        new: NewSequence,
        job: JobId,
        flight: usize,
        leg: Leg,
    ) -> Result<(), NeverFits> {
        let sequence = self.scheduler.add(new)?;
        if self.tasks.len() <= sequence.index() {
            self.tasks.resize(sequence.index() + 1, None);
        }
        self.tasks[sequence.index()] = Some(Task { sequence, job, flight, leg });
        Ok(())
    }

    pub(super) fn task(&self, sequence: SequenceId) -> Option<Task> {
        let task = self.tasks.get(sequence.index()).copied().flatten();
        task.filter(|task| task.sequence == sequence)
    }

    pub(super) fn task_of(&self, job: JobId) -> Option<Task> {
        self.tasks.iter().copied().flatten().find(|task| task.job == job)
    }

    pub(super) fn remove(&mut self, sequence: SequenceId) {
        self.scheduler.remove(sequence);
        if let Some(task) = self.tasks.get_mut(sequence.index()) {
            *task = None;
        }
    }

    /// Plans the next step and says how long it takes; none if there is nothing to compute.
    pub(super) fn begin_step(&mut self) -> Option<Nanos> {
        self.scheduler.set_pace(self.pacing.pace());
        loop {
            self.scheduler.plan_step_into(&mut self.step);
            if !self.step.work.is_empty() {
                break;
            }
            if self.step.preempted.is_empty() {
                return None;
            }
        }
        self.is_stepping = true;
        let mut step_ms = self.model.step_ms(&self.step.load(&self.model));
        if let Some((most, rng)) = &mut self.noise {
            step_ms *= 1.0 + *most * (2.0 * rng.f64() - 1.0);
        }
        self.pacing.observe(&self.step.computed(), step_ms);
        Some(nanos(step_ms).max(1))
    }

    pub(super) fn step(&self) -> &Step {
        &self.step
    }

    /// The step is computed. It is lent out to be looked at; give it back.
    pub(super) fn end_step(&mut self) -> Step {
        self.is_stepping = false;
        self.scheduler.finish_step(&self.step);
        std::mem::take(&mut self.step)
    }

    pub(super) fn give_back(&mut self, step: Step) {
        self.step = step;
    }

    pub(super) fn kv_used_tokens(&self) -> u64 {
        let block_size = self.scheduler.limits().block_size_tokens;
        u64::from(self.scheduler.blocks_used()) * u64::from(block_size)
    }

    pub(super) fn known_steps(&self) -> Option<FittedSteps> {
        self.pacing.fitted()
    }

    pub(super) fn report(&self) -> WorkerReport {
        WorkerReport {
            decode_context_tokens: self.step.decode_context_tokens(),
            kv_used_tokens: self.kv_used_tokens(),
        }
    }
}
