//! What `up` shows while the cluster runs: a table that is drawn anew each second on a terminal,
//! lines about what changed elsewhere.

use std::{collections::VecDeque, time::Duration};

use baton_config::ClusterConfig;
use tokio::time::Instant;

use super::{
    children::Children,
    metrics::{Histogram, Reading},
};
use crate::terminal::{Terminal, bad, faint, good, pending};

/// Medians are taken over this much of the past.
const WINDOW: Duration = Duration::from_secs(60);
/// Where nothing can be drawn, the totals are told this often while requests come.
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Ended,
}

struct Worker {
    name: String,
    role: String,
    state: State,
    running: f64,
    handoff_bytes: f64,
    bytes_per_second: f64,
}

pub(super) struct View {
    pub(super) terminal: Terminal,
    workers: Vec<Worker>,
    readings: VecDeque<(Instant, Reading)>,
    /// When the totals were told, and the requests that had ended by then.
    told: (Instant, f64),
}

impl View {
    pub(super) fn new(cluster: &ClusterConfig) -> Self {
        let workers = cluster.workers.iter().map(|worker| Worker {
            name: worker.name.clone(),
            role: worker.role.to_string(),
            state: State::Starting,
            running: 0.0,
            handoff_bytes: 0.0,
            bytes_per_second: 0.0,
        });
        Self {
            terminal: Terminal::stdout(),
            workers: workers.collect(),
            readings: VecDeque::new(),
            told: (Instant::now(), 0.0),
        }
    }

    /// Whether every worker has attached.
    pub(super) fn all_ready(&self) -> bool {
        self.workers.iter().all(|worker| worker.state == State::Ready)
    }

    /// Takes a new reading in and shows it.
    pub(super) fn update(&mut self, reading: Reading, children: &Children, now: Instant) {
        let since = self.readings.back().map_or(0.0, |(at, _)| (now - *at).as_secs_f64());
        for worker in &mut self.workers {
            let before = worker.state;
            worker.take(&reading, children, since);
            if !self.terminal.is_live() && worker.state != before {
                let text = match worker.state {
                    State::Ready => "is ready",
                    State::Starting => "has lost its coordinator",
                    State::Ended => "has ended",
                };
                self.terminal.say(&format!("{} {text}", worker.name));
            }
        }
        self.readings.push_back((now, reading));
        while self.readings.front().is_some_and(|(at, _)| now - *at > WINDOW) {
            self.readings.pop_front();
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
        let new = self.readings.back().map_or(0.0, |(_, reading)| reading.requests_ended());
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
        let Some((_, last)) = self.readings.back() else { return "no requests yet".to_owned() };
        let failed = match last.requests_failed() {
            0.0 => String::new(),
            failed => format!(", {failed} not ok"),
        };
        format!(
            "{} requests ({} split{failed}), {} open · TTFT p50 {} · ITL p50 {} · {} handed over",
            last.requests_ended(),
            last.requests_split(),
            last.requests_open(),
            self.median(Reading::ttft),
            self.median(Reading::itl),
            bytes(last.handoff_bytes()),
        )
    }

    /// Over the last minute; of all time while that minute has none.
    fn median(&self, histogram: fn(&Reading) -> Histogram) -> String {
        let (Some((_, first)), Some((_, last))) = (self.readings.front(), self.readings.back())
        else {
            return "–".to_owned();
        };
        let last = histogram(last);
        let median = last.since(&histogram(first)).median().or_else(|| last.median());
        median.map_or_else(|| "–".to_owned(), milliseconds)
    }
}

impl Worker {
    fn take(&mut self, reading: &Reading, children: &Children, seconds: f64) {
        let seen = reading.worker(&self.name);
        self.state = match &seen {
            _ if children.has_ended(&self.name) => State::Ended,
            Some(_) => State::Ready,
            None => State::Starting,
        };
        (self.running, self.bytes_per_second) = (0.0, 0.0);
        if let Some(seen) = seen {
            self.role = seen.role;
            self.running = seen.running;
            if seconds > 0.0 {
                self.bytes_per_second =
                    (seen.handoff_bytes - self.handoff_bytes).max(0.0) / seconds;
            }
            self.handoff_bytes = seen.handoff_bytes;
        }
    }
}

fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

fn speed(bytes_per_second: f64) -> String {
    if bytes_per_second > 0.0 { format!("{}/s", bytes(bytes_per_second)) } else { "–".to_owned() }
}

fn bytes(bytes: f64) -> String {
    match bytes {
        // Fast networks are spoken of in GB/s.
        1e8.. => format!("{:.2} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        1e3.. => format!("{:.1} kB", bytes / 1e3),
        _ => format!("{bytes:.0} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(milliseconds(0.0123), "12 ms");
        assert_eq!(milliseconds(0.0012), "1.2 ms");
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(16384.0), "16.4 kB");
        assert_eq!(bytes(2.54e9), "2.54 GB");
        assert_eq!(speed(0.0), "–");
        assert_eq!(speed(417e6), "0.42 GB/s");
        assert_eq!(speed(16384.0), "16.4 kB/s");
    }
}
