use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use baton_types::Role;

/// The whole file. A host runs the coordinator, or one of the workers, by naming it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterConfig {
    pub coordinator: CoordinatorConfig,
    pub slo: SloConfig,
    pub placement: PlacementConfig,
    pub admission: AdmissionConfig,
    pub balancer: BalancerConfig,
    /// Who gives the pools more or fewer workers.
    pub kubernetes: Option<KubernetesScaling>,
    /// Absent: nobody can look in or intervene.
    pub admin: Option<AdminConfig>,
    pub telemetry: TelemetryConfig,
    /// Mutual TLS between coordinator and workers. Required unless every address is loopback or
    /// `insecure_plaintext` is set.
    pub tls: Option<TlsConfig>,
    pub insecure_plaintext: bool,
    /// Who may send requests. Where there is none, everybody may.
    pub tenants: Vec<TenantConfig>,
    pub workers: Vec<WorkerConfig>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct CoordinatorConfig {
    /// Where clients connect (HTTP).
    pub listen: SocketAddr,
    /// Where workers connect (gRPC).
    pub workers_listen: SocketAddr,
    /// Where workers find it: `host:port`; `workers_listen` where not given.
    pub advertise: String,
    /// Directory of the model's tokenizer and chat template.
    pub tokenizer: Option<PathBuf>,
    pub limits: LimitsConfig,
    /// HTTPS towards clients, in place of HTTP.
    pub https: Option<HttpsConfig>,
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpsConfig {
    pub certificate: PathBuf,
    pub private_key: PathBuf,
}

/// Somebody who sends requests, known by an API key.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantConfig {
    pub name: String,
    /// SHA-256 of the key.
    pub key_sha256: Option<[u8; 32]>,
    /// File with one key a line.
    pub key_file: Option<PathBuf>,
    /// Share beside other tenants while requests wait.
    pub weight: f64,
    /// Of its requests that give none; smaller ones come first.
    pub priority: i32,
    /// Requests in flight; further ones are answered with 429.
    pub max_requests: Option<u32>,
    /// Of prompts and answers; beyond that it gets 429 until they are made up for.
    pub max_tokens_per_minute: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LimitsConfig {
    /// A longer request body is answered with 413.
    pub max_body_bytes: u64,
    /// What one client may leave unread before its request is cancelled.
    pub max_unread_bytes: u64,
    /// A client must have sent its request's head within this time.
    pub header_timeout: Duration,
    /// A client must have sent its request's body within this time.
    pub body_timeout: Duration,
    /// A request with no first token after this time is answered with 504.
    pub first_token_timeout: Duration,
    /// After the order to stop: how long open answers may go on.
    pub drain_timeout: Duration,
    /// Open client connections; further ones wait to be accepted.
    pub max_connections: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            max_unread_bytes: 16 << 20,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            first_token_timeout: Duration::from_secs(300),
            drain_timeout: Duration::from_secs(10),
            max_connections: 16_384,
        }
    }
}

/// What the operator promises; shown beside what is observed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SloConfig {
    pub ttft_ms: f64,
    pub itl_ms: f64,
}

impl Default for SloConfig {
    fn default() -> Self {
        Self { ttft_ms: 2000.0, itl_ms: 50.0 }
    }
}

/// Where the legs of a request run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacementConfig {
    pub mode: PlacementMode,
    /// Of `baton policies`; the mode's own where none is given.
    pub policy: Option<String>,
    pub on_no_prefill: OnNoPrefill,
    pub late: LateRequests,
    /// Prefix caches are followed by what workers tell; otherwise they are guessed.
    pub precise: bool,
}

impl Default for PlacementConfig {
    fn default() -> Self {
        Self {
            mode: PlacementMode::Adaptive,
            policy: None,
            on_no_prefill: OnNoPrefill::Local,
            late: LateRequests::Last,
            precise: true,
        }
    }
}

/// Which requests are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlacementMode {
    /// Each worker may do any leg, and each request is split where that is predicted to be better. As
    /// long as nothing can be predicted, as under `Always`.
    Adaptive,
    /// All that can be, between the two pools.
    Always,
    Never,
}

/// What becomes of requests while the prefill pool is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnNoPrefill {
    Reject,
    /// Decode workers do all of it.
    Local,
}

/// What becomes of requests that are predicted to miss their TTFT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateRequests {
    /// They come after all that can still make it, and those by their deadlines.
    Last,
    /// All are served as they come.
    Fifo,
}

