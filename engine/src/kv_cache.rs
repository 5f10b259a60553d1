//! What an engine's prefix cache holds, from the engine to whoever follows it.

use std::{collections::VecDeque, sync::Arc};

use baton_types::BlockHash;
use indexmap::{IndexMap, IndexSet};
use parking_lot::Mutex;
use tokio::sync::watch;

/// Changes that a follower may lag behind. One that lags by more is told anew what is held.
const LONGEST_LOG: usize = 1 << 18;

/// The blocks of one engine's prefix cache. The engine writes, followers read; none waits for the other.
#[derive(Clone, Debug)]
pub struct KvCacheLog {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts with the changes.
    end: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    /// By and large in the order in which they were stored.
    held: IndexSet<BlockHash>,
    changes: VecDeque<Change>,
    /// The number of the first of `changes`: those before it can no longer be had.
    first: u64,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    block: BlockHash,
    stored: bool,
}

/// Some changes, as they are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvCacheChanges {
    /// What was told before counts no more.
    pub restart: bool,
    pub removed: Vec<BlockHash>,
    /// None of them is among the removed. In the order in which they were stored, which is that of a prompt: whoever
    /// keeps them so finds them faster.
    pub stored: Vec<BlockHash>,
}

impl Default for KvCacheLog {
    fn default() -> Self {
        let (end, _) = watch::channel(0);
        Self { shared: Arc::new(Shared { state: Mutex::default(), end }) }
    }
}

impl KvCacheLog {
    pub fn stored(&self, block: BlockHash) {
        self.change(Change { block, stored: true });
    }

    pub fn removed(&self, block: BlockHash) {
        self.change(Change { block, stored: false });
    }

    /// The cache holds nothing.
    pub fn cleared(&self) {
        let mut state = self.shared.state.lock();
        state.held.clear();
        // Every follower has missed something.
        state.first += state.changes.len() as u64 + 1;
        state.changes.clear();
        self.shared.end.send_replace(state.end());
    }

    /// How many blocks are held.
    pub fn len(&self) -> usize {
        self.shared.state.lock().held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Follows the changes, starting with all that is held.
    pub fn follow(&self) -> KvCacheFollower {
        KvCacheFollower {
            ends: self.shared.end.subscribe(),
            shared: self.shared.clone(),
            at: None,
            snapshot: Vec::new(),
        }
    }

    fn change(&self, change: Change) {
        let mut state = self.shared.state.lock();
        let is_new = if change.stored {
            state.held.insert(change.block)
        } else {
            state.held.swap_remove(&change.block)
        };
        if !is_new {
            return;
        }
        state.changes.push_back(change);
        if state.changes.len() > LONGEST_LOG {
            state.changes.pop_front();
            state.first += 1;
        }
        self.shared.end.send_replace(state.end());
    }
}

impl State {
    fn end(&self) -> u64 {
        self.first + self.changes.len() as u64
    }
}

/// One reader's place among the changes.
#[derive(Debug)]
pub struct KvCacheFollower {
    shared: Arc<Shared>,
    ends: watch::Receiver<u64>,
    /// Everything before was told, but for what is left of the snapshot. `None` at the start.
    at: Option<u64>,
    snapshot: Vec<BlockHash>,
}

impl KvCacheFollower {
    /// Tells everything anew.
    pub fn restart(&mut self) {
        self.at = None;
        self.snapshot.clear();
    }

