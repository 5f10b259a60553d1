use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn shell(
    script: &str,
    environment: &BTreeMap<String, String>,
) -> Result<EngineProcess, EngineError> {
    let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
    let launch = Launch {
        command: &command,
        environment,
        arguments: Vec::new(),
        port: 0,
        worker_name: "p0",
    };
    EngineProcess::spawn(&launch)
}

fn is_alive(pid: &str) -> bool {
    // A zombie whose parent has not yet asked is dead too.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

async fn until(condition: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn the_end_of_a_process_tells_its_status_and_last_words() {
    let process = shell("echo starting; echo no such model >&2; exit 3", &BTreeMap::new()).unwrap();
    let EngineError::Ended(how) = timeout(PATIENCE, process.ended()).await.unwrap() else {
        panic!("another error")
    };
    assert!(how.contains("exit status: 3"), "{how}");
    assert!(how.contains("starting") && how.contains("no such model"), "{how}");
}

#[tokio::test]
async fn stopping_ends_the_children_too() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    let script = format!("sleep 600 & echo $! > {0}.part; mv {0}.part {0}; wait", pids.display());
    for stop in [true, false] {
        let process = shell(&script, &BTreeMap::new()).unwrap();
        until(|| pids.exists()).await;
        let child = std::fs::read_to_string(&pids).unwrap().trim().to_owned();
        std::fs::remove_file(&pids).unwrap();
        assert!(is_alive(&child));
        if stop {
            timeout(PATIENCE, process.stop()).await.unwrap();
        }
        drop(process);
        until(|| !is_alive(&child)).await;
    }
}

/// As Python's resource tracker does it: deaf to signals, until it is alone.
#[tokio::test]
async fn what_cleans_up_behind_the_others_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (ready, cleaned) = (dir.path().join("ready"), dir.path().join("cleaned"));
    let script = format!(
        "(trap '' TERM; : > {}; while kill -0 $$; do sleep 0.05; done; : > {}) & exec sleep 600",
        ready.display(),
        cleaned.display()
    );
    let process = shell(&script, &BTreeMap::new()).unwrap();
    until(|| ready.exists()).await;
    timeout(PATIENCE, process.stop()).await.unwrap();
    assert!(cleaned.exists());
}

#[tokio::test]
async fn a_process_that_will_not_stop_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let script = format!("trap '' TERM; : > {}; while :; do sleep 1; done", ready.display());
    let process = shell(&script, &BTreeMap::new()).unwrap();
    until(|| ready.exists()).await;
    timeout(PATIENCE, process.stop_within(Duration::from_millis(200))).await.unwrap();
    let ended = process.ended().await.to_string();
    assert!(ended.contains("SIGKILL"), "{ended}");
}

#[tokio::test]
async fn what_cannot_start_says_so_at_once() {
    let none = BTreeMap::new();
    let launch = |command, port| Launch {
        command,
        environment: &none,
        arguments: vec![],
        port,
        worker_name: "p0",
    };
    let missing = ["/does/not/exist".to_owned()];
    let error = EngineProcess::spawn(&launch(&missing, 0)).unwrap_err().to_string();
    assert!(error.contains("/does/not/exist"), "{error}");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let sleep = ["sleep".to_owned(), "600".to_owned()];
    let error = EngineProcess::spawn(&launch(&sleep, port)).unwrap_err().to_string();
    assert!(error.contains(&port.to_string()), "{error}");
    assert!(EngineProcess::spawn(&launch(&[], 0)).is_err());
}

#[tokio::test]
async fn the_connector_comes_first_on_the_python_path() {
    let environment = BTreeMap::from([
        (CONNECTOR_PATH.to_owned(), "/opt/baton/connector".to_owned()),
        ("PYTHONPATH".to_owned(), "/a:/b".to_owned()),
    ]);
    let process = shell("echo path $PYTHONPATH", &environment).unwrap();
    let said = timeout(PATIENCE, process.ended()).await.unwrap().to_string();
    assert!(said.contains("path /opt/baton/connector:/a:/b"), "{said}");
}
