//! In which order a handoff's blocks come.
//!
//! An engine that hands a block over layer group by layer group hands it over as so many blocks, one for each
//! group: group `g` of block `b` goes by the index `b · groups + g`. Those of one group come in their order and
//! without gaps; which group goes first is for the engine to say.

/// What is due next, of each layer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    /// By the remainder of the index.
    due: Vec<u32>,
}

impl Order {
    /// From this index on.
    pub(crate) fn from(first: u32, layer_groups: u32) -> Self {
        let groups = layer_groups.max(1);
        let mut due = vec![0; groups as usize];
        for index in (0..groups).map(|ahead| first.saturating_add(ahead)) {
            due[(index % groups) as usize] = index;
        }
        Self { due }
    }

    fn groups(&self) -> u32 {
        u32::try_from(self.due.len()).unwrap_or(u32::MAX)
    }

    /// Takes the block of this index, if it is due. Else answers which one of its group is.
    pub(crate) fn take(&mut self, index: u32) -> Result<(), u32> {
        let groups = self.groups();
        match self.due.get_mut((index % groups) as usize) {
            Some(due) if *due == index => {
                *due = due.saturating_add(groups);
                Ok(())
            }
            Some(due) => Err(*due),
            None => Err(0),
        }
    }

    /// Makes what was taken last of its group due again.
    pub(crate) fn put_back(&mut self, index: u32) {
        let groups = self.groups();
        if let Some(due) = self.due.get_mut((index % groups) as usize) {
            *due = index;
        }
    }

    /// The index behind the last, where all groups have come equally far.
    pub(crate) fn end(&self) -> Option<u32> {
        let end = self.due.iter().copied().min()?;
        (0..).zip(&self.due).all(|(group, due)| *due == end.saturating_add(group)).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_group_comes_in_order_whichever_goes_first(
            groups in 1..9_u32,
            first in 0..5_u32,
            blocks in 0..20_u32,
            turns in prop::collection::vec(0..9_u32, 0..200),
        ) {
            let mut order = Order::from(first * groups, groups);
            let mut taken = vec![0; groups as usize];
            let index = |block: u32, group: u32| (first + block) * groups + group;
            for group in turns.into_iter().map(|turn| turn % groups).chain(
                // What is left, so that all come to the same.
                (0..blocks).flat_map(|_| 0..groups),
            ) {
                let block = taken[group as usize];
                if block == blocks {
                    continue;
                }
                let due = index(block, group);
                for wrong in [due + groups, due.wrapping_sub(groups)] {
                    if wrong % groups == group {
                        prop_assert_eq!(order.clone().take(wrong), Err(due));
                    }
                }
                prop_assert_eq!(order.take(due), Ok(()));
                order.put_back(due);
                prop_assert_eq!(order.take(due), Ok(()));
                taken[group as usize] += 1;
                let even = taken.iter().all(|of_group| *of_group == taken[0]);
                prop_assert_eq!(order.end(), even.then_some(index(taken[0], 0)));
            }
            prop_assert_eq!(order.end(), Some(index(blocks, 0)));
        }
    }
}
