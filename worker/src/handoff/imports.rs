mod mapped;
mod pulling;

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use baton_arena::{Arena, Landing, PeerArena, ReservedSlot, Slot, SlotPool};
use baton_engine::{BlockToLoad, MappedBlockToLoad, ToEngine};
use baton_proto::HandoffResult;
use baton_transfer::{MappedBlock, PeerAddress, Pulled, TransferError};
use baton_types::{Compatibility, Epoch, Fault, FaultKind, Origin, PromptDigest};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
    time::Instant,
};

use self::mapped::EngineMaps;
use super::{Name, PortError, Transfer, fault, pieces::Pieces, to_engine::Queue};
use crate::counters::Counters;

/// Who computes the prompt.
#[derive(Clone, Debug)]
pub(crate) struct Producer {
    pub(crate) address: PeerAddress,
    pub(crate) epoch: Epoch,
    /// Of its engine, where that is not the very same as that of this worker's.
    pub(crate) compatibility: Option<Compatibility>,
}

/// How far a handoff is, as its decode job sees it.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    Waiting,
    /// The engine held the whole prompt already.
    NotNeeded,
    Complete(Received),
    Failed(Fault),
}

/// What was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) blocks: u32,
    pub(crate) bytes: u64,
    /// From the subscription to the last block's verification.
    pub(crate) duration: Duration,
    pub(crate) blocks_reused: u32,
    /// Those of `blocks` that were loaded where they lay, in the producer's arena.
    pub(crate) blocks_mapped: u32,
    pub(crate) transport: &'static str,
    /// Prompt tokens that the producer had in its cache.
    pub(crate) cached_tokens: u32,
}

impl From<Received> for HandoffResult {
    fn from(received: Received) -> Self {
        Self {
            blocks: received.blocks,
            bytes: received.bytes,
            micros: u64::try_from(received.duration.as_micros()).unwrap_or(u64::MAX),
            blocks_reused: received.blocks_reused,
            blocks_mapped: received.blocks_mapped,
            transport: received.transport.to_owned(),
        }
    }
}

/// What the engine subscribes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prompt {
    pub(super) prompt_tokens: u32,
    pub(super) prompt_digest: PromptDigest,
    pub(super) first_block: u32,
}

/// The consuming side: blocks from the channel into the engine's import slots.
#[derive(Debug)]
pub(super) struct Imports {
    arena: Arena,
    /// In their order.
    ranks: Vec<Rank>,
    /// Of the first rank.
    compatibility: Compatibility,
    pieces: Pieces,
    engine_maps: EngineMaps,
    epoch: Mutex<Epoch>,
    transfer: Transfer,
    counters: Arc<Counters>,
    consumers: Mutex<HashMap<Name, Consumer>>,
}

/// One rank of the engine.
#[derive(Debug)]
struct Rank {
    pool: SlotPool,
    queue: Queue,
}

#[derive(Debug)]
struct Consumer {
    producer: Producer,
    progress: watch::Sender<Progress>,
    /// What each rank has subscribed for.
    subscribed: HashMap<u32, Prompt>,
    /// Runs once all ranks have.
    pull: Option<AbortHandle>,
    /// Slots that the engine may be reading.
    lent: HashMap<Slot, ReservedSlot>,
    /// Blocks that it may be reading where they lie, by rank and index.
    lent_mapped: HashMap<(u32, u32), MappedBlock>,
    blocks_mapped: u32,
    /// The engine gave slots back.
    given_back: Arc<Notify>,
    /// When the job ended, where slots are still lent.
    left: Option<Instant>,
}

impl Consumer {
    /// Whether the engine may read nothing of it any more.
    fn has_lent_nothing(&self) -> bool {
        self.lent.is_empty() && self.lent_mapped.is_empty()
    }

    /// Its job has ended, and the engine has given everything back.
    fn is_over(&self) -> bool {
        self.left.is_some() && self.has_lent_nothing()
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        if let Some(pull) = &self.pull {
            pull.abort();
        }
    }
}

