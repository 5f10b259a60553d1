//! Who holds one block: up to four workers in eight bytes, where most blocks end; more in a list, and
//! many, as of a system prompt that everybody has, in a bitmap.

use super::worker_slots::Slot;

const NOBODY: Slot = Slot::MAX;
/// In the last place: the first two are an index into [`Crowds`].
const CROWD: Slot = Slot::MAX - 1;
/// A list of more becomes a bitmap, which a prompt's way through the table compares faster.
const LONGEST_LIST: usize = 48;

/// The holders of one block: in ascending order, or the place of a [`Crowd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holders([Slot; 4]);

/// Holders of one block, to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HoldersView<'a> {
    Few([Slot; 4]),
    List(&'a [Slot]),
    Bits(&'a [u64]),
}

/// More than four holders.
#[derive(Debug)]
enum Crowd {
    /// Ascending.
    List(Vec<Slot>),
    Bits {
        words: Vec<u64>,
        count: usize,
    },
}

/// The crowds of a part of the table.
#[derive(Debug, Default)]
pub(super) struct Crowds {
    crowds: Vec<Crowd>,
    free: Vec<u32>,
}

impl Holders {
    pub(super) const NONE: Self = Self([NOBODY; 4]);

    pub(super) fn view(self, crowds: &Crowds) -> HoldersView<'_> {
        match self.crowd().map(|crowd| &crowds.crowds[crowd as usize]) {
            None => HoldersView::Few(self.0),
            Some(Crowd::List(list)) => HoldersView::List(list),
            Some(Crowd::Bits { words, .. }) => HoldersView::Bits(words),
        }
    }

    /// Adds a holder. False where it was one.
    pub(super) fn insert(&mut self, slot: Slot, crowds: &mut Crowds) -> bool {
        if let Some(crowd) = self.crowd() {
            return crowds.crowds[crowd as usize].insert(slot);
        }
        if self.0.contains(&slot) {
            return false;
        }
        if self.0[3] == NOBODY {
            self.0[3] = slot;
            self.0.sort_unstable();
        } else {
            let mut list = Vec::with_capacity(8);
            list.extend(self.0);
            let mut crowd = Crowd::List(list);
            crowd.insert(slot);
            *self = crowds.add(crowd);
        }
        true
    }

    /// Removes a holder. False where it was none.
    pub(super) fn remove(&mut self, slot: Slot, crowds: &mut Crowds) -> bool {
        let Some(crowd) = self.crowd() else {
            let Some(place) = self.0.iter().position(|held| *held == slot) else { return false };
            self.0[place] = NOBODY;
            self.0.sort_unstable();
            return true;
        };
        let was_held = crowds.crowds[crowd as usize].remove(slot);
        self.settle(crowd, crowds);
        was_held
    }

    /// Keeps those holders alone that are wanted.
    pub(super) fn retain(&mut self, wanted: impl Fn(Slot) -> bool, crowds: &mut Crowds) {
        match self.crowd() {
            None => {
                for held in &mut self.0 {
                    if *held != NOBODY && !wanted(*held) {
                        *held = NOBODY;
                    }
                }
                self.0.sort_unstable();
            }
            Some(crowd) => {
                crowds.crowds[crowd as usize].retain(wanted);
                self.settle(crowd, crowds);
            }
        }
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::NONE
    }

    /// Whether they stand among [`Crowds`]: then who is equal need not be the same.
    pub(super) fn are_many(self) -> bool {
        self.crowd().is_some()
    }

    /// A crowd of four or fewer is none.
    fn settle(&mut self, crowd: u32, crowds: &mut Crowds) {
        if let Some(few) = crowds.crowds[crowd as usize].few() {
            crowds.release(crowd);
            *self = Self(few);
        }
    }

    fn crowd(self) -> Option<u32> {
        let [low, high, _, mark] = self.0;
        (mark == CROWD).then(|| u32::from(low) | u32::from(high) << 16)
    }
}

impl Crowds {
    fn add(&mut self, crowd: Crowd) -> Holders {
        let place = self.free.pop().unwrap_or_else(|| {
            self.crowds.push(Crowd::List(Vec::new()));
            // Four billion crowds are more than any memory has room for.
            u32::try_from(self.crowds.len() - 1).unwrap_or(u32::MAX)
        });
        self.crowds[place as usize] = crowd;
        let [a, b, c, d] = place.to_le_bytes();
        Holders([Slot::from_le_bytes([a, b]), Slot::from_le_bytes([c, d]), NOBODY, CROWD])
    }

