//! The processes of a cluster, each run in this one: what the thin binaries do, in one program.

use std::process::ExitCode;

use anyhow::Context as _;
use baton_config::ClusterConfig;
use baton_process::{CoordinatorOptions, WorkerOptions};
use baton_types::Role;

pub(crate) fn coordinator(options: &CoordinatorOptions) -> anyhow::Result<ExitCode> {
    let cluster = ClusterConfig::read(&options.config)?;
    options.process.run(|stop| baton_coordinator::run(cluster, stop))??;
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
