use std::{collections::HashSet, sync::Arc, time::Instant};

use baton_arena::{Arena, ArenaLayout, Slot, SlotView};
use baton_engine::{BlockInSlot, ToEngine};
use baton_transfer::{Ending, HandoffError, Ledger};
use baton_types::{Fault, FaultKind, Origin, PromptDigest};
use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Name, PortError, to_engine::Queue};

/// The producing side: blocks from the engine's export slots into the ledgers, each rank's into its own.
#[derive(Debug)]
pub(super) struct Exports {
    arena: Arena,
    block_bytes: u64,
    ledgers: Vec<Ledger>,
    lent: Arc<Lent>,
}

/// Export slots whose bytes somebody may still read.
#[derive(Debug)]
struct Lent {
    slots: Mutex<HashSet<Slot>>,
    /// Of each rank.
    queues: Vec<Queue>,
}

impl Exports {
    pub(super) fn new(
        arena: Arena,
        block_bytes: u64,
        ledgers: Vec<Ledger>,
        queues: Vec<Queue>,
    ) -> Self {
        let lent = Arc::new(Lent { slots: Mutex::default(), queues });
        Self { arena, block_bytes, ledgers, lent }
    }

    pub(super) fn expect(
        &self,
        name: Name,
        consumer: [u8; 32],
        due: Option<Instant>,
    ) -> Result<Producing, Fault> {
        let mut producing = Producing {
            name,
            ledgers: self.ledgers.clone(),
            lent: self.lent.clone(),
            endings: FuturesUnordered::new(),
        };
        for (expecting, ledger) in self.ledgers.iter().enumerate() {
            let expected = match due {
                Some(due) => ledger.expect_by(due, name.0, name.1, consumer),
                None => ledger.expect(name.0, name.1, consumer),
            };
            match expected {
                Ok(ending) => producing.endings.push(ending),
                Err(error) => {
                    // What is open there is another's.
                    producing.ledgers.truncate(expecting);
                    let reason = error.to_string();
                    return Err(Fault::new(Origin::Handoff, FaultKind::Failed, reason));
                }
            }
        }
        Ok(producing)
    }

    pub(super) fn exported(
        &self,
        rank: u32,
        name: Name,
        blocks: &[BlockInSlot],
    ) -> Result<(), PortError> {
        let ledger = self.ledger(rank)?;
        for block in blocks {
            let bytes = self.borrow(rank, block.slot)?;
            match ledger.push(name.0, name.1, block.index, bytes) {
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
        rank: u32,
        name: Name,
        prompt_tokens: u32,
        prompt_digest: PromptDigest,
        cached_tokens: u32,
    ) -> Result<(), PortError> {
        let ledger = self.ledger(rank)?;
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
        self.ledgers.iter().for_each(|ledger| ledger.abort(name.0, name.1));
    }

    /// Handoffs of which some rank's part has not ended.
    pub(super) fn open(&self) -> usize {
        self.ledgers.iter().map(Ledger::open_handoffs).max().unwrap_or_default()
    }

    pub(super) fn slots_used(&self) -> usize {
        self.lent.slots.lock().len()
    }

    pub(super) fn layout(&self) -> ArenaLayout {
        self.arena.layout()
    }

    fn ledger(&self, rank: u32) -> Result<&Ledger, PortError> {
        self.ledgers.get(rank as usize).ok_or(PortError::NoSuchRank(rank))
    }

    /// The bytes of a slot that this rank exported. It has the slot back when they are dropped.
    fn borrow(&self, rank: u32, slot: Slot) -> Result<Bytes, PortError> {
        let view = self.arena.view(slot, self.block_bytes)?;
        let ranks = u32::try_from(self.ledgers.len()).unwrap_or(u32::MAX);
        let (own, _) = self.arena.layout().of_rank(rank, ranks);
        if !own.contains(&slot.0) {
            return Err(PortError::NotForExport(slot));
        }
        if !self.lent.slots.lock().insert(slot) {
            return Err(PortError::StillLent(slot));
        }
        Ok(Bytes::from_owner(Borrowed { view, rank, slot, lent: self.lent.clone() }))
    }
}

struct Borrowed {
    view: SlotView,
    rank: u32,
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
        if let Some(queue) = self.lent.queues.get(self.rank as usize) {
            queue.release(self.slot);
        }
    }
}

/// A handoff that this worker's engine produces. Dropping it before its end makes it void on both
/// sides.
#[derive(Debug)]
pub(crate) struct Producing {
    name: Name,
    ledgers: Vec<Ledger>,
    lent: Arc<Lent>,
    /// Of the ranks whose part has not ended.
    endings: FuturesUnordered<oneshot::Receiver<Ending>>,
}

impl Producing {
    /// Keeps the handoff while its prefill is under way, though the engine has exported nothing yet.
    pub(crate) fn renew(&self) {
        for ledger in &self.ledgers {
            // One that has ended is told by `ended`.
            let _ = ledger.renew(self.name.0, self.name.1);
        }
    }

    /// Waits for its end: that of all ranks' parts, or of the first that fails, which makes the others
    /// void. Nothing is lost when the future is dropped.
    pub(crate) async fn ended(&mut self) -> Ending {
        while let Some(ending) = self.endings.next().await {
            let ending = ending.unwrap_or(Ending::Aborted);
            if ending != Ending::Acked {
                self.give_up();
                return ending;
            }
        }
        Ending::Acked
    }

    fn give_up(&mut self) {
        self.endings.clear();
        let (handoff, generation) = self.name;
        self.ledgers.iter().for_each(|ledger| ledger.abort(handoff, generation));
        for queue in &self.lent.queues {
            queue.send(ToEngine::Cancel { handoff, generation });
        }
    }
}

impl Drop for Producing {
    fn drop(&mut self) {
        if !self.endings.is_empty() {
            self.give_up();
        }
    }
}
