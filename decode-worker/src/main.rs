use std::path::PathBuf;

use anyhow::Context;
use baton_config::ClusterConfig;
use baton_logs::LogOptions;
use baton_types::Role;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Drives the engine beside it as a worker of the decode pool.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The cluster's baton.toml.
    #[arg(long)]
    config: PathBuf,
    /// Which of the file's decode workers this is.
    #[arg(long)]
    name: String,
    /// HOST:PORT at which other workers reach this one, in place of the file's.
    #[arg(long)]
    advertise: Option<String>,
    #[command(flatten)]
    log: LogOptions,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    arguments.log.begin();
    let cluster = ClusterConfig::read(&arguments.config)?;
    let worker = cluster.worker(&arguments.name, Role::Decode, arguments.advertise.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let shutdown = async move {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        };
        Ok(baton_worker::run(worker, shutdown).await?)
    })
}
