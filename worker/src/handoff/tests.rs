//! An engine's KV side and a channel that do what a test says, on both ends of the handoffs.

use std::collections::VecDeque;

use async_trait::async_trait;
use baton_arena::{Arena, ArenaLayout};
use baton_engine::{BlockInSlot, BlockToLoad};
use baton_transfer::{
    BlockSink, Exported, Exports as _, PeerAddress, Pulled, Seal, Subscription, TransferError,
};
use baton_types::{Compatibility, FaultKind, HandoffKey, Origin, PromptDigest};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::*;

pub(super) const BLOCK_BYTES: u64 = 100;
pub(super) const STALL: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(60);
const CONSUMER: [u8; 32] = [3; 32];
pub(super) const DIGEST: PromptDigest = PromptDigest([7; 32]);

/// Pulls what it was told to.
#[derive(Default)]
struct ScriptedChannel {
    script: Mutex<VecDeque<Pull>>,
    asked: Mutex<Vec<Subscription>>,
}

enum Pull {
    Blocks { count: u32, block_bytes: u64, then: Result<(), TransferError> },
    Never(Arc<Notify>),
}

#[async_trait]
impl Channel for ScriptedChannel {
    async fn pull(
        &self,
        _peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        self.asked.lock().push(subscription.clone());
        let next = self.script.lock().pop_front().unwrap();
        match next {
            Pull::Blocks { count, block_bytes, then } => {
                for index in subscription.first_block..subscription.first_block + count {
                    let byte = [u8::try_from(index).unwrap()];
                    let bytes = byte.repeat(usize::try_from(block_bytes).unwrap());
                    let (front, back) = bytes.split_at(30);
                    let len = u32::try_from(block_bytes).unwrap();
                    let block = sink.reserve(index, len).await?;
                    block.write(&[front, back]).unwrap();
                    assert_eq!(block.as_bytes(), bytes);
                    let crc32 = BlockToLoad::checksum(block.as_bytes());
                    sink.verified(index, block, crc32).await?;
                }
                then?;
                let seal = Seal {
                    prompt_blocks: subscription.first_block + count,
                    prompt_tokens: subscription.prompt_tokens,
                    prompt_digest: subscription.prompt_digest,
                    cached_tokens: 11,
                };
                Ok(Pulled {
                    seal,
                    blocks: count,
                    bytes: u64::from(count) * BLOCK_BYTES,
                    transport: "scripted",
                })
            }
            Pull::Never(given_up) => {
                struct Tell(Arc<Notify>);
                impl Drop for Tell {
                    fn drop(&mut self) {
                        self.0.notify_one();
                    }
                }
                let _tell = Tell(given_up);
                std::future::pending().await
            }
        }
    }

    fn transports(&self) -> Vec<String> {
        vec!["scripted".to_owned()]
    }
}

struct Fixture {
    handoffs: Handoffs,
    ledgers: RankLedgers,
    channel: Arc<ScriptedChannel>,
    counters: Arc<Counters>,
    epoch: Epoch,
    arena: Arena,
    /// The engine's ends.
    tell: Option<mpsc::Sender<FromEngine>>,
    hear: mpsc::Receiver<ToEngine>,
    carrying: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

pub(super) fn compatibility() -> Compatibility {
    Compatibility {
        model: "m".into(),
        revision: String::new(),
        kv_dtype: "float32".into(),
        kv_layout: "flat".into(),
        block_size_tokens: 16,
        block_bytes: BLOCK_BYTES,
        layer_groups: 1,
        tensor_parallel_rank: 0,
        tensor_parallel_size: 1,
        connector_version: "1".into(),
        kv_heads: String::new(),
    }
}

impl Fixture {
    fn new(script: impl IntoIterator<Item = Pull>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = ArenaLayout { slot_bytes: 128, export_slots: 4, import_slots: 3 };
        let arena = Arena::create(&dir.path().join("arena"), layout).unwrap();
        let (rank, tell, hear) = RankPort::pair(16);
        let ranks = vec![rank];
        let port = KvPort { compatibility: compatibility(), arena: arena.clone(), ranks };
        let ledgers = RankLedgers::new(3 * STALL);
        let channel = Arc::new(ScriptedChannel::default());
        channel.script.lock().extend(script);
        let transfer =
            Transfer { ledgers: ledgers.clone(), channel: channel.clone(), stall_timeout: STALL };
        let counters = Arc::<Counters>::default();
        let epoch = Epoch::random();
        let (handoffs, port_loop) = Handoffs::of_port(port, epoch, transfer, counters.clone());
        let carrying = tokio::spawn(port_loop.run());
        Self {
            handoffs,
            ledgers,
            channel,
            counters,
            epoch,
            arena,
            tell: Some(tell),
            hear,
            carrying,
            _dir: dir,
        }
    }

