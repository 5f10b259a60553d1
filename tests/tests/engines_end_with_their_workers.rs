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

#[test]
fn a_killed_workers_engine_is_gone_with_all_its_children() {
    let directory = tempfile::tempdir().unwrap();
    // In place of vLLM: a server that starts, and a core of it that does not look after its parent.
    let program = directory.path().join("engine.sh");
    let pids = directory.path().join("pids");
    fs::write(
        &program,
        format!("sleep 600 & echo $$ $! > {0}.part; mv {0}.part {0}; wait", pids.display()),
    )
    .unwrap();
    let port = free_port();
    let config = directory.path().join("baton.toml");
    let toml = format!(
        "[coordinator]\nlisten = \"127.0.0.1:8000\"\nworkers_listen = \"127.0.0.1:7000\"\n[engine]\n\
         kind = \"vllm\"\ncommand = [\"sh\", {program:?}]\nport = {port}\n[arena]\ndirectory = \
         \".\"\n[[worker]]\nname = \"decode-0\"\nrole = \"decode\"\n"
    );
    fs::write(&config, toml).unwrap();
    let mut command = Command::new(baton().unwrap());
    command.args(["decode-worker", "--name", "decode-0", "--config"]).arg(&config);
    let mut worker = Process::spawn("decode-0", command, directory.path()).unwrap();
    until("the engine starts", || Path::new(&pids).exists());
    let pids = fs::read_to_string(&pids).unwrap();
    assert!(pids.split_whitespace().all(is_alive), "{pids}");
    worker.kill();
    until("all of it is gone", || !pids.split_whitespace().any(is_alive));
}
