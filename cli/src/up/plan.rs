//! From `baton up`'s options to the `baton.toml` that its processes read.

use std::{
    fmt::Write as _,
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use baton_config::{
    AdminConfig, AdmissionConfig, ArenaConfig, BalancerConfig, ClusterConfig, CoordinatorConfig,
    EngineConfig, LimitsConfig, PlacementConfig, PlacementMode, SimConfig, SloConfig,
    TelemetryConfig, TransferConfig, WorkerConfig,
};
use baton_types::Role;
use tempfile::TempDir;

use super::{
    options::{EngineName, UpOptions},
    ports::Ports,
    vllm::VllmPlan,
};
use crate::operators::AdminClient;

/// A cluster to start.
pub(super) struct Plan {
    pub(super) cluster: ClusterConfig,
    /// Name that requests give for the model.
    pub(super) model: String,
    /// Where operators look in.
    pub(super) admin: AdminClient,
    pub(super) token_file: PathBuf,
    /// A cluster that has not come up by then will not.
    pub(super) start_timeout: Duration,
    /// Holds the arenas, those of workers that were killed too, and goes with the plan.
    _arenas: TempDir,
}

/// Whoever stops what stands on their own desk does not want to wait.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const SIM_START_TIMEOUT: Duration = Duration::from_secs(60);
/// Room for the longest prompt of the embedded engine, of which a block has 16 KiB.
const SIM_ARENA_BYTES: u64 = 64 << 20;

/// `directory` is for the cluster's files: sockets and the connector.
pub(super) fn plan(options: &UpOptions, directory: &Path) -> anyhow::Result<Plan> {
    let names = worker_names(options);
    let mut ports = Ports::default();
    let clients = ports.for_clients(options.port)?;
    let token_file = directory.join("admin.token");
    let listen = ports.for_operators(options.port)?;
    let admin = AdminConfig { listen, token_file: Some(token_file.clone()), https: None };
    let token = random_token()?;
    write_token(&token_file, &token)
        .with_context(|| format!("cannot write {}", token_file.display()))?;
    let workers_listen = ports.any()?;

    let vllm = match options.engine {
        EngineName::Sim => None,
        EngineName::Vllm => Some(VllmPlan::new(options, names.len(), directory)?),
    };
    let arena_bytes = match vllm {
        Some(_) => ArenaConfig::default().export_bytes,
        None => SIM_ARENA_BYTES,
    };
    let arenas = arena_directory(2 * arena_bytes * names.len() as u64)
        .context("cannot make a directory for the arenas")?;
    let arena = ArenaConfig {
        directory: arenas.path().to_owned(),
        export_bytes: arena_bytes,
        import_bytes: arena_bytes,
    };

    let mut workers = Vec::with_capacity(names.len());
    for (index, (name, role)) in names.into_iter().enumerate() {
        let engine = match &vllm {
            Some(vllm) => EngineConfig::Vllm(vllm.engine(index, &name, ports.any()?.port())),
            None => EngineConfig::Sim(sim(options)),
        };
        workers.push(WorkerConfig {
            name,
            role,
            coordinators: vec![workers_listen.to_string()],
            every_address: false,
            health_listen: None,
            drain_timeout: DRAIN_TIMEOUT,
            tls: None,
            engine,
            arena: arena.clone(),
            transfer: TransferConfig::default(),
        });
    }
    let cluster = ClusterConfig {
        coordinator: CoordinatorConfig {
            listen: clients,
            workers_listen,
            advertise: workers_listen.to_string(),
            tokenizer: vllm.as_ref().and_then(|vllm| vllm.tokenizer()),
            limits: LimitsConfig::default(),
            https: None,
        },
        slo: SloConfig::default(),
        // To show both pools at work, whatever a laptop's load would make of them.
        placement: PlacementConfig { mode: PlacementMode::Always, ..PlacementConfig::default() },
        admission: AdmissionConfig::default(),
        balancer: BalancerConfig::default(),
        kubernetes: None,
        admin: Some(admin.clone()),
        telemetry: TelemetryConfig::default(),
        tls: None,
        insecure_plaintext: false,
        tenants: Vec::new(),
        workers,
    };
    let (model, start_timeout) = match vllm {
        Some(vllm) => (vllm.model_name().to_owned(), vllm.start_timeout()),
        None => (SimConfig::default().model, SIM_START_TIMEOUT),
    };
    let admin = AdminClient { url: format!("http://{}", admin.listen), token, ca: None };
    Ok(Plan { cluster, model, admin, token_file, start_timeout, _arenas: arenas })
}

/// 256 bits that nobody guesses.
fn random_token() -> io::Result<String> {
    let mut bytes = [0_u8; 32];
    let filled = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    debug_assert_eq!(filled, bytes.len(), "so few bytes come whole");
    Ok(bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing into a string does not fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

/// For nobody else to read.
fn write_token(path: &Path, token: &str) -> io::Result<()> {
    let mut file = fs::File::options().create_new(true).write(true).mode(0o600).open(path)?;
    writeln!(file, "{token}")
}

fn worker_names(options: &UpOptions) -> Vec<(String, Role)> {
    let pool =
        |role: Role, count: u16| (0..count).map(move |index| (format!("{role}-{index}"), role));
    pool(Role::Prefill, options.prefill).chain(pool(Role::Decode, options.decode)).collect()
}

fn sim(options: &UpOptions) -> SimConfig {
    let defaults = SimConfig::default();
    SimConfig {
        time_scale: options.time_scale.unwrap_or(defaults.time_scale),
        layer_groups: options.layer_groups,
        max_model_tokens: options.max_model_len.unwrap_or(defaults.max_model_tokens),
        ..defaults
    }
}

/// In `/dev/shm`. Containers often have 64 MiB of it: then a slower place is better than none.
fn arena_directory(needed_bytes: u64) -> io::Result<TempDir> {
    let shm = ArenaConfig::default().directory;
    let available =
        rustix::fs::statvfs(&shm).map(|shm| shm.f_bavail.saturating_mul(shm.f_frsize)).unwrap_or(0);
    let mut builder = tempfile::Builder::new();
    builder.prefix("baton-");
    if available >= needed_bytes { builder.tempdir_in(shm) } else { builder.tempdir() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        options: UpOptions,
    }

    fn options(arguments: &[&str]) -> UpOptions {
        Arguments::parse_from([&["up"], arguments].concat()).options
    }

    #[test]
    fn the_written_file_is_right_and_has_both_pools() {
        let directory = tempfile::tempdir().unwrap();
        let options =
            options(&["--prefill", "2", "--decode", "3", "--time-scale", "0.5", "--port", "0"]);
        options.check().unwrap();
        let plan = plan(&options, directory.path()).unwrap();
        let text = plan.cluster.to_toml();
        let read = ClusterConfig::parse(&text, directory.path()).unwrap();
        assert_eq!(read, plan.cluster);
        let token = fs::read_to_string(&plan.token_file).unwrap();
        assert_eq!((token.trim().len(), token.trim()), (64, plan.admin.token.as_str()));
        let mode = fs::metadata(&plan.token_file).unwrap().permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
        let names: Vec<&str> = read.workers.iter().map(|worker| worker.name.as_str()).collect();
        assert_eq!(names, ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]);
        let EngineConfig::Sim(sim) = &read.workers[4].engine else { panic!("{text}") };
        assert_eq!(sim.time_scale, 0.5);
    }

    #[test]
    fn flags_of_the_other_engine_are_refused() {
        let refusal = |arguments: &[&str]| options(arguments).check().unwrap_err().to_string();
        assert_eq!(refusal(&["--dtype", "float32"]), "--dtype is for --engine vllm");
        assert_eq!(
            refusal(&["--engine", "vllm", "--time-scale", "0"]),
            "--time-scale is for --engine sim"
        );
    }

    #[test]
    fn an_arena_that_does_not_fit_goes_elsewhere() {
        let elsewhere = arena_directory(u64::MAX).unwrap();
        assert!(!elsewhere.path().starts_with("/dev/shm"), "{}", elsewhere.path().display());
    }
}
