use baton_engine::sim::{PrefillPace, Step};
use baton_types::{StepModel, StepTail};

/// Steps are planned to end this much before the ITL target at least: the target is on the slowest of them.
pub(super) const STEP_HEADROOM: f64 = 0.95;
/// Of the ITL target, what the slowest tenth of steps may take on average.
const TAIL_HEADROOM: f64 = 0.98;
const MIN_CHUNK_TOKENS: u32 = 32;
/// Alone, prompts are batched up to here: a longer batch gains nothing and delays the first of it.
const BATCH_TOKENS: u32 = 1024;

/// How much prefill one engine's steps take in beside decodes: as much as keeps the slowest tenth of them
/// within the ITL target, by what its steps turn out to take.
#[derive(Debug)]
pub(super) struct Pacer {
    itl_ms: f64,
    believed: StepModel,
    tail: StepTail,
}

impl Pacer {
    pub(super) fn new(itl_ms: f64, believed: StepModel) -> Self {
        Self { itl_ms, believed, tail: StepTail::default() }
    }

    pub(super) fn pace(&self) -> PrefillPace {
        PrefillPace {
            step_ms: self.itl_ms * STEP_HEADROOM.min(TAIL_HEADROOM / self.tail.part()),
            model: self.believed,
            min_chunk_tokens: MIN_CHUNK_TOKENS,
            batch_tokens: BATCH_TOKENS,
        }
    }

    /// A step took so long. Only those with decodes are gaps between tokens.
    pub(super) fn observe(&mut self, step: &Step, step_ms: f64) {
        let load = step.load(&self.believed);
        if load.decode_sequences > 0 {
            self.tail.observe(step_ms / self.believed.step_ms(&load));
        }
    }
}
