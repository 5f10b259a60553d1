use baton_types::{Role, StepModel};

use super::{PoolFigures, Promise, WorkerSight, demand::Demand, demand::View};
use crate::fleet::WorkerKey;

/// Of its time, what a prefill worker has for prompts: the rest is the fixed part of its batches.
const PREFILL_PART: f64 = 0.95;
/// A worker is pressed when its requests wait this part of what they can,
const PRESSED_WAIT: f64 = 0.5;
/// when its steps are this long a part of the target,
const PRESSED_STEP: f64 = 0.9;
/// when its KV is used up to this part,
const PRESSED_KV: f64 = 0.9;
/// and all of a pool are when this part of what they can do is asked of them.
const PRESSED_DEMAND: f64 = 0.95;
/// However little of the TTFT is left to wait in, this part of it is.
const LEAST_BUDGET: f64 = 0.1;
/// Sequences in one step, where nothing else bounds them.
const MOST_SEQUENCES: f64 = 256.0;

/// The workers of one role, and what is asked of them.
pub(super) struct Pool<'a> {
    pub(super) role: Role,
    pub(super) members: Vec<&'a WorkerSight<'a>>,
    pub(super) figures: PoolFigures,
    demand: &'a Demand,
    promise: &'a Promise,
}

impl<'a> Pool<'a> {
    pub(super) fn new(
        role: Role,
        members: Vec<&'a WorkerSight<'a>>,
        demand: &'a Demand,
        promise: &'a Promise,
    ) -> Self {
        let mut pool = Self { role, members, figures: PoolFigures::default(), demand, promise };
        let budget_ms = pool.queue_budget_ms();
        let asked = pool.asked(&demand.short, |_| true);
        let least = |of: &dyn Fn(&WorkerSight<'_>) -> f64| {
            let all = pool.members.iter().map(|worker| of(worker));
            all.min_by(f64::total_cmp).unwrap_or_default()
        };
        let pressure = least(&|worker| pool.pressure(worker, budget_ms));
        let queue_wait_ms = least(&|worker| worker.queue_wait_ms);
        let without = pool.members.iter().map(|worker| pool.fullness_without(worker.worker));
        pool.figures = PoolFigures {
            workers: u32::try_from(pool.members.len()).unwrap_or(u32::MAX),
            pressure: pressure.max(asked / PRESSED_DEMAND),
            demand: asked,
            fullness_without_one: without.min_by(f64::total_cmp).unwrap_or(f64::INFINITY),
            queue_wait_ms,
            queue_budget_ms: budget_ms,
        };
        pool
    }

    /// So many workers would be this full.
    pub(super) fn wanted(&self, fullness: f64) -> u32 {
        let members = self.figures.workers;
        let asked = f64::from(members) * self.figures.demand.max(self.figures.pressure.min(1.0));
        // Not without end: what is asked for in one breath is at most twice what is there.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let wanted = (asked / fullness).ceil() as u32;
        wanted.clamp(members + 1, 2 * members.max(1))
    }

    /// How full the others would be without this one, by the worst of all measures.
    pub(super) fn fullness_without(&self, gone: WorkerKey) -> f64 {
        let stays = |worker: &WorkerSight<'_>| worker.worker != gone;
        let left = self.members.iter().filter(|worker| stays(worker)).count();
        if left == 0 {
            return f64::INFINITY;
        }
        let Demand { short, long, .. } = self.demand;
        let asked = self.asked(short, stays).max(self.asked(long, stays));
        let (all, left) = (self.members.len() as f64, left as f64);
        let mean_wait_ms = self.members.iter().map(|w| w.queue_wait_ms).sum::<f64>() / all;
        let wait = mean_wait_ms * all / left / (PRESSED_WAIT * self.queue_budget_ms());
        let held = match self.role {
            Role::Prefill => 0.0,
            Role::Decode => self.steps_without(gone).max(self.kv_without(gone)),
        };
        asked.max(wait).max(held)
    }

