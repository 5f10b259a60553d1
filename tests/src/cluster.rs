use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    answers::{Answer, StreamEvent, read_events},
    metrics::Metrics,
    ports::free_port,
    process::Process,
    vllm::VllmInstallation,
};

/// What operators show to a cluster of these scenarios.
pub const ADMIN_TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// What a cluster shall be.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    prefill: usize,
    decode: usize,
    engine: Engine,
    coordinator_toml: String,
    placement_toml: String,
    admission_toml: String,
    slo_toml: String,
    arena_toml: String,
    /// By role; those of no role for all.
    transfer_toml: BTreeMap<String, String>,
    tables_toml: String,
    log: Vec<String>,
    balancer_toml: String,
    tls: Option<TlsPem>,
    drain_timeout_seconds: u32,
    ready: bool,
    prefix: String,
    starts_workers: bool,
    one_process: bool,
    environment: Vec<(&'static str, String)>,
    /// By role.
    vllm_ranks: BTreeMap<&'static str, usize>,
}

/// One identity, and whom it trusts, as PEM texts.
#[derive(Clone, Debug)]
pub struct TlsPem {
    pub ca: String,
    pub certificate: String,
    pub private_key: String,
}

impl TlsPem {
    /// Writes the files below `directory` and answers the `[tls]` table that names them.
    pub fn write_to(&self, directory: &Path) -> Result<String> {
        fs::create_dir_all(directory)?;
        let files = [
            ("ca", "ca.pem", &self.ca),
            ("certificate", "host.pem", &self.certificate),
            ("private_key", "host.key", &self.private_key),
        ];
        let mut toml = "[tls]\n".to_owned();
        for (key, file, text) in files {
            let path = directory.join(file);
            fs::write(&path, text)?;
            writeln!(toml, "{key} = {path:?}")?;
        }
        Ok(toml)
    }
}

#[derive(Clone, Debug)]
enum Engine {
    Sim { toml: String },
    Vllm { program: PathBuf, model: PathBuf, arguments: Vec<String>, toml: String },
}

impl ClusterBuilder {
    /// One prefill and one decode worker with the embedded engine, as fast as it goes.
    pub fn sim() -> Self {
        let toml = "time_scale = 0.0\n".to_owned();
        Self::new(Engine::Sim { toml })
    }

    /// One prefill and one decode worker with a real vLLM each, in float32, of which token-for-token
    /// equality can be asked.
    pub fn vllm(installation: &VllmInstallation) -> Self {
        let program = installation.environment.join("bin/vllm");
        let model = installation.model.clone();
        Self::new(Engine::Vllm { program, model, arguments: Vec::new(), toml: String::new() })
    }

    fn new(engine: Engine) -> Self {
        Self {
            prefill: 1,
            decode: 1,
            engine,
            coordinator_toml: String::new(),
            // What a scenario is about shall not depend on what splitting is predicted to bring.
            placement_toml: "mode = \"always\"".to_owned(),
            admission_toml: String::new(),
            slo_toml: String::new(),
            // Beside the configuration, so that a killed worker's goes with it; smaller than some
            // prompts, so that handoffs have to wait for room.
            arena_toml: "directory = \".\"\nexport_bytes = \"48 MiB\"\nimport_bytes = \"48 MiB\""
                .into(),
            transfer_toml: BTreeMap::new(),
            tables_toml: String::new(),
            log: Vec::new(),
            balancer_toml: String::new(),
            tls: None,
            drain_timeout_seconds: 1,
            ready: true,
            prefix: String::new(),
            starts_workers: true,
            one_process: false,
            environment: Vec::new(),
            vllm_ranks: BTreeMap::new(),
        }
    }

    pub fn pools(mut self, prefill: usize, decode: usize) -> Self {
        (self.prefill, self.decode) = (prefill, decode);
        self
    }