    /// Waits for changes, and takes up to `most` of them. Can be cancelled. Never returns once the
    /// engine is gone and all was told.
    pub async fn next(&mut self, most: usize) -> KvCacheChanges {
        loop {
            if let Some(changes) = self.take(most) {
                return changes;
            }
            if self.ends.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Up to `most` changes, if there were any. Does not wait.
    pub fn take(&mut self, most: usize) -> Option<KvCacheChanges> {
        let state = self.shared.state.lock();
        self.ends.borrow_and_update();
        let mut changes = KvCacheChanges::default();
        let at = match self.at {
            Some(at) if at >= state.first => at,
            _ => {
                changes.restart = true;
                self.snapshot = state.held.iter().copied().collect();
                let end = state.end();
                self.at = Some(end);
                end
            }
        };
        if changes.restart || !self.snapshot.is_empty() {
            changes.stored = self.snapshot.split_off(self.snapshot.len().saturating_sub(most));
            return Some(changes);
        }
        let from = usize::try_from(at - state.first).unwrap_or(usize::MAX);
        // Of several changes of one block the last counts.
        let last: IndexMap<BlockHash, bool> = state
            .changes
            .range(from.min(state.changes.len())..)
            .take(most)
            .map(|change| (change.block, change.stored))
            .collect();
        if last.is_empty() {
            return None;
        }
        self.at = Some(state.end().min(at + most as u64));
        for (block, stored) in last {
            if stored { &mut changes.stored } else { &mut changes.removed }.push(block);
        }
        Some(changes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn block(number: u64) -> BlockHash {
        BlockHash::new(number + 1).unwrap()
    }

    /// A reader who believes what it is told.
    fn believe(held: &mut HashSet<BlockHash>, changes: &KvCacheChanges) {
        if changes.restart {
            held.clear();
        }
        for removed in &changes.removed {
            held.remove(removed);
        }
        held.extend(&changes.stored);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Store(u64),
        Remove(u64),
        Clear,
        Read(usize),
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..20_u64).prop_map(Step::Store),
            6 => (0..20_u64).prop_map(Step::Remove),
            1 => Just(Step::Clear),
            4 => (1..8_usize).prop_map(Step::Read),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        #[test]
        fn who_has_heard_all_knows_what_is_held(steps in prop::collection::vec(step(), 0..120)) {
            let log = KvCacheLog::default();
            let mut follower = log.follow();
            let mut truth = HashSet::new();
            let mut believed = HashSet::new();
            for step in steps {
                match step {
                    Step::Store(number) => {
                        truth.insert(block(number));
                        log.stored(block(number));
                    }
                    Step::Remove(number) => {
                        truth.remove(&block(number));
                        log.removed(block(number));
                    }
                    Step::Clear => {
                        truth.clear();
                        log.cleared();
                    }
                    Step::Read(most) => {
                        if let Some(changes) = follower.take(most) {
                            believe(&mut believed, &changes);
                        }
                    }
                    Step::Restart => follower.restart(),
                }
                prop_assert_eq!(log.len(), truth.len());
            }
            while let Some(changes) = follower.take(5) {
                believe(&mut believed, &changes);
            }
            prop_assert_eq!(believed, truth);
        }
    }

    #[test]
    fn blocks_are_told_in_the_order_in_which_they_were_stored() {
        let log = KvCacheLog::default();
        let mut late = log.follow();
        let mut follower = log.follow();
        assert!(follower.take(10).unwrap().restart);
        let prompt: Vec<_> = (0..100).map(|number| block(number * 7 % 100)).collect();
        for block in &prompt {
            log.stored(*block);
        }
        assert_eq!(follower.take(1000).unwrap().stored, prompt);
        assert_eq!(late.take(1000).unwrap().stored, prompt, "and so is all that is held");
    }

    #[tokio::test]
    async fn a_follower_that_lags_too_far_begins_anew() {
        let log = KvCacheLog::default();
        let mut follower = log.follow();
        assert!(follower.next(10).await.restart);
        for number in 0..=LONGEST_LOG as u64 {
            log.stored(block(number));
        }
        let mut held = HashSet::new();
        let changes = follower.next(1 << 17).await;
        assert!(changes.restart && changes.stored.len() == 1 << 17);
        believe(&mut held, &changes);
        while held.len() < log.len() {
            let changes = follower.next(1 << 17).await;
            assert!(!changes.restart);
            believe(&mut held, &changes);
        }
        let waiting = follower.next(10);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        log.removed(block(3));
        assert_eq!(waiting.await.removed, [block(3)]);
    }
}
