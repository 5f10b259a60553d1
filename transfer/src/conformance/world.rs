//! A producer, a consumer, and arenas between them.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use baton_arena::{Arena, ArenaLayout, Landing, PeerArena, ReservedSlot, Slot, SlotPool, SlotView};
use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use bytes::Bytes;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::{Node, Transport};
use crate::{
    channel::{BlockSink, PeerAddress, Pulled, Subscription, TransferError},
    lease::Ending,
    ledger::Ledger,
    shm::MappedBlock,
};

pub(super) const COMPATIBILITY: [u8; 32] = [5; 32];
pub(super) const PROMPT_TOKENS: u32 = 1000;
pub(super) const PROMPT: PromptDigest = PromptDigest([6; 32]);
pub(super) const FIRST: Generation = Generation(0);
/// Long enough that no scenario that does not mean it ever meets it.
pub(super) const NEVER: Duration = Duration::from_secs(600);

/// One side's slots.
pub(super) struct Staging {
    pub(super) arena: Arena,
    pub(super) slots: SlotPool,
    _directory: TempDir,
}

impl Staging {
    pub(super) fn new(slots: u32, slot_bytes: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layout = ArenaLayout { slot_bytes, export_slots: slots, import_slots: 0 };
        let arena = Arena::create(&directory.path().join("arena"), layout).unwrap();
        // Neighbours in a prompt are no neighbours in memory.
        let scattered = (0..slots).map(|slot| (slot * 7 + 3) % slots);
        let each_once = !slots.is_multiple_of(7);
        assert!(each_once, "7 must not divide the number of slots");
        Self { arena, slots: SlotPool::new(scattered.map(Slot)), _directory: directory }
    }
}

/// A block in an export slot, which is free again when the last of its `Bytes` is dropped.
struct ExportedBlock {
    view: SlotView,
    _slot: ReservedSlot,
}

impl AsRef<[u8]> for ExportedBlock {
    fn as_ref(&self) -> &[u8] {
        self.view.as_ref()
    }
}

pub(super) struct Producer {
    pub(super) ledger: Ledger,
    pub(super) epoch: Epoch,
    pub(super) node: Node,
    pub(super) staging: Staging,
}

impl Producer {
    pub(super) async fn start(transport: &dyn Transport, staging: Staging) -> Self {
        Self::start_with(transport, staging, NEVER, NEVER).await
    }

    pub(super) async fn start_with(
        transport: &dyn Transport,
        staging: Staging,
        stall: Duration,
        lease: Duration,
    ) -> Self {
        let epoch = Epoch::random();
        let ledger = Ledger::new(epoch, COMPATIBILITY, lease);
        let node = transport.start(Arc::new(ledger.clone()), stall).await;
        node.channel.use_arena(&staging.arena);
        Self { ledger, epoch, node, staging }
    }

    pub(super) fn expect(&self, id: HandoffId, consumer: &Consumer) -> oneshot::Receiver<Ending> {
        self.ledger.expect(id, FIRST, consumer.fingerprint()).unwrap()
    }

    /// Fills an export slot with a block's own bytes and pushes it. Answers the slot.
    pub(super) async fn push(&self, id: HandoffId, index: u32, len: usize) -> Slot {
        let slot = self.staging.slots.reserve().await.unwrap();
        let number = slot.slot();
        self.staging.arena.write(number, 0, &content(id, index, len)).unwrap();
        let view = self.staging.arena.view(number, len as u64).unwrap();
        let bytes = Bytes::from_owner(ExportedBlock { view, _slot: slot });
        self.ledger.push(id, FIRST, index, bytes).unwrap();
        number
    }

    pub(super) fn seal(&self, id: HandoffId) {
        self.ledger.seal(id, FIRST, PROMPT_TOKENS, PROMPT, 17).unwrap();
    }

    pub(super) async fn export(&self, id: HandoffId, lens: &[usize]) {
        for (index, len) in (0..).zip(lens) {
            self.push(id, index, *len).await;
        }
        self.seal(id);
    }

    pub(super) fn key(&self, id: HandoffId) -> HandoffKey {
        HandoffKey { epoch: self.epoch, id, generation: FIRST }
    }

    pub(super) fn subscription(&self, id: HandoffId, first_block: u32) -> Subscription {
        Subscription {
            handoff: self.key(id),
            consumer_epoch: Epoch::from_u128(9),
            compatibility: COMPATIBILITY,
            first_block,
            prompt_tokens: PROMPT_TOKENS,
            prompt_digest: PROMPT,
        }
    }

    /// Waits until what it sends does not grow any more. Answers the bytes.
    pub(super) async fn sends_no_more(&self) -> u64 {
        let sent = || self.ledger.counters().bytes_sent;
        let mut last = 0;
        while sent() > last {
            last = sent();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        last
    }

    /// No handoff is open and no export slot is in use, or soon so.
    pub(super) async fn holds_nothing(&self) {
        eventually("the producer holds nothing", || {
            self.ledger.open_handoffs() == 0 && self.staging.slots.used() == 0
        })
        .await;
    }
}

pub(super) struct Consumer {
    pub(super) node: Node,
    pub(super) staging: Arc<Staging>,
    pub(super) takes_them_there: bool,
}

impl Consumer {
    pub(super) async fn start(transport: &dyn Transport, staging: Staging) -> Self {
        Self::start_with(transport, staging, NEVER).await
    }

    pub(super) async fn start_with(
        transport: &dyn Transport,
        staging: Staging,
        stall: Duration,
    ) -> Self {
        let nothing = Ledger::new(Epoch::random(), COMPATIBILITY, NEVER);
        let node = transport.start(Arc::new(nothing), stall).await;
        node.channel.use_arena(&staging.arena);
        let takes_them_there = transport.takes_them_there();
        Self { node, staging: Arc::new(staging), takes_them_there }
    }