    /// More keys of `[engine]`, in place of those of the same name.
    pub fn engine(mut self, keys: &str) -> Self {
        let (Engine::Sim { toml } | Engine::Vllm { toml, .. }) = &mut self.engine;
        let named = |line: &str| line.split('=').next().unwrap_or_default().trim().to_owned();
        let given: Vec<_> = keys.lines().map(named).collect();
        toml.retain_lines(|line| !given.contains(&named(line)));
        toml.push_str(keys);
        toml.push('\n');
        self
    }

    /// Tensor parallel ranks of the engines of one role (real vLLM only).
    pub fn vllm_ranks(mut self, role: &'static str, ranks: usize) -> Self {
        self.vllm_ranks.insert(role, ranks);
        self
    }

    /// More arguments for `vllm serve` (real vLLM only).
    pub fn vllm_arguments(mut self, more: &[&str]) -> Self {
        if let Engine::Vllm { arguments, .. } = &mut self.engine {
            arguments.extend(more.iter().map(ToString::to_string));
        }
        self
    }

    /// Keys of `[coordinator.limits]`.
    pub fn limits(mut self, keys: &str) -> Self {
        self.coordinator_toml = keys.to_owned();
        self
    }

    /// Keys of `[worker.transfer]`, of the workers of this role, or of all where it is empty.
    pub fn transfer(mut self, role: &str, keys: &str) -> Self {
        self.transfer_toml.insert(role.to_owned(), keys.to_owned());
        self
    }

    /// More tables of the file, such as `[telemetry]`. Relative paths are taken from the cluster's
    /// directory.
    pub fn tables(mut self, toml: &str) -> Self {
        self.tables_toml = toml.to_owned();
        self
    }

    /// Logs in JSON, what `filter` lets through.
    pub fn json_logs(mut self, filter: &str) -> Self {
        self.log = ["--log-format", "json", "--log", filter].map(str::to_owned).into();
        self
    }

    /// Keys of `[placement]`. Without them all requests are split that can be.
    pub fn placement(mut self, keys: &str) -> Self {
        self.placement_toml = keys.to_owned();
        self
    }

    /// Keys of `[admission]`.
    pub fn admission(mut self, keys: &str) -> Self {
        self.admission_toml = keys.to_owned();
        self
    }

    /// Keys of `[balancer]`.
    pub fn balancer(mut self, keys: &str) -> Self {
        self.balancer_toml = keys.to_owned();
        self
    }

    /// Keys of `[slo]`.
    pub fn slo(mut self, keys: &str) -> Self {
        self.slo_toml = keys.to_owned();
        self
    }

    /// Mutual TLS between coordinator and workers, who all show this one certificate.
    pub fn tls(mut self, pem: TlsPem) -> Self {
        self.tls = Some(pem);
        self
    }

    /// How long a worker that is told to stop goes on with what it has.
    pub fn drain_timeout_seconds(mut self, seconds: u32) -> Self {
        self.drain_timeout_seconds = seconds;
        self
    }

    /// Do not wait until each role has a worker.
    pub fn not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Workers' names begin so.
    pub fn named(mut self, prefix: &str) -> Self {
        self.prefix = prefix.to_owned();
        self
    }

    /// The scenario starts the workers itself.
    pub fn without_workers(mut self) -> Self {
        (self.starts_workers, self.ready) = (false, false);
        self
    }

    /// The coordinator's process has the workers in it.
    pub fn in_one_process(mut self) -> Self {
        self.one_process = true;
        self
    }

