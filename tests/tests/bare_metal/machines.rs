//! The cluster of `deploy/bare-metal/baton.toml`: each host of the file a network namespace with that
//! address, the certificates by `baton certs`, and the embedded engine in vLLM's place.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use baton_tests::{ADMIN_TOKEN, Host, HttpsClient, Metrics, Network, Process, SlowWire, baton};
use tempfile::TempDir;
use toml::{Table, Value};

const KEY: &str = "a-key-of-no-worth";
const CLIENT: &str = "10.77.0.100";
/// Whose wire can be made slow.
pub(crate) const FAR_AWAY: &str = "decode-1";
pub(crate) const COORDINATOR: &str = "coordinator";

/// All hosts, and what runs on them.
pub(crate) struct Machines {
    // Processes end before their hosts, and those before the switch.
    processes: BTreeMap<String, Process>,
    hosts: BTreeMap<String, Host>,
    wire: SlowWire,
    _client: Host,
    network: Network,
    addresses: BTreeMap<String, SocketAddr>,
    file: Table,
    directory: TempDir,
}

impl Machines {
    /// `None` where no namespaces may be made.
    pub(crate) async fn start_or_skip() -> Option<Self> {
        let machines = Self::prepare_or_skip()?;
        Some(machines.started().await)
    }

    /// The hosts with their files; nothing runs yet.
    pub(crate) fn prepare_or_skip() -> Option<Self> {
        let mut network = Network::new_or_skip().unwrap()?;
        let file = deployed();
        let addresses = addresses(&file);
        let mut hosts = BTreeMap::new();
        let mut slow = None;
        for (name, address) in &addresses {
            let ip = address.ip().to_string();
            let host = if name == FAR_AWAY {
                let (host, wire) = network.host_on_slow_wire(&ip).unwrap();
                slow = Some(wire);
                host
            } else {
                network.host(&ip).unwrap()
            };
            hosts.insert(name.clone(), host);
        }
        let client = network.host(CLIENT).unwrap();
        client.move_in().unwrap();
        let machines = Self {
            processes: BTreeMap::new(),
            hosts,
            wire: slow.unwrap(),
            _client: client,
            network,
            addresses,
            file,
            directory: tempfile::tempdir().unwrap(),
        };
        let certs = machines.certs_directory();
        machines.certs(&["init", "--out", &certs]);
        for name in machines.names() {
            machines.issue(&name, &[]);
            machines.install(&name);
            machines.write_file(&name, &machines.file.clone());
        }
        Some(machines)
    }

    /// Starts what the file has, and waits until all workers are attached.
    pub(crate) async fn started(mut self) -> Self {
        for name in self.names() {
            self.start(&name);
        }
        self.eventually("2 + 2 workers", |metrics| pools(metrics) == (2.0, 2.0)).await;
        self
    }

    fn names(&self) -> Vec<String> {
        self.addresses.keys().cloned().collect()
    }

    pub(crate) fn file(&self) -> Table {
        self.file.clone()
    }

    /// Of one host: its file, certificates and logs.
    pub(crate) fn host_directory(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn certs_directory(&self) -> String {
        self.directory.path().join("certs").to_string_lossy().into_owned()
    }

    /// What was said, of a command that has to succeed.
    pub(crate) fn certs(&self, arguments: &[&str]) -> String {
        let output = Command::new(baton().unwrap()).arg("certs").args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "baton certs {arguments:?}: {said}{stderr}");
        said
    }

    /// One more host, with a certificate of its own.
    pub(crate) fn add_host(&mut self, name: &str, address: SocketAddr) {
        let host = self.network.host(&address.ip().to_string()).unwrap();
        self.hosts.insert(name.to_owned(), host);
        self.addresses.insert(name.to_owned(), address);
        self.issue(name, &[]);
        self.install(name);
    }

    /// A certificate for the address of a host, and for its worker alone.
    pub(crate) fn issue(&self, name: &str, more: &[&str]) {
        let (ip, certs) = (self.addresses[name].ip().to_string(), self.certs_directory());
        let mut arguments = vec!["issue", &ip, "--ca", &certs];
        if !name.starts_with(COORDINATOR) {
            arguments.extend(["--worker", name]);
        }
        arguments.extend(more);
        self.certs(&arguments);
    }

    pub(crate) fn ca(&self, command: &str) {
        self.certs(&[command, "--ca", &self.certs_directory()]);
    }

    /// Puts what was issued for a host where its file looks, each file at once.
    pub(crate) fn install(&self, name: &str) {
        let tls = self.host_directory(name).join("tls");
        fs::create_dir_all(&tls).unwrap();
        let issued = Path::new(&self.certs_directory()).join(self.addresses[name].ip().to_string());
        for file in ["host.key", "host.pem", "ca.pem"] {
            let beside = tls.join("new");
            fs::copy(issued.join(file), &beside).unwrap();
            fs::rename(&beside, tls.join(file)).unwrap();
        }
    }

    pub(crate) fn write_file(&self, name: &str, file: &Table) {
        let directory = self.host_directory(name);
        fs::create_dir_all(directory.join("keys")).unwrap();
        fs::write(directory.join("keys/default"), format!("{KEY}\n")).unwrap();
        fs::write(directory.join("admin.token"), format!("{ADMIN_TOKEN}\n")).unwrap();
        fs::write(directory.join("baton.toml"), file.to_string()).unwrap();
    }

