//! Which worker holds which KV blocks, as far as the coordinator knows.
//!
//! The index follows what engines tell of their caches (block stored, removed, all cleared) and answers,
//! for the blocks of one prompt, how many of them from the first on each worker holds. **It may
//! undercount, never overcount**: what it says of a worker was so when that worker's last message was
//! sent. Where a message was lost it forgets the worker's blocks, and hears it again from a restart on,
//! which tells everything anew.
//!
//! A prefix ends at the first block that is missing. Engines evict blocks from inside a chain too, so
//! each block of the prompt is looked at: nothing about a block follows from one behind it.

mod holders;
mod places;
mod reach;
mod routed;
mod rows;
mod table;
mod worker_slots;

#[cfg(test)]
mod tests;

use std::{collections::HashMap, hash::Hash};

use baton_types::BlockHash;

pub use self::routed::{RoutedIndex, RoutedLimits};
use self::{
    reach::Reach,
    table::BlockTable,
    worker_slots::{Slot, WorkerSlots},
};

/// Changes to the blocks of workers `W` between two looks at one part of the table for blocks of
/// workers that are gone.
const CHANGES_PER_SWEEP: usize = 256;

/// Blocks that lie one behind the other, fewer than which make it likely that the next ones do not.
const SHORT_RUN: usize = 8;

/// Which workers `W` hold which blocks.
#[derive(Debug)]
pub struct PrefixIndex<W> {
    workers: HashMap<W, Known>,
    slots: WorkerSlots<W>,
    table: BlockTable,
    changes_since_sweep: usize,
}

#[derive(Debug)]
struct Known {
    slot: Slot,
    hearing: Hearing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hearing {
    /// All up to here was heard.
    Next(u64),
    /// Something was missed, or nothing was heard yet.
    Lost,
}

/// One message about a worker's blocks. Those of one worker come in their order; some may be lost.
#[derive(Clone, Copy, Debug)]
pub struct KvUpdate<'a> {
    /// One more than that of the message before.
    pub sequence: u64,
    /// The worker holds nothing but what this message, and those after it, tell.
    pub restart: bool,
    /// Blocks that it no longer holds. No block is both removed and stored.
    pub removed: &'a [BlockHash],
    /// Blocks that it holds.
    pub stored: &'a [BlockHash],
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    Applied,
    /// Of a worker that is not known, heard before, or of no use until the restart that was asked for.
    Ignored,
    /// One before it was lost: the worker's blocks are forgotten until it restarts its telling. Said
    /// once; whoever drives the index asks again while [`PrefixIndex::is_heard`] stays false.
    NeedsRestart,
}

impl<W: Copy + Eq + Hash> Default for PrefixIndex<W> {
    fn default() -> Self {
        Self {
            workers: HashMap::new(),
            slots: WorkerSlots::default(),
            table: BlockTable::default(),
            changes_since_sweep: 0,
        }
    }
}

impl<W: Copy + Eq + Hash> PrefixIndex<W> {
    /// A worker that holds nothing, and whose first message must be a restart. One that was known is
    /// forgotten.
    pub fn worker_joined(&mut self, worker: W) {
        self.worker_gone(worker);
        let slot = self.new_slot(worker);
        self.workers.insert(worker, Known { slot, hearing: Hearing::Lost });
    }

    /// Forgets a worker, in a time that does not depend on what it held.
    pub fn worker_gone(&mut self, worker: W) {
        if let Some(known) = self.workers.remove(&worker) {
            self.retire(known.slot);
        }
    }

    /// Takes one message of a worker's telling.
    pub fn apply(&mut self, worker: W, update: &KvUpdate<'_>) -> Heard {
        let Some(known) = self.workers.get_mut(&worker) else { return Heard::Ignored };
        match known.hearing {
            _ if update.restart => {}
            Hearing::Lost => return Heard::Ignored,
            Hearing::Next(next) if update.sequence < next => return Heard::Ignored,
            Hearing::Next(next) if update.sequence > next => {
                known.hearing = Hearing::Lost;
                self.cleared(worker);
                return Heard::NeedsRestart;
            }
            Hearing::Next(_) => {}
        }
        known.hearing = Hearing::Next(update.sequence.wrapping_add(1));
        if update.restart {
            self.cleared(worker);
        }
        self.removed(worker, update.removed);
        self.stored(worker, update.stored);
        Heard::Applied
    }

