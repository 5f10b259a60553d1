use std::{collections::HashSet, sync::Arc};

use baton_arena::{Arena, Slot, SlotView};
use baton_engine::{BlockInSlot, ToEngine};
use baton_transfer::{Ending, HandoffError, Ledger};
use baton_types::{Epoch, Fault, FaultKind, Origin, PromptDigest};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Name, PortError, Transfer, to_engine::Queue};

/// The producing side: blocks from the engine's export slots into the ledger.
#[derive(Debug)]
pub(super) struct Exports {
    arena: Arena,
    block_bytes: u64,
    transfer: Transfer,
    lent: Arc<Lent>,
}

/// Export slots whose bytes somebody may still read.
#[derive(Debug)]
struct Lent {
    slots: Mutex<HashSet<Slot>>,
    queue: Queue,
}

impl Exports {
    pub(super) fn new(arena: Arena, block_bytes: u64, transfer: Transfer, queue: Queue) -> Self {
        let lent = Arc::new(Lent { slots: Mutex::default(), queue });
        Self { arena, block_bytes, transfer, lent }
    }

    pub(super) fn expect(&self, name: Name, consumer: [u8; 32]) -> Result<Producing, Fault> {
        let ending =
            self.transfer.ledger.expect(name.0, name.1, consumer).map_err(|error| {
                Fault::new(Origin::Handoff, FaultKind::Failed, error.to_string())
            })?;
        Ok(Producing {
            name,
            ledger: self.transfer.ledger.clone(),
            queue: self.lent.queue.clone(),
            ending: Some(ending),
        })
    }

    pub(super) fn exported(&self, name: Name, blocks: &[BlockInSlot]) -> Result<(), PortError> {
        for block in blocks {
            let bytes = self.borrow(block.slot)?;
            match self.transfer.ledger.push(name.0, name.1, block.index, bytes) {
                Ok(()) => {}
                // Cancelled, and the engine is about to hear of it. The slot went back with the bytes.
                Err(HandoffError::NotOpen | HandoffError::Stale { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn sealed(
        &self,
        name: Name,
        prompt_tokens: u32,
        prompt_digest: PromptDigest,
        cached_tokens: u32,
    ) -> Result<(), PortError> {
        let ledger = &self.transfer.ledger;
        match ledger.seal(name.0, name.1, prompt_tokens, prompt_digest, cached_tokens) {
            Ok(()) | Err(HandoffError::NotOpen | HandoffError::Stale { .. }) => Ok(()),
            Err(HandoffError::WrongPrompt) => {
                // The ledger tells the consumer, in its place among the blocks.
                tracing::warn!(handoff = %name.0, "the two engines made different tokens of one prompt");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn abort(&self, name: Name) {
        self.transfer.ledger.abort(name.0, name.1);
    }

    pub(super) fn begin_epoch(&self, epoch: Epoch, compatibility: [u8; 32]) {
        self.transfer.ledger.begin_epoch(epoch, compatibility);
    }

    pub(super) fn open(&self) -> usize {
        self.transfer.ledger.open_handoffs()
    }

    pub(super) fn slots_used(&self) -> usize {
        self.lent.slots.lock().len()
    }

    pub(super) fn total_slots(&self) -> u32 {
        self.arena.layout().total_slots()
    }

    /// The bytes of an exported slot. The engine has the slot back when they are dropped.
    fn borrow(&self, slot: Slot) -> Result<Bytes, PortError> {
        let view = self.arena.view(slot, self.block_bytes)?;
        if !self.arena.layout().is_export(slot) {
            return Err(PortError::NotForExport(slot));
        }
        if !self.lent.slots.lock().insert(slot) {
            return Err(PortError::StillLent(slot));
        }
        Ok(Bytes::from_owner(Borrowed { view, slot, lent: self.lent.clone() }))
    }
}

struct Borrowed {
    view: SlotView,
    slot: Slot,
    lent: Arc<Lent>,
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        self.view.as_ref()
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.lent.slots.lock().remove(&self.slot);
        self.lent.queue.release(self.slot);
    }
}

/// A handoff that this worker's engine produces. Dropping it before its end makes it void on both
/// sides.
#[derive(Debug)]
pub(crate) struct Producing {
    name: Name,
    ledger: Ledger,
    queue: Queue,
    /// Taken when it has ended.
    ending: Option<oneshot::Receiver<Ending>>,
}

impl Producing {
    /// Keeps the handoff while its prefill is under way, though the engine has exported nothing yet.
    pub(crate) fn renew(&self) {
        // One that has ended is told by `ended`.
        let _ = self.ledger.renew(self.name.0, self.name.1);
    }

    /// Waits for its end. Nothing is lost when the future is dropped.
    pub(crate) async fn ended(&mut self) -> Ending {
        let ending = match &mut self.ending {
            Some(ending) => ending.await.unwrap_or(Ending::Aborted),
            None => return Ending::Aborted,
        };
        self.ending = None;
        if ending != Ending::Acked {
            self.cancel_in_engine();
        }
        ending
    }

    fn cancel_in_engine(&self) {
        let (handoff, generation) = self.name;
        self.queue.send(ToEngine::Cancel { handoff, generation });
    }
}

impl Drop for Producing {
    fn drop(&mut self) {
        if self.ending.is_some() {
            self.ledger.abort(self.name.0, self.name.1);
            self.cancel_in_engine();
        }
    }
}
