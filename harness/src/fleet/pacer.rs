use baton_engine::sim::{PrefillPace, Step};
use baton_types::{StepModel, StepTail};

const MIN_CHUNK_TOKENS: u32 = 32;

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
            step_ms: self.tail.planned_step_ms(self.itl_ms),
            model: self.believed,
            min_chunk_tokens: MIN_CHUNK_TOKENS,
            least_tokens: 0,
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
