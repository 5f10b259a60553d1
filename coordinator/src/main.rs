use std::path::PathBuf;

use anyhow::Context;
use baton_config::ClusterConfig;
use baton_logs::LogOptions;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Splits requests between prefill and decode workers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The cluster's baton.toml.
    #[arg(long)]
    config: PathBuf,
    #[command(flatten)]
    log: LogOptions,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    arguments.log.begin();
    let config = ClusterConfig::read(&arguments.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
                .context("cannot listen for SIGTERM")?;
        let shutdown = async move {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        };
        Ok(baton_coordinator::run(config, shutdown).await?)
    })
}