    /// What is asked, as a part of what these can do.
    fn asked(&self, view: &View, takes_part: impl Fn(&WorkerSight<'_>) -> bool) -> f64 {
        let models = self.members.iter().filter(|worker| takes_part(worker));
        // In the unit of all that is asked.
        let possible: f64 = models
            .map(|worker| {
                let Some(model) = worker.model else { return 0.0 };
                let (can, asked) = match self.role {
                    Role::Prefill => (1000.0 * PREFILL_PART, view.prefill_ms_per_s(&model)),
                    Role::Decode => {
                        let can = self.output_tokens_per_s(worker, &model, view);
                        (can, view.output_tokens_per_s())
                    }
                };
                if asked > 0.0 { can / asked } else { f64::INFINITY }
            })
            .sum();
        if possible > 0.0 { 1.0 / possible } else { f64::INFINITY }
    }

    /// What a worker decodes when its steps are as long as they may be, or its KV is full.
    fn output_tokens_per_s(&self, worker: &WorkerSight<'_>, model: &StepModel, view: &View) -> f64 {
        let [fixed, per_sequence, per_token] = model.decode_ms;
        let context = view.decode_context_tokens();
        let each = per_sequence + per_token * context;
        let mut sequences = MOST_SEQUENCES;
        let room_ms = self.promise.targets.step_ms - fixed;
        // Where one sequence is too slow already more workers make none faster.
        if room_ms > each && each > 0.0 {
            sequences = sequences.min(room_ms / each);
        }
        if let Some((_, capacity)) = worker.kv_tokens
            && context > 0.0
        {
            sequences = sequences.min(PRESSED_KV * tokens(capacity) / context);
        }
        let sequences = sequences.max(1.0);
        1000.0 * sequences / (fixed + each * sequences).max(1e-3)
    }

    /// Of the TTFT, what a request may wait: all but its own prefill, its handoff and its first step.
    fn queue_budget_ms(&self) -> f64 {
        let Promise { ttft_ms, ttft_prefill_factor, targets } = self.promise;
        let model = self.members.iter().find_map(|worker| worker.model);
        let alone_ms = model.map_or(0.0, |model| self.demand.long.prefill_alone_ms(&model));
        let thousands = self.demand.long.prompt_tokens() / 1000.0;
        let handoff_ms = targets.handoff_ms + targets.handoff_ms_per_thousand_tokens * thousands;
        let limit_ms = ttft_ms + ttft_prefill_factor * alone_ms;
        (limit_ms - alone_ms - handoff_ms - targets.step_ms).max(LEAST_BUDGET * ttft_ms)
    }

    fn pressure(&self, worker: &WorkerSight<'_>, budget_ms: f64) -> f64 {
        let wait = worker.queue_wait_ms / (PRESSED_WAIT * budget_ms);
        if self.role == Role::Prefill {
            return wait;
        }
        let step = worker.model.map_or(0.0, |model| {
            let computed_ms = match worker.decodes {
                0 => 0.0,
                decodes => model.decode_step_ms(decodes, worker.decode_context_tokens),
            };
            let step_ms = computed_ms.max(worker.observed_itl_ms.unwrap_or_default());
            let most_ms = PRESSED_STEP * self.promise.targets.step_ms;
            reducible(step_ms, most_ms, model.decode_ms[0])
        });
        let kv = worker.kv_tokens.map_or(0.0, |(used, capacity)| {
            tokens(used) / (PRESSED_KV * tokens(capacity)).max(1.0)
        });
        wait.max(step).max(kv)
    }

    /// What decodes now, spread over the others.
    fn steps_without(&self, gone: WorkerKey) -> f64 {
        let left = || self.members.iter().filter(|worker| worker.worker != gone);
        let workers = left().count() as f64;
        let sequences: f64 = self.members.iter().map(|w| f64::from(w.decodes)).sum();
        let context: f64 = self.members.iter().map(|w| tokens(w.decode_context_tokens)).sum();
        let (sequences, context) = (sequences / workers, context / workers);
        if sequences <= 0.0 {
            return 0.0;
        }
        let fullest = left().filter_map(|worker| worker.model).map(|model| {
            let [fixed, per_sequence, per_token] = model.decode_ms;
            let step_ms = fixed + per_sequence * sequences + per_token * context;
            reducible(step_ms, self.promise.targets.step_ms, fixed)
        });
        fullest.max_by(f64::total_cmp).unwrap_or_default()
    }

    fn kv_without(&self, gone: WorkerKey) -> f64 {
        let used: f64 =
            self.members.iter().filter_map(|w| w.kv_tokens).map(|kv| tokens(kv.0)).sum();
        let left = self.members.iter().filter(|worker| worker.worker != gone);
        let room: f64 = left.filter_map(|w| w.kv_tokens).map(|kv| tokens(kv.1)).sum();
        if room > 0.0 { used / room } else { 0.0 }
    }
}

/// A step as a part of the target, both without what is there whatever the number of workers. Where
/// that alone misses the target nothing is left to shorten.
fn reducible(step_ms: f64, target_ms: f64, fixed_ms: f64) -> f64 {
    let room_ms = target_ms - fixed_ms;
    if room_ms <= 0.05 * target_ms { 0.0 } else { (step_ms - fixed_ms).max(0.0) / room_ms }
}

#[allow(clippy::cast_precision_loss)]
fn tokens(tokens: u64) -> f64 {
    tokens as f64
}
