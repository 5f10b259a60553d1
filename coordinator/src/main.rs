use baton_config::ClusterConfig;
use baton_process::CoordinatorOptions;
use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Splits requests between prefill and decode workers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    coordinator: CoordinatorOptions,
}

fn main() -> anyhow::Result<()> {
    let CoordinatorOptions { config, process } = Arguments::parse().coordinator;
    let cluster = ClusterConfig::read(&config)?;
    process.run(|stop| baton_coordinator::run(cluster, stop))??;
    Ok(())
}