    /// A variable in the environment of all processes.
    pub fn environment(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    pub async fn start(self) -> Result<Cluster> {
        let directory = tempfile::tempdir()?;
        let (http_port, workers_port, admin_port) = (free_port(), free_port(), free_port());
        fs::write(directory.path().join("admin.token"), format!("{ADMIN_TOKEN}\n"))?;
        let mut workers = BTreeMap::new();
        for (role, count) in [("prefill", self.prefill), ("decode", self.decode)] {
            for index in 0..count {
                workers.insert(format!("{}{role}-{index}", self.prefix), role);
            }
        }
        let mut ports = BTreeMap::new();
        for name in workers.keys() {
            ports.insert(name.clone(), [free_port(), free_port()]);
        }
        let config = directory.path().join("baton.toml");
        let listeners = [http_port, workers_port, admin_port];
        let toml = self.toml(directory.path(), listeners, &workers, &ports)?;
        fs::write(&config, toml)?;

        let mut cluster = Cluster {
            config,
            processes: BTreeMap::new(),
            http: reqwest::Client::builder().no_proxy().build()?,
            base: format!("http://127.0.0.1:{http_port}"),
            workers_port,
            admin_port,
            log: self.log.clone(),
            one_process: self.one_process,
            environment: self.environment.clone(),
            ports,
            workers: workers
                .iter()
                .map(|(name, role)| (name.clone(), (*role).to_owned()))
                .collect(),
            directory,
        };
        cluster.start_process("coordinator")?;
        if self.starts_workers && !self.one_process {
            for name in workers.keys() {
                cluster.start_process(name)?;
            }
        }
        if self.ready {
            let patience = match self.engine {
                Engine::Sim { .. } => Duration::from_secs(30),
                Engine::Vllm { .. } => Duration::from_secs(300),
            };
            cluster.wait_for_workers(workers.len(), patience).await?;
        }
        Ok(cluster)
    }

    fn toml(
        &self,
        directory: &Path,
        [http_port, workers_port, admin_port]: [u16; 3],
        workers: &BTreeMap<String, &str>,
        ports: &BTreeMap<String, [u16; 2]>,
    ) -> Result<String> {
        let mut toml = format!(
            "[coordinator]\nlisten = \"127.0.0.1:{http_port}\"\n\
             workers_listen = \"127.0.0.1:{workers_port}\"\n\n\
             [coordinator.limits]\n{}\n\n[slo]\n{}\n\n[placement]\n{}\n\n[admission]\n{}\n\n[admin]\n\
             listen = \"127.0.0.1:{admin_port}\"\ntoken_file = \"admin.token\"\n\n[arena]\n{}\n\n{}\n",
            self.coordinator_toml,
            self.slo_toml,
            self.placement_toml,
            self.admission_toml,
            self.arena_toml,
            self.tables_toml
        );
        writeln!(toml, "[balancer]\n{}\n", self.balancer_toml)?;
        if let Some(tls) = &self.tls {
            writeln!(toml, "{}", tls.write_to(&directory.join("tls"))?)?;
        }
        if let Engine::Sim { toml: engine } = &self.engine {
            writeln!(toml, "[engine]\nkind = \"sim\"\n{engine}")?;
        }
        for (index, (name, role)) in workers.iter().enumerate() {
            let [transfer_port, engine_port] = ports[name];
            writeln!(toml, "[[worker]]\nname = \"{name}\"\nrole = \"{role}\"")?;
            writeln!(toml, "drain_timeout_seconds = {}", self.drain_timeout_seconds)?;
            writeln!(toml, "[worker.transfer]\nlisten = \"127.0.0.1:{transfer_port}\"")?;
            for keys in ["", role].iter().filter_map(|role| self.transfer_toml.get(*role)) {
                writeln!(toml, "{keys}")?;
            }
            if let Engine::Vllm { program, model, arguments, toml: keys } = &self.engine {
                let socket = directory.join(format!("{name}.sock"));
                let model = model.to_string_lossy().into_owned();
                let base = [
                    "serve",
                    &model,
                    "--served-model-name",
                    "smollm2",
                    "--enforce-eager",
                    "--dtype",
                    "float32",
                    "--max-model-len",
                    "2048",
                    "--max-num-seqs",
                    "8",
                    "--block-size",
                    "32",
                    "--kv-cache-memory-bytes",
                    "268435456",
                    "--enable-prompt-tokens-details",
                ];
                let ranks = self.vllm_ranks.get(role).copied().unwrap_or(1);
                let command: Vec<String> = [program.to_string_lossy().into_owned()]
                    .into_iter()
                    .chain(base.into_iter().map(str::to_owned))
                    .chain((ranks > 1).then(|| format!("--tensor-parallel-size={ranks}")))
                    .chain(arguments.iter().cloned())
                    .collect();
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                let bound: Vec<_> =
                    (index..index + ranks).map(|rank| (rank % cores).to_string()).collect();
                writeln!(
                    toml,
                    "[worker.engine]\nkind = \"vllm\"\ncommand = {command:?}\nport = {}\n\
                     connector_socket = {socket:?}\n\
                     environment = {{ HF_HUB_OFFLINE = \"1\", VLLM_NO_USAGE_STATS = \"1\", \
                     VLLM_SERVER_DEV_MODE = \"1\", VLLM_CPU_OMP_THREADS_BIND = \"{}\" }}\n{keys}",
                    engine_port,
                    bound.join("|"),
                )?;
            }
        }
        Ok(toml)
    }
}

trait RetainLines {
    fn retain_lines(&mut self, keep: impl Fn(&str) -> bool);
}

impl RetainLines for String {
    fn retain_lines(&mut self, keep: impl Fn(&str) -> bool) {
        *self = self
            .lines()
            .filter(|line| keep(line))
            .fold(String::new(), |kept, line| kept + line + "\n");
    }
}

/// A running cluster. All of it ends when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    pub http: reqwest::Client,
    base: String,
    workers_port: u16,
    admin_port: u16,
    log: Vec<String>,
    one_process: bool,
    environment: Vec<(&'static str, String)>,
    /// Of each worker: its transfer channel's, and its engine's.
    ports: BTreeMap<String, [u16; 2]>,
    config: PathBuf,
    workers: BTreeMap<String, String>,
    // Workers end before the coordinator, and all of them before their directory.
    processes: BTreeMap<String, Process>,
    directory: TempDir,
}

impl Cluster {
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// `host:port` where clients connect.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// Where a worker's vLLM serves.
    pub fn engine_port(&self, worker: &str) -> u16 {
        self.ports[worker][1]
    }

