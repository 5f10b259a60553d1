use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use baton_arena::{Arena, ArenaFile, ReservedSlot, Slot, SlotPool};
use baton_types::{Compatibility, Generation, HandoffId, PromptDigest};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use crate::kv_port::{
    BlockInSlot, BlockToLoad, FromEngine, KvPort, MappedBlockToLoad, RankPort, ToEngine,
};

type Key = (HandoffId, Generation);

/// How blocks get to the consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Into slots of its own arena.
    Copied,
    /// They stay in the producer's arena, which the consumer has mapped.
    Mapped,
}

/// The producer's arena, as the consumer is told of it.
const PRODUCERS: u32 = 7;

/// How a handoff is carried. Blocks are the engine's: of one that has several layer groups, what happens to it happens
/// to one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interference {
    #[default]
    None,
    /// One bit of a block is another at the consumer.
    Flip { block: u32, byte: u64 },
    /// One bit of a block changes in the arena that it is loaded from, after it was verified there.
    Rot { block: u32, byte: u64 },
    /// A block that lies in the producer's arena becomes another after it was verified there.
    Overwrite { block: u32 },
    /// A block is said to have come, and did not.
    Skip { block: u32 },
    /// In a block's place comes what the last handoff had there.
    Stale { block: u32 },
    /// Nothing is carried from this block on.
    HoldFrom { block: u32 },
    /// Everything is carried, but nobody says that it is complete.
    HoldSeal,
    /// The consumer is told that its KV will not come.
    Fail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Completed,
    NotNeeded,
    Aborted,
    Failed,
    /// The consumer's engine found a block that was not what was verified.
    Corrupt,
}

/// What became of a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    pub ending: Ending,
    pub first_block: u32,
    /// Blocks that were carried.
    pub blocks: u32,
    /// Of the seal; 0 where there was none.
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
}

/// Slots that an engine has not given back, or that were not given back to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outstanding {
    pub export_slots: usize,
    pub import_slots: usize,
}

/// Plays the workers of a producer and a consumer, and the network between them.
#[derive(Debug)]
pub struct Loopback {
    shared: Arc<Shared>,
    block_size_tokens: u32,
    layer_groups: u32,
    carrier: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    interferences: HashMap<HandoffId, Interference>,
    passed: HashMap<HandoffId, Passed>,
    subscribed: Vec<HandoffId>,
    held: Vec<HandoffId>,
    outstanding: Outstanding,
}

impl Loopback {
    /// With each port comes the channel that it came by: it is kept open.
    pub(super) fn start(
        producer: (KvPort, mpsc::Receiver<KvPort>),
        consumer: (KvPort, mpsc::Receiver<KvPort>),
        way: Way,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let layout = consumer.0.arena.layout();
        let Compatibility { block_size_tokens, layer_groups, .. } = producer.0.compatibility;
        let carrier = Carrier {
            imports: SlotPool::new((layout.export_slots..layout.total_slots()).map(Slot)),
            producer: Side::of(producer.0),
            consumer: Side::of(consumer.0),
            _attaching: [producer.1, consumer.1],
            way,
            is_mapped: false,
            loading: HashMap::new(),
            loading_mapped: HashMap::new(),
            passings: HashMap::new(),
            last_blocks: HashMap::new(),
            shared: shared.clone(),
        };
        Self { shared, block_size_tokens, layer_groups, carrier: tokio::spawn(carrier.run()) }
    }

    pub fn block_size_tokens(&self) -> u32 {
        self.block_size_tokens
    }

    /// Decides how a handoff will be carried that has not begun.
    pub fn interfere(&self, handoff: HandoffId, interference: Interference) {
        self.shared.state.lock().interferences.insert(handoff, interference);
    }

    /// Waits for a handoff's end.
    pub async fn passed(&self, handoff: HandoffId) -> Passed {
        let passed = self.wait_for(|state| state.passed.get(&handoff).copied()).await;
        let Passed { first_block, blocks, .. } = passed;
        let groups = self.layer_groups;
        Passed { first_block: first_block / groups, blocks: blocks.div_ceil(groups), ..passed }
    }

    /// The same, for whoever does not ask what became of it.
    pub async fn is_over(&self, handoff: HandoffId) {
        self.passed(handoff).await;
    }

    /// Waits until a handoff's consumer has asked for it.
    pub async fn is_subscribed(&self, handoff: HandoffId) {
        self.wait_for(|state| state.subscribed.contains(&handoff).then_some(())).await;
    }

