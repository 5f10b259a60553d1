//! What operators ask of a running coordinator, and order it: over its `[admin]` listener.

mod access;
mod status;
mod top;

use std::process::ExitCode;

use baton_coordinator::admin::{ClusterState, Mode};
use serde_json::json;

pub(crate) use access::{Access, AdminClient};
pub(crate) use status::{StatusOptions, run as status};
pub(crate) use top::run as top;

use crate::terminal;

/// What a coordinator calls the states of a worker.
const READY: &str = "ready";
const DRAINED: &str = "drained";

#[derive(Debug, clap::Args)]
pub(crate) struct DrainOptions {
    /// The worker's name, as `baton status` shows it.
    worker: String,
    /// Gives it requests again.
    #[arg(long)]
    undrain: bool,
    /// Returns when it has nothing left: stop it then.
    #[arg(long, conflicts_with = "undrain")]
    wait: bool,
    #[command(flatten)]
    access: Access,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ModeOptions {
    /// aggregated (no request is split), disaggregated (all that can be are), or adaptive (decided by
    /// each request).
    mode: Mode,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn drain(options: &DrainOptions) -> anyhow::Result<ExitCode> {
    let order = if options.undrain { "undrain" } else { "drain" };
    let path = format!("/admin/workers/{}/{order}", path_segment(&options.worker));
    let client = options.access.client()?;
    let mut terminal = terminal::Terminal::stdout();
    block_on(async {
        let answer: serde_json::Value = client.post(&path, &json!({})).await?;
        let state = answer["state"].as_str().unwrap_or_default();
        terminal.say(&format!("{} is {state}", options.worker));
        if options.wait && state != DRAINED {
            drained(&client, &options.worker).await?;
            terminal.say(&format!("{} is {DRAINED}", options.worker));
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Until a worker has nothing left.
async fn drained(client: &AdminClient, name: &str) -> anyhow::Result<()> {
    loop {
        let state = client.state().await?;
        match state.workers.iter().find(|worker| worker.name == name) {
            Some(worker) if worker.state == DRAINED => return Ok(()),
            Some(worker) => anyhow::ensure!(
                worker.state != READY,
                "{name} is {READY}: somebody gave it requests again, or its engine began anew"
            ),
            None => anyhow::bail!("{name} went away before it was {DRAINED}"),
        }
        tokio::time::sleep(status::INTERVAL).await;
    }
}

pub(crate) fn mode(options: &ModeOptions) -> anyhow::Result<ExitCode> {
    block_on(options.access.client()?.set_mode(options.mode))?;
    terminal::Terminal::stdout().say(&format!("the mode is {}", options.mode));
    Ok(ExitCode::SUCCESS)
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// A name as one part of a path: what is no letter, digit or `-._~` goes in hexadecimal.
fn path_segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).into() } else { format!("%{byte:02X}") })
        .collect()
}

/// How many requests have ended.
fn ended(state: &ClusterState) -> u64 {
    state.requests_ended.values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_part_of_the_path() {
        assert_eq!(path_segment("prefill-0.a_b"), "prefill-0.a_b");
        assert_eq!(path_segment("a/../b?c d%"), "a%2F..%2Fb%3Fc%20d%25");
    }
}
