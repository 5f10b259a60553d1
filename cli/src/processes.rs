//! The processes of a cluster, each run in this one: what the thin binaries do, in one program.

use std::{io::Read as _, path::Path, process::ExitCode};

use anyhow::Context as _;
use baton_config::ClusterConfig;
use baton_logs::LogOptions;
use baton_types::Role;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::WorkerArguments;

/// What a process of a cluster is told on its command line, beside its file.
#[derive(Clone, clap::Args)]
pub(crate) struct ProcessOptions {
    #[command(flatten)]
    log: LogOptions,
    /// Stops when stdin ends: so a parent's death, however it came, is noticed.
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

pub(crate) fn coordinator(config: &Path, options: &ProcessOptions) -> anyhow::Result<ExitCode> {
    let cluster = ClusterConfig::read(config)?;
    options.log.begin();
    runtime()?.block_on(async {
        baton_coordinator::run(cluster, stop(options)?).await?;
        Ok(ExitCode::SUCCESS)
    })
}

pub(crate) fn worker(arguments: &WorkerArguments, role: Role) -> anyhow::Result<ExitCode> {
    let WorkerArguments { config, name, advertise, options } = arguments;
    let cluster = ClusterConfig::read(config)?;
    let worker = cluster
        .worker(name, role, advertise.as_deref())
        .with_context(|| config.display().to_string())?;
    options.log.begin();
    runtime()?.block_on(async {
        baton_worker::run(worker, stop(options)?).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// One thread: a token crosses no others, which costs half of what work stealing would.
fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// Done when this process shall stop.
fn stop(options: &ProcessOptions) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let (ended, stdin_ended) = oneshot::channel();
    let ended = options.stop_with_stdin.then_some(ended);
    let watches_stdin = ended.is_some();
    if let Some(ended) = ended {
        // A thread of its own: tokio's stdin would keep the runtime from ending.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock().by_ref(), &mut std::io::sink());
            let _ = ended.send(());
        });
    }
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = stdin_ended, if watches_stdin => {}
        }
    })
}
