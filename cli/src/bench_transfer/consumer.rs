//! The consuming half, which measures.

use std::{
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use baton_arena::{Arena, Landing, PeerArena, SlotPool};
use baton_engine::BlockToLoad;
use baton_transfer::{
    BlockSink, Channel, Ledger, MappedBlock, PeerAddress, Subscription, TransferError,
};
use baton_types::{Epoch, HandoffId, HandoffKey};
use futures::future::try_join_all;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::{
    Answer, BenchOptions, COMPATIBILITY, ChannelKind, GENERATION, Order, PROMPT, PROMPT_TOKENS,
    SMALL_BYTES, SMALL_HANDOFFS, STALL, cpu_seconds, epoch_of, scattered,
};

pub(super) struct Measured {
    pub(super) copied: Handed,
    /// Over shared memory: blocks that are verified where they lie, in the producer's arena, and let go of.
    pub(super) mapped: Option<Handed>,
    /// The same blocks copied by one thread of this process.
    pub(super) memcpy_seconds: Vec<f64>,
    /// The same, and both checksums taken over each copy: what verification costs where all else is free.
    pub(super) verified_memcpy_seconds: Vec<f64>,
    pub(super) bytes: u64,
    /// What carried the blocks, as the producing half knows it.
    pub(super) transports: Vec<String>,
}

/// Blocks that were handed over, in one way.
pub(super) struct Handed {
    /// Of each round.
    pub(super) seconds: Vec<f64>,
    /// Over all rounds, beside what preparing them takes.
    pub(super) cpu: Cpu,
    /// Of handoffs of one small block, from the subscription to the end.
    pub(super) handoff_us: Vec<f64>,
    /// Of handoffs of no block: what is asked, and its answer.
    pub(super) round_trip_us: Vec<f64>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Cpu {
    pub(super) producer: f64,
    pub(super) consumer: f64,
}

pub(super) async fn run(options: &BenchOptions) -> anyhow::Result<Measured> {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let mut producer = Producer::start(options, directory.path()).await?;
    let nothing = Ledger::new(Epoch::random(), COMPATIBILITY, STALL);
    let (channel, ourselves) = options.open("consumer", directory.path(), Arc::new(nothing))?;
    producer.order(&Order::For { fingerprint: ourselves.certificate_fingerprint }).await?;
    let arena = options.arena(directory.path())?;
    channel.use_arena(&arena);
    let slots = scattered(options.slots()?);
    let memcpy_seconds = memcpy(options, &arena, directory.path(), |_| {})?;
    let verified_memcpy_seconds = memcpy(options, &arena, directory.path(), |copy| {
        std::hint::black_box(BlockToLoad::checksum(copy));
        std::hint::black_box(crc_fast::crc64_nvme(copy));
    })?;
    let sink = Sink { arena, pool: SlotPool::new(slots), takes_them_there: AtomicBool::new(false) };

    let copied = hand_over(options, &mut producer, &*channel, &sink).await?;
    let mapped = match options.channel {
        ChannelKind::Quic | ChannelKind::Ucx => None,
        ChannelKind::Shm => {
            sink.takes_them_there.store(true, Relaxed);
            Some(hand_over(options, &mut producer, &*channel, &sink).await?)
        }
    };
    let bytes = u64::from(options.blocks_of_each()?)
        * u64::from(options.block)
        * u64::from(options.streams);
    let transports = producer.transports.clone();
    Ok(Measured { copied, mapped, memcpy_seconds, verified_memcpy_seconds, bytes, transports })
}

async fn hand_over(
    options: &BenchOptions,
    producer: &mut Producer,
    channel: &dyn Channel,
    sink: &Sink,
) -> anyhow::Result<Handed> {
    let blocks = options.blocks_of_each()?;
    let (mut seconds, mut cpu) = (Vec::new(), Cpu::default());
    for round in 0..=options.rounds {
        let export = Export { handoffs: options.streams, blocks, block_bytes: options.block };
        let before = (producer.export(&export).await?, cpu_seconds()?);
        let took = producer.pull_all(channel, sink).await?;
        let of_consumer = cpu_seconds()? - before.1;
        // An order for nothing tells what the producer has used since.
        let idle = Export { handoffs: 0, blocks: 0, block_bytes: 0 };
        let of_producer = producer.export(&idle).await? - before.0;
        if round > 0 {
            seconds.push(took);
            cpu.producer += of_producer;
            cpu.consumer += of_consumer;
        }
    }
    let small = Export { handoffs: 1, blocks: 1, block_bytes: SMALL_BYTES };
    let empty = Export { handoffs: 1, blocks: 0, block_bytes: 0 };
    let (mut handoff_us, mut round_trip_us) = (Vec::new(), Vec::new());
    for _ in 0..SMALL_HANDOFFS {
        for (export, times) in [(&small, &mut handoff_us), (&empty, &mut round_trip_us)] {
            producer.export(export).await?;
            times.push(producer.pull_all(channel, sink).await? * 1e6);
        }
    }
    Ok(Handed { seconds, cpu, handoff_us, round_trip_us })
}

/// Copies a round's blocks from one arena's slots to another's, in as scattered an order, and does something
/// with each copy.
fn memcpy(
    options: &BenchOptions,
    to: &Arena,
    directory: &Path,
    then: impl Fn(&[u8]),
) -> anyhow::Result<Vec<f64>> {
    let directory = tempfile::tempdir_in(directory)?;
    let from = options.arena(directory.path())?;
    let slots = scattered(options.slots()?);
    let mut seconds = Vec::new();
    for _ in 0..=options.rounds.min(3) {
        let begun = Instant::now();
        for (source, target) in slots.iter().zip(slots.iter().rev()) {
            let view = from.view(*source, u64::from(options.block))?;
            to.write(*target, 0, view.as_ref())?;
            then(to.view(*target, u64::from(options.block))?.as_ref());
        }
        seconds.push(begun.elapsed().as_secs_f64());
    }
    // The first touches what no one has touched.
    seconds.remove(0);
    Ok(seconds)
}

struct Export {
    handoffs: u32,
    blocks: u32,
    block_bytes: u32,
}

/// The other half.
struct Producer {
    stdin: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _process: Child,
    address: PeerAddress,
    epoch: Epoch,
    waiting: Vec<HandoffId>,
    transports: Vec<String>,
}

impl Producer {
    async fn start(options: &BenchOptions, directory: &Path) -> anyhow::Result<Self> {
        let number = |n: u64| n.to_string();
        let mut process = Command::new(std::env::current_exe()?)
            .args(["bench-transfer", "--channel", options.channel.as_str()])
            .args(["--check", options.check.as_str(), "--produce"])
            .arg(directory)
            .args(["--block", &number(options.block.into())])
            .args(["--bytes", &number(options.bytes)])
            .args(["--mtu", &number(options.mtu.into())])
            .args(["--streams", &number(options.streams.into())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the producing half")?;
        let stdin = process.stdin.take().context("the producing half has no stdin")?;
        let stdout = process.stdout.take().context("the producing half has no stdout")?;
        let mut answers = BufReader::new(stdout).lines();
        let Answer::Here { address, fingerprint, epoch } = answer(&mut answers).await? else {
            bail!("the producing half did not say where it is");
        };
        let address = PeerAddress {
            worker_name: "producer".to_owned(),
            address,
            certificate_fingerprint: fingerprint,
        };
        let epoch = epoch_of(epoch);
        let (waiting, transports) = (Vec::new(), Vec::new());
        Ok(Self { stdin, answers, _process: process, address, epoch, waiting, transports })
    }

    /// Answers the CPU seconds that it has used when it is done.
    async fn order(&mut self, order: &Order) -> anyhow::Result<f64> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.stdin.write_all(&line).await?;
        match answer(&mut self.answers).await? {
            Answer::Done { cpu_seconds, transports } => {
                self.transports = transports;
                Ok(cpu_seconds)
            }
            other @ Answer::Here { .. } => bail!("the producing half answered {other:?}"),
        }
    }

    async fn export(&mut self, export: &Export) -> anyhow::Result<f64> {
        let ids: Vec<u128> = (0..export.handoffs).map(|_| fastrand::u128(1..)).collect();
        self.waiting = ids.iter().copied().map(HandoffId::from_u128).collect();
        let Export { blocks, block_bytes, .. } = *export;
        self.order(&Order::Export { ids, blocks, block_bytes }).await
    }

    /// Pulls what was exported, all at once. Answers the seconds.
    async fn pull_all(&mut self, channel: &dyn Channel, sink: &Sink) -> anyhow::Result<f64> {
        let waiting = std::mem::take(&mut self.waiting);
        let begun = Instant::now();
        try_join_all(waiting.into_iter().map(|id| {
            let handoff = HandoffKey { epoch: self.epoch, id, generation: GENERATION };
            let subscription = Subscription {
                handoff,
                consumer_epoch: Epoch::from_u128(1),
                compatibility: COMPATIBILITY,
                first_block: 0,
                prompt_tokens: PROMPT_TOKENS,
                prompt_digest: PROMPT,
            };
            channel.pull(&self.address, subscription, sink)
        }))
        .await?;
        Ok(begun.elapsed().as_secs_f64())
    }
}

async fn answer(answers: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Answer> {
    let mut line = String::new();
    // UCX writes its own complaints to stdout, too.
    while !line.starts_with('{') {
        line = answers.next_line().await?.context("the producing half ended")?;
    }
    serde_json::from_str(&line).with_context(|| format!("the producing half said {line:?}"))
}

/// Verified blocks are let go of at once.
struct Sink {
    arena: Arena,
    pool: SlotPool,
    takes_them_there: AtomicBool,
}

#[async_trait]
impl BlockSink for Sink {
    async fn reserve(&self, _index: u32, len: u32) -> Result<Landing, TransferError> {
        let no_room = |error: &dyn std::error::Error| TransferError::NoRoom(error.to_string());
        let slot = self.pool.reserve().await.map_err(|e| no_room(&e))?;
        self.arena.landing(slot, u64::from(len)).map_err(|e| no_room(&e))
    }

    async fn verified(&self, _: u32, _: Landing, _: u32) -> Result<(), TransferError> {
        Ok(())
    }

    fn takes_from(&self, _: u32, _: u32, _: &Arc<PeerArena>) -> Result<bool, TransferError> {
        Ok(self.takes_them_there.load(Relaxed))
    }

    async fn verified_there(&self, _: u32, _: MappedBlock, _: u32) -> Result<(), TransferError> {
        Ok(())
    }
}
