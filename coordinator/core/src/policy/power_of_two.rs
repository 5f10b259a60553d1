use super::{Choice, Policy, random::Random};

/// The less loaded of two drawn at random (Mitzenmacher, 2001): nearly as even as looking at all, and
/// no herd runs to the same worker when what is known of them is old.
#[derive(Debug)]
pub(super) struct PowerOfTwo {
    lots: Random,
}

impl PowerOfTwo {
    pub(super) fn new(seed: u64) -> Self {
        Self { lots: Random::new(seed) }
    }
}

impl Policy for PowerOfTwo {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        let [a, b] = [(); 2].map(|()| self.lots.below(choice.candidates.len()));
        let jobs = |place: usize| choice.candidates[place].load.jobs();
        if jobs(b) < jobs(a) { b } else { a }
    }
}