impl Imports {
    pub(super) fn new(
        arena: Arena,
        compatibility: Compatibility,
        epoch: Epoch,
        transfer: Transfer,
        queues: Vec<Queue>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let layout = arena.layout();
        let count = u32::try_from(queues.len()).unwrap_or(u32::MAX);
        let rank = |(rank, queue)| {
            let (_, slots) = layout.of_rank(rank, count);
            Rank { pool: SlotPool::new(slots.map(Slot)), queue }
        };
        Arc::new(Self {
            ranks: (0..).zip(queues).map(rank).collect(),
            pieces: Pieces::beside(&arena),
            engine_maps: EngineMaps::default(),
            arena,
            compatibility,
            epoch: Mutex::new(epoch),
            transfer,
            counters,
            consumers: Mutex::default(),
        })
    }

    pub(super) fn expect(
        self: &Arc<Self>,
        name: Name,
        producer: Producer,
    ) -> Result<Consuming, Fault> {
        let (sender, progress) = watch::channel(Progress::Waiting);
        match self.consumers.lock().entry(name) {
            Entry::Occupied(_) => {
                let reason = "this handoff is under way here already";
                Err(Fault::new(Origin::Handoff, FaultKind::Failed, reason))
            }
            Entry::Vacant(vacant) => {
                vacant.insert(Consumer {
                    producer,
                    progress: sender,
                    subscribed: HashMap::new(),
                    pull: None,
                    lent: HashMap::new(),
                    lent_mapped: HashMap::new(),
                    blocks_mapped: 0,
                    given_back: Arc::default(),
                    left: None,
                });
                Ok(Consuming { name, imports: self.clone(), progress })
            }
        }
    }

    /// The handoff begins when all ranks have asked for it.
    pub(super) fn subscribe(self: &Arc<Self>, rank: u32, name: Name, prompt: Prompt) {
        let mut consumers = self.consumers.lock();
        let refused = match consumers.get_mut(&name) {
            None => "no job of this worker expects this handoff",
            Some(consumer) if consumer.left.is_some() => "its job has ended",
            Some(consumer) if consumer.subscribed.contains_key(&rank) => {
                "it was subscribed to before"
            }
            Some(consumer) if consumer.subscribed.values().any(|other| *other != prompt) => {
                "the engine's ranks do not ask for the same"
            }
            Some(consumer) => {
                consumer.subscribed.insert(rank, prompt);
                if consumer.subscribed.len() == self.ranks.len() {
                    let pull = self.clone().pull(name, consumer.producer.clone(), prompt);
                    consumer.pull = Some(tokio::spawn(pull).abort_handle());
                }
                return;
            }
        };
        drop(consumers);
        self.fail_in_engine(name, refused.to_owned());
    }

    fn complete(&self, name: Name, pulled: Pulled, first_block: u32, duration: Duration) {
        let consumers = self.consumers.lock();
        let Some(consumer) = consumers.get(&name) else { return };
        let blocks_reused = first_block / self.layer_groups();
        // The job knows before the engine does, and so before there is a token.
        consumer.progress.send_replace(Progress::Complete(Received {
            blocks: pulled.blocks / self.layer_groups(),
            bytes: pulled.bytes,
            duration,
            blocks_reused,
            blocks_mapped: consumer.blocks_mapped,
            transport: pulled.transport,
            cached_tokens: pulled.seal.cached_tokens,
        }));
        self.counters.handoff_blocks_reused.add(u64::from(blocks_reused));
        self.tell_all(&ToEngine::Complete { handoff: name.0, generation: name.1 });
    }

    fn tell_all(&self, message: &ToEngine) {
        self.ranks.iter().for_each(|rank| rank.queue.send(message.clone()));
    }

