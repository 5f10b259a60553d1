use std::collections::VecDeque;

use super::table::SHARDS;

/// The short number of a worker, or of what it held before it was cleared.
pub(super) type Slot = u16;

/// Numbers above are marks of [`super::holders::Holders`].
pub(super) const MAX_SLOTS: usize = 0xfffe;

/// Gives workers their numbers. A number that was given back still stands in the table; it means
/// nobody, and is given out again once the whole table was swept.
#[derive(Debug)]
pub(super) struct WorkerSlots<W> {
    slots: Vec<Entry<W>>,
    /// With the count of sweeps when they were given back.
    retired: VecDeque<(Slot, u64)>,
    /// They stand nowhere.
    free: Vec<Slot>,
}

#[derive(Debug)]
struct Entry<W> {
    worker: Option<W>,
    blocks: usize,
}

impl<W> Default for WorkerSlots<W> {
    fn default() -> Self {
        Self { slots: Vec::new(), retired: VecDeque::new(), free: Vec::new() }
    }
}

impl<W: Copy> WorkerSlots<W> {
    /// A number that stands nowhere in the table; none where more sweeps are needed first.
    pub(super) fn take(&mut self, worker: W) -> Option<Slot> {
        let fresh = Entry { worker: Some(worker), blocks: 0 };
        if let Some(slot) = self.free.pop() {
            self.slots[usize::from(slot)] = fresh;
            return Some(slot);
        }
        let slot = Slot::try_from(self.slots.len()).ok();
        let slot = slot.filter(|slot| usize::from(*slot) < MAX_SLOTS)?;
        self.slots.push(fresh);
        Some(slot)
    }

    pub(super) fn retire(&mut self, slot: Slot, sweeps: u64) {
        self.slots[usize::from(slot)] = Entry { worker: None, blocks: 0 };
        self.retired.push_back((slot, sweeps));
    }

    /// A part of the table was swept: this many since the beginning.
    pub(super) fn swept(&mut self, sweeps: u64) {
        while let Some((slot, retired)) = self.retired.front().copied()
            && sweeps - retired >= SHARDS as u64
        {
            self.retired.pop_front();
            self.free.push(slot);
        }
    }

    pub(super) fn any_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    pub(super) fn worker(&self, slot: Slot) -> Option<W> {
        self.slots.get(usize::from(slot))?.worker
    }

    pub(super) fn is_live(&self, slot: Slot) -> bool {
        self.worker(slot).is_some()
    }

    pub(super) fn blocks(&self, slot: Slot) -> usize {
        self.slots[usize::from(slot)].blocks
    }

    pub(super) fn count(&mut self, slot: Slot, change: isize) {
        let blocks = &mut self.slots[usize::from(slot)].blocks;
        *blocks = blocks.saturating_add_signed(change);
    }

    /// Numbers are below this.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Entry<W>>()
            + self.retired.capacity() * size_of::<(Slot, u64)>()
            + self.free.capacity() * size_of::<Slot>()
    }
}
