//! `baton bench-transfer`: how fast KV blocks pass between two processes of this machine, over the channels,
//! ledgers and arenas that workers use, every block verified.

mod consumer;
mod producer;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use baton_arena::{Arena, ArenaLayout, Slot};
use baton_transfer::{
    Channel, Check, Exports, PeerAddress, QuicChannel, QuicConfig, ShmChannel, ShmConfig,
    UcxChannel, UcxConfig,
};
use baton_types::{Epoch, Generation, PromptDigest};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::terminal::Terminal;

const STALL: Duration = Duration::from_secs(30);
const PROMPT_TOKENS: u32 = 1;
const PROMPT: PromptDigest = PromptDigest([1; 32]);
const COMPATIBILITY: [u8; 32] = [2; 32];
const GENERATION: Generation = Generation(0);
/// The block of the small handoff.
const SMALL_BYTES: u32 = 64 << 10;
const SMALL_HANDOFFS: u32 = 300;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ChannelKind {
    Quic,
    Ucx,
    Shm,
}

impl ChannelKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Ucx => "ucx",
            Self::Shm => "shm",
        }
    }
}

/// What every block is held against.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CheckKind {
    Crc,
    Blake3,
}

impl CheckKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Crc => "crc",
            Self::Blake3 => "blake3",
        }
    }
}

impl std::str::FromStr for CheckKind {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "crc" => Ok(Self::Crc),
            "blake3" => Ok(Self::Blake3),
            "none" => Err("every block is verified, here as everywhere: the channels have no way \
                that leaves it out. What it costs is verified_memcpy_gb_per_s beside memcpy_gb_per_s"),
            _ => Err("expected \"crc\" or \"blake3\""),
        }
    }
}

#[derive(Args, Clone, Debug)]
pub(crate) struct BenchOptions {
    /// What carries the blocks. UCX's own variables (UCX_TLS, …) say what it may use. Over shm they are copied, and
    /// then, in figures that begin with mapped_, verified where they lie and not copied.
    #[arg(long, value_enum)]
    channel: ChannelKind,
    /// Bytes of a block.
    #[arg(long, default_value_t = 64 << 10)]
    block: u32,
    /// Bytes of a round, in all handoffs together.
    #[arg(long, default_value_t = 512 << 20)]
    bytes: u64,
    /// Largest UDP payload.
    #[arg(long, default_value_t = 6500)]
    mtu: u16,
    /// Handoffs at a time.
    #[arg(long, default_value_t = 1)]
    streams: u32,
    /// What every block is held against: a CRC, or a keyed hash too (not over shared memory).
    #[arg(long, value_name = "crc|blake3", default_value = "crc")]
    check: CheckKind,
    /// Measured rounds, after one that warms up.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// One JSON object instead of lines to read.
    #[arg(long)]
    json: bool,
    /// This process is the producing half, whose sockets for this host lie here.
    #[arg(long, hide = true)]
    produce: Option<PathBuf>,
}

impl BenchOptions {
    fn blocks_of_each(&self) -> anyhow::Result<u32> {
        let is_shm = matches!(self.channel, ChannelKind::Shm);
        ensure!(
            !(is_shm && matches!(self.check, CheckKind::Blake3)),
            "--check blake3 is for networks: shared memory has none, and knows --check crc alone"
        );
        ensure!(self.block > 0, "--block 0: a block has at least one byte");
        ensure!(self.streams > 0, "--streams 0: at least one handoff is needed");
        ensure!(self.rounds > 0, "--rounds 0: at least one round is needed");
        let blocks = self.bytes / u64::from(self.block) / u64::from(self.streams);
        let blocks = u32::try_from(blocks).context("--bytes is too large for this --block")?;
        ensure!(
            blocks > 0,
            "--bytes {} has no block of {} bytes for each of {} handoffs",
            self.bytes,
            self.block,
            self.streams
        );
        Ok(blocks)
    }

    fn slot_bytes(&self) -> u64 {
        u64::from(self.block.max(SMALL_BYTES))
    }

    fn slots(&self) -> anyhow::Result<u32> {
        self.blocks_of_each()?
            .checked_mul(self.streams)
            .context("--bytes is too large for this --block")
    }