    fn fail(&self, name: Name, fault: Fault) {
        let producer = self.producer_of(name);
        tracing::warn!(handoff = %name.0, generation = %name.1, producer, %fault, "a handoff failed");
        self.counters.handoffs_failed.add(1);
        let reason = fault.to_string();
        if let Some(consumer) = self.consumers.lock().get(&name) {
            consumer.progress.send_replace(Progress::Failed(fault));
        }
        self.fail_in_engine(name, reason);
    }

    /// By its name.
    fn producer_of(&self, name: Name) -> String {
        let consumers = self.consumers.lock();
        consumers.get(&name).map(|it| it.producer.address.worker_name.clone()).unwrap_or_default()
    }

    fn fail_in_engine(&self, name: Name, reason: String) {
        self.tell_all(&ToEngine::Failed { handoff: name.0, generation: name.1, reason });
    }

    pub(super) fn not_needed(&self, name: Name) {
        if let Some(consumer) = self.consumers.lock().get(&name) {
            consumer.progress.send_replace(Progress::NotNeeded);
        }
    }

    pub(super) fn loaded(&self, name: Name, slots: &[Slot]) -> Result<(), PortError> {
        let mut consumers = self.consumers.lock();
        // Its slots were taken back some time after its job had ended.
        let Some(consumer) = consumers.get_mut(&name) else { return Ok(()) };
        for slot in slots {
            consumer.lent.remove(slot).ok_or(PortError::NotLent(*slot))?;
        }
        consumer.given_back.notify_one();
        if consumer.is_over() {
            consumers.remove(&name);
        }
        Ok(())
    }

    pub(super) fn loaded_mapped(
        &self,
        rank: u32,
        name: Name,
        indices: &[u32],
    ) -> Result<(), PortError> {
        let mut consumers = self.consumers.lock();
        let Some(consumer) = consumers.get_mut(&name) else { return Ok(()) };
        for index in indices {
            // The channel hears of it by that.
            let block = consumer.lent_mapped.remove(&(rank, *index));
            block.ok_or(PortError::BlockNotLent(*index))?;
        }
        if consumer.is_over() {
            consumers.remove(&name);
        }
        Ok(())
    }

    /// A rank of the engine has mapped another worker's arena, or cannot.
    pub(super) fn engine_mapped(&self, rank: u32, arena: u32, refused: Option<&str>) {
        self.engine_maps.answered(rank, arena, refused);
    }

    /// The number of another worker's arena, if the engine loads blocks from where they lie in it.
    pub(super) fn number_of(&self, arena: &Arc<PeerArena>) -> Option<u32> {
        self.engine_maps.number_of(arena, &self.ranks)
    }

    /// The engine's request is gone. Answers whether the handoff was one of ours.
    pub(super) fn aborted(&self, name: Name) -> bool {
        self.give_up(name, Fault::new(Origin::Engine, FaultKind::Failed, "the engine gave it up"))
    }

    /// The engine found a block changed that was verified here.
    pub(super) fn corrupt(&self, name: Name, index: u32) {
        let error = TransferError::Rotten { index };
        let fault = fault::of_transfer(&error);
        let producer = self.producer_of(name);
        // A block of a handoff that has failed may be another's by now, where its producer has taken it back.
        if self.is_waited_for(name) && self.give_up(name, fault.clone()) {
            tracing::error!(handoff = %name.0, generation = %name.1, producer, %fault, "a handoff failed");
            self.counters.handoff_errors.add(error.name());
            self.counters.handoffs_failed.add(1);
            self.fail_in_engine(name, fault.to_string());
        }
    }

    fn is_waited_for(&self, name: Name) -> bool {
        let consumers = self.consumers.lock();
        consumers.get(&name).is_some_and(|consumer| {
            consumer.left.is_none() && matches!(*consumer.progress.borrow(), Progress::Waiting)
        })
    }

