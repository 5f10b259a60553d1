//! The processes of a cluster, each run in this one: what the thin binaries do, in one program. And a
//! coordinator with its workers in one process.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use baton_config::{ClusterConfig, WorkerConfig};
use baton_process::{CoordinatorOptions, Stop, WorkerOptions};
use baton_proto::{CoordinatorHere, in_process};
use baton_types::Role;
use baton_worker::WorkerError;
use futures::future::try_join_all;
use tokio::sync::watch;
use tracing::Instrument as _;

/// An engine that does not serve is looked for again after this time.
const ENGINE_RETRY: Duration = Duration::from_secs(5);

/// The command line of a coordinator, and of one that has its workers with it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CoordinatorCommand {
    #[command(flatten)]
    coordinator: CoordinatorOptions,
    /// Also runs the file's workers, in this process: a router before engines that run already.
    #[arg(long)]
    with_workers: bool,
}

pub(crate) fn coordinator(command: &CoordinatorCommand) -> anyhow::Result<ExitCode> {
    let CoordinatorOptions { config, process } = &command.coordinator;
    let cluster = ClusterConfig::read(config)?;
    if command.with_workers {
        let workers = all_workers(&cluster).with_context(|| config.display().to_string())?;
        process.run(|stop| run_with_workers(cluster, workers, stop))??;
    } else {
        process.run(|stop| baton_coordinator::run(cluster, stop))??;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn worker(options: &WorkerOptions, role: Role) -> anyhow::Result<ExitCode> {
    let WorkerOptions { config, name, advertise, process } = options;
    let cluster = ClusterConfig::read(config)?;
    let worker = cluster
        .worker(name, role, advertise.as_deref())
        .with_context(|| config.display().to_string())?;
    process.run(|stop| baton_worker::run(worker, stop))??;
    Ok(ExitCode::SUCCESS)
}

fn all_workers(cluster: &ClusterConfig) -> anyhow::Result<Vec<WorkerConfig>> {
    if let Some(template) = cluster.workers.iter().find(|worker| worker.name.ends_with('*')) {
        let name = &template.name;
        bail!(
            "worker.name is {name:?}: --with-workers needs each worker's own name, not a template"
        );
    }
    Ok(cluster.workers.clone())
}

/// The workers are told to leave when the coordinator has ended: until then answers may go on.
async fn run_with_workers(
    cluster: ClusterConfig,
    workers: Vec<WorkerConfig>,
    stop: Stop,
) -> anyhow::Result<()> {
    let (leave, told) = watch::channel(());
    let (here, workers_here) = in_process();
    let workers = try_join_all(workers.into_iter().map(|worker| {
        let span = tracing::info_span!("worker", name = worker.name);
        run_beside_others(here.clone(), worker, told.clone()).instrument(span)
    }));
    let coordinator = baton_coordinator::run_with(workers_here, cluster, stop);
    tokio::pin!(workers, coordinator);
    tokio::select! {
        ended = &mut coordinator => ended?,
        // None ends by itself but for what is wrong with it.
        ended = &mut workers => return ended.map(drop),
    }
    drop(leave);
    workers.await.map(drop)
}

/// Alone in its process a worker whose engine does not come up ends, and is started again. Here the others
/// go on.
async fn run_beside_others(
    here: CoordinatorHere,
    worker: WorkerConfig,
    told: watch::Receiver<()>,
) -> anyhow::Result<()> {
    loop {
        match baton_worker::run_here(here.clone(), worker.clone(), leaving(told.clone())).await {
            Ok(()) => return Ok(()),
            Err(WorkerError::Engine(error)) => {
                tracing::error!(%error, "the worker's engine does not serve; trying again in {ENGINE_RETRY:?}");
            }
            Err(error) => {
                return Err(error).with_context(|| format!("worker {:?}", worker.name));
            }
        }
        if tokio::time::timeout(ENGINE_RETRY, leaving(told.clone())).await.is_ok() {
            return Ok(());
        }
    }
}

/// Until all are told to leave.
async fn leaving(mut told: watch::Receiver<()>) {
    while told.changed().await.is_ok() {}
}