    /// The worker holds these blocks.
    pub fn stored(&mut self, worker: W, blocks: &[BlockHash]) {
        let Some(known) = self.workers.get(&worker) else { return };
        let mut sought = Vec::new();
        for batch in blocks.chunks(table::BATCH) {
            self.table.seek(batch, &mut sought);
            for block in batch {
                let is_new = self.table.insert(*block, known.slot, &self.slots);
                self.slots.count(known.slot, isize::from(is_new));
            }
        }
        self.changed(blocks.len());
    }

    /// The worker no longer holds these blocks.
    pub fn removed(&mut self, worker: W, blocks: &[BlockHash]) {
        let Some(known) = self.workers.get(&worker) else { return };
        let mut sought = Vec::new();
        for batch in blocks.chunks(table::BATCH) {
            self.table.seek(batch, &mut sought);
            for block in batch {
                let was_held = self.table.remove(*block, known.slot);
                self.slots.count(known.slot, -isize::from(was_held));
            }
        }
        self.changed(blocks.len());
    }

    /// The worker holds nothing. Takes a time that does not depend on what it held.
    pub fn cleared(&mut self, worker: W) {
        let Some(known) = self.workers.get(&worker) else { return };
        let slot = known.slot;
        if self.slots.blocks(slot) == 0 {
            return;
        }
        self.retire(slot);
        let slot = self.new_slot(worker);
        if let Some(known) = self.workers.get_mut(&worker) {
            known.slot = slot;
        }
    }

    /// Appends each worker that holds the prompt's first block, with the number of blocks that it holds
    /// from the first on. In no order.
    pub fn matched(&self, prompt: &[BlockHash], held: &mut Vec<(W, u32)>) {
        let mut reach = Reach::new(self.slots.len());
        let mut found = |slot: Slot, blocks: u32| {
            if let Some(worker) = self.slots.worker(slot) {
                held.push((worker, blocks));
            }
        };
        let mut rest = prompt;
        // Where blocks may lie, sought ahead; the rest begins at this one of them.
        let (mut sought, mut at) = (Vec::new(), 0);
        'prompt: loop {
            let run = self.table.run(rest, sought.get(at).copied().flatten());
            for row in run {
                if !reach.advance(row.holders, || self.table.holders(row), &mut found) {
                    break 'prompt;
                }
            }
            if run.is_empty() {
                break;
            }
            rest = &rest[run.len()..];
            at += run.len();
            if run.len() < SHORT_RUN && at >= sought.len() {
                self.table.seek(&rest[..rest.len().min(table::BATCH)], &mut sought);
                at = 0;
            }
        }
        reach.finish(found);
    }

    /// How many blocks a worker holds.
    pub fn blocks_of(&self, worker: W) -> usize {
        self.workers.get(&worker).map_or(0, |known| self.slots.blocks(known.slot))
    }

    /// Whether the worker's telling was heard without a gap.
    pub fn is_heard(&self, worker: W) -> bool {
        self.workers.get(&worker).is_some_and(|known| known.hearing != Hearing::Lost)
    }

    /// How many blocks are held, counted once for each worker.
    pub fn len(&self) -> usize {
        self.workers.values().map(|known| self.slots.blocks(known.slot)).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives back some of what workers left behind that are gone: a little work, for when time passes
    /// and nothing changes.
    pub fn tidy(&mut self) {
        if self.slots.any_retired() || self.table.is_sparse() {
            self.table.sweep(&mut self.slots);
        }
    }

    /// Memory of the index, as its parts were allocated.
    pub fn memory_bytes(&self) -> usize {
        self.table.memory_bytes() + self.slots.memory_bytes()
    }

    fn changed(&mut self, changes: usize) {
        self.changes_since_sweep += changes;
        while self.changes_since_sweep >= CHANGES_PER_SWEEP {
            self.changes_since_sweep -= CHANGES_PER_SWEEP;
            self.tidy();
        }
    }

    fn retire(&mut self, slot: Slot) {
        self.slots.retire(slot, self.table.sweeps());
        self.table.retired(slot);
    }

    fn new_slot(&mut self, worker: W) -> Slot {
        loop {
            if let Some(slot) = self.slots.take(worker) {
                return slot;
            }
            // All numbers are in use or were lately.
            self.table.sweep(&mut self.slots);
        }
    }
}
