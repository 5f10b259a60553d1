use super::{Choice, Policy, least};

/// Each worker in its turn: the one that was given work least lately.
#[derive(Debug)]
pub(super) struct RoundRobin;

impl Policy for RoundRobin {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        least(choice, |_| 0.0)
    }
}
