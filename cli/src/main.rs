//! `baton`: starts a cluster on this machine, runs one process of a cluster, checks a cluster's file.

mod bench;
mod bench_transfer;
mod certs;
mod check;
mod compare;
mod goodput;
mod http;
mod operators;
mod policies;
mod processes;
mod profile;
mod quantity;
mod reading;
mod simulate;
mod terminal;
mod transfer_check;
mod up;

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use baton_process::WorkerOptions;
use baton_types::Role;
use clap::{CommandFactory as _, Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serves one language model from pools of prefill and decode workers.
#[derive(Parser)]
#[command(name = "baton", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts a whole cluster on this machine: the quickest way to see Baton work.
    Up(up::UpOptions),
    /// Lists everything that is wrong with a baton.toml, or what it describes.
    Check {
        /// The cluster's baton.toml.
        file: PathBuf,
    },
    /// Makes and shows the certificates by which coordinator and workers know each other.
    Certs {
        #[command(subcommand)]
        command: certs::CertsCommand,
    },
    /// Shows a running cluster's workers, as its coordinator sees them.
    Status(operators::StatusOptions),
    /// Draws what a running cluster does, once a second.
    Top(operators::Access),
    /// Gives a worker nothing new: it ends what it has.
    Drain(operators::DrainOptions),
    /// Switches how a running cluster splits requests.
    Mode(operators::ModeOptions),
    /// Writes the completions of a shell to stdout.
    Completions { shell: clap_complete::Shell },
    /// Loads a live endpoint by a trace, or at a rate, and measures what comes.
    Bench(bench::BenchArguments),
    /// Fits the step times of an engine: of a live one, or from tables of points.
    Profile(profile::ProfileArguments),
    /// Measures how fast KV blocks pass between two processes of this machine.
    BenchTransfer(bench_transfer::BenchOptions),
    /// Shows what this machine has to move KV blocks with, and whether its workers' needs are met.
    TransferCheck(transfer_check::CheckOptions),
    /// Runs the coordinator of a cluster.
    Coordinator(processes::CoordinatorCommand),
    /// Runs one prefill worker of a cluster.
    PrefillWorker(WorkerOptions),
    /// Runs one decode worker of a cluster.
    DecodeWorker(WorkerOptions),
    /// Replays a trace on a simulated fleet, in virtual time.
    Simulate(simulate::SimulateOptions),
    /// Finds the highest load that a simulated fleet serves within its SLOs.
    Goodput(goodput::GoodputOptions),
    /// Runs an experiment: modes × traces × fleet sizes × SLOs, one table, one report.
    Compare(compare::CompareOptions),
    /// Lists the policies that place requests.
    Policies,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Up(options) => up::run(&options),
        Command::Check { file } => Ok(check::run(&file)),
        Command::Certs { command } => certs::run(&command),
        Command::Status(options) => operators::status(&options),
        Command::Top(access) => operators::top(&access),
        Command::Drain(options) => operators::drain(&options),
        Command::Mode(options) => operators::mode(&options),
        Command::Completions { shell } => completions(shell),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Profile(arguments) => profile::run(&arguments),
        Command::BenchTransfer(options) => bench_transfer::run(&options),
        Command::TransferCheck(options) => transfer_check::run(&options),
        Command::Coordinator(command) => processes::coordinator(&command),
        Command::PrefillWorker(worker) => processes::worker(&worker, Role::Prefill),
        Command::DecodeWorker(worker) => processes::worker(&worker, Role::Decode),
        Command::Simulate(options) => simulate::run(&options),
        Command::Goodput(options) => goodput::run(&options),
        Command::Compare(options) => compare::run(&options),
        Command::Policies => Ok(policies::run()),
    };
    outcome.unwrap_or_else(|error| {
        terminal::complain(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "baton", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}
