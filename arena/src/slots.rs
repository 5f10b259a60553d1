use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::Slot;

/// The free slots of one side of the arena. Whoever finds none waits for the next to be given back,
/// in the order of asking.
#[derive(Clone, Debug)]
pub struct SlotPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    free: Mutex<VecDeque<Slot>>,
    available: Semaphore,
    total: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    #[error("the arena was closed")]
    Closed,
}

impl SlotPool {
    pub fn new(slots: impl IntoIterator<Item = Slot>) -> Self {
        let free: VecDeque<_> = slots.into_iter().collect();
        let total = free.len();
        let available = Semaphore::new(total);
        Self { shared: Arc::new(Shared { free: Mutex::new(free), available, total }) }
    }

    pub fn total(&self) -> usize {
        self.shared.total
    }

    pub fn used(&self) -> usize {
        self.total().saturating_sub(self.shared.free.lock().len())
    }

    /// Waits for a slot. Dropping what it returns gives the slot back.
    pub async fn reserve(&self) -> Result<ReservedSlot, ReserveError> {
        let permit = self.shared.available.acquire().await.map_err(|_| ReserveError::Closed)?;
        let slot = self.shared.free.lock().pop_front().ok_or(ReserveError::Closed)?;
        permit.forget();
        Ok(ReservedSlot { slot, pool: self.clone() })
    }

    /// A slot if one is free now.
    pub fn try_reserve(&self) -> Option<ReservedSlot> {
        let permit = self.shared.available.try_acquire().ok()?;
        let slot = self.shared.free.lock().pop_front()?;
        permit.forget();
        Some(ReservedSlot { slot, pool: self.clone() })
    }
}

/// A slot that is ours until this is dropped.
#[derive(Debug)]
pub struct ReservedSlot {
    slot: Slot,
    pool: SlotPool,
}

impl ReservedSlot {
    pub fn slot(&self) -> Slot {
        self.slot
    }
}

impl Drop for ReservedSlot {
    fn drop(&mut self) {
        self.pool.shared.free.lock().push_back(self.slot);
        self.pool.shared.available.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slot_given_back_wakes_who_waits() {
        let pool = SlotPool::new([Slot(7)]);
        let held = pool.reserve().await.unwrap();
        assert_eq!((held.slot(), pool.used()), (Slot(7), 1));
        assert!(pool.try_reserve().is_none());

        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.reserve().await.unwrap().slot() }
        });
        tokio::task::yield_now().await;
        drop(held);
        assert_eq!(waiting.await.unwrap(), Slot(7));
        assert_eq!(pool.used(), 0);
    }
}
