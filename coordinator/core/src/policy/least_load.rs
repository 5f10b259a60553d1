use super::{Choice, Policy, least};

/// The worker with the fewest jobs.
#[derive(Debug)]
pub(super) struct LeastLoad;

impl Policy for LeastLoad {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        least(choice, |candidate| f64::from(candidate.load.jobs()))
    }
}