    /// Waits until a handoff is carried as far as it shall be.
    pub async fn is_held(&self, handoff: HandoffId) {
        self.wait_for(|state| state.held.contains(&handoff).then_some(())).await;
    }

    pub fn outstanding(&self) -> Outstanding {
        self.shared.state.lock().outstanding
    }

    async fn wait_for<T>(&self, look: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = look(&self.shared.state.lock()) {
                return found;
            }
            changed.await;
        }
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.carrier.abort();
    }
}

/// An engine of one rank.
struct Side {
    compatibility: Compatibility,
    arena: Arena,
    port: RankPort,
}

impl Side {
    fn of(port: KvPort) -> Self {
        let KvPort { compatibility, arena, mut ranks } = port;
        let port = ranks.pop().expect("an engine has a rank");
        assert!(ranks.is_empty(), "blocks of several ranks are not carried here");
        Self { compatibility, arena, port }
    }
}

struct Carrier {
    producer: Side,
    consumer: Side,
    _attaching: [mpsc::Receiver<KvPort>; 2],
    way: Way,
    /// The consumer has said that it has mapped the producer's arena.
    is_mapped: bool,
    imports: SlotPool,
    /// Slots that the consumer copies from.
    loading: HashMap<Slot, ReservedSlot>,
    /// Export slots of blocks that it copies from where they lie.
    loading_mapped: HashMap<(Key, u32), Slot>,
    /// Ended ones stay, so that what comes late is known to be late.
    passings: HashMap<Key, Passing>,
    /// The block of each index that was carried last.
    last_blocks: HashMap<u32, Vec<u8>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Passing {
    exported: VecDeque<BlockInSlot>,
    subscription: Option<(u32, u32, PromptDigest)>,
    seal: Option<(u32, PromptDigest, u32)>,
    carried: u32,
    loads_on_their_way: usize,
    is_ended: bool,
}

impl Carrier {
    async fn run(mut self) {
        if self.way == Way::Mapped {
            let file = self.producer.arena.file().expect("an arena with a file");
            // Refuses another file, and says so.
            let wrong = ArenaFile { inode: file.inode + 1, ..file.clone() };
            self.tell_consumer(ToEngine::Map { arena: PRODUCERS - 1, file: wrong }).await;
            self.tell_consumer(ToEngine::Map { arena: PRODUCERS, file }).await;
        }
        loop {
            let (from_producer, message) = tokio::select! {
                Some(message) = self.producer.port.from_engine.recv() => (true, message),
                Some(message) = self.consumer.port.from_engine.recv() => (false, message),
                else => return,
            };
            match message {
                FromEngine::Exported { handoff, generation, blocks } => {
                    assert!(from_producer, "a consumer does not export");
                    self.shared.state.lock().outstanding.export_slots += blocks.len();
                    let passing = self.passings.entry((handoff, generation)).or_default();
                    passing.exported.extend(blocks);
                }
                FromEngine::Sealed {
                    handoff,
                    generation,
                    prompt_tokens,
                    prompt_digest,
                    cached_tokens,
                } => {
                    let passing = self.passings.entry((handoff, generation)).or_default();
                    passing.seal = Some((prompt_tokens, prompt_digest, cached_tokens));
                }
                FromEngine::Subscribe {
                    handoff,
                    generation,
                    prompt_tokens,
                    prompt_digest,
                    first_block,
                } => {
                    self.shared.state.lock().subscribed.push(handoff);
                    let passing = self.passings.entry((handoff, generation)).or_default();
                    passing.subscription = Some((first_block, prompt_tokens, prompt_digest));
                    if self.interference(handoff) == Interference::Fail {
                        let reason = "as was intended".to_owned();
                        self.tell_consumer(ToEngine::Failed { handoff, generation, reason }).await;
                        self.end((handoff, generation), Ending::Failed).await;
                    }
                }
                FromEngine::NotNeeded { handoff, generation } => {
                    self.end((handoff, generation), Ending::NotNeeded).await;
                }
                FromEngine::Loaded { handoff, generation, slots } => {
                    for slot in &slots {
                        assert!(self.loading.remove(slot).is_some(), "it was being loaded");
                    }
                    self.shared.state.lock().outstanding.import_slots -= slots.len();
                    let passing = self.passings.entry((handoff, generation)).or_default();
                    passing.loads_on_their_way -= slots.len();
                }
                FromEngine::LoadedMapped { handoff, generation, indices } => {
                    let key = (handoff, generation);
                    let slots = indices.iter().map(|index| {
                        let slot = self.loading_mapped.remove(&(key, *index));
                        slot.expect("it was being loaded")
                    });
                    let slots: Vec<_> = slots.collect();
                    let passing = self.passings.entry(key).or_default();
                    passing.loads_on_their_way -= slots.len();
                    self.release(slots).await;
                }
                FromEngine::Mapped { arena, refused } => {
                    assert_eq!(refused.is_none(), arena == PRODUCERS, "{refused:?}");
                    self.is_mapped |= refused.is_none();
                }
                FromEngine::Corrupt { handoff, generation, index } => {
                    let reason = format!("block {index} was corrupt");
                    self.tell_consumer(ToEngine::Failed { handoff, generation, reason }).await;
                    self.end((handoff, generation), Ending::Corrupt).await;
                }
                FromEngine::Aborted { handoff, generation } => {
                    if from_producer {
                        let reason = "the producer gave up".to_owned();
                        self.tell_consumer(ToEngine::Failed { handoff, generation, reason }).await;
                    }
                    self.end((handoff, generation), Ending::Aborted).await;
                }
            }
            // Any message may have made room, or brought what somebody waits for.
            let keys: Vec<_> = self.passings.keys().copied().collect();
            for key in keys {
                self.carry(key).await;
            }
            self.shared.changed.notify_waiters();
        }
    }

