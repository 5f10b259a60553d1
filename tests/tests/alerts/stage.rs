//! Where the scenes are played: clusters of their own, one Prometheus for all, and the rules as they are
//! deployed but for their pace.

use std::{
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use baton_tests::{ADMIN_TOKEN, Cluster, Prometheus, baton, chromium_or_skip};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Until an alert fires or is over. Only a hang takes this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whoever is looked at may not answer.
const LOOK: Duration = Duration::from_secs(2);

pub(crate) type Scene = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The deployed rules, with a second for each minute of their ranges and `for:`, and for whatever job.
pub(crate) fn hurried_rules(rules: &str) -> String {
    let mut hurried = String::new();
    for line in rules.lines() {
        let mut line = line.replace("job=\"baton\"", "job=~\".+\"");
        for minutes in ["1m", "5m", "10m", "15m"] {
            let seconds = minutes.replace('m', "s");
            line = line.replace(&format!("[{minutes}]"), &format!("[{seconds}]"));
            if line.trim() == format!("for: {minutes}") {
                line = line.replace(minutes, &seconds);
            }
        }
        hurried.push_str(&line);
        hurried.push('\n');
    }
    hurried
}

/// One scene's view of Prometheus: what it says of the cluster that is scraped as this job.
#[derive(Clone)]
pub(crate) struct Watch {
    pub(crate) prometheus: Arc<Prometheus>,
    pub(crate) job: &'static str,
}

impl Watch {
    pub(crate) fn over(&self, cluster: &Cluster) {
        self.prometheus.scrape(self.job, cluster.address()).unwrap();
    }

    /// The job's alerts that fire.
    pub(crate) async fn firing(&self) -> Vec<Value> {
        let alerts = self.prometheus.alerts().await.unwrap();
        let ours = |alert: &Value| alert["labels"]["job"] == self.job && alert["state"] == "firing";
        alerts.into_iter().filter(ours).collect()
    }

    pub(crate) async fn is_quiet(&self) {
        let firing = self.firing().await;
        assert!(firing.is_empty(), "{}: {firing:#?}", self.job);
    }

    /// Waits until it fires, and answers with its labels and annotations.
    pub(crate) async fn fires(&self, alert: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let firing = self.firing().await;
            if let Some(fires) = firing.iter().find(|it| it["labels"]["alertname"] == alert) {
                println!("{}: {} ({})", self.job, fires["annotations"]["summary"], names(&firing));
                return fires.clone();
            }
            assert!(Instant::now() < deadline, "{alert} does not fire: {firing:?}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until none of them is left.
    pub(crate) async fn clears(&self, alerts: &[&str]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let firing = names(&self.firing().await);
            if !alerts.iter().any(|alert| firing.contains(alert)) {
                return println!("{}: cleared ({firing} left)", self.job);
            }
            assert!(Instant::now() < deadline, "{alerts:?} stay: {firing}");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Values of an expression in which `JOB` stands for this scene's job, as runbooks ask for them.
    pub(crate) async fn query(&self, expression: &str) -> Vec<f64> {
        let expression = expression.replace("JOB", &format!("job={:?}", self.job));
        self.prometheus.query(&expression).await.unwrap()
    }

    /// What an operator sees now, kept below the directory that `BATON_SEEN` names; nothing without it.
    pub(crate) async fn seen(&self, cluster: &Cluster, when: &str) {
        let Some(directory) = std::env::var_os("BATON_SEEN").map(PathBuf::from) else { return };
        let directory = directory.join(format!("{}-{when}", self.job));
        std::fs::create_dir_all(&directory).unwrap();
        let (code, status) = ask(cluster, &["status", "--check"]).await;
        let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
        write("status", &format!("{status}\nexit {code}\n"));
        write("firing", &serde_json::to_string_pretty(&self.firing().await).unwrap());
        for path in ["/admin/state", "/debug/transfer", "/metrics"] {
            let asked = cluster.http.get(cluster.admin_url(path)).timeout(LOOK);
            if let Ok(answer) = asked.bearer_auth(ADMIN_TOKEN).send().await {
                write(&path[1..].replace('/', "-"), &answer.text().await.unwrap_or_default());
            }
        }
        if let Ok(answer) = cluster.http.get(cluster.url("/ready")).timeout(LOOK).send().await {
            let said = format!("{} {}", answer.status(), answer.text().await.unwrap_or_default());
            write("ready", &said);
        }
        picture(cluster.admin_url("/ui"), format!("{}-{when}", self.job)).await;
        for file in std::fs::read_dir(cluster.directory()).unwrap().flatten() {
            let name = file.file_name();
            if Path::new(&name).extension().is_some_and(|end| end == "log" || end == "toml") {
                std::fs::copy(file.path(), directory.join(name)).unwrap();
            }
        }
    }
}

fn names(alerts: &[Value]) -> String {
    let mut names: Vec<&str> =
        alerts.iter().filter_map(|alert| alert["labels"]["alertname"].as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(" ")
}

/// The live page, below the directory that `BATON_SCREENSHOTS` names; nothing without it.
async fn picture(url: String, name: String) {
    if std::env::var_os("BATON_SCREENSHOTS").is_none() {
        return;
    }
    let taken = tokio::task::spawn_blocking(move || {
        let Some(mut browser) = chromium_or_skip(&name) else { return Ok(()) };
        browser.look(1400, 900, "light")?;
        browser.open(&url)?;
        let token = format!(
            "document.querySelector('#token').value = {ADMIN_TOKEN:?};
             document.querySelector('#token-dialog .primary').click()"
        );
        browser.until("it asks", "document.querySelector('#token-dialog').open")?;
        browser.evaluate(&token)?;
        browser.until("it is live", "document.querySelector('#standing.live') !== null")?;
        browser.screenshot(&name)
    });
    // There is none of a coordinator that does not run.
    if let Err(error) = taken.await.unwrap() {
        println!("no picture: {error:#}");
    }
}

/// Asks `baton` as somebody on the coordinator's host does, by its file: its exit status, and what it says.
pub(crate) async fn ask(cluster: &Cluster, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(baton().unwrap());
    command.args(arguments).env_remove("BATON_ADMIN_TOKEN");
    command.arg("--config").arg(cluster.directory().join("baton.toml"));
    let asked = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = asked.await.unwrap();
    let said =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), said)
}

/// Clients that ask again and again, each for itself, until this is dropped.
pub(crate) struct Clients {
    clients: JoinSet<()>,
    answered: Arc<AtomicU64>,
}

/// What each client asks for.
#[derive(Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) prompt_tokens: usize,
    pub(crate) max_tokens: u32,
    /// Between an answer and the next question.
    pub(crate) pause: Duration,
    /// After so long a client gives up.
    pub(crate) patience: Duration,
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            prompt_tokens: 40,
            max_tokens: 4,
            pause: Duration::from_millis(100),
            patience: Duration::from_secs(60),
        }
    }
}

