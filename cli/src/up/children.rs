//! The processes of the cluster: this program again, once for each.
//!
//! Each holds one end of a pipe as its stdin and stops when it ends: so none outlives `up`, however
//! `up` ends. Each has a process group of its own, so that Ctrl-C reaches `up` alone, which then
//! stops them in order.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use baton_config::ClusterConfig;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::time::{Instant, sleep, sleep_until};

use super::stop_signal::StopSignal;

/// A worker gives its vLLM 10 s to end, a coordinator its clients as long.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Of a process that failed.
const LAST_LINES: usize = 20;

pub(super) const COORDINATOR: &str = "coordinator";

/// One process.
pub(super) struct Part {
    /// `coordinator`, or the worker's name.
    pub(super) name: String,
    log: PathBuf,
    process: Child,
    stdin: Option<ChildStdin>,
    ended: Option<ExitStatus>,
}

pub(super) struct Children {
    parts: Vec<Part>,
}

impl Children {
    /// Starts the coordinator and all workers of the file, with their logs in `directory`. If one
    /// cannot be started, those before it end with their pipes.
    pub(super) fn start(
        cluster: &ClusterConfig,
        file: &Path,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut parts = vec![Part::start(&program, COORDINATOR, COORDINATOR, file, directory)?];
        for worker in &cluster.workers {
            let command = format!("{}-worker", worker.role);
            parts.push(Part::start(&program, &command, &worker.name, file, directory)?);
        }
        Ok(Self { parts })
    }

    /// Those that ended since this was last asked.
    pub(super) fn newly_ended(&mut self) -> impl Iterator<Item = &Part> {
        self.parts.iter_mut().filter_map(|part| part.has_newly_ended().then_some(&*part))
    }

    pub(super) fn has_ended(&self, name: &str) -> bool {
        self.parts.iter().any(|part| part.name == name && part.ended.is_some())
    }

    /// Stops all and waits until they are gone. Those that take too long are killed, at a second stop
    /// signal at once.
    pub(super) async fn stop(mut self, signal: &mut StopSignal) {
        for part in &mut self.parts {
            part.stdin = None;
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            self.newly_ended().for_each(drop);
            if self.parts.iter().all(|part| part.ended.is_some()) {
                return;
            }
            tokio::select! {
                () = sleep(POLL_INTERVAL) => {}
                () = signal.received() => break,
                () = sleep_until(deadline) => break,
            }
        }
        for part in self.parts.iter_mut().filter(|part| part.ended.is_none()) {
            part.kill();
        }
    }
}

impl Part {
    fn start(
        program: &Path,
        command: &str,
        name: &str,
        file: &Path,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let errors = output.try_clone().context("cannot share a log file")?;
        let mut process = Command::new(program);
        process.arg(command).arg("--config").arg(file).arg("--stop-with-stdin");
        if command != COORDINATOR {
            process.args(["--name", name]);
        }
        let mut process = process
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdin = process.stdin.take();
        Ok(Self { name: name.to_owned(), log, process, stdin, ended: None })
    }

    fn has_newly_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.process.try_wait().ok().flatten();
            return self.ended.is_some();
        }
        false
    }

    /// How it ended, and what it said last.
    pub(super) fn last_words(&self) -> String {
        let how = match self.ended {
            Some(status) => status.to_string(),
            None => "still running".to_owned(),
        };
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n  ");
        let log = self.log.display();
        format!("{} ended ({how}); the end of {log}:\n  {last}", self.name)
    }

    /// Ends it and all that it started, which may have process groups of their own.
    fn kill(&mut self) {
        let descendants = descendants(self.process.id());
        let pid = |id: u32| i32::try_from(id).ok().and_then(Pid::from_raw);
        if let Some(group) = pid(self.process.id()) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        for process in descendants.into_iter().filter_map(pid) {
            let _ = kill_process(process, Signal::KILL);
        }
        self.ended = self.process.wait().ok();
    }
}

/// All processes below one, as `/proc` has them; none where there is no `/proc`.
fn descendants(root: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let parents: Vec<(u32, u32)> = entries
        .flatten()
        .filter_map(|entry| {
            let process = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // `pid (name) state parent …`, and the name may have anything in it.
            let (_, rest) = stat.rsplit_once(") ")?;
            Some((process, rest.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(process, _)| *process));
        next += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_are_found_below_their_ancestor() {
        let mut shell = Command::new("sh")
            .args(["-c", "(sleep 60; :) & wait"])
            .process_group(0)
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        // The subshell, and its sleep.
        while descendants(shell.id()).len() < 2 && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let found = descendants(shell.id());
        let group = Pid::from_raw(i32::try_from(shell.id()).unwrap()).unwrap();
        kill_process_group(group, Signal::KILL).unwrap();
        shell.wait().unwrap();
        assert_eq!(found.len(), 2);
        assert!(!found.contains(&shell.id()));
    }
}