    /// Starts the coordinator of a host, or the worker of that name.
    pub(crate) fn start(&mut self, name: &str) {
        self.start_on(name, name, name);
    }

    /// Starts a worker `name` of the file in a directory, on a host.
    pub(crate) fn start_on(&mut self, host: &str, directory: &str, name: &str) {
        let directory = self.host_directory(directory);
        let mut command = self.hosts[host].command(&baton().unwrap());
        match name.split_once('-') {
            Some((role @ ("prefill" | "decode"), _)) => {
                command.arg(format!("{role}-worker")).args(["--name", name]);
            }
            _ => {
                command.arg("coordinator");
            }
        }
        command.arg("--stop-with-stdin").arg("--config").arg(directory.join("baton.toml"));
        let process = Process::spawn(name, command, &directory).unwrap();
        let process_name = directory.file_name().unwrap().to_string_lossy().into_owned();
        self.processes.insert(process_name, process);
    }

    pub(crate) fn kill(&mut self, name: &str) {
        self.processes.get_mut(name).unwrap().kill();
    }

    pub(crate) fn terminate(&mut self, name: &str) {
        self.processes.get_mut(name).unwrap().terminate().unwrap();
    }

    pub(crate) fn log(&self, name: &str) -> String {
        self.processes[name].log()
    }

    pub(crate) fn cut_off(&self, name: &str) {
        self.network.cut_off(&self.hosts[name]).unwrap();
    }

    pub(crate) fn reconnect(&self, name: &str) {
        self.network.reconnect(&self.hosts[name]).unwrap();
    }

    /// Of [`FAR_AWAY`], both ways alike.
    pub(crate) fn slow_down(&mut self, delay: Duration, loss: f64) {
        self.wire.set(delay, loss).unwrap();
    }

    pub(crate) fn client(&self) -> HttpsClient {
        self.client_of(COORDINATOR)
    }

    pub(crate) fn client_of(&self, coordinator: &str) -> HttpsClient {
        HttpsClient {
            address: self.addresses[coordinator],
            ca: Path::new(&self.certs_directory()).join("ca.pem"),
            key: Some(KEY.to_owned()),
        }
    }

    /// Waits until the log of a process says something `times` times.
    pub(crate) async fn said(&self, name: &str, what: &str, times: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.log(name).matches(what).count() < times {
            assert!(Instant::now() < deadline, "{name} never said {what:?}:\n{}", self.log(name));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until the coordinator's metrics say what they should.
    pub(crate) async fn eventually(&self, what: &str, holds: impl Fn(&Metrics) -> bool) {
        self.eventually_of(COORDINATOR, what, holds).await;
    }

    pub(crate) async fn eventually_of(
        &self,
        coordinator: &str,
        what: &str,
        holds: impl Fn(&Metrics) -> bool,
    ) {
        let client = self.client_of(coordinator);
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut last = String::new();
        while Instant::now() < deadline {
            if let Ok((_, _, text)) = client.get("/metrics").await {
                if holds(&Metrics::parse(&text)) {
                    return;
                }
                last = text;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let logs: Vec<_> = self.processes.values().map(Process::log_tail).collect();
        panic!("never held: {what}\n{last}\n{}", logs.join("\n---\n"));
    }

    /// Nothing is left of any request.
    pub(crate) async fn eventually_idle(&self) {
        self.eventually("everything is idle", |metrics| {
            let left = [
                "baton_requests_open",
                "baton_worker_jobs",
                "baton_worker_handoffs_open",
                "baton_worker_arena_slots_used",
            ];
            left.iter().all(|name| metrics.sum(name, &[]) == 0.0)
        })
        .await;
    }
}

/// Attached prefill and decode workers.
pub(crate) fn pools(metrics: &Metrics) -> (f64, f64) {
    let count = |role| metrics.sum("baton_workers", &[role]);
    (count("role=\"prefill\""), count("role=\"decode\""))
}

/// The file as it is deployed, with the embedded engine and arenas of its size. All requests are split,
/// and pools stay as they are: what is done to them here is done on purpose.
fn deployed() -> Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bare-metal/baton.toml");
    let mut file: Table = fs::read_to_string(path).unwrap().parse().unwrap();
    for (name, table) in [
        ("engine", "kind = \"sim\"\ntime_scale = 0.5"),
        ("arena", "directory = \".\"\nexport_bytes = \"16 MiB\"\nimport_bytes = \"16 MiB\""),
        ("placement", "mode = \"always\""),
        ("balancer", "actuator = \"off\""),
    ] {
        file.insert(name.to_owned(), table.parse::<Table>().unwrap().into());
    }
    for worker in file["worker"].as_array_mut().unwrap() {
        let worker = worker.as_table_mut().unwrap();
        worker.remove("engine");
        worker.remove("arena");
    }
    file
}

/// Of the coordinator where clients find it, and of each worker where others do.
fn addresses(file: &Table) -> BTreeMap<String, SocketAddr> {
    let listen = |table: &Value| table["listen"].as_str().unwrap().parse::<SocketAddr>().unwrap();
    let workers =
        file["worker"].as_array().unwrap().iter().map(|worker| {
            (worker["name"].as_str().unwrap().to_owned(), listen(&worker["transfer"]))
        });
    workers.chain([(COORDINATOR.to_owned(), listen(&file["coordinator"]))]).collect()
}