impl Clients {
    pub(crate) fn start(cluster: &Cluster, clients: usize, asked: Asked) -> Self {
        let answered = Arc::new(AtomicU64::new(0));
        let mut running = JoinSet::new();
        for client in 0..clients {
            let (http, url) = (cluster.http.clone(), cluster.url("/v1/completions"));
            let answered = answered.clone();
            running.spawn(async move {
                for round in 0_usize.. {
                    let first = [client, round].map(|number| 1 + number % 30_000);
                    let rest = (0..asked.prompt_tokens).map(|token| 1 + token % 199);
                    let prompt: Vec<usize> = first.into_iter().chain(rest).collect();
                    let body = json!({"prompt": prompt, "max_tokens": asked.max_tokens,
                        "stream": true, "ignore_eos": true});
                    // Some are to fail: that is what the scene is about.
                    let asked_for = http.post(&url).timeout(asked.patience).json(&body);
                    if let Ok(answer) = asked_for.send().await
                        && answer.text().await.is_ok()
                    {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                    tokio::time::sleep(asked.pause).await;
                }
            });
        }
        Self { clients: running, answered }
    }

    /// Waits until so many more were answered.
    pub(crate) async fn answered(&self, more: u64) {
        let (goal, deadline) =
            (self.answered.load(Ordering::Relaxed) + more, Instant::now() + PATIENCE);
        while self.answered.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < deadline, "{more} more answers do not come");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) async fn stop(mut self) {
        self.clients.shutdown().await;
    }
}
