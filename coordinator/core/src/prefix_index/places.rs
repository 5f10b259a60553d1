//! Where each block's row lies: open addressing, with eight places to a cache line.

use super::rows::{Place, Rows};

const FIRST_ENTRIES: usize = 8;

/// The places of a part of all blocks.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// A power of two of them, or none.
    entries: Vec<Option<Entry>>,
    used: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// A block's lower half: where it is at home, and for the most part which it is.
    tag: u32,
    place: Place,
}

impl Places {
    pub(super) fn find(&self, block: u64, rows: &Rows) -> Option<Place> {
        let tag = tag(block);
        self.way_from_home(tag).map_while(|at| self.entries[at]).find_map(|entry| {
            (entry.tag == tag && rows.get(entry.place).block == block).then_some(entry.place)
        })
    }

    /// A load from where the block is at home, for [`super::table::BlockTable::seek`].
    pub(super) fn touch(&self, block: u64) -> u32 {
        let at = self.home(tag(block));
        self.entries.get(at).map_or(0, |entry| entry.map_or(0, |entry| entry.tag))
    }

    /// As [`Self::find`], without a look at the row.
    pub(super) fn likely(&self, block: u64) -> Option<Place> {
        let tag = tag(block);
        let mut entries = self.way_from_home(tag).map_while(|at| self.entries[at]);
        entries.find_map(|entry| (entry.tag == tag).then_some(entry.place))
    }

    /// Notes the place of a block that has none.
    pub(super) fn add(&mut self, block: u64, place: Place) {
        if (self.used + 1) * 8 > self.entries.len() * 7 {
            self.resize(self.entries.len() * 2);
        }
        self.used += 1;
        self.put(Entry { tag: tag(block), place });
    }

    pub(super) fn moved(&mut self, block: u64, from: Place, to: Place) {
        if let Some(at) = self.position(block, from) {
            self.entries[at] = Some(Entry { tag: tag(block), place: to });
        }
    }

    /// Forgets a block; those that stood behind it for want of a better place move up.
    pub(super) fn take_out(&mut self, block: u64, place: Place) {
        let Some(mut hole) = self.position(block, place) else { return };
        let mask = self.entries.len() - 1;
        self.used -= 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(entry) = self.entries[at] else { break };
            let way = at.wrapping_sub(self.home(entry.tag)) & mask;
            if way >= at.wrapping_sub(hole) & mask {
                self.entries[hole] = Some(entry);
                hole = at;
            }
        }
        self.entries[hole] = None;
        if self.used * 8 < self.entries.len() {
            self.resize((self.used * 2).next_power_of_two());
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Option<Entry>>()
    }

    fn position(&self, block: u64, place: Place) -> Option<usize> {
        self.way_from_home(tag(block))
            .map_while(|at| self.entries[at].map(|entry| (at, entry)))
            .find_map(|(at, entry)| (entry.place == place).then_some(at))
    }

    fn put(&mut self, entry: Entry) {
        let empty = self.way_from_home(entry.tag).find(|at| self.entries[*at].is_none());
        if let Some(at) = empty {
            self.entries[at] = Some(entry);
        }
    }

    fn resize(&mut self, entries: usize) {
        let entries = vec![None; entries.max(FIRST_ENTRIES)];
        if entries.len() == self.entries.len() {
            return;
        }
        for entry in std::mem::replace(&mut self.entries, entries).into_iter().flatten() {
            self.put(entry);
        }
    }

    /// Where an entry stands if none is in its way.
    fn home(&self, tag: u32) -> usize {
        tag as usize & self.entries.len().wrapping_sub(1)
    }

    /// All positions, from an entry's home on.
    fn way_from_home(&self, tag: u32) -> impl Iterator<Item = usize> + use<> {
        let (home, len) = (self.home(tag), self.entries.len());
        (0..len).map(move |step| (home + step) & (len - 1))
    }
}

fn tag(block: u64) -> u32 {
    // The uppermost bits chose the part.
    u32::try_from(block & u64::from(u32::MAX)).unwrap_or_default()
}
