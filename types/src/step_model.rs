use serde::{Deserialize, Serialize};

/// How long an engine's steps take. One formula for the engine that keeps to it, the simulator that
/// runs it in virtual time, and the coordinator that predicts by it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepModel {
    /// `[a, b, c]`: a prefill of n tokens takes `a + b·n + c·n²` milliseconds.
    pub prefill_ms: [f64; 3],
    /// `[a, b, c]`: a decode step takes `a + b·sequences + c·Σcontext` milliseconds, Σcontext being
    /// the tokens that lie before those of this step, over all its sequences.
    pub decode_ms: [f64; 3],
    /// What a prefill costs when it shares its step with decodes, as a part of what it costs alone:
    /// the weights are read once for both.
    #[serde(default = "alone")]
    pub prefill_interference_factor: f64,
}

fn alone() -> f64 {
    1.0
}

/// The parts of a step that cost time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepLoad {
    /// Prompts whose first chunk is in the step.
    pub prompts_begun: u32,
    /// Prompts with a chunk in the step.
    pub prompts: u32,
    /// Milliseconds of their tokens, by [`StepModel::prefill_work_ms`].
    pub prefill_work_ms: f64,
    pub decode_sequences: u32,
    pub decode_context_tokens: u64,
}

impl StepModel {
    /// Of an engine that takes `factor` times as long.
    #[must_use]
    pub fn slowed(&self, factor: f64) -> Self {
        Self {
            prefill_ms: self.prefill_ms.map(|ms| factor * ms),
            decode_ms: self.decode_ms.map(|ms| factor * ms),
            ..*self
        }
    }

    /// What tokens `from..to` of a prompt cost, the fixed part of a prefill left out. Chunks add up
    /// to the whole.
    pub fn prefill_work_ms(&self, from: u32, to: u32) -> f64 {
        let (from, to) = (f64::from(from), f64::from(to));
        self.prefill_ms[1] * (to - from) + self.prefill_ms[2] * (to * to - from * from)
    }

    /// A whole prompt, alone on an idle worker.
    pub fn prefill_alone_ms(&self, cached_tokens: u32, prompt_tokens: u32) -> f64 {
        self.prefill_ms[0] + self.prefill_work_ms(cached_tokens, prompt_tokens)
    }

    /// A step of decodes and nothing else.
    #[allow(clippy::cast_precision_loss)]
    pub fn decode_step_ms(&self, sequences: u32, context_tokens: u64) -> f64 {
        let [fixed, per_sequence, per_context_token] = self.decode_ms;
        fixed + per_sequence * f64::from(sequences) + per_context_token * context_tokens as f64
    }

    /// Prompts that begin in a step without decodes pay the fixed part of a prefill, once for all of
    /// them; their later chunks do not. Beside decodes it is the decodes' fixed part that is paid.
    pub fn step_ms(&self, load: &StepLoad) -> f64 {
        let decodes = match load.decode_sequences {
            0 if load.prompts == 0 => return 0.0,
            0 if load.prompts_begun == 0 => return load.prefill_work_ms,
            0 => return self.prefill_ms[0] + load.prefill_work_ms,
            sequences => self.decode_step_ms(sequences, load.decode_context_tokens),
        };
        decodes + self.prefill_interference_factor * load.prefill_work_ms
    }

    /// The most tokens, from `from` on, whose [`Self::prefill_work_ms`] is within `work_ms`.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn prefill_tokens_within(&self, work_ms: f64, from: u32) -> u32 {
        let ([_, b, c], from) = (self.prefill_ms, f64::from(from));
        if work_ms <= 0.0 {
            return 0;
        }
        let tokens = if c > 0.0 {
            // c·n² + (b + 2·c·from)·n = work
            let slope = b + 2.0 * c * from;
            2.0 * work_ms / (slope + (slope * slope + 4.0 * c * work_ms).sqrt())
        } else if b > 0.0 {
            work_ms / b
        } else {
            f64::INFINITY
        };
        // Saturates.
        tokens as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: StepModel = StepModel {
        prefill_ms: [10.0, 0.5, 0.25],
        decode_ms: [20.0, 3.0, 0.125],
        prefill_interference_factor: 0.5,
    };

    #[test]
    fn chunks_add_up_to_the_whole() {
        let chunks = MODEL.prefill_work_ms(0, 3) + MODEL.prefill_work_ms(3, 8);
        assert_eq!(chunks, MODEL.prefill_work_ms(0, 8));
        assert_eq!(MODEL.prefill_alone_ms(0, 8), 10.0 + 4.0 + 16.0);
    }

    #[test]
    fn as_many_tokens_as_fit_and_no_more() {
        for from in [0, 7, 5000] {
            for work_ms in [0.1, 1.0, 33.0, 4000.0] {
                let tokens = MODEL.prefill_tokens_within(work_ms, from);
                assert!(MODEL.prefill_work_ms(from, from + tokens) <= work_ms * (1.0 + 1e-12));
                assert!(MODEL.prefill_work_ms(from, from + tokens + 1) > work_ms);
            }
        }
        let free = StepModel { prefill_ms: [1.0, 0.0, 0.0], ..MODEL };
        assert_eq!(free.prefill_tokens_within(1.0, 0), u32::MAX);
        assert_eq!(MODEL.prefill_tokens_within(-1.0, 0), 0);
    }

    #[test]
    fn a_prefill_beside_decodes_pays_its_part() {
        let load = StepLoad {
            prompts_begun: 1,
            prompts: 1,
            prefill_work_ms: 4.0,
            decode_sequences: 2,
            decode_context_tokens: 24,
        };
        assert_eq!(MODEL.step_ms(&load), 20.0 + 6.0 + 3.0 + 0.5 * 4.0);
        assert_eq!(MODEL.step_ms(&StepLoad { decode_sequences: 0, ..load }), 14.0);
        let later = StepLoad { decode_sequences: 0, prompts_begun: 0, ..load };
        assert_eq!(MODEL.step_ms(&later), 4.0);
        assert_eq!(MODEL.step_ms(&StepLoad::default()), 0.0);
    }
}