    fn interference(&self, handoff: HandoffId) -> Interference {
        self.shared.state.lock().interferences.get(&handoff).copied().unwrap_or_default()
    }

    async fn carry(&mut self, key: Key) {
        if self.way == Way::Mapped && !self.is_mapped {
            return;
        }
        let interference = self.interference(key.0);
        while let Some((block, first_block)) = self.passings.get(&key).and_then(|passing| {
            let first_block = passing.subscription.map(|(first_block, ..)| first_block);
            let first_block = if passing.is_ended { Some(u32::MAX) } else { first_block };
            Some((*passing.exported.front()?, first_block?))
        }) {
            if block.index >= first_block {
                let groups = self.producer.compatibility.layer_groups;
                if matches!(interference, Interference::HoldFrom { block: from } if block.index / groups >= from)
                {
                    self.hold(key.0);
                    return;
                }
                if self.way == Way::Mapped {
                    self.passings.entry(key).or_default().exported.pop_front();
                    self.lend_block(key, block, interference).await;
                    continue;
                }
                let Some(import) = self.imports.try_reserve() else { return };
                self.carry_block(key, block, import, interference).await;
            }
            self.passings.entry(key).or_default().exported.pop_front();
            self.release(vec![block.slot]).await;
        }
        self.complete(key, interference).await;
    }

    async fn carry_block(
        &mut self,
        key: Key,
        block: BlockInSlot,
        import: ReservedSlot,
        interference: Interference,
    ) {
        let bytes = self.producer.compatibility.block_bytes;
        let view =
            self.producer.arena.view(block.slot, bytes).expect("an export slot of the arena");
        let mut copy = view.as_ref().to_vec();
        let sent = copy.clone();
        // Of each block another layer group.
        let groups = self.producer.compatibility.layer_groups;
        let meant = |of: u32| block.index == of * groups + of % groups;
        match interference {
            Interference::Skip { block: skipped } if meant(skipped) => {
                self.passings.entry(key).or_default().carried += 1;
                return;
            }
            Interference::Flip { block: flipped, byte } if meant(flipped) => {
                copy[usize::try_from(byte).expect("a byte of a block")] ^= 1;
            }
            Interference::Stale { block: stale } if meant(stale) => {
                copy.clone_from(self.last_blocks.get(&block.index).expect("an earlier handoff"));
            }
            _ => {}
        }
        self.last_blocks.insert(block.index, sent);
        // Of what came, right or wrong: that what came is right is for a worker to find out.
        let crc32 = BlockToLoad::checksum(&copy);
        if let Interference::Rot { block: rotten, byte } = interference
            && meant(rotten)
        {
            copy[usize::try_from(byte).expect("a byte of a block")] ^= 0x10;
        }
        self.consumer.arena.write(import.slot(), 0, &copy).expect("an import slot of the arena");
        let block = BlockToLoad { index: block.index, slot: import.slot(), crc32 };
        self.loading.insert(import.slot(), import);
        self.shared.state.lock().outstanding.import_slots += 1;
        let passing = self.passings.entry(key).or_default();
        passing.carried += 1;
        passing.loads_on_their_way += 1;
        let (handoff, generation) = key;
        self.tell_consumer(ToEngine::Load { handoff, generation, blocks: vec![block] }).await;
    }

