use std::collections::{HashMap, VecDeque};

/// Blocks of prompts that were lately sent to a worker: what its prefix cache is believed to hold, as
/// long as it has not told.
#[derive(Debug, Default)]
pub(crate) struct RecentPrefixes {
    capacity_tokens: Option<u64>,
    /// When each was last used, counted in uses.
    last_used: HashMap<u64, u64>,
    /// Uses in their order; all but the last one of a block are void.
    uses: VecDeque<(u64, u64)>,
    clock: u64,
}

/// What is remembered of a worker that does not say how much it holds.
const DEFAULT_CAPACITY_TOKENS: u64 = 500_000;

impl RecentPrefixes {
    pub(crate) fn new(capacity_tokens: Option<u64>) -> Self {
        Self { capacity_tokens, ..Self::default() }
    }

    /// How many blocks from the first on it holds.
    pub(crate) fn matched(&self, blocks: &[u64]) -> usize {
        blocks.iter().take_while(|block| self.last_used.contains_key(block)).count()
    }

    /// From the last to the first, so that a prefix outlives what follows it.
    pub(crate) fn used(&mut self, blocks: &[u64], block_tokens: u32) {
        for block in blocks.iter().rev() {
            self.clock += 1;
            self.last_used.insert(*block, self.clock);
            self.uses.push_back((self.clock, *block));
        }
        let capacity_tokens = self.capacity_tokens.unwrap_or(DEFAULT_CAPACITY_TOKENS);
        let most = usize::try_from(capacity_tokens / u64::from(block_tokens.max(1)));
        let most = most.unwrap_or(usize::MAX);
        while self.last_used.len() > most || self.uses.len() > 4 * most.max(64) {
            let Some((use_, block)) = self.uses.pop_front() else { break };
            if self.last_used.get(&block) == Some(&use_) {
                self.last_used.remove(&block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_least_lately_is_forgotten() {
        let mut prefixes = RecentPrefixes::new(Some(40));
        prefixes.used(&[1, 2, 3], 10);
        prefixes.used(&[1, 9], 10);
        assert_eq!(prefixes.matched(&[1, 2, 3, 4]), 3);
        prefixes.used(&[7], 10);
        assert_eq!(prefixes.matched(&[1, 2, 3]), 2, "the end of a prompt goes first");
        assert_eq!(prefixes.matched(&[1, 9]), 2);
        assert_eq!(prefixes.matched(&[8]), 0);
    }
}
