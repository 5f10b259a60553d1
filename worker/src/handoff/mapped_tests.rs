//! Blocks that the engine loads where they lie, over the real channel, with an engine that does what a test says.

use baton_arena::{Arena, ArenaLayout, PeerArena};
use baton_engine::{BlockToLoad, MappedBlockToLoad};
use baton_transfer::{Ending, Ledger, PeerAddress, ShmChannel, ShmConfig};
use baton_types::{FaultKind, Origin};
use tokio::sync::oneshot;

use super::{
    tests::{BLOCK_BYTES, CONSUMED_TOKENS, DIGEST, STALL, compatibility, name, timeout},
    *,
};

const BLOCKS: u32 = 6;

struct World {
    handoffs: Handoffs,
    counters: Arc<Counters>,
    tell: mpsc::Sender<FromEngine>,
    hear: mpsc::Receiver<ToEngine>,
    /// As the engine has mapped it.
    mapped: Option<(u32, PeerArena)>,
    ledger: Ledger,
    epoch: Epoch,
    /// The producer's.
    arena: Arena,
    channel: Option<Arc<ShmChannel>>,
    address: PeerAddress,
    consumer: [u8; 32],
    _dir: tempfile::TempDir,
}

fn open(dir: &tempfile::TempDir, who: u8, exports: Ledger) -> (Arc<ShmChannel>, [u8; 32]) {
    let certificate_fingerprint = [who; 32];
    let directory = dir.path().to_owned();
    let config = ShmConfig { directory, certificate_fingerprint, stall_timeout: STALL };
    (ShmChannel::bind(config, Arc::new(exports)).unwrap(), certificate_fingerprint)
}

impl World {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = |name, export_slots, import_slots| {
            let layout = ArenaLayout { slot_bytes: 128, export_slots, import_slots };
            Arena::create(&dir.path().join(name), layout).unwrap()
        };
        let epoch = Epoch::random();
        let ledger = Ledger::new(epoch, compatibility().digest(), 3 * STALL);
        let (channel, certificate_fingerprint) = open(&dir, 1, ledger.clone());
        // So many that it is never short of slots.
        let arena = made("producer", 4 * BLOCKS, 1);
        channel.use_arena(&arena);
        let address = channel.path().display().to_string();
        let address = PeerAddress { worker_name: "p0".into(), address, certificate_fingerprint };

