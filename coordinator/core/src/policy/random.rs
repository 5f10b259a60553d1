use super::{Choice, Policy};

/// Any worker. The lots are drawn by xorshift64* (Vigna, 2016), so that a seed gives the same run on
/// every machine.
#[derive(Debug)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let drawn = u128::from(self.state.wrapping_mul(0x2545_f491_4f6c_dd1d));
        // Always below the bound.
        usize::try_from((drawn * bound as u128) >> 64).unwrap_or_default()
    }
}

impl Policy for Random {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        self.below(choice.candidates.len())
    }
}