    /// No import slot is in use, or soon so: a channel may keep one until its producer has let go.
    pub(super) async fn holds_nothing(&self) {
        eventually("the consumer holds nothing", || self.staging.slots.used() == 0).await;
    }

    pub(super) fn fingerprint(&self) -> [u8; 32] {
        self.node.address.certificate_fingerprint
    }

    pub(super) fn sink(&self, id: HandoffId) -> Sink {
        Sink {
            id,
            staging: Arc::clone(&self.staging),
            pace: Arc::new(Pace::default()),
            takes_them_there: self.takes_them_there,
            reading: None,
            layer_groups: 1,
        }
    }

    pub(super) async fn pull(
        &self,
        producer: &Producer,
        id: HandoffId,
        first_block: u32,
    ) -> Result<Pulled, TransferError> {
        let subscription = producer.subscription(id, first_block);
        self.pull_from(&producer.node.address, subscription).await
    }

    pub(super) async fn pull_from(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
    ) -> Result<Pulled, TransferError> {
        let sink = self.sink(subscription.handoff.id);
        self.node.channel.pull(peer, subscription, &sink).await
    }
}

/// Takes blocks into import slots, looks at each, and gives its slot back.
pub(super) struct Sink {
    id: HandoffId,
    staging: Arc<Staging>,
    pub(super) pace: Arc<Pace>,
    pub(super) layer_groups: u32,
    takes_them_there: bool,
    /// Where blocks that are taken where they lie are kept, with their checksums; else they are let go of at once.
    pub(super) reading: Option<Arc<Reading>>,
}

pub(super) type Reading = Mutex<Vec<(MappedBlock, u32)>>;

/// Slows a sink down, and tells how far it is.
pub(super) struct Pace {
    /// One for each block that may be placed.
    pub(super) permits: Semaphore,
    pub(super) limited: std::sync::atomic::AtomicBool,
    asked: AtomicU64,
    verified: AtomicU64,
    moved: Notify,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            permits: Semaphore::new(0),
            limited: false.into(),
            asked: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            moved: Notify::new(),
        }
    }
}

impl Pace {
    /// Lets so many blocks through, and then none.
    pub(super) fn limit(&self, blocks: usize) {
        self.limited.store(true, Relaxed);
        self.permits.add_permits(blocks);
    }

    pub(super) fn verified(&self) -> u64 {
        self.verified.load(Relaxed)
    }

    /// A block has come to be placed.
    async fn may_take(&self) {
        self.asked.fetch_add(1, Relaxed);
        self.moved.notify_one();
        if self.limited.load(Relaxed) {
            self.permits.acquire().await.unwrap().forget();
        }
    }

    fn took_one(&self) {
        self.verified.fetch_add(1, Relaxed);
        self.moved.notify_one();
    }

    /// Waits until so many blocks were verified.
    pub(super) async fn reached(&self, blocks: u64) {
        while self.verified() < blocks {
            self.moved.notified().await;
        }
    }

    /// Waits until so many blocks came to be placed, whether or not they may.
    pub(super) async fn asked(&self, blocks: u64) {
        while self.asked.load(Relaxed) < blocks {
            self.moved.notified().await;
        }
    }
}

#[async_trait]
impl BlockSink for Sink {
    fn max_block_bytes(&self) -> u32 {
        u32::try_from(self.staging.arena.layout().slot_bytes).unwrap()
    }

    fn layer_groups(&self) -> u32 {
        self.layer_groups
    }

    async fn reserve(&self, _index: u32, len: u32) -> Result<Landing, TransferError> {
        // Slots are asked for before blocks are taken that need none: then each waits for its turn there.
        if !self.takes_them_there {
            self.pace.may_take().await;
        }
        let slot = self.staging.slots.reserve().await.unwrap();
        Ok(self.staging.arena.landing(slot, u64::from(len)).unwrap())
    }

    async fn verified(&self, index: u32, block: Landing, crc32: u32) -> Result<(), TransferError> {
        if self.takes_them_there {
            self.pace.may_take().await;
        }
        let bytes = block.as_bytes();
        assert_eq!(crc32, crc_fast::crc32_iso_hdlc(bytes));
        assert!(bytes == content(self.id, index, bytes.len()), "block {index} is another");
        self.pace.took_one();
        Ok(())
    }

    fn takes_from(
        &self,
        _index: u32,
        _len: u32,
        _arena: &Arc<PeerArena>,
    ) -> Result<bool, TransferError> {
        Ok(self.takes_them_there)
    }

    async fn verified_there(
        &self,
        index: u32,
        block: MappedBlock,
        crc32: u32,
    ) -> Result<(), TransferError> {
        self.pace.may_take().await;
        let bytes = block.bytes().unwrap();
        assert_eq!(crc32, crc_fast::crc32_iso_hdlc(bytes));
        assert!(bytes == content(self.id, index, bytes.len()), "block {index} is another");
        if let Some(reading) = &self.reading {
            reading.lock().push((block, crc32));
        }
        self.pace.took_one();
        Ok(())
    }
}

/// The bytes of one block, which no other block of any handoff has.
pub(super) fn content(id: HandoffId, index: u32, len: usize) -> Vec<u8> {
    let seed = id.as_bytes().iter().fold(u64::from(index) + 1, |seed, byte| {
        (seed ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Waits, for a generous time, until something holds.
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(what, waiting).await;
}

/// Waits for something that takes two seconds at most, for far longer than that.
pub(super) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(30), work).await {
        Ok(done) => done,
        Err(_) => panic!("not in 30 s: {what}"),
    }
}