    async fn tell(&self, message: FromEngine) {
        self.tell.as_ref().unwrap().send(message).await.unwrap();
    }

    async fn hear(&mut self) -> ToEngine {
        timeout(self.hear.recv()).await.unwrap()
    }

    fn consume(&self, name: Name) -> Consuming {
        let address = PeerAddress {
            worker_name: "p0".into(),
            address: "127.0.0.1:1".into(),
            certificate_fingerprint: [1; 32],
        };
        self.handoffs
            .consume(name, Producer { address, epoch: Epoch::from_u128(5), compatibility: None })
            .unwrap()
    }

    async fn subscribe(&self, name: Name, first_block: u32) {
        self.tell(FromEngine::Subscribe {
            handoff: name.0,
            generation: name.1,
            prompt_tokens: CONSUMED_TOKENS,
            prompt_digest: DIGEST,
            first_block,
        })
        .await;
    }

    async fn until_idle(&self) {
        timeout(async {
            while self.handoffs.open() > 0 || self.handoffs.slots().used > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    async fn export(&self, name: Name, blocks: &[(u32, u32)]) {
        for (_, slot) in blocks {
            if let Ok(slot @ 0..4) = u8::try_from(*slot) {
                self.arena.write(Slot(slot.into()), 0, &[slot; 100]).unwrap();
            }
        }
        let blocks = blocks
            .iter()
            .map(|(index, slot)| BlockInSlot { index: *index, slot: Slot(*slot) })
            .collect();
        self.tell(FromEngine::Exported { handoff: name.0, generation: name.1, blocks }).await;
    }

    fn subscription(&self, name: Name, first_block: u32) -> Subscription {
        Subscription {
            handoff: HandoffKey { epoch: self.epoch, id: name.0, generation: name.1 },
            consumer_epoch: Epoch::from_u128(6),
            compatibility: compatibility().digest(),
            first_block,
            prompt_tokens: 40,
            prompt_digest: DIGEST,
        }
    }
}

pub(super) async fn timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

pub(super) fn name() -> Name {
    (HandoffId::random(), Generation(1))
}

/// Six blocks, the last of them not full.
pub(super) const CONSUMED_TOKENS: u32 = 90;

fn blocks(count: u32) -> Pull {
    Pull::Blocks { count, block_bytes: BLOCK_BYTES, then: Ok(()) }
}

fn released(message: ToEngine) -> Vec<u32> {
    let ToEngine::Release { slots } = message else { panic!("{message:?}") };
    let mut slots: Vec<_> = slots.into_iter().map(|slot| slot.0).collect();
    slots.sort_unstable();
    slots
}

#[tokio::test]
async fn pulled_blocks_are_loaded_and_only_then_complete() {
    // More blocks than slots: the engine's giving back makes room.
    let mut fixture = Fixture::new([blocks(5)]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 1).await;
    let mut loaded = Vec::new();
    while loaded.len() < 5 {
        let ToEngine::Load { blocks, .. } = fixture.hear().await else { panic!("a load is due") };
        for BlockToLoad { index, slot, crc32 } in blocks {
            assert!(fixture.arena.layout().is_import(slot));
            let view = fixture.arena.view(slot, BLOCK_BYTES).unwrap();
            assert_eq!(view.as_ref(), [u8::try_from(index).unwrap(); 100]);
            assert_eq!(crc32, BlockToLoad::checksum(view.as_ref()));
            loaded.push(index);
            assert!(matches!(consuming.progress(), Progress::Waiting));
            let (handoff, generation) = name;
            fixture.tell(FromEngine::Loaded { handoff, generation, slots: vec![slot] }).await;
        }
    }
    assert_eq!(loaded, [1, 2, 3, 4, 5]);
    assert_eq!(fixture.hear().await, ToEngine::Complete { handoff: name.0, generation: name.1 });
    let Progress::Complete(received) = consuming.progress() else { panic!("it is complete") };
    assert_eq!((received.blocks, received.bytes, received.blocks_reused), (5, 500, 1));
    assert_eq!((received.cached_tokens, received.transport), (11, "scripted"));
    assert_eq!(fixture.counters.handoff_blocks_received.get(), 5);
    assert_eq!(fixture.counters.handoff_bytes_received.get(), 500);

    let asked = fixture.channel.asked.lock()[0].clone();
    let expected = Subscription {
        handoff: HandoffKey { epoch: Epoch::from_u128(5), id: name.0, generation: name.1 },
        consumer_epoch: fixture.epoch,
        prompt_tokens: CONSUMED_TOKENS,
        ..fixture.subscription(name, 1)
    };
    assert_eq!(asked, expected);
    drop(consuming);
    fixture.until_idle().await;
}

#[tokio::test]
async fn a_pull_that_fails_fails_the_request_and_its_job() {
    let corrupt = TransferError::Corrupt { index: 1, expected: 1, found: 2 };
    let scripts = [
        (
            Pull::Blocks { count: 1, block_bytes: BLOCK_BYTES, then: Err(corrupt) },
            FaultKind::Corrupt,
        ),
        (Pull::Blocks { count: 1, block_bytes: BLOCK_BYTES - 1, then: Ok(()) }, FaultKind::Corrupt),
    ];
    for (script, kind) in scripts {
        let mut fixture = Fixture::new([script]);
        let name = name();
        let consuming = fixture.consume(name);
        fixture.subscribe(name, 0).await;
        let fault = timeout(consuming.failed()).await;
        assert_eq!((fault.origin, fault.kind), (Origin::Handoff, kind), "{fault}");
        let mut lent = Vec::new();
        let reason = loop {
            match fixture.hear().await {
                ToEngine::Load { blocks, .. } => lent.extend(blocks),
                ToEngine::Failed { reason, .. } => break reason,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(reason, fault.to_string());
        drop(consuming);
        // What the engine holds is its own until it gives it back.
        assert_eq!(fixture.handoffs.slots().used as usize, lent.len());
        let slots = lent.into_iter().map(|block| block.slot).collect();
        fixture.tell(FromEngine::Loaded { handoff: name.0, generation: name.1, slots }).await;
        fixture.until_idle().await;
    }
}

#[tokio::test]
async fn a_block_that_the_engine_finds_changed_fails_the_handoff() {
    let mut fixture = Fixture::new([blocks(2)]);
    let name = name();
    let (handoff, generation) = name;
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 4).await;
    let mut slots = Vec::new();
    while slots.len() < 2 {
        let ToEngine::Load { blocks, .. } = fixture.hear().await else { panic!("a load is due") };
        slots.extend(blocks.into_iter().map(|block| block.slot));
    }
    // As an engine does: that it is corrupt first, then that it is done with the slots.
    fixture.tell(FromEngine::Corrupt { handoff, generation, index: 5 }).await;
    fixture.tell(FromEngine::Loaded { handoff, generation, slots }).await;
    let fault = timeout(consuming.failed()).await;
    assert_eq!((fault.origin, fault.kind), (Origin::Handoff, FaultKind::Corrupt));
    assert!(matches!(fixture.hear().await, ToEngine::Failed { .. }), "and never `Complete`");
    assert_eq!(fixture.counters.handoff_errors.get()["rotten"], 1);
    drop(consuming);
    fixture.until_idle().await;
}

#[tokio::test]
async fn cancelling_gives_the_pull_up_and_tells_the_engine() {
    let given_up = Arc::new(Notify::new());
    let mut fixture = Fixture::new([Pull::Never(given_up.clone())]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 0).await;
    while fixture.channel.asked.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(consuming);
    timeout(given_up.notified()).await;
    assert!(matches!(fixture.hear().await, ToEngine::Failed { .. }));
    fixture.until_idle().await;

    // Whom no job expects, too.
    fixture.subscribe(name, 0).await;
    assert!(matches!(fixture.hear().await, ToEngine::Failed { .. }));
}

#[tokio::test(start_paused = true)]
async fn slots_that_an_engine_keeps_are_taken_back_in_time() {
    let given_up = TransferError::Cancelled;
    let script = Pull::Blocks { count: 2, block_bytes: BLOCK_BYTES, then: Err(given_up) };
    let mut fixture = Fixture::new([script]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 0).await;
    timeout(consuming.failed()).await;
    drop(consuming);
    assert_eq!(fixture.handoffs.slots().used, 2);
    tokio::time::sleep(STALL / 2).await;
    assert_eq!(fixture.handoffs.slots().used, 2);
    tokio::time::sleep(STALL).await;
    assert_eq!((fixture.handoffs.slots().used, fixture.handoffs.open()), (0, 0));
    // Late, and harmless.
    let slots = vec![Slot(4), Slot(5)];
    fixture.tell(FromEngine::Loaded { handoff: name.0, generation: name.1, slots }).await;
    fixture.consume(name);
    while !matches!(fixture.hear().await, ToEngine::Failed { .. }) {}
}

#[tokio::test]
async fn a_seal_over_less_than_the_prompt_is_not_the_prompt() {
    let mut fixture = Fixture::new([blocks(2)]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 1).await;
    let fault = timeout(consuming.failed()).await;
    assert_eq!((fault.origin, fault.kind), (Origin::Handoff, FaultKind::Corrupt));
    assert!(fault.message.contains("90 tokens make 6 blocks, the producer sealed 3"), "{fault}");
    while !matches!(fixture.hear().await, ToEngine::Failed { .. }) {}
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_loads_nothing_fails_its_handoff() {
    let mut fixture = Fixture::new([blocks(2)]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 4).await;
    let fault = consuming.failed().await;
    assert_eq!((fault.origin, fault.kind), (Origin::Engine, FaultKind::TimedOut));
    while !matches!(fixture.hear().await, ToEngine::Failed { .. }) {}
}

#[tokio::test]
async fn slots_of_an_aborted_request_come_back_from_the_engine() {
    let never = Pull::Blocks { count: 2, block_bytes: BLOCK_BYTES, then: Ok(()) };
    let mut fixture = Fixture::new([never]);
    let name = name();
    let (handoff, generation) = name;
    let consuming = fixture.consume(name);
    fixture.subscribe(name, 0).await;
    let mut slots = Vec::new();
    while slots.len() < 2 {
        let ToEngine::Load { blocks, .. } = fixture.hear().await else { panic!("a load is due") };
        slots.extend(blocks.into_iter().map(|block| block.slot));
    }
    fixture.tell(FromEngine::Aborted { handoff, generation }).await;
    timeout(consuming.failed()).await;
    assert_eq!(fixture.handoffs.slots().used, 2);
    drop(consuming);
    fixture.tell(FromEngine::Loaded { handoff, generation, slots }).await;
    fixture.until_idle().await;
}

#[tokio::test]
async fn a_prompt_that_the_engine_holds_needs_no_pull() {
    let fixture = Fixture::new([]);
    let name = name();
    let consuming = fixture.consume(name);
    fixture.tell(FromEngine::NotNeeded { handoff: name.0, generation: name.1 }).await;
    timeout(async {
        while !matches!(consuming.progress(), Progress::NotNeeded) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(consuming);
    fixture.until_idle().await;
}

#[tokio::test]
async fn exported_blocks_reach_their_consumer_and_their_slots_come_back() {
    let mut fixture = Fixture::new([]);
    let name = name();
    let mut producing = fixture.handoffs.produce(name, CONSUMER, None).unwrap();
    fixture.export(name, &[(0, 2), (1, 0)]).await;
    fixture.export(name, &[(2, 3)]).await;
    let (handoff, generation) = name;
    let sealed = FromEngine::Sealed {
        handoff,
        generation,
        prompt_tokens: 40,
        prompt_digest: DIGEST,
        cached_tokens: 16,
    };
    fixture.tell(sealed).await;

    let wanted = fixture.subscription(name, 1);
    let mut stream = timeout(fixture.ledgers.attach(&wanted, CONSUMER)).await.unwrap();
    let mut came = Vec::new();
    let seal = loop {
        match timeout(stream.next()).await {
            Exported::Block { index, bytes, .. } => {
                assert_eq!(bytes.len() as u64, BLOCK_BYTES);
                came.push((index, bytes[0]));
            }
            Exported::Sealed(seal) => break seal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(came, [(1, 0), (2, 3)], "each is the slot that it was written to");
    assert_eq!((seal.prompt_blocks, seal.cached_tokens), (3, 16));
    stream.finish(Ok(()));
    assert_eq!(timeout(producing.ended()).await, baton_transfer::Ending::Acked);
    let mut back = Vec::new();
    while back.len() < 3 {
        back.extend(released(fixture.hear().await));
    }
    back.sort_unstable();
    assert_eq!(back, [0, 2, 3]);
    fixture.until_idle().await;
}

#[tokio::test]
async fn a_producer_that_is_dropped_frees_its_blocks_and_stops_the_engine() {
    let mut fixture = Fixture::new([]);
    let name = name();
    let producing = fixture.handoffs.produce(name, CONSUMER, None).unwrap();
    assert!(fixture.handoffs.produce(name, CONSUMER, None).is_err(), "it is under way");
    fixture.export(name, &[(0, 0), (1, 1)]).await;
    while fixture.handoffs.slots().used < 2 {
        tokio::task::yield_now().await;
    }
    drop(producing);
    let (handoff, generation) = name;
    let (mut cancelled, mut back) = (false, Vec::new());
    while back.len() < 2 || !cancelled {
        match fixture.hear().await {
            ToEngine::Cancel { handoff: h, generation: g } => {
                cancelled = (h, g) == (handoff, generation);
            }
            message => back.extend(released(message)),
        }
    }
    // The engine may not have heard of it yet.
    fixture.export(name, &[(2, 2)]).await;
    assert_eq!(released(fixture.hear().await), [2]);
    fixture.until_idle().await;
}

#[tokio::test]
async fn an_engine_that_breaks_the_protocol_loses_that_handoff_alone() {
    for (first, second) in [
        // Not in the arena, not the engine's, still lent, out of order.
        (None, (0, 99)),
        (None, (0, 5)),
        (Some((0, 1)), (1, 1)),
        (Some((0, 1)), (7, 2)),
    ] {
        let fixture = Fixture::new([]);
        let (broken, fine) = (name(), name());
        let mut producing = fixture.handoffs.produce(broken, CONSUMER, None).unwrap();
        let other = fixture.handoffs.produce(fine, CONSUMER, None).unwrap();
        if let Some(block) = first {
            fixture.export(broken, &[block]).await;
        }
        fixture.export(broken, &[second]).await;
        assert_eq!(timeout(producing.ended()).await, baton_transfer::Ending::Aborted);
        assert_eq!(fixture.handoffs.open(), 1);
        drop(other);
        fixture.until_idle().await;
    }
    let fixture = Fixture::new([]);
    let name = name();
    let consuming = fixture.consume(name);
    let slots = vec![Slot(4)];
    fixture.tell(FromEngine::Loaded { handoff: name.0, generation: name.1, slots }).await;
    let fault = timeout(consuming.failed()).await;
    assert!(fault.message.contains("slot 4"), "{fault}");
}

#[tokio::test]
async fn an_engine_that_goes_away_fails_what_waits_for_it() {
    let mut fixture = Fixture::new([]);
    let consuming = fixture.consume(name());
    fixture.tell = None;
    let fault = timeout(consuming.failed()).await;
    assert_eq!((fault.origin, fault.kind), (Origin::Engine, FaultKind::Unavailable));
    timeout(fixture.carrying).await.unwrap();
}