    /// Has the consumer load a block from where it lies.
    async fn lend_block(&mut self, key: Key, block: BlockInSlot, interference: Interference) {
        let (arena, bytes) = (self.producer.arena.clone(), self.producer.compatibility.block_bytes);
        let view = arena.view(block.slot, bytes).expect("an export slot of the arena");
        let sent = view.as_ref().to_vec();
        let turn = |byte: u64, bits: u8| {
            let at = usize::try_from(byte).expect("a byte of a block");
            arena.write(block.slot, byte, &[sent[at] ^ bits]).expect("a byte of a slot");
        };
        let groups = self.producer.compatibility.layer_groups;
        let meant = |of: u32| block.index == of * groups + of % groups;
        let passing = self.passings.entry(key).or_default();
        passing.carried += 1;
        match interference {
            Interference::Skip { block: skipped } if meant(skipped) => {
                return self.release(vec![block.slot]).await;
            }
            Interference::Flip { block: flipped, byte } if meant(flipped) => turn(byte, 1),
            Interference::Stale { block: stale } if meant(stale) => {
                let last = self.last_blocks.get(&block.index).expect("an earlier handoff");
                arena.write(block.slot, 0, last).expect("a slot");
            }
            _ => {}
        }
        let crc32 = BlockToLoad::checksum(view.as_ref());
        match interference {
            Interference::Rot { block: rotten, byte } if meant(rotten) => turn(byte, 0x10),
            // As a producer does that has taken the handoff back.
            Interference::Overwrite { block: index } if meant(index) => {
                let other: Vec<u8> = sent.iter().map(|byte| !byte).collect();
                arena.write(block.slot, 0, &other).expect("a slot");
            }
            _ => {}
        }
        passing.loads_on_their_way += 1;
        let layout = arena.layout();
        let offset = u64::from(block.slot.0) * layout.slot_bytes;
        self.last_blocks.insert(block.index, sent);
        self.loading_mapped.insert((key, block.index), block.slot);
        let (handoff, generation) = key;
        let blocks = vec![MappedBlockToLoad { index: block.index, offset, crc32 }];
        let arena = PRODUCERS;
        self.tell_consumer(ToEngine::LoadMapped { handoff, generation, arena, blocks }).await;
    }

    async fn complete(&mut self, key: Key, interference: Interference) {
        let Some(passing) = self.passings.get(&key) else { return };
        let (Some((_, tokens, digest)), Some((sealed_tokens, sealed_digest, _))) =
            (passing.subscription, passing.seal)
        else {
            return;
        };
        if passing.is_ended || passing.loads_on_their_way > 0 || !passing.exported.is_empty() {
            return;
        }
        assert_eq!((tokens, digest), (sealed_tokens, sealed_digest), "both know the same prompt");
        if interference == Interference::HoldSeal {
            self.hold(key.0);
            return;
        }
        let (handoff, generation) = key;
        self.tell_consumer(ToEngine::Complete { handoff, generation }).await;
        self.end(key, Ending::Completed).await;
    }

    fn hold(&self, handoff: HandoffId) {
        self.shared.state.lock().held.push(handoff);
    }

    /// The first ending counts. A producer whose work nobody wants any more is told.
    async fn end(&mut self, key: Key, ending: Ending) {
        let passing = self.passings.entry(key).or_default();
        if passing.is_ended {
            return;
        }
        passing.is_ended = true;
        let (prompt_tokens, _, cached_tokens) =
            passing.seal.unwrap_or((0, PromptDigest([0; 32]), 0));
        let first_block = passing.subscription.map_or(0, |(first_block, ..)| first_block);
        let blocks = passing.carried;
        let passed = Passed { ending, first_block, blocks, prompt_tokens, cached_tokens };
        let slots: Vec<_> = passing.exported.drain(..).map(|block| block.slot).collect();
        self.release(slots).await;
        let (handoff, generation) = key;
        if ending != Ending::Completed {
            let cancel = ToEngine::Cancel { handoff, generation };
            self.producer.port.to_engine.send(cancel).await.expect("the producer lives");
        }
        self.shared.state.lock().passed.insert(handoff, passed);
    }

    async fn release(&mut self, slots: Vec<Slot>) {
        if slots.is_empty() {
            return;
        }
        self.shared.state.lock().outstanding.export_slots -= slots.len();
        let release = ToEngine::Release { slots };
        self.producer.port.to_engine.send(release).await.expect("the producer lives");
    }

    async fn tell_consumer(&mut self, message: ToEngine) {
        self.consumer.port.to_engine.send(message).await.expect("the consumer lives");
    }
}
