//! Every key of the file: its name, its documentation, its kind and its default. Reading, writing
//! and the commented sample all follow these tables.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use baton_types::Role;
use toml::de::DeValue;

use crate::{
    cluster::{
        AdminConfig, AdmissionConfig, ArenaConfig, BalancerConfig, CheckChoice, ClusterConfig,
        CoordinatorConfig, EngineConfig, HttpsConfig, KubernetesScaling, LateRequests,
        LimitsConfig, OnNoPrefill, PlacementConfig, PlacementMode, SimConfig, SloConfig,
        TelemetryConfig, TenantConfig, TlsConfig, TransferConfig, TransportChoice, VllmConfig,
        VllmSource, WorkerConfig,
    },
    value::{
        ActuatorName, Address, AnyBytes, Codec, Count, Environment, ExistingDirectory,
        ExistingFile, FilePath, FixedAddress, Flag, HeaderName, HostPort, HostPorts, Maybe,
        MtuBytes, Name, NameOrStart, NotNegative, OneOf, Port, Positive, Priority, Program, Ratio,
        Requirements, RoleName, Seconds, SecondsOrNone, Sha256, Text, TokenBytes, Url,
    },
};

/// One key of a table that becomes a `T`.
pub(crate) struct Key<T> {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static [&'static str],
    pub(crate) absence: Absence,
    /// On failure answers what would have been right.
    pub(crate) read: fn(&mut T, &DeValue<'_>, &Path) -> Result<(), String>,
    pub(crate) write: fn(&T) -> Option<String>,
}

/// What a file means that does not name the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absence {
    /// The value that `T` starts with.
    Default,
    /// Nothing; the example shows what could stand there.
    Optional(&'static str),
    /// A mistake; the example shows what could stand there.
    Required(&'static str),
}

macro_rules! keys {
    ($(#[doc = $about:literal])+ $list:ident: $section:ty {
        $($(#[doc = $doc:literal])+ $key:ident => $field:ident: $codec:ty = $absence:expr;)+
    }) => {
        $(#[doc = $about])+
        pub(crate) const $list: &[Key<$section>] = &[$(Key {
            name: stringify!($key),
            doc: &[$($doc),+],
            absence: $absence,
            read: |section, value, base| {
                section.$field = <$codec>::read(value, base)?;
                Ok(())
            },
            write: |section| <$codec>::write(&section.$field),
        }),+];
    };
}

use Absence::{Default as ByDefault, Optional, Required};

keys! {
    /// Outside of all tables.
    ROOT: ClusterConfig {
        /// Lets coordinator and workers talk without TLS over addresses that other machines reach.
        /// Whoever is on that network can then read prompts and take a worker's place.
        insecure_plaintext => insecure_plaintext: Flag = ByDefault;
    }
}

keys! {
    /// `[coordinator]`
    COORDINATOR: CoordinatorConfig {
        /// Where clients connect (HTTP).
        listen => listen: Address = Required("\"127.0.0.1:8000\"");
        /// Where workers connect (gRPC).
        workers_listen => workers_listen: FixedAddress = Required("\"127.0.0.1:7000\"");
        /// HOST:PORT at which workers find it. Default: workers_listen.
        advertise => advertise: HostPort = Optional("\"127.0.0.1:7000\"");
        /// Directory of the model's tokenizer.json, tokenizer_config.json and chat template. With it
        /// the coordinator knows which of a prompt's blocks each worker has cached; without it, it
        /// remembers which texts it sent where.
        tokenizer => tokenizer: Maybe<ExistingDirectory> = Optional("\"model\"");
    }
}

keys! {
    /// `[coordinator.limits]`
    LIMITS: LimitsConfig {
        /// A longer request body is answered with 413.
        max_body_bytes => max_body_bytes: AnyBytes = ByDefault;
        /// What one client may leave unread before its request is cancelled.
        max_unread_bytes => max_unread_bytes: AnyBytes = ByDefault;
        /// A client must have sent its request's head within this time.
        header_timeout_seconds => header_timeout: Seconds = ByDefault;
        /// A client must have sent its request's body within this time.
        body_timeout_seconds => body_timeout: Seconds = ByDefault;
        /// A request with no first token after this time is answered with 504.
        first_token_timeout_seconds => first_token_timeout: Seconds = ByDefault;
        /// After the order to stop (SIGTERM), open answers may go on for this time.
        drain_timeout_seconds => drain_timeout: Seconds = ByDefault;
        /// Open client connections; further ones wait to be accepted.
        max_connections => max_connections: Count = ByDefault;
    }
}

keys! {
    /// `[coordinator.https]`, and `[admin.https]`
    HTTPS: HttpsConfig {
        /// With the names by which clients dial the coordinator; intermediate certificates after it.
        certificate => certificate: FilePath = Required("\"tls/front.pem\"");
        /// Of the certificate.
        private_key => private_key: FilePath = Required("\"tls/front.key\"");
    }
}

keys! {
    /// `[slo]`
    SLO: SloConfig {
        /// Time to the first token, in milliseconds.
        ttft_ms => ttft_ms: Positive = ByDefault;
        /// Time between two tokens, in milliseconds.
        itl_ms => itl_ms: Positive = ByDefault;
    }
}

keys! {
    /// `[placement]`
    PLACEMENT: PlacementConfig {
        /// Which requests are split. "adaptive": each worker may do any leg, and what TTFT and ITL are
        /// predicted to be decides for each request; as long as the steps of some worker's engine are
        /// not known, as under "always": all that can be, between the two pools. "never": none.
        mode => mode: OneOf<PlacementMode> = ByDefault;
        /// One of `baton policies`. Default: "slack" where the mode is adaptive, else "least-load".
        policy => policy: Maybe<Text> = Optional("\"slack\"");
        /// While there is no prefill worker: "local" (decode workers do all of it) or "reject" (503).
        on_no_prefill => on_no_prefill: OneOf<OnNoPrefill> = ByDefault;
        /// "last": requests wait here rather than in an engine, by the time at which their first token
        /// is due, and those that are predicted to miss it come after all others. "fifo": as they come.
        late => late: OneOf<LateRequests> = ByDefault;
        /// What each worker has cached is known by what it tells. false: it is guessed, by which prompts
        /// were sent where.
        precise => precise: Flag = ByDefault;
    }
}

keys! {
    /// `[admission]`
    ADMISSION: AdmissionConfig {
        /// When all workers have enough to do, so many requests wait here, the important first and
        /// tenants by their shares; the least important beyond that are answered with 429.
        max_waiting_requests => max_waiting_requests: Count = ByDefault;
        /// Who waited so long is answered with 429.
        max_wait_seconds => max_wait: Seconds = ByDefault;
        /// Without any worker a request waits so long for the first one, and then gets 503.
        wait_for_worker_seconds => wait_for_worker: SecondsOrNone = ByDefault;
        /// Requests of this priority, and of less important (larger) ones, are answered with 429 at once
        /// if they are predicted to miss their TTFT on every path. Default: none are.
        early_rejection_priority => early_rejection_priority: Maybe<Priority> = Optional("0");
        /// Requests that name no tenant otherwise are of the one that this header names. Whoever can
        /// reach the coordinator can then be anyone: for use behind a proxy that sets it.
        tenant_header => tenant_header: Maybe<HeaderName> = Optional("\"x-tenant\"");
    }
}

keys! {
    /// `[balancer.kubernetes]`
    KUBERNETES: KubernetesScaling {
        /// Of the Deployments. Default: the coordinator's own.
        namespace => namespace: Maybe<Text> = Optional("\"baton\"");
        /// Whose pods are prefill workers: their names begin with its name.
        prefill_deployment => prefill_deployment: Text = Required("\"baton-prefill\"");
        /// Whose pods are decode workers.
        decode_deployment => decode_deployment: Text = Required("\"baton-decode\"");
        /// Most replicas of the one; the fewest are balancer.min_prefill.
        max_prefill => max_prefill: Count = Required("8");
        /// And of the other.
        max_decode => max_decode: Count = Required("8");
        /// After so long without any request both go to nothing, and the next request asks for the first
        /// of each; give it time by admission.wait_for_worker_seconds. Default: never.
        zero_after_seconds => zero_after: Maybe<Seconds> = Optional("1800");
    }
}

keys! {
    /// `[balancer]`
    BALANCER: BalancerConfig {
        /// "flip": workers go over to the pool that needs them. "advise": it is only said, in log and
        /// metrics, which should. "off".
        actuator => actuator: ActuatorName = ByDefault;
        /// No flip leaves fewer prefill workers.
        min_prefill => min_prefill: Count = ByDefault;
        /// No flip leaves fewer decode workers.
        min_decode => min_decode: Count = ByDefault;
        /// A worker that changed its pool stays there for so long, and so long no other goes the way
        /// back.
        dwell_seconds => dwell: Seconds = ByDefault;
        /// A worker that was told to change its pool, and still has requests after this time, stays.
        drain_timeout_seconds => drain_timeout: Seconds = ByDefault;
    }
}

keys! {
    /// `[admin]`
    ADMIN: AdminConfig {
        /// Where operators connect: the page /ui, the state, drains and modes. An address that is not
        /// loopback needs [admin.https].
        listen => listen: Address = ByDefault;
        /// Its first line is the token that operators show; it is read anew when it changes. The
        /// environment variable BATON_ADMIN_TOKEN goes before it; one of them must be there.
        token_file => token_file: Maybe<FilePath> = Optional("\"admin.token\"");
    }
}

keys! {
    /// `[telemetry]`
    TELEMETRY: TelemetryConfig {
        /// A collector for OTLP over gRPC. One trace for each request, over both its legs.
        otlp_endpoint => otlp_endpoint: Maybe<Url> = Optional("\"http://127.0.0.1:4317\"");
        /// Share of the requests that are traced, of those that bring no traceparent.
        sample_ratio => sample_ratio: Ratio = ByDefault;
    }
}

keys! {
    /// `[tls]`
    TLS: TlsConfig {
        /// Signs the certificates of the coordinators and of all workers.
        ca => ca: ExistingFile = Required("\"tls/ca.pem\"");
        /// Of this host, with the names by which the others dial it.
        certificate => certificate: ExistingFile = Required("\"tls/host.pem\"");
        /// Of the certificate.
        private_key => private_key: ExistingFile = Required("\"tls/host.key\"");
    }
}

keys! {
    /// `[[tenant]]`
    TENANT: TenantConfig {
        /// Stands in metrics and logs; unique.
        name => name: Name = Required("\"search\"");
        /// SHA-256 of its API key, in hexadecimal (`printf %s "$KEY" | sha256sum`). Either this, or
        /// key_file, or both.
        key_sha256 => key_sha256: Maybe<Sha256> = Optional(
            "\"2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\""
        );
        /// File with API keys, one a line; each opens. It is read anew when it changes.
        key_file => key_file: Maybe<FilePath> = Optional("\"keys/search\"");
        /// Its share beside other tenants while requests wait.
        weight => weight: Positive = ByDefault;
        /// Of its requests that give none. Smaller ones come first.
        priority => priority: Priority = ByDefault;
        /// Requests in flight; further ones are answered with 429. Default: any number.
        max_requests => max_requests: Maybe<Count> = Optional("64");
        /// Tokens of its prompts and answers, at each coordinator. Who has used more is answered with 429
        /// until as much time has passed as that makes up for. Default: any number.
        max_tokens_per_minute => max_tokens_per_minute: Maybe<Count> = Optional("1000000");
    }
}

keys! {
    /// `[[worker]]`
    WORKER: WorkerConfig {
        /// By which `--name` chooses it; unique in the cluster. One that ends in "*" stands for any
        /// number of workers, each with a `--name` that begins like it and an `--advertise` of its own.
        name => name: NameOrStart = Required("\"prefill-0\"");
        /// "prefill" or "decode": the pool that it starts in.
        role => role: RoleName = Required("\"prefill\"");
        /// HOST:PORT of each coordinator's workers_listen. Default: the coordinator of this file.
        coordinators => coordinators: HostPorts = Optional("[\"127.0.0.1:7000\"]");
        /// Those are names of which every address is a coordinator (Kubernetes' headless Services). They
        /// are looked up again every 5 s.
        every_address => every_address: Flag = ByDefault;
        /// Where probes are answered over HTTP: /health while the process runs, /ready while the worker
        /// can be given requests.
        health_listen => health_listen: Maybe<Address> = Optional("\"127.0.0.1:7200\"");
        /// After the order to stop (SIGTERM) the worker takes nothing new; what it has may go on for
        /// this time.
        drain_timeout_seconds => drain_timeout: Seconds = ByDefault;
    }
}

keys! {
    /// `[arena]` and `[worker.arena]`
    ARENA: ArenaConfig {
        /// Where the arena's file lies: a file system in memory.
        directory => directory: FilePath = ByDefault;
        /// Room for blocks that wait to be fetched by other workers.
        export_bytes => export_bytes: AnyBytes = ByDefault;
        /// Room for blocks that came and wait to be loaded by the engine.
        import_bytes => import_bytes: AnyBytes = ByDefault;
    }
}

keys! {
    /// `[transfer]` and `[worker.transfer]`
    TRANSFER: TransferConfig {
        /// Where other workers connect (QUIC, UDP). Port 0 takes a free one.
        listen => listen: Address = ByDefault;
        /// HOST:PORT that other workers are told. Default: listen.
        advertise => advertise: Maybe<HostPort> = Optional("\"127.0.0.1:7100\"");
        /// "auto": shared memory on one host, else ucx where there is an RDMA device, else quic, whatever
        /// both workers have. "quic", "ucx" or "shm": that alone.
        transport => transport: OneOf<TransportChoice> = ByDefault;
        /// "rdma", "encrypted": a worker that cannot meet each of them does not start.
        require => require: Requirements = Optional("[\"rdma\"]");
        /// "crc" finds accidents. "blake3" finds blocks that somebody on the network wrote, too, at 7 GB/s
        /// a core; for ucx in networks that are not trusted.
        check => check: OneOf<CheckChoice> = ByDefault;
        /// UCX's libucp. Default: BATON_UCX_LIBRARY, else libucp.so.0 on the loader's path.
        ucx_library => ucx_library: Maybe<FilePath> = Optional("\"/opt/ucx/lib/libucp.so.0\"");
        /// A handoff that moves nothing for this long is given up.
        stall_timeout_seconds => stall_timeout: Seconds = ByDefault;
        /// Largest UDP payload to try for; the path's own limit is discovered.
        max_mtu_bytes => max_mtu_bytes: MtuBytes = ByDefault;
    }
}

keys! {
    /// `[engine]` and `[worker.engine]` of `kind = "sim"`
    SIM: SimConfig {
        /// Name that requests give for the model.
        model => model: Text = ByDefault;
        /// Of the model's weights. Workers of different revisions never hand over to each other.
        revision => revision: Maybe<Text> = Optional("\"2026-11\"");
        /// Longest prompt plus output.
        max_model_tokens => max_model_tokens: Count = ByDefault;
        /// Tokens of one KV block.
        block_size_tokens => block_size_tokens: Count = ByDefault;
        /// Bytes of KV a token; a real 8B model has "128 KiB".
        kv_bytes_per_token => kv_bytes_per_token: TokenBytes = ByDefault;
        /// Tensor parallel ranks: each hands over its part of the KV heads, of which there are 4.
        tensor_parallel => tensor_parallel: Count = ByDefault;
        /// A step's blocks leave in so many layer groups, one after the other, while the step is computed. The
        /// same on all workers that hand over to each other.
        layer_groups => layer_groups: Count = ByDefault;
        /// Blocks of the KV cache.
        kv_blocks => kv_blocks: Count = ByDefault;
        /// Requests that run at once.
        max_seqs => max_seqs: Count = ByDefault;
        /// Prefill and decode tokens of one step.
        max_step_tokens => max_step_tokens: Count = ByDefault;
        /// Step times (JSON). Default: the built-in profile.
        profile => profile: Maybe<ExistingFile> = Optional("\"profile.json\"");
        /// Multiplies every time of the profile; 0 runs as fast as the machine can.
        time_scale => time_scale: NotNegative = ByDefault;
    }
}

keys! {
    /// `[engine]` and `[worker.engine]` of `kind = "vllm"`
    VLLM: VllmKeys {
        /// A vLLM that is already running. Either this, or command and port.
        url => url: Maybe<Url> = Optional("\"http://127.0.0.1:8100\"");
        /// A vLLM that the worker starts and stops: program and arguments. The worker adds --host and
        /// --port, and with a connector_socket --kv-transfer-config; also, where the command does not
        /// say otherwise, --kv-events-config, --scheduling-policy priority and, with a
        /// connector_socket, --scheduler-cls: requests are served by their deadlines, and a step takes
        /// in as much of a prompt as [slo] itl_ms leaves beside its decodes.
        command => command: Maybe<Program> =
            Optional("[\"/opt/vllm/bin/vllm\", \"serve\", \"/models/llama\"]");
        /// Loopback port that the started vLLM serves on.
        port => port: Maybe<Port> = Optional("8100");
        /// Environment variables that the started vLLM gets beside the worker's own. A worker's table
        /// replaces that of [engine] as a whole.
        environment => environment: Environment = Optional("{ HF_HUB_OFFLINE = \"1\" }");
        /// Unix socket at which our connector inside vLLM finds this worker. Without one the engine
        /// takes part in no fenced handoff.
        connector_socket => connector_socket: Maybe<FilePath> =
            Optional("\"/run/baton/prefill-0.sock\"");
        /// The engines hand over by themselves (NixlConnector and its kin): Baton only relays their
        /// kv_transfer_params. Excludes connector_socket.
        engine_handoff => engine_handoff: Flag = ByDefault;
        /// A step's blocks leave in so many layer groups, one after the other, while the step is computed: for long
        /// prompts that few steps compute, over links that take about as long. A divisor of the model's layers, and
        /// the same on all workers that hand over to each other. Needs connector_socket.
        layer_groups => layer_groups: Count = ByDefault;
        /// How long the engine may take until it serves.
        start_timeout_seconds => start_timeout: Seconds = ByDefault;
        /// Step times (JSON, as `baton profile` writes them) to begin with; from then on they are
        /// learnt. Without them they are not known before the first steps.
        profile => profile: Maybe<ExistingFile> = Optional("\"profile.json\"");
    }
}

/// Chooses between [`SIM`] and [`VLLM`].
pub(crate) const KIND: &str = "kind";
pub(crate) const KIND_DOC: &str =
    "\"sim\", the embedded engine that needs no GPU and no model, or \"vllm\".";

/// An engine's tables as they are read, before [`VllmSource`] is known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum EngineKeys {
    Sim(SimConfig),
    Vllm(VllmKeys),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct VllmKeys {
    pub(crate) url: Option<String>,
    pub(crate) command: Option<Vec<String>>,
    pub(crate) port: Option<u16>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) connector_socket: Option<PathBuf>,
    pub(crate) engine_handoff: bool,
    pub(crate) layer_groups: u32,
    pub(crate) start_timeout: Duration,
    pub(crate) profile: Option<PathBuf>,
}

impl Default for VllmKeys {
    fn default() -> Self {
        Self {
            url: None,
            command: None,
            port: None,
            environment: BTreeMap::new(),
            connector_socket: None,
            engine_handoff: false,
            layer_groups: 1,
            start_timeout: Duration::from_secs(600),
            profile: None,
        }
    }
}

impl From<&EngineConfig> for EngineKeys {
    fn from(engine: &EngineConfig) -> Self {
        let vllm = match engine {
            EngineConfig::Sim(sim) => return Self::Sim(sim.clone()),
            EngineConfig::Vllm(vllm) => vllm,
        };
        let mut keys = VllmKeys {
            connector_socket: vllm.connector_socket.clone(),
            engine_handoff: vllm.engine_handoff,
            layer_groups: vllm.layer_groups,
            start_timeout: vllm.start_timeout,
            profile: vllm.profile.clone(),
            ..VllmKeys::default()
        };
        match &vllm.source {
            VllmSource::Url(url) => keys.url = Some(url.clone()),
            VllmSource::Command { command, environment, port } => {
                keys.command = Some(command.clone());
                keys.environment = environment.clone();
                keys.port = Some(*port);
            }
        }
        Self::Vllm(keys)
    }
}

impl VllmKeys {
    /// What contradicts itself or is missing: the key, and what to say of it.
    pub(crate) fn check(&self) -> Option<(&'static str, &'static str)> {
        Some(match (&self.url, &self.command) {
            (None, None) => ("url", "missing: give the url of a running vLLM, or command and port"),
            (Some(_), Some(_)) => {
                ("url", "excludes command: a vLLM is either running or started, not both")
            }
            (None, Some(_)) if self.port.is_none() => (
                "port",
                "missing: command needs the loopback port to serve on, such as port = 8100",
            ),
            (Some(_), None) if self.port.is_some() => ("port", "belongs to command, not to url"),
            (Some(_), None) if !self.environment.is_empty() => {
                ("environment", "belongs to command, not to url")
            }
            (Some(_), None) if self.layer_groups > 1 => (
                "layer_groups",
                "belongs to command, not to url: a running vLLM has it in its kv_connector_extra_config",
            ),
            _ if self.layer_groups > 1 && self.connector_socket.is_none() => {
                ("layer_groups", "needs connector_socket: our connector makes the groups")
            }
            _ if self.engine_handoff && self.connector_socket.is_some() => {
                ("connector_socket", "excludes engine_handoff: only one of them moves the KV")
            }
            _ => return None,
        })
    }
}

impl From<EngineKeys> for Option<EngineConfig> {
    /// `None` where [`VllmKeys::check`] has something to say.
    fn from(keys: EngineKeys) -> Self {
        let keys = match keys {
            EngineKeys::Sim(sim) => return Some(EngineConfig::Sim(sim)),
            EngineKeys::Vllm(keys) => keys,
        };
        let source = match (keys.url, keys.command, keys.port) {
            (Some(url), None, None) => VllmSource::Url(url),
            (None, Some(command), Some(port)) => {
                VllmSource::Command { command, environment: keys.environment, port }
            }
            _ => return None,
        };
        Some(EngineConfig::Vllm(VllmConfig {
            source,
            connector_socket: keys.connector_socket,
            engine_handoff: keys.engine_handoff,
            layer_groups: keys.layer_groups,
            start_timeout: keys.start_timeout,
            profile: keys.profile,
        }))
    }
}

const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a table's required keys fill in. None of it outlives a missing one: that is an error.
pub(crate) fn blank_coordinator() -> CoordinatorConfig {
    CoordinatorConfig {
        listen: NOWHERE,
        workers_listen: NOWHERE,
        advertise: String::new(),
        tokenizer: None,
        limits: LimitsConfig::default(),
        https: None,
    }
}

pub(crate) fn blank_https() -> HttpsConfig {
    HttpsConfig { certificate: PathBuf::new(), private_key: PathBuf::new() }
}

pub(crate) fn blank_tenant() -> TenantConfig {
    TenantConfig {
        name: String::new(),
        key_sha256: None,
        key_file: None,
        weight: 1.0,
        priority: 0,
        max_requests: None,
        max_tokens_per_minute: None,
    }
}

pub(crate) fn blank_kubernetes() -> KubernetesScaling {
    KubernetesScaling {
        namespace: None,
        prefill_deployment: String::new(),
        decode_deployment: String::new(),
        max_prefill: 1,
        max_decode: 1,
        zero_after: None,
    }
}

pub(crate) fn blank_tls() -> TlsConfig {
    TlsConfig { ca: PathBuf::new(), certificate: PathBuf::new(), private_key: PathBuf::new() }
}

pub(crate) fn blank_worker() -> WorkerConfig {
    WorkerConfig {
        name: String::new(),
        role: Role::Prefill,
        coordinators: Vec::new(),
        every_address: false,
        health_listen: None,
        drain_timeout: Duration::from_secs(30),
        tls: None,
        engine: EngineConfig::Sim(SimConfig::default()),
        arena: ArenaConfig::default(),
        transfer: TransferConfig::default(),
    }
}

pub(crate) fn blank_cluster() -> ClusterConfig {
    ClusterConfig {
        coordinator: blank_coordinator(),
        slo: SloConfig::default(),
        placement: PlacementConfig::default(),
        admission: AdmissionConfig::default(),
        balancer: BalancerConfig::default(),
        kubernetes: None,
        admin: None,
        telemetry: TelemetryConfig::default(),
        tls: None,
        insecure_plaintext: false,
        tenants: Vec::new(),
        workers: Vec::new(),
    }
}
