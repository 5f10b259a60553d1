//! What `up` shows while the cluster runs: a table that is drawn anew each second on a terminal,
//! lines about what changed elsewhere.

use std::time::Duration;

use baton_config::ClusterConfig;
use baton_coordinator::admin::{ClusterState, WorkerState};
use tokio::time::Instant;

use super::children::Children;
use crate::{
    quantity::{bytes, speed},
    reading::Readings,
    terminal::{Terminal, bad, faint, good, pending},
};

/// Medians are taken over this much of the past.
const WINDOW: Duration = Duration::from_secs(60);
/// Where nothing can be drawn, the totals are told this often while requests come.
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Draining,
    Ended,
}

struct Worker {
    name: String,
    role: String,
    state: State,
    running: u32,
    bytes_per_second: f64,
}

pub(super) struct View {
    pub(super) terminal: Terminal,
    workers: Vec<Worker>,
    readings: Readings,
    /// When the totals were told, and the requests that had ended by then.
    told: (Instant, u64),
}

impl View {
    pub(super) fn new(cluster: &ClusterConfig) -> Self {
        let workers = cluster.workers.iter().map(|worker| Worker {
            name: worker.name.clone(),
            role: worker.role.to_string(),
            state: State::Starting,
            running: 0,
            bytes_per_second: 0.0,
        });
        Self {
            terminal: Terminal::stdout(),
            workers: workers.collect(),
            readings: Readings::over(WINDOW),
            told: (Instant::now(), 0),
        }
    }

    /// Whether every worker has attached.
    pub(super) fn all_ready(&self) -> bool {
        self.workers.iter().all(|worker| worker.state == State::Ready)
    }

    /// Takes a new reading in and shows it.
    pub(super) fn update(&mut self, state: ClusterState, children: &Children, now: Instant) {
        self.readings.add(state);
        for worker in &mut self.workers {
            let before = worker.state;
            worker.take(&self.readings, children);
            if !self.terminal.is_live() && worker.state != before {
                let text = match worker.state {
                    State::Ready => "is ready",
                    State::Draining => "is draining",
                    State::Starting => "has lost its coordinator",
                    State::Ended => "has ended",
                };
                self.terminal.say(&format!("{} {text}", worker.name));
            }
        }
        if self.terminal.is_live() {
            let table = self.table();
            self.terminal.draw(table);
        } else {
            self.tell_totals(now);
        }
    }

    /// Takes the table away.
    pub(super) fn clear(&mut self) {
        self.terminal.draw(Vec::new());
    }

    fn tell_totals(&mut self, now: Instant) {
        let (at, ended) = self.told;
        let new = self.readings.last().map_or(0, requests_ended);
        if now - at >= PLAIN_INTERVAL && new != ended {
            self.told = (now, new);
            let totals = self.totals();
            self.terminal.say(&totals);
        }
    }

    fn table(&self) -> Vec<String> {
        let width = self.workers.iter().map(|worker| worker.name.len()).max().unwrap_or(0).max(8);
        let heading = format!(
            "{:width$}  {:8} {:8} {:>7}  {:>12}",
            "worker", "role", "state", "running", "handoff"
        );
        let mut lines = vec![String::new(), faint(&heading).to_string()];
        for worker in &self.workers {
            let state = match worker.state {
                State::Starting => pending("starting"),
                State::Ready => good("ready   "),
                State::Draining => pending("draining"),
                State::Ended => bad("ended   "),
            };
            lines.push(format!(
                "{:width$}  {:8} {state} {:>7}  {:>12}",
                worker.name,
                worker.role,
                worker.running,
                speed(worker.bytes_per_second),
            ));
        }
        lines.push(String::new());
        lines.push(self.totals());
        lines.push(faint("Ctrl-C stops everything").to_string());
        lines
    }

    fn totals(&self) -> String {
        let Some(last) = self.readings.last() else { return "no requests yet".to_owned() };
        let ended = requests_ended(last);
        let failed = match ended - last.requests_ended.get("ok").copied().unwrap_or_default() {
            0 => String::new(),
            failed => format!(", {failed} not ok"),
        };
        #[allow(clippy::cast_precision_loss, reason = "shown in three digits")]
        let handed_over = bytes(last.handoffs.bytes as f64);
        format!(
            "{ended} requests ({} split{failed}), {} open · TTFT p50 {} · ITL p50 {} · {handed_over} \
             handed over",
            last.requests_split,
            last.requests_open,
            self.readings.ttft_p50(),
            self.readings.itl_p50(),
        )
    }
}

fn requests_ended(state: &ClusterState) -> u64 {
    state.requests_ended.values().sum()
}

impl Worker {
    fn take(&mut self, readings: &Readings, children: &Children) {
        let named = |state: &ClusterState| -> Option<WorkerState> {
            state.workers.iter().find(|worker| worker.name == self.name).cloned()
        };
        let seen = readings.last().and_then(named);
        let handed_over = |state: &ClusterState| {
            named(state).map_or(0, |seen| seen.handoffs.bytes_sent + seen.handoffs.bytes_received)
        };
        let bytes_per_second = readings.rate_now(handed_over);
        self.state = match &seen {
            _ if children.has_ended(&self.name) => State::Ended,
            Some(seen) if seen.state != "ready" => State::Draining,
            Some(_) => State::Ready,
            None => State::Starting,
        };
        (self.running, self.bytes_per_second) = (0, 0.0);
        if let Some(seen) = seen {
            self.role = seen.role;
            self.running = seen.jobs;
            self.bytes_per_second = bytes_per_second;
        }
    }
}
