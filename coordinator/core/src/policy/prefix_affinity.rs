use baton_types::Leg;

use super::{Choice, Policy, least};

/// The worker that would have the prompt computed soonest: what goes before, and of the prompt what its
/// cache does not hold (Mooncake, FAST'25, algorithm 1).
#[derive(Debug)]
pub(super) struct PrefixAffinity;

impl Policy for PrefixAffinity {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        let tokens = choice.request.prompt_tokens;
        least(choice, |candidate| {
            let step_ms = candidate.load.decode_step_ms(0, 0);
            if choice.leg == Leg::Decode {
                return step_ms;
            }
            let work_ms = candidate.load.prefill_ms(candidate.hit_tokens, tokens);
            candidate.work_ahead_ms + work_ms + step_ms
        })
    }
}
