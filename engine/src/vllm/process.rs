use std::{
    collections::{BTreeMap, VecDeque},
    ffi::OsString,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};

use crate::EngineError;

/// vLLM ends its requests and its child processes in this time, or is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Once its server has ended, the others of vLLM's processes clean up after it in this time, or are
/// killed.
const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(3);
const CLEAN_UP_INTERVAL: Duration = Duration::from_millis(50);
/// What a dead process said last is part of its error.
const LAST_LINES: usize = 20;
const MAX_LINE_BYTES: u64 = 16 << 10;
/// Output of a process whose end was seen is waited for this long.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_millis(500);

/// Where the Python package of our connector lies, if it is not installed beside vLLM.
const CONNECTOR_PATH: &str = "BATON_CONNECTOR_PATH";

pub(super) struct Launch<'a> {
    pub(super) command: &'a [String],
    pub(super) environment: &'a BTreeMap<String, String>,
    /// After the command's own.
    pub(super) arguments: Vec<String>,
    pub(super) port: u16,
    pub(super) worker_name: &'a str,
}

/// One process of vLLM, all its children and their keeper: a process group of its own.
#[derive(Debug)]
pub(super) struct EngineProcess {
    group: Pid,
    ended: watch::Receiver<Option<String>>,
}

impl EngineProcess {
    pub(super) fn spawn(launch: &Launch<'_>) -> Result<Self, EngineError> {
        let (program, arguments) = launch
            .command
            .split_first()
            .ok_or_else(|| EngineError::NotStarted("the engine's command is empty".to_owned()))?;
        // Left to vLLM, a taken port shows only after the model is loaded.
        TcpListener::bind(("127.0.0.1", launch.port)).map_err(|error| {
            EngineError::NotStarted(format!("port {} for the engine: {error}", launch.port))
        })?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(&launch.arguments)
            .envs(launch.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(python_path) = python_path(launch.environment) {
            command.env("PYTHONPATH", python_path);
        }
        let not_started = |reason: String| EngineError::NotStarted(format!("{program}: {reason}"));
        let keeper = keeper()
            .inspect_err(|error| {
                tracing::warn!(%error, "if this worker is killed, its engine will go on alone");
            })
            .ok();
        let keepers_group = keeper.as_ref().and_then(pid_of);
        command.process_group(keepers_group.map_or(0, |group| group.as_raw_nonzero().get()));
        let child = command.spawn().map_err(|error| not_started(error.to_string()))?;
        let group = keepers_group
            .or_else(|| pid_of(&child))
            .ok_or_else(|| not_started("it ended at once".to_owned()))?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(watch_over(child, keeper, group, launch.worker_name.to_owned(), sender));
        Ok(Self { group, ended })
    }

    /// Waits for its end and tells how it came, with the last lines that it wrote.
    pub(super) async fn ended(&self) -> EngineError {
        let mut ended = self.ended.clone();
        let how = match ended.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or_default(),
            Err(_) => "it is no longer watched".to_owned(),
        };
        EngineError::Ended(how)
    }

    pub(super) async fn stop(&self) {
        self.stop_within(STOP_TIMEOUT).await;
    }

    async fn stop_within(&self, patience: Duration) {
        signal(self.group, &self.ended, Signal::TERM);
        if timeout(patience, self.ended()).await.is_err() {
            tracing::warn!("the engine did not stop in {patience:?}: killed");
            signal(self.group, &self.ended, Signal::KILL);
            self.ended().await;
        }
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        // After `stop`, there is nothing left to kill.
        signal(self.group, &self.ended, Signal::KILL);
    }
}