    /// The engine said something about the handoff that cannot be.
    pub(super) fn broken(&self, name: Name, error: &PortError) {
        let fault = Fault::new(Origin::Engine, FaultKind::Failed, error.to_string());
        if self.give_up(name, fault) {
            self.fail_in_engine(name, error.to_string());
        }
    }

    fn give_up(&self, name: Name, fault: Fault) -> bool {
        let mut consumers = self.consumers.lock();
        let Some(consumer) = consumers.get_mut(&name) else { return false };
        if let Some(pull) = &consumer.pull {
            pull.abort();
        }
        // Slots stay lent: the engine gives back each that it was told of, wanted or not.
        if !matches!(*consumer.progress.borrow(), Progress::Complete(_) | Progress::Failed(_)) {
            consumer.progress.send_replace(Progress::Failed(fault));
        }
        if consumer.is_over() {
            consumers.remove(&name);
        }
        true
    }

    /// Takes back the slots of jobs that ended, from an engine that does not give them back. Should it
    /// read one after all, what it reads belongs to a request that failed.
    pub(super) fn sweep(&self) {
        self.engine_maps.forget_gone(&self.ranks);
        self.consumers.lock().retain(|name, consumer| {
            let keep =
                consumer.left.is_none_or(|left| left.elapsed() < self.transfer.stall_timeout);
            if !keep {
                let slots = consumer.lent.len() + consumer.lent_mapped.len();
                tracing::warn!(handoff = %name.0, slots, "took back slots that the engine kept");
            }
            keep
        });
    }

    /// Fails every handoff that is not complete.
    pub(super) fn engine_gone(&self) {
        for (_, consumer) in self.consumers.lock().drain() {
            if !matches!(*consumer.progress.borrow(), Progress::Complete(_)) {
                let reason = "the engine's KV side went away";
                consumer.progress.send_replace(Progress::Failed(Fault::new(
                    Origin::Engine,
                    FaultKind::Unavailable,
                    reason,
                )));
            }
        }
    }

    pub(super) fn compatibility(&self) -> &Compatibility {
        &self.compatibility
    }

    pub(super) fn count_ranks(&self) -> u32 {
        u32::try_from(self.ranks.len()).unwrap_or(u32::MAX)
    }

    /// In which each block of the engine comes, each as a block of its own.
    pub(super) fn layer_groups(&self) -> u32 {
        self.compatibility.layer_groups.max(1)
    }

    /// Blocks of the engine that count as come with this one: it, if it is of the last layer group.
    pub(super) fn whole_blocks(&self, index: u32) -> u64 {
        let groups = self.layer_groups();
        u64::from(index % groups + 1 == groups)
    }

    /// Bytes of a block of one rank.
    pub(super) fn block_bytes(&self) -> u64 {
        self.compatibility.block_bytes
    }

    /// An import slot of this rank, waiting for a free one.
    pub(super) async fn reserve(&self, rank: u32) -> Result<Landing, TransferError> {
        let no_room = |error: &dyn std::error::Error| TransferError::NoRoom(error.to_string());
        let closed = || TransferError::NoRoom(PortError::NoSuchRank(rank).to_string());
        let pool = &self.ranks.get(rank as usize).ok_or_else(closed)?.pool;
        let slot = pool.reserve().await.map_err(|e| no_room(&e))?;
        self.arena.landing(slot, self.block_bytes()).map_err(|e| no_room(&e))
    }

    /// Gives a rank's blocks to the engine, all of them or, where the job has ended, none.
    pub(super) fn lend(
        &self,
        name: Name,
        index: u32,
        blocks: impl IntoIterator<Item = (u32, Landing, u32)>,
    ) -> Result<(), TransferError> {
        let mut consumers = self.consumers.lock();
        let consumer = consumers.get_mut(&name).filter(|consumer| consumer.left.is_none());
        let consumer = consumer.ok_or(TransferError::Cancelled)?;
        let (handoff, generation) = name;
        for (rank, block, crc32) in blocks {
            let reserved = block.into_slot();
            let slot = reserved.slot();
            consumer.lent.insert(slot, reserved);
            let blocks = vec![BlockToLoad { index, slot, crc32 }];
            if let Some(rank) = self.ranks.get(rank as usize) {
                rank.queue.send(ToEngine::Load { handoff, generation, blocks });
            }
        }
        Ok(())
    }

