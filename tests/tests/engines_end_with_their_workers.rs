//! A worker that is killed takes its engine with it: left alone, that would keep its port and its GPU
//! from the worker's next life.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use baton_tests::{Process, baton, free_port};

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_alive(pid: &str) -> bool {
    // A zombie whose parent has not yet asked is dead too.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A worker whose engine is a server that starts, and a core of it that does not look after its parent.
/// `then` is what the server does once their process numbers stand in `pids`.
fn worker(directory: &Path, pids: &Path, then: &str) -> Process {
    let program = directory.join("engine.sh");
    let script =
        format!("sleep 600 & echo $$ $! > {0}.part; mv {0}.part {0}; {then}", pids.display());
    fs::write(&program, script).unwrap();
    let port = free_port();
    let config = directory.join("baton.toml");
    let toml = format!(
        "[coordinator]\nlisten = \"127.0.0.1:8000\"\nworkers_listen = \"127.0.0.1:7000\"\n[engine]\n\
         kind = \"vllm\"\ncommand = [\"sh\", {program:?}]\nport = {port}\n[arena]\ndirectory = \
         \".\"\n[[worker]]\nname = \"decode-0\"\nrole = \"decode\"\n"
    );
    fs::write(&config, toml).unwrap();
    let mut command = Command::new(baton().unwrap());
    command.args(["decode-worker", "--name", "decode-0", "--config"]).arg(&config);
    Process::spawn("decode-0", command, directory).unwrap()
}

fn written(pids: &Path) -> String {
    until("the engine starts", || pids.exists());
    fs::read_to_string(pids).unwrap()
}

#[test]
fn a_killed_workers_engine_is_gone_with_all_its_children() {
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    let mut worker = worker(directory.path(), &pids, "wait");
    let pids = written(&pids);
    assert!(pids.split_whitespace().all(is_alive), "{pids}");
    worker.kill();
    until("all of it is gone", || !pids.split_whitespace().any(is_alive));
}

#[test]
fn so_it_is_where_the_worker_is_killed_as_its_engine_starts() {
    let directory = tempfile::tempdir().unwrap();
    let pids = directory.path().join("pids");
    // Its parent is the worker.
    let _worker = worker(directory.path(), &pids, "kill -KILL $PPID; wait");
    let pids = written(&pids);
    until("all of it is gone", || !pids.split_whitespace().any(is_alive));
}
