//! Block names and their holders.

use std::hint::black_box;

use baton_types::BlockHash;

use super::{
    holders::{Crowds, HoldersView},
    places::Places,
    rows::{Place, Row, Rows},
    worker_slots::{Slot, WorkerSlots},
};

/// Parts of the table that grow on their own, and are swept one at a time: neither stalls the coordinator
/// for more than a thousandth of the whole.
pub(super) const SHARDS: usize = 1 << SHARD_BITS;
/// Few in tests, so that each is swept often.
const SHARD_BITS: u32 = if cfg!(test) { 2 } else { 10 };

/// Look-ups whose cache misses are waited for together.
pub(super) const BATCH: usize = 64;

#[derive(Debug)]
pub(super) struct BlockTable {
    /// By the name of a block.
    shards: Box<[Shard]>,
    rows: Rows,
    /// Parts swept since the beginning.
    sweeps: u64,
}

#[derive(Debug, Default)]
struct Shard {
    places: Places,
    crowds: Crowds,
}

impl Default for BlockTable {
    fn default() -> Self {
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        Self { shards, rows: Rows::default(), sweeps: 0 }
    }
}

impl BlockTable {
    /// Where these blocks may lie, which brings them into the cache. The loads do not depend on each other, so
    /// that the processor waits for many at once; of look-ups one by one, it would wait for each.
    pub(super) fn seek(&self, blocks: &[BlockHash], places: &mut Vec<Option<Place>>) {
        let homes = blocks.iter().map(|block| self.shard(*block).places.touch(block.get()));
        black_box(homes.fold(0, u32::wrapping_add));
        places.clear();
        places.extend(blocks.iter().map(|block| self.shard(*block).places.likely(block.get())));
        let rows = places.iter().flatten().map(|place| self.rows.get(*place).block);
        black_box(rows.fold(0, u64::wrapping_add));
    }

    /// The rows of as many of these blocks, from the first on, as lie one behind the other; where the first
    /// one may lie if that is known.
    pub(super) fn run(&self, blocks: &[BlockHash], likely: Option<Place>) -> &[Row] {
        let Some(first) = blocks.first() else { return &[] };
        let likely = likely.filter(|place| self.rows.get(*place).block == first.get());
        let Some(place) = likely.or_else(|| self.find(*first)) else { return &[] };
        let rows = self.rows.following(place);
        let same = rows.iter().zip(blocks).take_while(|(row, block)| row.block == block.get());
        &rows[..same.count()]
    }

    pub(super) fn holders(&self, row: &Row) -> HoldersView<'_> {
        row.holders.view(&self.shards[shard_of(row.block)].crowds)
    }

    /// False where the worker held it.
    pub(super) fn insert<W: Copy>(
        &mut self,
        block: BlockHash,
        slot: Slot,
        slots: &WorkerSlots<W>,
    ) -> bool {
        let place = self.find(block).unwrap_or_else(|| {
            let place = self.rows.add(slot, block.get());
            self.shards[shard_of(block.get())].places.add(block.get(), place);
            place
        });
        let crowds = &mut self.shards[shard_of(block.get())].crowds;
        let holders = &mut self.rows.get_mut(place).holders;
        if slots.any_retired() {
            holders.retain(|slot| slots.is_live(slot), crowds);
        }
        holders.insert(slot, crowds)
    }

    /// False where the worker did not hold it.
    pub(super) fn remove(&mut self, block: BlockHash, slot: Slot) -> bool {
        let Some(place) = self.find(block) else { return false };
        let crowds = &mut self.shards[shard_of(block.get())].crowds;
        let holders = &mut self.rows.get_mut(place).holders;
        let was_held = holders.remove(slot, crowds);
        if holders.is_empty() {
            self.take_out(place);
        }
        was_held
    }

    /// The worker that had this number tells no more under it.
    pub(super) fn retired(&mut self, slot: Slot) {
        self.rows.ended(slot);
    }

    pub(super) fn sweeps(&self) -> u64 {
        self.sweeps
    }

    /// Whether sweeping gives memory back though no worker is gone.
    pub(super) fn is_sparse(&self) -> bool {
        self.rows.are_sparse()
    }

    /// Frees the next part of what workers left behind that are gone, and of what lies too far apart.
    pub(super) fn sweep<W: Copy>(&mut self, slots: &mut WorkerSlots<W>) {
        let next = usize::try_from(self.sweeps % SHARDS as u64).unwrap_or_default();
        self.sweeps += 1;
        for page in (next..self.rows.pages()).step_by(SHARDS) {
            if slots.any_retired() {
                self.retain(page, |slot| slots.is_live(slot));
            }
            if self.rows.is_sparse(page) {
                self.relocate(page);
            }
        }
        slots.swept(self.sweeps);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let shards = self
            .shards
            .iter()
            .map(|shard| shard.places.memory_bytes() + shard.crowds.memory_bytes());
        shards.sum::<usize>() + SHARDS * size_of::<Shard>() + self.rows.memory_bytes()
    }

    fn retain(&mut self, page: usize, wanted: impl Fn(Slot) -> bool) {
        for place in self.rows.of_page(page) {
            let row = self.rows.get_mut(place);
            row.holders.retain(&wanted, &mut self.shards[shard_of(row.block)].crowds);
            if row.holders.is_empty() {
                self.take_out(place);
            }
        }
    }

    fn relocate(&mut self, page: usize) {
        for place in self.rows.of_page(page) {
            let block = self.rows.get(place).block;
            let new = self.rows.relocate(place);
            self.shards[shard_of(block)].places.moved(block, place, new);
        }
    }

    fn take_out(&mut self, place: Place) {
        let block = self.rows.get(place).block;
        self.shards[shard_of(block)].places.take_out(block, place);
        self.rows.take_out(place);
    }

    fn find(&self, block: BlockHash) -> Option<Place> {
        self.shard(block).places.find(block.get(), &self.rows)
    }

    fn shard(&self, block: BlockHash) -> &Shard {
        &self.shards[shard_of(block.get())]
    }
}

fn shard_of(block: u64) -> usize {
    usize::try_from(block >> (u64::BITS - SHARD_BITS)).unwrap_or_default()
}
