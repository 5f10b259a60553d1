//! The JSON of `/admin/state`: what the page and `baton status` read.

use std::{collections::BTreeMap, fmt, str::FromStr};

use baton_core::Split;
use serde::{Deserialize, Serialize};

/// What this coordinator sees now. Times ending in `_unix_ms` are by its own clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    pub version: String,
    pub at_unix_ms: u64,
    pub uptime_seconds: f64,
    pub mode: Mode,
    pub slo: SloState,
    pub latency: Latency,
    pub output_tokens: u64,
    /// Requests that ended, by how: `ok`, `client_error`, `server_error`, `broken_off`, `cancelled`,
    /// `too_slow`.
    pub requests_ended: BTreeMap<String, u64>,
    /// Those of them that two workers shared.
    pub requests_split: u64,
    pub requests_open: usize,
    /// The oldest of those that are open.
    pub requests: Vec<InFlightRequest>,
    /// The last ones that ended, oldest first.
    pub ended: Vec<EndedRequest>,
    /// By name.
    pub workers: Vec<WorkerState>,
    pub handoffs: Handoffs,
    /// Oldest first.
    pub decisions: Vec<Decision>,
}

/// Which requests are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// None: each worker does both legs.
    Aggregated,
    /// All that can be.
    Disaggregated,
    /// Decided by each request.
    Adaptive,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mode: {0:?} is not \"aggregated\", \"disaggregated\" or \"adaptive\"")]
pub struct UnknownMode(String);

impl Mode {
    pub const ALL: [Self; 3] = [Self::Aggregated, Self::Disaggregated, Self::Adaptive];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aggregated => "aggregated",
            Self::Disaggregated => "disaggregated",
            Self::Adaptive => "adaptive",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| UnknownMode(text.chars().take(40).collect()))
    }
}

impl From<Split> for Mode {
    fn from(split: Split) -> Self {
        match split {
            Split::Never => Self::Aggregated,
            Split::Always => Self::Disaggregated,
            Split::PerRequest => Self::Adaptive,
        }
    }
}

impl From<Mode> for Split {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Aggregated => Self::Never,
            Mode::Disaggregated => Self::Always,
            Mode::Adaptive => Self::PerRequest,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SloState {
    pub ttft_ms: f64,
    pub itl_ms: f64,
}

/// Since the start, over all ways that requests took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub ttft: Vec<BucketCount>,
    pub itl: Vec<BucketCount>,
}

/// Observations of at most so many seconds, those of smaller buckets included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BucketCount {
    /// Absent: without bound.
    pub le_seconds: Option<f64>,
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerState {
    pub name: String,
    pub role: String,
    /// `ready`, `draining` (given nothing new, and not done yet) or `drained`.
    pub state: String,
    /// One life of its engine.
    pub epoch: String,
    pub engine: String,
    pub models: Vec<String>,
    pub attached_unix_ms: u64,
    /// Legs that it was given and has not ended.
    pub jobs: u32,
    pub load: LoadState,
    pub engine_load: EngineState,
    pub arena: ArenaState,
    pub handoffs: HandoffCounters,
    /// Blocks of its prefix cache that are known here.
    pub prefix_blocks: usize,
    /// Oldest first.
    pub roles: Vec<RoleSince>,
}

/// What this coordinator gave a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadState {
    /// Prompts that its engine has and has not computed.
    pub prefills: u32,
    pub prefill_tokens: u64,
    /// Sequences that decode there, or whose KV is on its way there.
    pub decodes: u32,
    /// Prompts that wait for it here.
    pub queued: u32,
}

/// What an engine said of itself last, of all coordinators' requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineState {
    pub running: u32,
    pub waiting: u32,
    /// 0 to 1.
    pub kv_used_ratio: f32,
    pub kv_blocks_cached: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaState {
    pub slots: u32,
    pub slots_used: u32,
    /// Of these, what is for blocks that it receives; the others are for those that it sends.
    pub import_slots: u32,
    pub import_slots_used: u32,
}

/// A worker's own counts, since it started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoffCounters {
    pub open: u32,
    pub blocks_sent: u64,
    pub bytes_sent: u64,
    pub blocks_received: u64,
    pub bytes_received: u64,
    /// Those of the blocks received that its engine loaded where they lay, in another worker's arena; others over
    /// `shm` were copied.
    pub blocks_mapped: u64,
    pub blocks_reused: u64,
    /// Those to it that failed, by why.
    pub errors: BTreeMap<String, u64>,
    /// Those from it that ended, by how.
    pub ended: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleSince {
    pub role: String,
    pub since_unix_ms: u64,
}

/// What of a request's time went into what.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    pub queue_ms: f64,
    pub prefill_ms: f64,
    /// The part of the handoff that prefill did not hide.
    pub handoff_ms: f64,
    /// From the first token.
    pub decode_ms: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InFlightRequest {
    /// `x-request-id`.
    pub id: String,
    pub model: String,
    /// `queue`, `prefill`, `handoff` or `decode`.
    pub phase: String,
    /// `disaggregated` or `aggregated`; empty before it is placed.
    pub path: String,
    /// Why it was not split; empty where it was.
    pub reason: String,
    pub prefill_worker: String,
    /// The only worker, where it is aggregated.
    pub decode_worker: String,
    pub prompt_tokens: u32,
    pub attempts: u32,
    pub phases: Phases,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndedRequest {
    pub id: String,
    pub path: String,
    pub outcome: String,
    pub prefill_worker: String,
    pub decode_worker: String,
    pub attempts: u32,
    pub ended_unix_ms: u64,
    pub phases: Phases,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Handoffs {
    /// Of all requests answered here.
    pub bytes: u64,
    /// Pairs of workers that handed over.
    pub pairs: usize,
    /// Of those the ones that moved most bytes.
    pub busiest: Vec<HandoffPair>,
}

/// Since both attached, for requests answered here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoffPair {
    pub from: String,
    pub to: String,
    /// Of prompts, and of prefixes that were copied.
    pub handoffs: u64,
    /// Those that were tried and failed.
    pub failed: u64,
    pub blocks: u64,
    pub bytes: u64,
    /// From the receiver's subscription to its last verified block, summed; while prefill computed too.
    pub micros: u64,
    pub transport: String,
}

/// Something that was decided, or had to be taken note of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub at_unix_ms: u64,
    /// `mode`, `drain`, `undrain`, `attached`, `left`, `lost`, `mismatch`, ….
    pub kind: String,
    /// A worker, mostly.
    pub subject: String,
    pub reason: String,
    /// `operator`, `balancer`, `coordinator` or `worker`.
    pub by: String,
}

/// `/debug/transfer`: what carries a worker's blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferState {
    pub worker: String,
    pub role: String,
    /// `fenced`, `engine` or `none`.
    pub handoff: String,
    /// Where other workers dial it.
    pub address: String,
    /// What may carry its blocks, the best first, and what UCX has picked underneath: `ucx:rc_mlx5/mlx5_0:1`.
    pub transports: Vec<String>,
    /// What carried the handoffs that it received, as seen here.
    pub received_over: Vec<String>,
    pub handoffs: HandoffCounters,
}
