use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hash, Hasher},
    time::Duration,
};

use baton_types::BlockHash;

use super::PrefixIndex;

/// What an engine is taken to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedLimits {
    /// Blocks of one worker; beyond, those that were used longest ago are forgotten.
    pub blocks_per_worker: usize,
    /// A block that no prompt came for in this time is forgotten.
    pub expires_after: Duration,
}

impl Default for RoutedLimits {
    fn default() -> Self {
        Self { blocks_per_worker: 8_192, expires_after: Duration::from_secs(600) }
    }
}

/// A guess at which worker holds which blocks, for engines that do not tell: what was routed to a
/// worker lies there for a while. Unlike [`PrefixIndex`], it may be wrong both ways.
#[derive(Debug)]
pub struct RoutedIndex<W> {
    limits: RoutedLimits,
    index: PrefixIndex<W>,
    workers: HashMap<W, Routed>,
}

/// The prompts of one worker.
#[derive(Debug, Default)]
struct Routed {
    /// Oldest first.
    prompts: VecDeque<Prompt>,
    /// The last prompt that each block was part of.
    last_use: HashMap<BlockHash, u64, BuildHasherDefault<NameHasher>>,
    /// Prompts so far.
    count: u64,
}

#[derive(Debug)]
struct Prompt {
    number: u64,
    routed: Duration,
    blocks: Box<[BlockHash]>,
}

/// Blocks' names are hashes already: what is left is to spread them over the upper bits too.
#[derive(Clone, Copy, Debug, Default)]
struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, name: u64) {
        // 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4).
        self.0 = (self.0 ^ name).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl<W: Copy + Eq + Hash> RoutedIndex<W> {
    pub fn new(limits: RoutedLimits) -> Self {
        Self { limits, index: PrefixIndex::default(), workers: HashMap::new() }
    }

    /// A prompt of these blocks went to a worker.
    pub fn routed(&mut self, worker: W, blocks: &[BlockHash], now: Duration) {
        // A longer prompt than the worker has room for keeps its beginning.
        let blocks = &blocks[..blocks.len().min(self.limits.blocks_per_worker)];
        let routed = self.workers.entry(worker).or_insert_with(|| {
            self.index.worker_joined(worker);
            Routed::default()
        });
        routed.count += 1;
        let prompt = Prompt { number: routed.count, routed: now, blocks: blocks.into() };
        routed.last_use.extend(blocks.iter().map(|block| (*block, prompt.number)));
        routed.prompts.push_back(prompt);
        self.index.stored(worker, blocks);
        self.forget(worker, now);
    }

    /// As [`PrefixIndex::matched`], of what was routed and has not expired.
    pub fn matched(&mut self, prompt: &[BlockHash], now: Duration, held: &mut Vec<(W, u32)>) {
        let from = held.len();
        self.index.matched(prompt, held);
        let mut any_expired = false;
        for (worker, _) in held.iter().skip(from).copied().collect::<Vec<_>>() {
            any_expired |= self.forget(worker, now);
        }
        if any_expired {
            held.truncate(from);
            self.index.matched(prompt, held);
        }
    }

    pub fn worker_gone(&mut self, worker: W) {
        self.workers.remove(&worker);
        self.index.worker_gone(worker);
    }

    pub fn blocks_of(&self, worker: W) -> usize {
        self.index.blocks_of(worker)
    }

    /// Gives memory back that was of expired prompts.
    pub fn tidy(&mut self, now: Duration) {
        for worker in self.workers.keys().copied().collect::<Vec<_>>() {
            self.forget(worker, now);
        }
        self.index.tidy();
    }

    /// Forgets what is too old or too much. Whether there was any.
    fn forget(&mut self, worker: W, now: Duration) -> bool {
        let Some(routed) = self.workers.get_mut(&worker) else { return false };
        let mut any = false;
        while let Some(oldest) = routed.prompts.front() {
            let expired = now.saturating_sub(oldest.routed) >= self.limits.expires_after;
            if !expired && routed.last_use.len() <= self.limits.blocks_per_worker {
                break;
            }
            let Some(oldest) = routed.prompts.pop_front() else { break };
            let mut gone = oldest.blocks.into_vec();
            gone.retain(|block| routed.last_use.get(block) == Some(&oldest.number));
            for block in &gone {
                routed.last_use.remove(block);
            }
            self.index.removed(worker, &gone);
            any = true;
        }
        any
    }
}
