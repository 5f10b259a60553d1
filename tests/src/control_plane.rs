use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kube::{Client, Config};
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

use crate::ports::free_port;

/// The folder that `scripts/install-kube-apiserver.sh` filled, or `None` after saying that the test is
/// skipped. Where `BATON_REQUIRE_KUBE` is set there is no skipping.
pub fn kube_or_skip(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("BATON_KUBE").map(PathBuf::from);
    if let Some(folder) = folder.filter(|folder| folder.join("kube-apiserver").exists()) {
        return Some(folder);
    }
    let wanted = "BATON_KUBE to name what scripts/install-kube-apiserver.sh made";
    assert!(std::env::var_os("BATON_REQUIRE_KUBE").is_none(), "{test} needs {wanted}");
    println!("SKIPPED {test}: set {wanted}");
    None
}

/// Has all rights.
const ADMIN: &str = "admin-token-of-a-test";

/// etcd and kube-apiserver on loopback; nodes there are none. All of it ends when this is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    programs: PathBuf,
    port: u16,
    etcd_port: u16,
    ca: String,
    processes: Vec<(&'static str, Child)>,
    directory: TempDir,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        while let Some(&(name, _)) = self.processes.last() {
            self.stop(name);
        }
    }
}

impl ControlPlane {
    pub async fn start(programs: PathBuf) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name);
        let serving_key = KeyPair::generate()?;
        let serving =
            CertificateParams::new(["127.0.0.1".to_owned()])?.self_signed(&serving_key)?;
        fs::write(at("serving.pem"), serving.pem())?;
        fs::write(at("serving.key"), serving_key.serialize_pem())?;
        let accounts = KeyPair::generate()?;
        fs::write(at("accounts.key"), accounts.serialize_pem())?;
        fs::write(at("accounts.pub"), accounts.public_key_pem())?;
        fs::write(at("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))?;
        let [port, etcd_port] = [free_port(), free_port()];
        let mut control_plane =
            Self { programs, port, etcd_port, ca: serving.pem(), processes: Vec::new(), directory };
        fs::write(control_plane.kubeconfig(), control_plane.kubeconfig_of(ADMIN))?;
        control_plane.start_etcd()?;
        control_plane.start_api_server().await?;
        Ok(control_plane)
    }

    fn at(&self, name: &str) -> String {
        self.directory.path().join(name).to_string_lossy().into_owned()
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    fn spawn(&mut self, name: &'static str, arguments: &[String]) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.at(&format!("{name}.log")))?;
        let child = Command::new(self.programs.join(name))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        self.processes.push((name, child));
        Ok(())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let client = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("http://127.0.0.1:{}", free_port());
        let arguments = [
            format!("--data-dir={}", self.at("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            // It need not outlive the machine.
            "--unsafe-no-fsync".to_owned(),
        ];
        self.spawn("etcd", &arguments)
    }

    /// Starts it, or starts it again at the same address, and waits until it serves.
    pub async fn start_api_server(&mut self) -> Result<()> {
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", self.at("serving.pem")),
            format!("--tls-private-key-file={}", self.at("serving.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", self.at("accounts.pub")),
            format!("--service-account-signing-key-file={}", self.at("accounts.key")),
            "--authorization-mode=RBAC".to_owned(),
            format!("--token-auth-file={}", self.at("tokens.csv")),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
            // Nobody but the tests dials it.
            "--endpoint-reconciler-type=none".to_owned(),
        ];
        self.spawn("kube-apiserver", &arguments)?;
        let deadline = Instant::now() + Duration::from_secs(120);
        let client = self.client(ADMIN)?;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match client.request_text(request).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    bail!("the API server does not serve: {error}\n{}", self.log("kube-apiserver"))
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
            for at in 0..self.processes.len() {
                let (name, process) = &mut self.processes[at];
                if let (name, Some(status)) = (*name, process.try_wait()?) {
                    bail!("{name} ended: {status}\n{}", self.log(name));
                }
            }
        }
    }

    /// Starts a program of the control plane that goes by a kubeconfig.
    pub fn start_client(&mut self, name: &'static str, arguments: &[&str]) -> Result<()> {
        let mut all = vec![
            format!("--kubeconfig={}", self.kubeconfig().display()),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            // No port for its own metrics.
            "--secure-port=0".to_owned(),
        ];
        all.extend(arguments.iter().map(ToString::to_string));
        self.spawn(name, &all)
    }

    /// Where the key lies that signs service accounts' tokens.
    pub fn accounts_key(&self) -> String {
        self.at("accounts.key")
    }

    /// Ends one of the processes without a chance to say goodbye.
    pub fn stop(&mut self, name: &str) {
        if let Some(at) = self.processes.iter().position(|(process, _)| *process == name) {
            let (_, mut process) = self.processes.remove(at);
            // It may have ended of itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// The end of a process's log.
    pub fn log(&self, name: &str) -> String {
        let log = fs::read_to_string(self.at(&format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// How whoever has this token speaks to the API server.
    pub fn credentials(&self, token: &str) -> Result<Config> {
        let mut config = Config::new(self.url().parse()?);
        config.root_cert = Some(vec![pem_der(&self.ca)?]);
        config.auth_info.token = Some(token.to_owned().into());
        Ok(config)
    }

    pub fn client(&self, token: &str) -> Result<Client> {
        Ok(Client::try_from(self.credentials(token)?)?)
    }

    pub fn admin(&self) -> Result<Client> {
        self.client(ADMIN)
    }

    /// The administrator's.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A kubeconfig of whoever has this token.
    pub fn kubeconfig_of(&self, token: &str) -> String {
        let certificate = self.at("serving.pem");
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: {}\n    \
             certificate-authority: {certificate}\nusers:\n- name: u\n  user:\n    token: {token}\n\
             contexts:\n- name: c\n  context:\n    cluster: c\n    user: u\n    namespace: baton\n\
             current-context: c\n",
            self.url(),
        )
    }

    /// Runs kubectl as the administrator, with a text as its input. Answers what it said on stdout, and on
    /// stderr, where the API server's warnings come.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<(String, String)> {
        let mut child = Command::new(self.programs.join("kubectl"))
            .args(arguments)
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start kubectl")?;
        child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "kubectl {}: {stderr}", arguments.join(" "));
        Ok((stdout, stderr))
    }

    /// The published definitions of custom resources.
    pub fn custom_resources(&self) -> PathBuf {
        self.programs.join("crds")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn pem_der(pem: &str) -> Result<Vec<u8>> {
    use base64::Engine as _;
    let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    Ok(base64::engine::general_purpose::STANDARD.decode(body)?)
}
