//! `baton transfer-check`: what this machine has to move KV blocks with, and whether that meets what its
//! workers require.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use baton_config::{ClusterConfig, TransferConfig};
use baton_ucx::{Options, Resource, Ucx};
use baton_worker::transport::{self, Chosen, RDMA_DEVICES};
use clap::Args;

use crate::terminal::{Terminal, bad, good};

#[derive(Args)]
pub(crate) struct CheckOptions {
    /// The cluster's baton.toml; without it, what its defaults would mean here.
    #[arg(long, requires = "name")]
    config: Option<PathBuf>,
    /// Which of the file's workers runs here.
    #[arg(long, requires = "config")]
    name: Option<String>,
}

/// Succeeds where a worker of this configuration would start.
pub(crate) fn run(options: &CheckOptions) -> anyhow::Result<ExitCode> {
    let transfer = transfer(options)?;
    let mut terminal = Terminal::stdout();
    terminal.say(&format!("memlock              {}", memlock()?));
    terminal.say(&format!("huge pages           {}", huge_pages()?));
    for (name, mtu_bytes) in interfaces() {
        terminal.say(&format!("interface {name:10} MTU {mtu_bytes}"));
    }
    let devices = names_in(Path::new(RDMA_DEVICES));
    let shown = if devices.is_empty() { "none".to_owned() } else { devices.join(" ") };
    terminal.say(&format!("RDMA devices         {shown}"));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ucx_is_there = runtime.block_on(ucx(&transfer, &mut terminal));

    let has_rdma = !devices.is_empty();
    let wanted = |what: &str| format!("transport \"{}\": {what}", transfer.transport.as_str());
    let verdict = transport::choose(&transfer, has_rdma).map_err(|error| error.to_string());
    let verdict = verdict.and_then(|chosen| match (chosen, &ucx_is_there) {
        // Without it such a worker says so, and goes by QUIC.
        (Chosen { ucx: true, quic: true, .. }, Err(_)) => Ok(Chosen { ucx: false, ..chosen }),
        (Chosen { ucx: true, .. }, Err(error)) => Err(error.clone()),
        (Chosen { ucx: true, .. }, Ok(resources))
            if transfer.require.contains(&baton_config::Requirement::Rdma)
                && !resources.iter().any(Resource::is_rdma) =>
        {
            Err("rdma is required, and UCX finds no RDMA device".to_owned())
        }
        (chosen, _) => Ok(chosen),
    });
    match verdict {
        Ok(chosen) => {
            terminal.say(&good(&wanted(&format!("blocks go by {chosen}"))).to_string());
            Ok(ExitCode::SUCCESS)
        }
        Err(reason) => {
            terminal.say(&bad(&wanted(&format!("a worker would not start: {reason}"))).to_string());
            Ok(ExitCode::FAILURE)
        }
    }
}

fn transfer(options: &CheckOptions) -> anyhow::Result<TransferConfig> {
    let (Some(file), Some(name)) = (&options.config, &options.name) else {
        return Ok(TransferConfig::default());
    };
    let cluster = ClusterConfig::read(file)?;
    let worker = cluster.workers.iter().find(|worker| worker.name == *name);
    let worker = worker.with_context(|| format!("{} has no worker {name}", file.display()))?;
    Ok(worker.transfer.clone())
}

/// Prints what UCX says of itself, and what it picks for an endpoint to itself.
async fn ucx(transfer: &TransferConfig, terminal: &mut Terminal) -> Result<Vec<Resource>, String> {
    let options = Options { library: transfer.ucx_library.clone(), ..Options::default() };
    let ucx = match Ucx::start(&options) {
        Ok(ucx) => ucx,
        Err(error) => {
            terminal.say(&format!("UCX                  none: {error}"));
            return Err(error.to_string());
        }
    };
    terminal.say(&format!("UCX                  {} ({})", ucx.version(), ucx.library().display()));
    for Resource { transport, device } in ucx.resources() {
        terminal.say(&format!("UCX may use          {transport}/{device}"));
    }
    let lanes = match ucx.connect(ucx.address()).await {
        Ok(endpoint) => endpoint.lanes().await,
        Err(error) => Err(error),
    };
    match lanes {
        Ok(lanes) => {
            for lane in lanes.iter().filter(|lane| lane.writes) {
                let Resource { transport, device } = &lane.resource;
                terminal.say(&format!("UCX picks, to itself {transport}/{device}"));
            }
        }
        Err(error) => terminal.say(&format!("UCX picks, to itself nothing: {error}")),
    }
    Ok(ucx.resources().to_vec())
}

/// Registering the staging arena pins it: the limit must exceed it, or be none.
fn memlock() -> anyhow::Result<String> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max locked memory"));
    let line = line.context("/proc/self/limits tells no locked memory")?;
    let soft = line.split_whitespace().nth(3).unwrap_or("?");
    let capabilities = fs::read_to_string("/proc/self/status")?;
    let effective = capabilities.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // CAP_IPC_LOCK, which lifts the limit and allows huge pages.
    let has_ipc_lock = effective.is_some_and(|mask| mask & (1 << 14) != 0);
    let ipc_lock = if has_ipc_lock { "IPC_LOCK held" } else { "no IPC_LOCK" };
    Ok(format!("{soft} bytes, {ipc_lock}"))
}

fn huge_pages() -> anyhow::Result<String> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let of = |name: &str| {
        let line = memory.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or("?", |(_, value)| value.trim())
    };
    let (total, free) = (of("HugePages_Total"), of("HugePages_Free"));
    Ok(format!("{total}, {free} of them free, of {}", of("Hugepagesize")))
}

fn interfaces() -> Vec<(String, String)> {
    let root = Path::new("/sys/class/net");
    let mtu = |name: String| {
        let mtu_bytes = fs::read_to_string(root.join(&name).join("mtu")).ok()?;
        Some((name, mtu_bytes.trim().to_owned()))
    };
    names_in(root).into_iter().filter_map(mtu).collect()
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
