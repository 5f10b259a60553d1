use super::{
    holders::{Holders, HoldersView, for_each_bit, place},
    worker_slots::Slot,
};

/// How far into a prompt each worker's blocks reach, block by block.
#[derive(Debug)]
pub(super) struct Reach<'a> {
    /// The workers that hold every block so far.
    words: Vec<u64>,
    count: usize,
    blocks: u32,
    last: Option<(Holders, HoldersView<'a>)>,
}

impl<'a> Reach<'a> {
    pub(super) fn new(slots: usize) -> Self {
        Self { words: vec![0; slots.div_ceil(64)], count: 0, blocks: 0, last: None }
    }

    /// Goes over the next block, and tells of each worker that reaches no further. False at the end,
    /// which nobody passes.
    pub(super) fn advance(
        &mut self,
        holders: Holders,
        view: impl FnOnce() -> HoldersView<'a>,
        ended: impl FnMut(Slot, u32),
    ) -> bool {
        // Blocks that came together are mostly held by the same workers.
        if holders.are_many() || self.last.is_none_or(|(last, _)| last != holders) {
            let view = view();
            match self.last.replace((holders, view)) {
                None => self.start(view),
                Some((_, last)) if last == view => {}
                Some(_) => self.keep(view, ended),
            }
        }
        if self.count == 0 {
            return false;
        }
        self.blocks += 1;
        true
    }

    /// Tells of those that are left.
    pub(super) fn finish(self, mut ended: impl FnMut(Slot, u32)) {
        for_each_bit(&self.words, |slot| ended(slot, self.blocks));
    }

    fn start(&mut self, holders: HoldersView<'_>) {
        if let HoldersView::Bits(bits) = holders {
            self.words[..bits.len()].copy_from_slice(bits);
        }
        for slot in holders.listed().unwrap_or_default() {
            let (word, bit) = place(*slot);
            self.words[word] |= bit;
        }
        self.recount();
    }

    fn keep(&mut self, holders: HoldersView<'_>, ended: impl FnMut(Slot, u32)) {
        match holders {
            HoldersView::Bits(bits) => {
                let bits = bits.iter().copied().chain(std::iter::repeat(0));
                if self.words.iter().zip(bits.clone()).any(|(word, bits)| word & !bits != 0) {
                    self.drop_others(bits, ended);
                }
            }
            HoldersView::Few(_) | HoldersView::List(_) => {
                let listed = holders.listed().unwrap_or_default();
                let stays = |slot: &&Slot| {
                    let (word, bit) = place(**slot);
                    self.words[word] & bit != 0
                };
                if listed.iter().filter(stays).count() < self.count {
                    let mut bits = vec![0; self.words.len()];
                    for slot in listed {
                        let (word, bit) = place(*slot);
                        bits[word] |= bit;
                    }
                    self.drop_others(bits.into_iter(), ended);
                }
            }
        }
    }

    fn drop_others(&mut self, bits: impl Iterator<Item = u64>, mut ended: impl FnMut(Slot, u32)) {
        let mut gone = vec![0; self.words.len()];
        for ((word, gone), bits) in self.words.iter_mut().zip(&mut gone).zip(bits) {
            *gone = *word & !bits;
            *word &= bits;
        }
        for_each_bit(&gone, |slot| ended(slot, self.blocks));
        self.recount();
    }

    fn recount(&mut self) {
        self.count = self.words.iter().map(|word| word.count_ones() as usize).sum();
    }
}
