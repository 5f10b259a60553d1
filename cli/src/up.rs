//! `baton up`: a whole cluster on this machine, from nothing to a `curl` line.
//!
//! It writes a `baton.toml` and starts the same processes from it that a cluster of many machines
//! has: there is one way to run Baton.

mod children;
mod connector;
mod options;
mod plan;
mod ports;
mod stop_signal;
mod view;
mod vllm;

use std::{fs, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::Context as _;
use tokio::time::{Instant, MissedTickBehavior, interval};

pub(crate) use self::options::UpOptions;
use self::{
    children::{COORDINATOR, Children},
    options::EngineName,
    plan::Plan,
    stop_signal::StopSignal,
    view::View,
};
use crate::{
    http::Question,
    terminal::{faint, strong},
};

const START_POLL_INTERVAL: Duration = Duration::from_millis(100);
const VIEW_INTERVAL: Duration = Duration::from_secs(1);

/// Returns when the cluster was stopped and all its processes are gone.
pub(crate) fn run(options: &UpOptions) -> anyhow::Result<ExitCode> {
    options.check()?;
    let directory = tempfile::Builder::new()
        .prefix("baton-")
        .tempdir()
        .context("cannot make a directory for the cluster's files")?;
    let plan = plan::plan(options, directory.path())?;
    let clients = plan.cluster.coordinator.listen;
    let file = directory.path().join("baton.toml");
    fs::write(&file, plan.cluster.to_toml())
        .with_context(|| format!("cannot write {}", file.display()))?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut signal = StopSignal::new()?;
        let mut view = View::new(&plan.cluster);
        announce(options, &mut view, &file.display().to_string());
        let mut children = Children::start(&plan.cluster, &file, directory.path())?;
        let outcome = serve(&plan, clients, &mut children, &mut view, &mut signal).await;
        view.clear();
        children.stop(&mut signal).await;
        if outcome.is_ok() {
            view.terminal.say("stopped; nothing is left running");
        }
        outcome
    });
    if outcome.is_err() {
        // The logs are what explains it.
        let kept = directory.keep();
        return outcome.with_context(|| format!("logs are kept in {}", kept.display()));
    }
    outcome
}

fn announce(options: &UpOptions, view: &mut View, file: &str) {
    let engine = match options.engine {
        EngineName::Sim => "the embedded engine",
        EngineName::Vllm => "vLLM (this takes a minute or more)",
    };
    let of = |count: u16, role: &str| {
        format!("{count} {role} worker{}", if count == 1 { "" } else { "s" })
    };
    view.terminal.say(&format!(
        "starting a coordinator, {} and {} with {engine}",
        of(options.prefill, "prefill"),
        of(options.decode, "decode"),
    ));
    view.terminal.say(&faint(&format!("the cluster's file and logs: {file}")).to_string());
}

/// Goes on until a stop signal, or fails where the cluster cannot go on.
async fn serve(
    plan: &Plan,
    clients: SocketAddr,
    children: &mut Children,
    view: &mut View,
    signal: &mut StopSignal,
) -> anyhow::Result<ExitCode> {
    tokio::select! {
        started = start(plan, clients, children, view) => started?,
        () = signal.received() => return Ok(ExitCode::SUCCESS),
    }
    greet(plan, clients, view);
    tokio::select! {
        failed = watch(plan, children, view) => failed.map(|()| ExitCode::SUCCESS),
        () = signal.received() => Ok(ExitCode::SUCCESS),
    }
}

/// Waits until the coordinator is ready and every worker is attached.
async fn start(
    plan: &Plan,
    clients: SocketAddr,
    children: &mut Children,
    view: &mut View,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + plan.start_timeout;
    let base = format!("http://{clients}");
    let mut polls = interval(START_POLL_INTERVAL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        polls.tick().await;
        if let Some(ended) = children.newly_ended().next() {
            anyhow::bail!("{}", ended.last_words());
        }
        // Until it listens, there is nothing to read.
        if let Ok(state) = plan.admin.state().await {
            view.update(state, children, Instant::now());
        }
        let ready = Question { base: &base, ca: None, path: "/ready", token: None, body: None };
        if view.all_ready()
            && let Ok((status, _)) = ready.ask().await
            && status.is_success()
        {
            return Ok(());
        }
        anyhow::ensure!(
            Instant::now() < deadline,
            "the cluster did not come up in {} s",
            plan.start_timeout.as_secs()
        );
    }
}

fn greet(plan: &Plan, clients: SocketAddr, view: &mut View) {
    let body = format!(
        r#"{{"model": {}, "messages": [{{"role": "user", "content": "Tell me about relay races."}}], "max_tokens": 64, "stream": true}}"#,
        serde_json::Value::from(plan.model.as_str()),
    );
    // Inside single quotes, a shell takes everything but a single quote as it is.
    let body = body.replace('\'', "'\\''");
    let lines = [
        String::new(),
        format!(
            "Baton serves {} at {}",
            strong(&plan.model),
            strong(&format!("http://{clients}/v1"))
        ),
        String::new(),
        format!(
            "  curl -N http://{clients}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
        ),
        String::new(),
        format!(
            "See what it does at {}: the token is in",
            strong(&format!("{}/ui", plan.admin.url))
        ),
        plan.token_file.display().to_string(),
        String::new(),
        format!(
            "  baton top --admin {} --token-file {}",
            plan.admin.url,
            plan.token_file.display()
        ),
        String::new(),
    ];
    view.terminal.say(&lines.join("\n"));
}

/// Shows the cluster. Fails when the coordinator is gone; without a worker, the others go on.
async fn watch(plan: &Plan, children: &mut Children, view: &mut View) -> anyhow::Result<()> {
    let mut refreshes = interval(VIEW_INTERVAL);
    refreshes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        refreshes.tick().await;
        for ended in children.newly_ended() {
            anyhow::ensure!(ended.name != COORDINATOR, "{}", ended.last_words());
            view.terminal.say(&ended.last_words());
        }
        if let Ok(state) = plan.admin.state().await {
            view.update(state, children, Instant::now());
        }
    }
}
