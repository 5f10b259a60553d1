//! What one step computes, and how much there is room for in it.

use baton_types::{StepLoad, StepModel, StepWork};

use super::scheduler::SequenceId;
use crate::pacing::StepPace;

/// What one step computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub work: Vec<Work>,
    /// Sequences that were given blocks for the first time, or again after they were preempted.
    pub admitted: Vec<Admission>,
    /// Sequences that lost their blocks; they will be computed again.
    pub preempted: Vec<SequenceId>,
    prompts: u32,
    prompts_begun: u32,
    decode_sequences: u32,
    decode_context_tokens: u64,
}

impl Step {
    /// What the step costs its engine.
    pub fn load(&self, model: &StepModel) -> StepLoad {
        let mut load = StepLoad {
            prompts_begun: self.prompts_begun,
            prompts: self.prompts,
            prefill_work_ms: 0.0,
            decode_sequences: self.decode_sequences,
            decode_context_tokens: self.decode_context_tokens,
        };
        if load.prompts > 0 {
            for work in self.work.iter().filter(|work| !work.is_decode()) {
                load.prefill_work_ms +=
                    model.prefill_work_ms(work.first_token, work.first_token + work.tokens);
            }
        }
        load
    }

    /// What the step computes, for an engine that learns what its steps cost.
    pub fn computed(&self) -> StepWork {
        let mut computed = StepWork {
            decode_sequences: self.decode_sequences,
            decode_context_tokens: self.decode_context_tokens,
            ..StepWork::default()
        };
        for work in self.work.iter().filter(|work| !work.is_decode()) {
            computed.add_chunk(work.first_token, work.first_token + work.tokens, false);
        }
        StepWork { prompts_begun: self.prompts_begun, ..computed }
    }

    /// Tokens before those of this step, over all its decodes.
    pub fn decode_context_tokens(&self) -> u64 {
        self.decode_context_tokens
    }

    pub(super) fn clear(&mut self) {
        self.work.clear();
        self.admitted.clear();
        self.preempted.clear();
        (self.prompts, self.prompts_begun) = (0, 0);
        (self.decode_sequences, self.decode_context_tokens) = (0, 0);
    }

    pub(super) fn push(&mut self, work: Work, begins: bool) {
        if work.is_decode() {
            self.decode_sequences += 1;
            self.decode_context_tokens += u64::from(work.first_token);
        } else {
            self.prompts += 1;
            self.prompts_begun += u32::from(begins);
        }
        self.work.push(work);
    }
}

/// Tokens `first_token .. first_token + tokens` of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub sequence: SequenceId,
    pub first_token: u32,
    pub tokens: u32,
    /// These are the last tokens known: a new one is sampled.
    pub samples: bool,
}

impl Work {
    /// One token over a context costs what a decode costs, be it sampled or the end of a prompt.
    pub fn is_decode(&self) -> bool {
        self.tokens == 1 && self.first_token > 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    pub sequence: SequenceId,
    /// Tokens whose KV was found in the prefix cache: whole blocks.
    pub cached_tokens: u32,
    /// Blocks for the whole prompt are held, and wait for [`Scheduler::complete_remote`].
    pub waits_for_remote: bool,
}

/// Smaller chunks cost more than they bring. Also what each step takes in where no time is left for it: a prompt
/// that waits for idle decodes might wait for ever. As in the scheduler of the connector.
const MIN_CHUNK_TOKENS: u32 = 32;

/// What is left of a step while it is planned.
pub(super) struct Budget {
    pub(super) tokens: u32,
    pace: Option<StepPace>,
    /// Of prefill, in milliseconds.
    work_ms: f64,
    prefill_tokens_taken: u32,
}

impl Budget {
    pub(super) fn new(tokens: u32, pace: Option<StepPace>) -> Self {
        Self { tokens, pace, work_ms: f64::INFINITY, prefill_tokens_taken: 0 }
    }

    pub(super) fn decodes_planned(&mut self, step: &Step) {
        if let Some(StepPace { step_ms, model }) = self.pace
            && step.decode_sequences > 0
        {
            let base = model.decode_step_ms(step.decode_sequences, step.decode_context_tokens);
            self.work_ms = (step_ms - base) / model.prefill_interference_factor.max(1e-3);
        }
    }

    /// How many tokens of a prompt the step takes in.
    pub(super) fn chunk(&self, from: u32, remaining: u32) -> u32 {
        let most = remaining.min(self.tokens);
        let Some(StepPace { model, .. }) = self.pace else { return most };
        if self.work_ms.is_infinite() {
            return most;
        }
        let within = most.min(model.prefill_tokens_within(self.work_ms, from));
        let is_short = within < remaining && within < MIN_CHUNK_TOKENS;
        let least = most.min(MIN_CHUNK_TOKENS.saturating_sub(self.prefill_tokens_taken));
        if is_short { least } else { within.max(least) }
    }

    pub(super) fn take(&mut self, work: &Work) {
        self.tokens -= work.tokens;
        if let Some(pace) = &self.pace
            && !work.is_decode()
        {
            let end = work.first_token + work.tokens;
            self.prefill_tokens_taken += work.tokens;
            self.work_ms -= pace.model.prefill_work_ms(work.first_token, end);
        }
    }
}