    /// Has a rank load a block from where it lies in another worker's arena, unless the job has ended.
    pub(super) fn lend_mapped(
        &self,
        name: Name,
        rank: u32,
        index: u32,
        block: MappedBlock,
        crc32: u32,
    ) -> Result<(), TransferError> {
        let unmapped = || TransferError::Memory("a peer that the engine has not mapped".to_owned());
        let arena = self.number_of(block.arena()).ok_or_else(unmapped)?;
        let mut consumers = self.consumers.lock();
        let consumer = consumers.get_mut(&name).filter(|consumer| consumer.left.is_none());
        let consumer = consumer.ok_or(TransferError::Cancelled)?;
        let (handoff, generation) = name;
        let blocks = vec![MappedBlockToLoad { index, offset: block.offset(), crc32 }];
        consumer.lent_mapped.insert((rank, index), block);
        // All ranks' parts are one block.
        let blocks_mapped = if rank == 0 { self.whole_blocks(index) } else { 0 };
        consumer.blocks_mapped += u32::from(blocks_mapped > 0);
        self.counters.handoff_blocks_mapped.add(blocks_mapped);
        if let Some(rank) = self.ranks.get(rank as usize) {
            rank.queue.send(ToEngine::LoadMapped { handoff, generation, arena, blocks });
        }
        Ok(())
    }

    /// A block came, of which this is all or a part.
    pub(super) fn count(&self, blocks: u64, bytes: u64) {
        self.counters.handoff_blocks_received.add(blocks);
        self.counters.handoff_bytes_received.add(bytes);
    }

    pub(super) fn begin_epoch(&self, epoch: Epoch) {
        *self.epoch.lock() = epoch;
    }

    pub(super) fn open(&self) -> usize {
        self.consumers.lock().len()
    }

    pub(super) fn slots_used(&self) -> usize {
        self.ranks.iter().map(|rank| rank.pool.used()).sum()
    }
}

/// A handoff that this worker's engine consumes. Dropping it before its end tells both sides that it
/// is void.
#[derive(Debug)]
pub(crate) struct Consuming {
    name: Name,
    imports: Arc<Imports>,
    progress: watch::Receiver<Progress>,
}

impl Consuming {
    pub(crate) fn progress(&self) -> Progress {
        self.progress.borrow().clone()
    }

    /// Waits until the handoff has failed; for ever where it does not.
    pub(crate) async fn failed(&self) -> Fault {
        let mut progress = self.progress.clone();
        let fault = progress
            .wait_for(|progress| matches!(progress, Progress::Failed(_)))
            .await
            .ok()
            .and_then(|progress| match &*progress {
                Progress::Failed(fault) => Some(fault.clone()),
                _ => None,
            });
        match fault {
            Some(fault) => fault,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Consuming {
    fn drop(&mut self) {
        let mut consumers = self.imports.consumers.lock();
        let Some(consumer) = consumers.get_mut(&self.name) else { return };
        let subscribed = !consumer.subscribed.is_empty();
        let is_over =
            matches!(*consumer.progress.borrow(), Progress::Complete(_) | Progress::Failed(_));
        if let Some(pull) = &consumer.pull {
            pull.abort();
        }
        if consumer.has_lent_nothing() {
            consumers.remove(&self.name);
        } else {
            consumer.left = Some(Instant::now());
        }
        drop(consumers);
        if subscribed && !is_over {
            self.imports.fail_in_engine(self.name, "its request was cancelled".to_owned());
        }
    }
}