    /// Where a worker's transfer channel listens (UDP).
    pub fn transfer_port(&self, worker: &str) -> u16 {
        self.ports[worker][0]
    }

    /// Where workers connect.
    pub fn workers_port(&self) -> u16 {
        self.workers_port
    }

    /// Where operators look in, with [`ADMIN_TOKEN`].
    pub fn admin_url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.admin_port)
    }

    pub async fn admin_get(&self, path: &str) -> Answer {
        let request = self.http.get(self.admin_url(path)).bearer_auth(ADMIN_TOKEN);
        Answer::of(request.send().await.expect("an answer")).await.expect("a whole answer")
    }

    /// What `/admin/state` says.
    pub async fn state(&self) -> Value {
        self.admin_get("/admin/state").await.json()
    }

    pub async fn admin_post(&self, path: &str, body: &Value) -> Answer {
        let request = self.http.post(self.admin_url(path)).bearer_auth(ADMIN_TOKEN).json(body);
        Answer::of(request.send().await.expect("an answer")).await.expect("a whole answer")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a process of the configuration: `coordinator`, or a worker by its name.
    pub fn start_process(&mut self, name: &str) -> Result<()> {
        let config = self.config.to_string_lossy().into_owned();
        let role = self.workers.get(name).map(|role| format!("{role}-worker"));
        let mut arguments = match &role {
            None if self.one_process => vec!["coordinator", "--with-workers", "--config", &config],
            None => vec!["coordinator", "--config", &config],
            Some(role) => vec![role.as_str(), "--config", &config, "--name", name],
        };
        arguments.extend(self.log.iter().map(String::as_str));
        let process = Process::start(name, &arguments, &self.environment, self.directory.path())?;
        self.processes.insert(name.to_owned(), process);
        Ok(())
    }

    /// The text of the file that all processes were started with.
    pub fn config(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.config)?)
    }

    /// Starts one more process, called `process` here: the worker `name` of a file of its own.
    pub fn start_worker_of(
        &mut self,
        toml: &str,
        process: &str,
        role: &str,
        name: &str,
    ) -> Result<()> {
        let config = self.directory.path().join(format!("{process}.toml"));
        fs::write(&config, toml)?;
        let role = format!("{role}-worker");
        let arguments = [role.as_str(), "--config", &config.to_string_lossy(), "--name", name];
        let started =
            Process::start(process, &arguments, &self.environment, self.directory.path())?;
        self.processes.insert(process.to_owned(), started);
        Ok(())
    }

    /// Waits until a process says something in its log.
    pub async fn wait_for_log(&self, process: &str, says: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.log(process).contains(says) {
            assert!(Instant::now() < deadline, "no {says:?} in:\n{}", self.log(process));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn kill(&mut self, name: &str) {
        if let Some(mut process) = self.processes.remove(name) {
            process.kill();
        }
    }

    pub fn terminate(&mut self, name: &str) -> Result<()> {
        self.processes.remove(name).context("no such process")?.terminate()
    }

    pub fn process_id(&self, name: &str) -> Option<u32> {
        self.processes.get(name).map(Process::id)
    }

    pub fn log(&self, name: &str) -> String {
        self.processes.get(name).map(Process::log).unwrap_or_default()
    }

    /// Waits until this many workers are attached.
    pub async fn wait_for_workers(&mut self, count: usize, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            for process in self.processes.values_mut() {
                process.check_alive()?;
            }
            if let Ok(metrics) = self.try_metrics().await
                && metrics.sum("baton_workers", &[]) == count as f64
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                let logs: Vec<_> = self.processes.values().map(Process::log_tail).collect();
                bail!("{count} workers did not attach in time:\n{}", logs.join("\n---\n"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        let response = self.http.post(self.url(path)).json(body).send().await;
        Answer::of(response.expect("an answer")).await.expect("a whole answer")
    }

    pub async fn get(&self, path: &str) -> Answer {
        let response = self.http.get(self.url(path)).send().await.expect("an answer");
        Answer::of(response).await.expect("a whole answer")
    }

    /// A greedy completion of token ids or text.
    pub async fn complete(&self, prompt: impl Into<Value>, max_tokens: u32) -> Answer {
        let prompt = prompt.into();
        let body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        });
        self.post("/v1/completions", &body).await
    }

    pub async fn stream(&self, path: &str, body: &Value) -> Result<Vec<StreamEvent>> {
        read_events(self.http.post(self.url(path)).json(body).send().await?).await
    }

    pub async fn try_metrics(&self) -> Result<Metrics> {
        let response = self.http.get(self.url("/metrics")).send().await?;
        ensure!(response.status().is_success(), "metrics: {}", response.status());
        Ok(Metrics::parse(&response.text().await?))
    }

    pub async fn metrics(&self) -> Metrics {
        self.try_metrics().await.expect("metrics")
    }

    /// Waits until the metrics say what they should; workers report each half second. So long only where the machine
    /// has much else to do.
    pub async fn eventually(&self, what: &str, holds: impl Fn(&Metrics) -> bool) -> Metrics {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let metrics = self.metrics().await;
            if holds(&metrics) {
                return metrics;
            }
            assert!(Instant::now() < deadline, "never held: {what}\n{metrics:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Nothing is left of any request: no job, no handoff, no slot, no request in an engine.
    pub async fn eventually_idle(&self) -> Metrics {
        self.eventually("everything is idle", |metrics| {
            let left = [
                "baton_requests_open",
                "baton_worker_jobs",
                "baton_worker_handoffs_open",
                "baton_worker_arena_slots_used",
                "baton_worker_engine_requests_running",
                "baton_worker_engine_requests_waiting",
            ];
            left.iter().all(|name| metrics.sum(name, &[]) == 0.0)
        })
        .await
    }
}
