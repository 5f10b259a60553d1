use baton_config::ClusterConfig;
use baton_process::WorkerOptions;
use baton_types::Role;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Drives the engine beside it as a worker of the decode pool.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    worker: WorkerOptions,
}

fn main() -> anyhow::Result<()> {
    let WorkerOptions { config, name, advertise, process } = Arguments::parse().worker;
    let cluster = ClusterConfig::read(&config)?;
    let worker = cluster.worker(&name, Role::Decode, advertise.as_deref())?;
    process.run(|stop| baton_worker::run(worker, stop))??;
    Ok(())
}