/// Priorities are from minus this to this; clients' own that go beyond it are taken for it.
pub const MAX_PRIORITY: i32 = 10;

/// Who waits, how long, and who is turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    pub max_waiting_requests: u32,
    pub max_wait: Duration,
    /// Zero: not at all.
    pub wait_for_worker: Duration,
    /// Requests of this priority and of larger numbers.
    pub early_rejection_priority: Option<i32>,
    pub tenant_header: Option<String>,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            max_waiting_requests: 10_000,
            max_wait: Duration::from_secs(60),
            wait_for_worker: Duration::from_secs(2),
            early_rejection_priority: None,
            tenant_header: None,
        }
    }
}

/// Pools that follow the load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalancerConfig {
    pub actuator: BalancerActuator,
    /// No flip leaves fewer workers in a pool.
    pub min_prefill: u32,
    pub min_decode: u32,
    /// How long a worker stays where a flip brought it, and how long no flip takes back another's.
    pub dwell: Duration,
    /// A worker that was told to change its role and still has requests after this time stays.
    pub drain_timeout: Duration,
}

impl Default for BalancerConfig {
    fn default() -> Self {
        Self {
            actuator: BalancerActuator::Flip,
            min_prefill: 1,
            min_decode: 1,
            dwell: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(120),
        }
    }
}

/// The two Deployments of Kubernetes whose pods are the workers. As long as there are requests never fewer
/// replicas than the balancer's `min_prefill` and `min_decode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesScaling {
    /// The coordinator's own where not given.
    pub namespace: Option<String>,
    pub prefill_deployment: String,
    pub decode_deployment: String,
    pub max_prefill: u32,
    pub max_decode: u32,
    /// Both pools go to nothing when they had no request for so long.
    pub zero_after: Option<Duration>,
}

/// What becomes of the balancer's advice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalancerActuator {
    /// Workers change their role, and replicas are asked for where somebody can give them.
    Flip,
    /// It is told in the log and in the metrics.
    Advise,
    /// There is none.
    Off,
}

impl BalancerActuator {
    pub const ALL: [Self; 3] = [Self::Flip, Self::Advise, Self::Off];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flip => "flip",
            Self::Advise => "advise",
            Self::Off => "off",
        }
    }
}

/// Where operators look in and intervene.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    pub listen: SocketAddr,
    /// Its first line is the token that operators show; `BATON_ADMIN_TOKEN` goes before it.
    pub token_file: Option<PathBuf>,
    /// HTTPS in place of HTTP.
    pub https: Option<HttpsConfig>,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9400)), token_file: None, https: None }
    }
}

/// Where traces of requests go.
#[derive(Clone, Debug, PartialEq)]
pub struct TelemetryConfig {
    /// A collector's `http://host:port` for OTLP over gRPC; nothing is sent where not given.
    pub otlp_endpoint: Option<String>,
    /// Share of the requests that are traced, of those whose clients did not decide it.
    pub sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { otlp_endpoint: None, sample_ratio: 1.0 }
    }
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub private_key: PathBuf,
}

#[derive(Clone, Debug, PartialEq)]
pub struct WorkerConfig {
    /// Ends in `*` where it stands for any number of workers; see [`ClusterConfig::worker`].
    pub name: String,
    pub role: Role,
    /// `host:port` of each coordinator's `workers_listen`.
    pub coordinators: Vec<String>,
    /// Each of those stands for one coordinator at every address of its name.
    pub every_address: bool,
    /// Where probes are answered.
    pub health_listen: Option<SocketAddr>,
    /// After the order to stop: how long jobs may go on.
    pub drain_timeout: Duration,
    pub tls: Option<TlsConfig>,
    pub engine: EngineConfig,
    pub arena: ArenaConfig,
    pub transfer: TransferConfig,
}

#[derive(Clone, Debug, PartialEq)]
pub enum EngineConfig {
    Sim(SimConfig),
    Vllm(VllmConfig),
}