    fn release(&mut self, place: u32) {
        self.crowds[place as usize] = Crowd::List(Vec::new());
        self.free.push(place);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let crowds = self.crowds.iter().map(|crowd| match crowd {
            Crowd::List(list) => list.capacity() * size_of::<Slot>(),
            Crowd::Bits { words, .. } => words.capacity() * size_of::<u64>(),
        });
        crowds.sum::<usize>()
            + self.crowds.capacity() * size_of::<Crowd>()
            + self.free.capacity() * size_of::<u32>()
    }
}

impl Crowd {
    fn insert(&mut self, slot: Slot) -> bool {
        match self {
            Self::List(list) => {
                let Err(place) = list.binary_search(&slot) else { return false };
                list.insert(place, slot);
                if list.len() > LONGEST_LIST {
                    *self = Self::bits(list);
                }
                true
            }
            Self::Bits { words, count } => {
                let (word, bit) = place(slot);
                if words.len() <= word {
                    words.resize(word + 1, 0);
                }
                let is_new = words[word] & bit == 0;
                words[word] |= bit;
                *count += usize::from(is_new);
                is_new
            }
        }
    }

    fn bits(list: &[Slot]) -> Self {
        let last = list.last().copied().unwrap_or_default();
        let mut words = vec![0; place(last).0 + 1];
        for slot in list {
            let (word, bit) = place(*slot);
            words[word] |= bit;
        }
        Self::Bits { words, count: list.len() }
    }

    fn remove(&mut self, slot: Slot) -> bool {
        match self {
            Self::List(list) => list.binary_search(&slot).map(|place| list.remove(place)).is_ok(),
            Self::Bits { words, count } => {
                let (word, bit) = place(slot);
                let was_held = words.get(word).is_some_and(|word| word & bit != 0);
                if was_held {
                    words[word] &= !bit;
                    *count -= 1;
                }
                self.shorten();
                was_held
            }
        }
    }

    fn retain(&mut self, wanted: impl Fn(Slot) -> bool) {
        match self {
            Self::List(list) => list.retain(|slot| wanted(*slot)),
            Self::Bits { words, count } => {
                for_each_bit(words, |slot| {
                    if !wanted(slot) {
                        *count -= 1;
                    }
                });
                let kept: Vec<Slot> = {
                    let mut kept = Vec::with_capacity(*count);
                    for_each_bit(words, |slot| {
                        if wanted(slot) {
                            kept.push(slot);
                        }
                    });
                    kept
                };
                *self = Self::bits(&kept);
                self.shorten();
            }
        }
    }

    /// A bitmap of few is a list again: at half of what made it one, lest it turn back and forth.
    fn shorten(&mut self) {
        if let Self::Bits { words, count } = self
            && *count <= LONGEST_LIST / 2
        {
            let mut list = Vec::with_capacity(*count);
            for_each_bit(words, |slot| list.push(slot));
            *self = Self::List(list);
        }
    }

    fn few(&self) -> Option<[Slot; 4]> {
        match self {
            Self::List(list) if list.len() <= 4 => {
                let mut few = [NOBODY; 4];
                few[..list.len()].copy_from_slice(list);
                Some(few)
            }
            _ => None,
        }
    }
}

impl HoldersView<'_> {
    /// Those that are listed; a bitmap has its own ways.
    pub(super) fn listed(&self) -> Option<&[Slot]> {
        match self {
            Self::Few(few) => {
                let count = few.iter().take_while(|slot| **slot != NOBODY).count();
                Some(&few[..count])
            }
            Self::List(list) => Some(list),
            Self::Bits(_) => None,
        }
    }
}

/// Where a worker stands in a bitmap.
pub(super) fn place(slot: Slot) -> (usize, u64) {
    (usize::from(slot / 64), 1 << (slot % 64))
}

/// In ascending order.
pub(super) fn for_each_bit(words: &[u64], mut each: impl FnMut(Slot)) {
    for (index, word) in words.iter().enumerate() {
        let mut rest = *word;
        while rest != 0 {
            let slot = index * 64 + rest.trailing_zeros() as usize;
            // No bitmap is longer than there are numbers.
            each(Slot::try_from(slot).unwrap_or(NOBODY));
            rest &= rest - 1;
        }
    }
}