        let nothing = Ledger::new(Epoch::random(), compatibility().digest(), STALL);
        let (ours, consumer) = open(&dir, 2, nothing);
        let (rank, tell, hear) = RankPort::pair(64);
        let port = KvPort {
            compatibility: compatibility(),
            arena: made("consumer", 1, BLOCKS),
            ranks: vec![rank],
        };
        let ledgers = RankLedgers::new(3 * STALL);
        let transfer = Transfer { ledgers, channel: ours, stall_timeout: STALL };
        let counters = Arc::<Counters>::default();
        let (handoffs, port_loop) =
            Handoffs::of_port(port, Epoch::random(), transfer, counters.clone());
        tokio::spawn(port_loop.run());
        let (mapped, channel) = (None, Some(channel));
        Self {
            handoffs,
            counters,
            tell,
            hear,
            mapped,
            ledger,
            epoch,
            arena,
            channel,
            address,
            consumer,
            _dir: dir,
        }
    }

    /// All of a handoff's blocks, sealed.
    fn produce(&self, name: Name) -> oneshot::Receiver<Ending> {
        let ending = self.ledger.expect(name.0, name.1, self.consumer).unwrap();
        for index in 0..BLOCKS {
            let slot = Slot(index);
            let byte = u8::try_from(index).unwrap();
            self.arena.write(slot, 0, &[byte; 100]).unwrap();
            let bytes = self.arena.view(slot, BLOCK_BYTES).unwrap().into_bytes();
            self.ledger.push(name.0, name.1, index, bytes).unwrap();
        }
        self.ledger.seal(name.0, name.1, CONSUMED_TOKENS, DIGEST, 0).unwrap();
        ending
    }

    async fn consume(&self, name: Name) -> Consuming {
        let producer =
            Producer { address: self.address.clone(), epoch: self.epoch, compatibility: None };
        let consuming = self.handoffs.consume(name, producer).unwrap();
        let (handoff, generation) = name;
        self.tell(FromEngine::Subscribe {
            handoff,
            generation,
            prompt_tokens: CONSUMED_TOKENS,
            prompt_digest: DIGEST,
            first_block: 0,
        })
        .await;
        consuming
    }

    async fn tell(&self, message: FromEngine) {
        self.tell.send(message).await.unwrap();
    }

    async fn hear(&mut self) -> ToEngine {
        timeout(self.hear.recv()).await.unwrap()
    }

    /// The next of the messages that are not about copies, for which it does what an engine does: it maps, or
    /// refuses to, and loads.
    async fn hear_of_mapped(&mut self, maps: bool) -> ToEngine {
        loop {
            match self.hear().await {
                ToEngine::Map { arena, file } => {
                    let refused = (!maps).then(|| "it cannot".to_owned());
                    if maps {
                        self.mapped = Some((arena, PeerArena::open(&file).unwrap()));
                    }
                    self.tell(FromEngine::Mapped { arena, refused }).await;
                }
                ToEngine::Load { handoff, generation, blocks } => {
                    let slots = blocks.into_iter().map(|block| block.slot).collect();
                    self.tell(FromEngine::Loaded { handoff, generation, slots }).await;
                }
                other => return other,
            }
        }
    }

    /// One handoff that is copied, while which the engine maps the producer's arena or refuses to.
    async fn first(&mut self, maps: bool) {
        let name = name();
        let ending = self.produce(name);
        let consuming = self.consume(name).await;
        let complete = ToEngine::Complete { handoff: name.0, generation: name.1 };
        assert_eq!(self.hear_of_mapped(maps).await, complete);
        let Progress::Complete(received) = consuming.progress() else { panic!("it is complete") };
        assert_eq!((received.blocks, received.blocks_mapped), (BLOCKS, 0));
        assert_eq!(timeout(ending).await.unwrap(), Ending::Acked);
    }

    /// Every block of the next handoff, where it is to be loaded from.
    async fn lent(&mut self) -> Vec<MappedBlockToLoad> {
        let mut lent = Vec::new();
        while lent.len() < BLOCKS as usize {
            let message = self.hear_of_mapped(true).await;
            let ToEngine::LoadMapped { arena, blocks, .. } = message else { panic!("{message:?}") };
            assert_eq!(Some(arena), self.mapped.as_ref().map(|(number, _)| *number));
            lent.extend(blocks);
        }
        lent
    }

    /// The engine has mapped the producer's arena, and of a next handoff each block is lent to it.
    async fn lending() -> (Self, Lending) {
        let mut world = Self::start();
        world.first(true).await;
        let name = name();
        let ending = world.produce(name);
        let consuming = world.consume(name).await;
        let blocks = world.lent().await;
        let (handoff, generation) = name;
        (world, Lending { handoff, generation, ending, consuming, blocks })
    }

    /// What an engine finds there.
    fn checksum_of(&self, block: &MappedBlockToLoad) -> u32 {
        let (_, peer) = self.mapped.as_ref().unwrap();
        BlockToLoad::checksum(peer.bytes(block.offset, 100).unwrap())
    }

    /// The producer's blocks are free, on its side of the channel.
    async fn producer_holds_nothing(&self) {
        timeout(async {
            // This, and the channel's.
            while self.arena.holders() > 2 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert_eq!(self.ledger.open_handoffs(), 0);
    }

    async fn consumer_is_idle(&self) {
        timeout(async {
            while self.handoffs.open() > 0 || self.handoffs.slots().used > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

/// A handoff whose blocks the engine reads where they lie, and has not loaded yet.
struct Lending {
    handoff: HandoffId,
    generation: Generation,
    ending: oneshot::Receiver<Ending>,
    consuming: Consuming,
    blocks: Vec<MappedBlockToLoad>,
}

#[tokio::test]
async fn blocks_are_loaded_where_they_lie_once_the_engine_has_mapped_them() {
    let (mut world, lending) = World::lending().await;
    let Lending { handoff, generation, mut ending, consuming, blocks } = lending;
    assert_eq!(blocks.iter().map(|block| block.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert!(blocks.iter().all(|block| world.checksum_of(block) == block.crc32));
    assert_eq!(world.handoffs.slots().used, 0, "no slot of ours is needed");
    for indices in [vec![1, 0], vec![2, 3, 4]] {
        world.tell(FromEngine::LoadedMapped { handoff, generation, indices }).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(matches!(consuming.progress(), Progress::Waiting) && ending.try_recv().is_err());
    world.tell(FromEngine::LoadedMapped { handoff, generation, indices: vec![5] }).await;
    assert_eq!(world.hear_of_mapped(true).await, ToEngine::Complete { handoff, generation });
    let Progress::Complete(received) = consuming.progress() else { panic!("it is complete") };
    assert_eq!((received.blocks, received.blocks_mapped, received.bytes), (6, 6, 600));
    assert_eq!(world.counters.handoff_blocks_mapped.get(), 6);
    assert_eq!(timeout(ending).await.unwrap(), Ending::Acked);
    world.producer_holds_nothing().await;
    drop(consuming);
    world.consumer_is_idle().await;
}

#[tokio::test]
async fn an_engine_that_cannot_map_gets_copies() {
    let mut world = World::start();
    for _ in 0..3 {
        world.first(false).await;
    }
    assert_eq!(world.counters.handoff_blocks_mapped.get(), 0);
    world.consumer_is_idle().await;
}

#[tokio::test]
async fn a_block_that_was_overwritten_fails_its_handoff() {
    let (mut world, lending) = World::lending().await;
    let Lending { handoff, generation, ending, consuming, blocks } = lending;
    world.arena.write(Slot(3), 0, &[9; 100]).unwrap();
    let wrong: Vec<_> = blocks.iter().filter(|b| world.checksum_of(b) != b.crc32).collect();
    assert_eq!(wrong, [&blocks[3]]);
    world.tell(FromEngine::Corrupt { handoff, generation, index: 3 }).await;
    let fault = timeout(consuming.failed()).await;
    assert_eq!((fault.origin, fault.kind), (Origin::Handoff, FaultKind::Corrupt));
    assert!(matches!(world.hear_of_mapped(true).await, ToEngine::Failed { .. }));
    assert_eq!(world.counters.handoff_errors.get()["rotten"], 1);
    // The producer has its slots back though the engine has not said that it is done.
    assert!(matches!(timeout(ending).await.unwrap(), Ending::Broken(_)));
    world.producer_holds_nothing().await;
    drop(consuming);
    assert_eq!(world.handoffs.open(), 1);
    let indices = (0..BLOCKS).collect();
    world.tell(FromEngine::LoadedMapped { handoff, generation, indices }).await;
    world.consumer_is_idle().await;
}

#[tokio::test]
async fn who_cancels_while_blocks_are_loaded_leaves_nothing() {
    let (mut world, lending) = World::lending().await;
    let Lending { handoff, generation, ending, consuming, .. } = lending;
    drop(consuming);
    assert!(matches!(world.hear_of_mapped(true).await, ToEngine::Failed { .. }));
    assert!(matches!(timeout(ending).await.unwrap(), Ending::Broken(_)));
    world.producer_holds_nothing().await;
    // Late, and about a block that may be another's by now.
    world.tell(FromEngine::Corrupt { handoff, generation, index: 0 }).await;
    let indices = (0..BLOCKS).collect();
    world.tell(FromEngine::LoadedMapped { handoff, generation, indices }).await;
    world.consumer_is_idle().await;
    assert!(world.counters.handoff_errors.get().is_empty());
}

/// The producer is gone between the verification and the load, and its arena with it.
#[tokio::test]
async fn a_producer_that_dies_meanwhile_fails_the_handoff_and_is_unmapped() {
    let (mut world, lending) = World::lending().await;
    let Lending { handoff, generation, consuming, blocks, .. } = lending;
    let number = world.mapped.as_ref().map(|(number, _)| *number).unwrap();
    world.channel = None;
    let fault = timeout(consuming.failed()).await;
    assert_eq!((fault.origin, fault.kind), (Origin::Handoff, FaultKind::Unavailable));
    assert!(matches!(world.hear_of_mapped(true).await, ToEngine::Failed { .. }));
    // What is mapped is there as long as the engine may read it.
    assert!(blocks.iter().all(|block| world.checksum_of(block) == block.crc32));
    let indices = (0..BLOCKS).collect();
    world.tell(FromEngine::LoadedMapped { handoff, generation, indices }).await;
    drop(consuming);
    world.consumer_is_idle().await;
    // Whoever asks for it again finds that nobody is there.
    let consuming = world.consume(name()).await;
    timeout(consuming.failed()).await;
    loop {
        match world.hear().await {
            ToEngine::Unmap { arena } => break assert_eq!(arena, number),
            ToEngine::Failed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn an_engine_that_loaded_what_it_was_not_lent_broke_the_protocol() {
    let (world, Lending { handoff, generation, consuming, .. }) = World::lending().await;
    world.tell(FromEngine::LoadedMapped { handoff, generation, indices: vec![BLOCKS] }).await;
    let fault = timeout(consuming.failed()).await;
    assert!(fault.message.contains("block 6"), "{fault}");
    world.producer_holds_nothing().await;
}