/// The embedded engine.
#[derive(Clone, Debug, PartialEq)]
pub struct SimConfig {
    /// Name that requests give for the model.
    pub model: String,
    /// Of its weights; workers of different ones never hand over to each other.
    pub revision: Option<String>,
    pub max_model_tokens: u32,
    pub block_size_tokens: u32,
    /// Bytes of KV a token; a real 8B model has 131,072.
    pub kv_bytes_per_token: u32,
    /// Ranks over which the KV heads are split.
    pub tensor_parallel: u32,
    /// In which the blocks of a step leave while it is computed.
    pub layer_groups: u32,
    pub kv_blocks: u32,
    pub max_seqs: u32,
    /// Prefill and decode tokens of one step.
    pub max_step_tokens: u32,
    /// Step times (JSON); the built-in profile where not given.
    pub profile: Option<PathBuf>,
    /// Multiplies every time of the profile; 0 runs as fast as the machine can.
    pub time_scale: f64,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            model: "baton-sim".to_owned(),
            revision: None,
            max_model_tokens: 32_768,
            block_size_tokens: 16,
            kv_bytes_per_token: 1024,
            tensor_parallel: 1,
            layer_groups: 1,
            kv_blocks: 8192,
            max_seqs: 256,
            max_step_tokens: 2048,
            profile: None,
            time_scale: 1.0,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct VllmConfig {
    pub source: VllmSource,
    /// Unix socket at which our connector inside vLLM finds this worker. Without one the engine takes
    /// part in no fenced handoff.
    pub connector_socket: Option<PathBuf>,
    /// The engines hand over by themselves (NixlConnector and its kin): Baton only relays their
    /// `kv_transfer_params`. Excludes `connector_socket`.
    pub engine_handoff: bool,
    /// In which the blocks of a step leave while it is computed.
    pub layer_groups: u32,
    /// How long the engine may take until it serves.
    pub start_timeout: Duration,
    /// Step times (JSON) to begin with.
    pub profile: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum VllmSource {
    /// Already running, or run by somebody else, at `http://127.0.0.1:PORT`.
    Url(String),
    /// Started and stopped by the worker.
    Command {
        /// Program and arguments. The worker adds `--port` and `--host 127.0.0.1`; with a
        /// `connector_socket` `--kv-transfer-config` and `--scheduler-cls`; and, like the last one
        /// where the command does not say otherwise, `--scheduling-policy` and `--kv-events-config`.
        command: Vec<String>,
        environment: BTreeMap<String, String>,
        /// Loopback port that vLLM shall serve on.
        port: u16,
    },
}

/// Staging memory for KV on its way, in `/dev/shm`.
#[derive(Clone, Debug, PartialEq)]
pub struct ArenaConfig {
    pub directory: PathBuf,
    pub export_bytes: u64,
    pub import_bytes: u64,
}

impl Default for ArenaConfig {
    fn default() -> Self {
        Self { directory: "/dev/shm".into(), export_bytes: 256 << 20, import_bytes: 256 << 20 }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct TransferConfig {
    /// Where other workers connect (QUIC, UDP).
    pub listen: SocketAddr,
    /// `host:port` that other workers are told; `listen` where not given.
    pub advertise: Option<String>,
    /// What carries the blocks.
    pub transport: TransportChoice,
    /// A worker that cannot meet each of them does not start.
    pub require: Vec<Requirement>,
    /// What blocks from other workers are held against.
    pub check: CheckChoice,
    /// UCX's `libucp`; where not given, `BATON_UCX_LIBRARY` or the loader's path says where it is.
    pub ucx_library: Option<PathBuf>,
    /// A handoff that moves nothing for this long is given up.
    pub stall_timeout: Duration,
    /// Largest UDP payload to try for; the path's own limit is discovered.
    pub max_mtu_bytes: u16,
}

/// What carries KV blocks between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportChoice {
    /// With each peer the best that both have: shared memory on one host, else UCX where it finds an RDMA
    /// device, else QUIC; as far as nothing forbids it.
    Auto,
    Quic,
    Ucx,
    /// Memory shared on one host.
    Shm,
}

impl TransportChoice {
    pub const ALL: [Self; 4] = [Self::Auto, Self::Quic, Self::Ucx, Self::Shm];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Quic => "quic",
            Self::Ucx => "ucx",
            Self::Shm => "shm",
        }
    }
}

/// What shows that a block is the one that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckChoice {
    /// A CRC: no accident changed it.
    Crc,
    /// A keyed hash, too: nobody on the network did.
    Blake3,
}

/// What must hold of the way that blocks go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Network cards write the blocks into memory by themselves.
    Rdma,
    /// Nobody on the way can read or change them.
    Encrypted,
}

impl Requirement {
    pub const ALL: [Self; 2] = [Self::Rdma, Self::Encrypted];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Encrypted => "encrypted",
        }
    }
}

impl Default for TransferConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            transport: TransportChoice::Auto,
            require: Vec::new(),
            check: CheckChoice::Crc,
            ucx_library: None,
            stall_timeout: Duration::from_secs(10),
            max_mtu_bytes: 6500,
        }
    }
}
