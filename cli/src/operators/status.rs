use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use baton_coordinator::admin::{ClusterState, WorkerState};
use baton_types::Role;
use tokio::time::{MissedTickBehavior, interval};

use super::{Access, READY, block_on, ended};
use crate::{
    quantity::{bytes, duration},
    reading::Readings,
    terminal::{Terminal, bad, faint, good, pending, strong},
};

pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Rates and medians are taken over this much of the past.
pub(super) const WINDOW: Duration = Duration::from_secs(30);
/// A script can tell it from a coordinator that did not answer, which is 1.
const NOT_WHOLE: u8 = 2;

#[derive(Debug, clap::Args)]
pub(crate) struct StatusOptions {
    /// Goes on, once a second.
    #[arg(long)]
    watch: bool,
    /// The whole state as JSON; with --watch one object a line.
    #[arg(long)]
    json: bool,
    /// For scripts: exits with 2 unless both pools have a worker that is ready.
    #[arg(long, conflicts_with = "watch")]
    check: bool,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn run(options: &StatusOptions) -> anyhow::Result<ExitCode> {
    let client = options.access.client()?;
    let mut terminal = Terminal::stdout();
    let mut readings = Readings::over(WINDOW);
    block_on(async {
        let mut looks = interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let state = client.state().await?;
            let is_whole = is_whole(&state);
            if options.json {
                let json = if options.watch {
                    serde_json::to_string(&state)?
                } else {
                    serde_json::to_string_pretty(&state)?
                };
                terminal.say(&json);
            } else {
                readings.add(state);
                let mut lines = heading(&readings);
                if let Some(state) = readings.last() {
                    lines.push(String::new());
                    lines.extend(workers(state));
                    lines.extend(troubles(state));
                }
                if options.watch && terminal.is_live() {
                    terminal.draw(lines);
                } else {
                    terminal.say(&lines.join("\n"));
                }
            }
            if options.check && !is_whole {
                return Ok(ExitCode::from(NOT_WHOLE));
            }
            if !options.watch {
                return Ok(ExitCode::SUCCESS);
            }
        }
    })
}

/// Whether each pool has somebody who takes requests.
fn is_whole(state: &ClusterState) -> bool {
    Role::ALL.iter().all(|role| {
        let mut pool = state.workers.iter().filter(|worker| worker.role == role.as_str());
        pool.any(|worker| worker.state == READY)
    })
}

pub(super) fn heading(readings: &Readings) -> Vec<String> {
    let Some(state) = readings.last() else { return Vec::new() };
    let pool = |role: &str| state.workers.iter().filter(|worker| worker.role == role).count();
    let failed = ended(state) - state.requests_ended.get("ok").copied().unwrap_or_default();
    let up = Duration::try_from_secs_f64(state.uptime_seconds).unwrap_or_default();
    vec![
        format!(
            "{} · {} prefill and {} decode workers · up {}",
            strong(state.mode.as_str()),
            pool("prefill"),
            pool("decode"),
            duration(up)
        ),
        format!(
            "{} requests ended ({failed} not ok), {} open · TTFT p50 {} (SLO {:.0} ms) · ITL p50 {} \
             (SLO {:.0} ms)",
            ended(state),
            state.requests_open,
            readings.ttft_p50(),
            state.slo.ttft_ms,
            readings.itl_p50(),
            state.slo.itl_ms,
        ),
    ]
}

/// What is not as it should be, and whom it is about: workers that were lost and did not come back, those that
/// fit no other, pairs whose handoffs fail.
pub(super) fn troubles(state: &ClusterState) -> Vec<String> {
    let attached = |name: &str| state.workers.iter().any(|worker| worker.name == name);
    // Whoever attaches is held against all others, so that what the last one met with is what there is.
    let last_attached = state.decisions.iter().rposition(|decision| decision.kind == "attached");
    let mut told = BTreeMap::new();
    for (at, decision) in state.decisions.iter().enumerate() {
        let is_trouble = match decision.kind.as_str() {
            "lost" => !attached(&decision.subject),
            "mismatch" => {
                attached(&decision.subject) && last_attached.is_none_or(|last| last <= at + 1)
            }
            _ => false,
        };
        if is_trouble {
            // The last of each stays.
            told.insert((&decision.subject, &decision.kind), decision);
        }
    }
    let workers = told.values().map(|decision| {
        let ago = state.at_unix_ms.saturating_sub(decision.at_unix_ms);
        let ago = duration(Duration::from_millis(ago));
        let (name, kind) = (&decision.subject, &decision.kind);
        bad(&format!("{name}: {kind} {ago} ago: {}", decision.reason)).to_string()
    });
    let pairs = state.handoffs.busiest.iter().filter(|pair| pair.failed > 0).map(|pair| {
        let (from, to) = (&pair.from, &pair.to);
        let all = pair.handoffs + pair.failed;
        bad(&format!("{from} → {to}: {} of {all} handoffs failed", pair.failed)).to_string()
    });
    workers.chain(pairs).collect()
}

pub(super) fn workers(state: &ClusterState) -> Vec<String> {
    let names = state.workers.iter().map(|worker| worker.name.len());
    let width = names.max().unwrap_or(0).max("worker".len());
    let heading = format!(
        "{:width$}  {:7}  {:8}  {:>7} {:>6} {:>6} {:>7}  {:>5}  {:>10} {:>10}  {:>6}",
        "worker",
        "role",
        "state",
        "prefill",
        "decode",
        "queued",
        "waiting",
        "KV",
        "sent",
        "received",
        "failed"
    );
    let mut lines = vec![faint(&heading).to_string()];
    lines.extend(state.workers.iter().map(|worker| row(worker, width)));
    lines
}

#[allow(clippy::cast_precision_loss, reason = "shown in three digits")]
fn row(worker: &WorkerState, width: usize) -> String {
    let standing = format!("{:8}", worker.state);
    let standing = match worker.state.as_str() {
        READY => good(&standing),
        _ => pending(&standing),
    };
    let failed = worker.handoffs.errors.values().sum::<u64>();
    let failed_text = format!("{failed:>6}");
    let failed_text = if failed > 0 { bad(&failed_text).to_string() } else { failed_text };
    format!(
        "{:width$}  {:7}  {standing}  {:>7} {:>6} {:>6} {:>7}  {:>3.0} %  {:>10} {:>10}  {failed_text}",
        worker.name,
        worker.role,
        worker.load.prefills,
        worker.load.decodes,
        worker.load.queued,
        worker.engine_load.waiting,
        worker.engine_load.kv_used_ratio * 100.0,
        bytes(worker.handoffs.bytes_sent as f64),
        bytes(worker.handoffs.bytes_received as f64),
    )
}
