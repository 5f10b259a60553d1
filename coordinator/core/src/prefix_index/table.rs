//! Block names and their holders in open addressing: one cache line a look-up, for the most part.

use std::hint::black_box;

use baton_types::BlockHash;

use super::{
    holders::{Crowds, Holders, HoldersView},
    worker_slots::{Slot, WorkerSlots},
};

/// Parts of the table that grow on their own: no growth stalls the coordinator for more than a
/// thousandth of the whole.
pub(super) const SHARDS: usize = 1 << SHARD_BITS;
const SHARD_BITS: u32 = 10;

/// Look-ups whose cache misses are waited for together.
pub(super) const BATCH: usize = 64;

const FIRST_BUCKETS: usize = 8;

#[derive(Debug)]
pub(super) struct BlockTable {
    shards: Box<[Shard]>,
    /// Shards swept since the beginning.
    sweeps: u64,
}

#[derive(Debug, Default)]
struct Shard {
    /// A power of two of them, or none.
    buckets: Vec<Bucket>,
    used: usize,
    crowds: Crowds,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Zero where there is none.
    block: u64,
    holders: Holders,
}

const EMPTY: Bucket = Bucket { block: 0, holders: Holders::NONE };

impl Default for BlockTable {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard::default()).collect(), sweeps: 0 }
    }
}

impl BlockTable {
    /// Brings the blocks' first buckets into the cache. The loads do not depend on each other, so that
    /// the processor waits for many at once; followed by look-ups one by one, it would wait for each.
    pub(super) fn touch(&self, blocks: &[BlockHash]) {
        const NOTHING: &u64 = &0;
        let mut first = [NOTHING; BATCH];
        let mut last = [NOTHING; BATCH];
        for ((block, first), last) in blocks.iter().zip(&mut first).zip(&mut last) {
            let shard = &self.shards[shard_of(*block)];
            let home = shard.home(block.get());
            let place =
                |place: usize| shard.buckets.get(place).map_or(NOTHING, |bucket| &bucket.block);
            // Where a block is not at home it may stand across the line's end.
            (*first, *last) = (place(home), place(home + 3));
        }
        // Apart from the finding, so that as many loads as may be are under way at once.
        let sum = first.iter().chain(&last).fold(0_u64, |sum, block| sum.wrapping_add(**block));
        black_box(sum);
    }

    pub(super) fn holders(&self, block: BlockHash) -> Option<HoldersView<'_>> {
        let shard = &self.shards[shard_of(block)];
        let place = shard.find(block.get()).ok()?;
        Some(shard.buckets[place].holders.view(&shard.crowds))
    }

    /// False where the worker held it.
    pub(super) fn insert<W: Copy>(
        &mut self,
        block: BlockHash,
        slot: Slot,
        slots: &WorkerSlots<W>,
    ) -> bool {
        let shard = &mut self.shards[shard_of(block)];
        let place = match shard.find(block.get()) {
            Ok(place) => place,
            Err(_) => shard.add(block.get()),
        };
        let Shard { buckets, crowds, .. } = shard;
        let holders = &mut buckets[place].holders;
        if slots.any_retired() {
            holders.retain(|slot| slots.is_live(slot), crowds);
        }
        holders.insert(slot, crowds)
    }

    /// False where the worker did not hold it.
    pub(super) fn remove(&mut self, block: BlockHash, slot: Slot) -> bool {
        let shard = &mut self.shards[shard_of(block)];
        let Ok(place) = shard.find(block.get()) else { return false };
        let Shard { buckets, crowds, .. } = shard;
        let was_held = buckets[place].holders.remove(slot, crowds);
        if buckets[place].holders.is_empty() {
            shard.take_out(place);
        }
        was_held
    }

    pub(super) fn sweeps(&self) -> u64 {
        self.sweeps
    }

    /// Frees the next shard of what workers left behind that are gone.
    pub(super) fn sweep<W: Copy>(&mut self, slots: &mut WorkerSlots<W>) {
        let next = usize::try_from(self.sweeps % SHARDS as u64).unwrap_or_default();
        self.sweeps += 1;
        self.shards[next].retain(|slot| slots.is_live(slot));
        slots.swept(self.sweeps);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let shards = self.shards.iter().map(|shard| {
            shard.buckets.capacity() * size_of::<Bucket>() + shard.crowds.memory_bytes()
        });
        shards.sum::<usize>() + SHARDS * size_of::<Shard>()
    }
}

impl Shard {
    /// Where a block stands if none is in its way.
    fn home(&self, block: u64) -> usize {
        // Its uppermost bits chose the shard.
        usize::try_from(block & u64::from(u32::MAX)).unwrap_or_default()
            & self.buckets.len().wrapping_sub(1)
    }

    /// Where the block stands; else the empty place where it would.
    fn find(&self, block: u64) -> Result<usize, usize> {
        if self.buckets.is_empty() {
            return Err(0);
        }
        let mask = self.buckets.len() - 1;
        let mut place = self.home(block);
        loop {
            match self.buckets[place].block {
                found if found == block => return Ok(place),
                0 => return Err(place),
                _ => place = (place + 1) & mask,
            }
        }
    }

    /// Makes a place for a block that has none.
    fn add(&mut self, block: u64) -> usize {
        if (self.used + 1) * 8 > self.buckets.len() * 7 {
            self.resize((self.buckets.len() * 2).max(FIRST_BUCKETS));
        }
        self.used += 1;
        self.put(Bucket { block, holders: Holders::NONE })
    }

    fn put(&mut self, bucket: Bucket) -> usize {
        let (Ok(place) | Err(place)) = self.find(bucket.block);
        self.buckets[place] = bucket;
        place
    }

    fn resize(&mut self, buckets: usize) {
        let old = std::mem::replace(&mut self.buckets, vec![EMPTY; buckets]);
        for bucket in old.into_iter().filter(|bucket| bucket.block != 0) {
            self.put(bucket);
        }
    }

    /// Empties a place; those behind it that stood there for want of a better one move up.
    fn take_out(&mut self, mut hole: usize) {
        let mask = self.buckets.len() - 1;
        self.used -= 1;
        let mut place = hole;
        loop {
            place = (place + 1) & mask;
            let bucket = self.buckets[place];
            if bucket.block == 0 {
                break;
            }
            let way = place.wrapping_sub(self.home(bucket.block)) & mask;
            if way >= place.wrapping_sub(hole) & mask {
                self.buckets[hole] = bucket;
                hole = place;
            }
        }
        self.buckets[hole] = EMPTY;
    }

    fn retain(&mut self, wanted: impl Fn(Slot) -> bool) {
        let mut place = 0;
        while place < self.buckets.len() {
            let Self { buckets, crowds, .. } = self;
            let bucket = &mut buckets[place];
            if bucket.block != 0 {
                bucket.holders.retain(&wanted, crowds);
                if bucket.holders.is_empty() {
                    // Another may have moved here.
                    self.take_out(place);
                    continue;
                }
            }
            place += 1;
        }
        if self.buckets.len() > FIRST_BUCKETS && self.used * 8 < self.buckets.len() {
            self.resize((self.used * 2).next_power_of_two().max(FIRST_BUCKETS));
        }
    }
}

fn shard_of(block: BlockHash) -> usize {
    usize::try_from(block.get() >> (u64::BITS - SHARD_BITS)).unwrap_or_default()
}