/// Leads the engine's group, and kills it when this process is gone, however it went: nobody else holds
/// the other end of the keeper's stdin. A killed worker's engine would keep its port and its GPU. It is
/// there before the engine, so that there is no moment at which a killed worker leaves one behind.
fn keeper() -> std::io::Result<Child> {
    Command::new("sh")
        .args(["-c", "read -r _; kill -KILL 0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

fn pid_of(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
}

fn signal(group: Pid, ended: &watch::Receiver<Option<String>>, signal: Signal) {
    // The group's number may belong to others once its processes were waited for.
    if ended.borrow().is_none() {
        let _ = kill_process_group(group, signal);
    }
}

async fn watch_over(
    mut child: Child,
    keeper: Option<Child>,
    group: Pid,
    worker_name: String,
    ended: watch::Sender<Option<String>>,
) {
    let last_lines = Arc::new(Mutex::new(VecDeque::with_capacity(LAST_LINES)));
    let stdout = child.stdout.take().map(|out| log_lines(out, &worker_name, &last_lines));
    let stderr = child.stderr.take().map(|err| log_lines(err, &worker_name, &last_lines));
    let output = tokio::spawn(async move {
        tokio::join!(
            async {
                if let Some(lines) = stdout {
                    lines.await;
                }
            },
            async {
                if let Some(lines) = stderr {
                    lines.await;
                }
            },
        )
    });
    let how = child.wait().await.map_or_else(|error| error.to_string(), describe);
    clean_up(group).await;
    if let Some(mut keeper) = keeper {
        let _ = keeper.wait().await;
    }
    let _ = timeout(LAST_OUTPUT_TIMEOUT, output).await;
    let lines: Vec<String> = last_lines.lock().drain(..).collect();
    ended.send_replace(Some(format!("{how}; it wrote last:\n{}", lines.join("\n"))));
}

/// vLLM's engine cores are no good without their server. What they leave in shared memory is removed by
/// Python's resource tracker, a process of the same group, which does so when all others have gone: killed
/// together with them, it leaves hundreds of MiB behind.
async fn clean_up(group: Pid) {
    let _ = kill_process_group(group, Signal::TERM);
    let gone = async {
        while has_live_process(group) {
            tokio::time::sleep(CLEAN_UP_INTERVAL).await;
        }
    };
    let _ = timeout(CLEAN_UP_TIMEOUT, gone).await;
    let _ = kill_process_group(group, Signal::KILL);
}

/// As `/proc` has it; where there is none, nobody lives.
fn has_live_process(group: Pid) -> bool {
    let group = group.as_raw_nonzero().to_string();
    let is_of_group = |process: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(process.path().join("stat")).ok()?;
        // `pid (name) state parent group …`, and the name may have anything in it.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        (fields.next()? != "Z" && fields.nth(1)? == group).then_some(())
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(is_of_group).next().is_some()
}

fn describe(status: ExitStatus) -> String {
    // "exit status: 1" or "signal: 9 (SIGKILL)"
    status.to_string()
}

/// Hands each line to the log. vLLM logs no prompts unless it is asked to.
fn log_lines(
    output: impl AsyncRead + Unpin + Send + 'static,
    worker_name: &str,
    last_lines: &Arc<Mutex<VecDeque<String>>>,
) -> impl Future<Output = ()> + Send + 'static {
    let (worker, last_lines) = (worker_name.to_owned(), last_lines.clone());
    async move {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut output).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            tracing::info!(target: "vllm", worker, "{text}");
            let mut last_lines = last_lines.lock();
            if last_lines.len() == LAST_LINES {
                last_lines.pop_front();
            }
            last_lines.push_back(text);
        }
    }
}

/// The connector's directory before what the user has there.
fn python_path(environment: &BTreeMap<String, String>) -> Option<OsString> {
    let connector = environment
        .get(CONNECTOR_PATH)
        .map(PathBuf::from)
        .or_else(|| std::env::var_os(CONNECTOR_PATH).map(PathBuf::from))
        .or_else(connector_beside_program)?;
    let users = environment
        .get("PYTHONPATH")
        .map(OsString::from)
        .or_else(|| std::env::var_os("PYTHONPATH"));
    let mut paths = vec![connector];
    paths.extend(users.iter().flat_map(std::env::split_paths));
    std::env::join_paths(paths).ok()
}

/// In a source tree, and in an archive that has the programs and `connector/` under one directory.
fn connector_beside_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    program
        .ancestors()
        .skip(1)
        .take(4)
        .map(|directory| directory.join("connector"))
        .find(|connector| has_package(connector))
}

fn has_package(directory: &Path) -> bool {
    directory.join("baton_connector/__init__.py").is_file()
}

#[cfg(test)]
mod tests;
