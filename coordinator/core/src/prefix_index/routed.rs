use std::{collections::HashMap, hash::Hash, time::Duration};

use baton_types::BlockHash;

use super::PrefixIndex;

/// What an engine is taken to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedLimits {
    /// Blocks of one worker, at most; at least the latest half of them is remembered.
    pub blocks_per_worker: usize,
    /// A block that no prompt came for in this time is forgotten; it is remembered for at least half of it.
    pub expires_after: Duration,
}

impl Default for RoutedLimits {
    fn default() -> Self {
        Self { blocks_per_worker: 8_192, expires_after: Duration::from_secs(600) }
    }
}

/// A guess at which worker holds which blocks, for engines that do not tell: what was routed to a
/// worker lies there for a while. Unlike [`PrefixIndex`], it may be wrong both ways.
///
/// What is remembered of a worker has two halves. Prompts are noted in the younger one; when that is full, or has
/// served half its time, the older one is forgotten as a whole and the two change places. To forget thus costs nothing,
/// and a prompt one insertion a block.
#[derive(Debug)]
pub struct RoutedIndex<W> {
    limits: RoutedLimits,
    index: PrefixIndex<(W, Half)>,
    workers: HashMap<W, Younger>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Half {
    One,
    Other,
}

impl Half {
    fn other(self) -> Self {
        match self {
            Self::One => Self::Other,
            Self::Other => Self::One,
        }
    }
}

/// The half in which a worker's prompts are noted.
#[derive(Clone, Copy, Debug)]
struct Younger {
    half: Half,
    since: Duration,
    /// What its names stand for.
    blocks: usize,
}

impl<W: Copy + Eq + Hash> RoutedIndex<W> {
    pub fn new(limits: RoutedLimits) -> Self {
        Self { limits, index: PrefixIndex::default(), workers: HashMap::new() }
    }

    /// A prompt went to a worker. Not each of its blocks need be named: the first n of `names` stand for
    /// `blocks(n)` of them.
    pub fn routed(
        &mut self,
        worker: W,
        names: &[BlockHash],
        blocks: impl Fn(usize) -> usize,
        now: Duration,
    ) {
        let room = self.limits.blocks_per_worker / 2;
        let mut kept = names.len();
        // A longer prompt than there is room for keeps its beginning.
        while blocks(kept) > room {
            kept -= 1;
        }
        self.forget(worker, now);
        let younger = self.workers.entry(worker).or_insert_with(|| {
            self.index.worker_joined((worker, Half::One));
            self.index.worker_joined((worker, Half::Other));
            Younger { half: Half::One, since: now, blocks: 0 }
        });
        if younger.blocks + blocks(kept) > room {
            *younger = Younger { half: younger.half.other(), since: now, blocks: 0 };
            self.index.cleared((worker, younger.half));
        }
        let half = (worker, younger.half);
        let before = self.index.blocks_of(half);
        self.index.stored(half, &names[..kept]);
        // Those that were there are the prompt's first.
        let new = self.index.blocks_of(half) - before;
        younger.blocks += blocks(kept) - blocks(kept - new);
    }

    /// As [`PrefixIndex::matched`], in names, of what was routed and has not expired.
    pub fn matched(&mut self, prompt: &[BlockHash], now: Duration, held: &mut Vec<(W, u32)>) {
        let mut found = Vec::new();
        self.index.matched(prompt, &mut found);
        let mut any_expired = false;
        for ((worker, _), _) in &found {
            any_expired |= self.forget(*worker, now);
        }
        if any_expired {
            found.clear();
            self.index.matched(prompt, &mut found);
        }
        let mut longest: HashMap<W, u32> = HashMap::with_capacity(found.len());
        for ((worker, _), blocks) in found {
            let held = longest.entry(worker).or_default();
            *held = blocks.max(*held);
        }
        held.extend(longest);
    }

    pub fn worker_gone(&mut self, worker: W) {
        self.workers.remove(&worker);
        self.index.worker_gone((worker, Half::One));
        self.index.worker_gone((worker, Half::Other));
    }

    /// Those that stand in both halves count twice.
    pub fn names_of(&self, worker: W) -> usize {
        self.index.blocks_of((worker, Half::One)) + self.index.blocks_of((worker, Half::Other))
    }

    /// Gives memory back that was of expired prompts.
    pub fn tidy(&mut self, now: Duration) {
        for worker in self.workers.keys().copied().collect::<Vec<_>>() {
            self.forget(worker, now);
        }
        self.index.tidy();
    }

    /// Forgets what has expired. Whether there was any.
    fn forget(&mut self, worker: W, now: Duration) -> bool {
        let Some(Younger { half, since, .. }) = self.workers.get(&worker).copied() else {
            return false;
        };
        let half_time = self.limits.expires_after / 2;
        let age = now.saturating_sub(since);
        if age < half_time {
            return false;
        }
        let before = self.names_of(worker);
        self.index.cleared((worker, half.other()));
        // Counted from when it was due, however late this is: or the other half would stay for too long.
        let mut since = since + half_time;
        if age >= self.limits.expires_after {
            self.index.cleared((worker, half));
            since = now;
        }
        self.workers.insert(worker, Younger { half: half.other(), since, blocks: 0 });
        self.names_of(worker) < before
    }
}
