use baton_types::Leg;

use super::{Choice, Policy, least};

/// The worker that has the least to do, in time: prefills by their work, decodes by what a step of
/// theirs takes.
#[derive(Debug)]
pub(super) struct LeastWork;

impl Policy for LeastWork {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        least(choice, |candidate| {
            let step_ms = candidate.load.decode_step_ms(0, 0);
            if choice.leg == Leg::Decode { step_ms } else { candidate.work_ahead_ms + step_ms }
        })
    }
}