    /// An end of the channel, with who it is. Sockets for this host are made in the directory.
    fn open(
        &self,
        name: &str,
        directory: &Path,
        exports: Arc<dyn Exports>,
    ) -> anyhow::Result<(Arc<dyn Channel>, PeerAddress)> {
        let control = QuicConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            max_mtu_bytes: self.mtu,
            stall_timeout: STALL,
            check: match self.check {
                CheckKind::Crc => Check::Crc,
                CheckKind::Blake3 => Check::Blake3,
            },
        };
        let of = |quic: &QuicChannel| PeerAddress {
            worker_name: name.to_owned(),
            address: quic.local_address().to_string(),
            certificate_fingerprint: quic.certificate_fingerprint(),
        };
        Ok(match self.channel {
            ChannelKind::Quic => {
                let channel = QuicChannel::bind(control, exports)?;
                let address = of(&channel);
                (channel, address)
            }
            ChannelKind::Ucx => {
                let ucx = Default::default();
                let config = UcxConfig { control, ucx, require_rdma: false, or_quic: false };
                let channel = UcxChannel::bind(config, exports)?;
                let address = of(channel.control());
                (channel, address)
            }
            ChannelKind::Shm => {
                let certificate_fingerprint = std::array::from_fn(|_| fastrand::u8(..));
                let directory = directory.to_owned();
                let config = ShmConfig { directory, certificate_fingerprint, stall_timeout: STALL };
                let channel = ShmChannel::bind(config, exports)?;
                let address = channel.path().display().to_string();
                let worker_name = name.to_owned();
                (channel, PeerAddress { worker_name, address, certificate_fingerprint })
            }
        })
    }

    fn arena(&self, directory: &Path) -> anyhow::Result<Arena> {
        let slots = self.slots()?;
        let layout =
            ArenaLayout { slot_bytes: self.slot_bytes(), export_slots: slots, import_slots: 0 };
        Arena::create(&directory.join("arena"), layout).context("no arena for this --bytes")
    }
}

/// What the consuming half tells the other.
#[derive(Debug, Deserialize, Serialize)]
enum Order {
    /// Handoffs for the holder of this certificate from now on.
    For { fingerprint: [u8; 32] },
    /// Makes these handoffs, sealed, before it answers.
    Export { ids: Vec<u128>, blocks: u32, block_bytes: u32 },
}

/// What the producing half answers.
#[derive(Debug, Deserialize, Serialize)]
enum Answer {
    Here {
        address: String,
        fingerprint: [u8; 32],
        epoch: u128,
    },
    /// Seconds of CPU that the process has used so far, and what it moved blocks by.
    Done {
        cpu_seconds: f64,
        transports: Vec<String>,
    },
}

pub(crate) fn run(options: &BenchOptions) -> anyhow::Result<ExitCode> {
    options.slots()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    if let Some(directory) = &options.produce {
        runtime.block_on(producer::run(options, directory))?;
        return Ok(ExitCode::SUCCESS);
    }
    let measured = runtime.block_on(consumer::run(options))?;
    let consumer::Measured {
        copied,
        mapped,
        memcpy_seconds,
        verified_memcpy_seconds,
        bytes,
        transports,
    } = measured;
    #[allow(clippy::cast_precision_loss)] // Bytes of a round are far below 2^52.
    let gigabytes = bytes as f64 / 1e9;
    let memcpy = gigabytes / median(&memcpy_seconds);
    let of_way = |prefix: &str, handed: &consumer::Handed| -> Vec<(String, f64)> {
        let rate = gigabytes / median(&handed.seconds);
        let all = gigabytes * f64::from(options.rounds);
        let small = quantile(&handed.handoff_us, 0.5);
        let trip = quantile(&handed.round_trip_us, 0.5);
        let values = [
            ("gb_per_s", rate),
            ("ratio_to_memcpy", rate / memcpy),
            ("producer_cpu_s_per_gb", handed.cpu.producer / all),
            ("consumer_cpu_s_per_gb", handed.cpu.consumer / all),
            ("small_handoff_p50_us", small),
            ("small_handoff_p99_us", quantile(&handed.handoff_us, 0.99)),
            ("round_trip_p50_us", trip),
            ("small_handoff_round_trips", small / trip),
        ];
        values.map(|(name, value)| (format!("{prefix}{name}"), value)).into()
    };
    let mut report = json!({
        "channel": options.channel.as_str(),
        "transports": transports,
        "block_bytes": options.block,
        "round_bytes": bytes,
        "streams": options.streams,
        "mtu_bytes": options.mtu,
        "check": options.check.as_str(),
        "rounds": options.rounds,
        "memcpy_gb_per_s": memcpy,
        "verified_memcpy_gb_per_s": gigabytes / median(&verified_memcpy_seconds),
    });
    if let Some(report) = report.as_object_mut() {
        let mapped = mapped.iter().flat_map(|mapped| of_way("mapped_", mapped));
        report.extend(
            of_way("", &copied).into_iter().chain(mapped).map(|(name, v)| (name, json!(v))),
        );
    }
    if options.json {
        Terminal::stdout().say(&report.to_string());
    } else if let Some(fields) = report.as_object() {
        let mut terminal = Terminal::stdout();
        for (name, value) in fields {
            terminal.say(&format!("{name:28} {value}"));
        }
    }
    std::io::stdout().flush()?;
    Ok(ExitCode::SUCCESS)
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The smallest value that so much of all values does not exceed.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // An index of a list that fits memory.
    let at = ((sorted.len() as f64 * part).ceil() as usize).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Of this process, all its threads together, in user and kernel.
fn cpu_seconds() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name before it may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<u64, _>>()?;
    #[allow(clippy::cast_precision_loss)] // Far below 2^52.
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Neighbours in a prompt are no neighbours in memory.
fn scattered(slots: u32) -> Vec<Slot> {
    let mut slots: Vec<Slot> = (0..slots).map(Slot).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut slots);
    slots
}

fn epoch_of(number: u128) -> Epoch {
    Epoch::from_u128(number)
}
