//! Hosts with network stacks and addresses of their own, on one switch: network namespaces, each
//! held by a process of ours. Nothing of it is seen from the machine's own network, and all of it is
//! gone when its processes are, however the test ends.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The switch, to which hosts are added.
#[derive(Debug)]
pub struct Network {
    switch: Namespace,
    hosts: usize,
}

/// A host on the network.
#[derive(Debug)]
pub struct Host {
    namespace: Namespace,
    port: String,
}

/// A host's wire that can be made slow.
#[derive(Debug)]
pub struct SlowWire {
    process: Child,
}

impl Network {
    /// `None`, said on the terminal, where namespaces may not be made; an error where
    /// `BATON_REQUIRE_NETNS` asks for them.
    pub fn new_or_skip() -> Result<Option<Self>> {
        match Namespace::new().and_then(Self::on) {
            Ok(network) => Ok(Some(network)),
            Err(error) if std::env::var_os("BATON_REQUIRE_NETNS").is_some() => Err(error),
            Err(error) => {
                println!(
                    "skipped: no network namespaces here (root and iproute2 are needed): {error:#}"
                );
                Ok(None)
            }
        }
    }

    fn on(switch: Namespace) -> Result<Self> {
        switch.ip("link add switch type bridge")?;
        switch.ip("link set switch up")?;
        Ok(Self { switch, hosts: 0 })
    }

    /// A host by an address such as `10.77.0.11`, in a network of 24 bits.
    pub fn host(&mut self, address: &str) -> Result<Host> {
        let (namespace, port) = (Namespace::new()?, self.next_port());
        let holder = namespace.holder.id();
        self.switch.ip(&format!("link add {port} type veth peer name eth0 netns {holder}"))?;
        self.plug_in(namespace, port, address)
    }

    /// The same, on a wire that can be made slow.
    pub fn host_on_slow_wire(&mut self, address: &str) -> Result<(Host, SlowWire)> {
        let (namespace, port) = (Namespace::new()?, self.next_port());
        let wire = SlowWire::between((&self.switch, &port), (&namespace, "eth0"))?;
        Ok((self.plug_in(namespace, port, address)?, wire))
    }

    fn next_port(&mut self) -> String {
        self.hosts += 1;
        format!("port{}", self.hosts)
    }

    fn plug_in(&self, namespace: Namespace, port: String, address: &str) -> Result<Host> {
        self.switch.ip(&format!("link set {port} master switch up"))?;
        namespace.ip("link set lo up")?;
        namespace.ip(&format!("address add {address}/24 dev eth0"))?;
        namespace.ip("link set eth0 up")?;
        Ok(Host { namespace, port })
    }

    /// From now on nothing reaches the host and nothing leaves it; nobody is told.
    pub fn cut_off(&self, host: &Host) -> Result<()> {
        // Taken from the switch, not down: the host's own side sees nothing of it.
        self.switch.ip(&format!("link set {} nomaster", host.port))
    }

    pub fn reconnect(&self, host: &Host) -> Result<()> {
        self.switch.ip(&format!("link set {} master switch", host.port))
    }
}

impl Host {
    /// A command that runs on this host.
    pub fn command(&self, program: &Path) -> Command {
        self.namespace.command(program)
    }

    /// What this thread opens from now on, it opens on this host.
    pub fn move_in(&self) -> Result<()> {
        let namespace = fs::File::open(self.namespace.path())?;
        let network = Some(LinkNameSpaceType::Network);
        Ok(move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), network)?)
    }
}

impl SlowWire {
    fn between(one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("slow_wire.py");
        let ends = [one, other]
            .map(|(namespace, name)| [namespace.holder.id().to_string(), name.to_owned()]);
        let mut process = Command::new("python3")
            .arg(script)
            .args(ends.as_flattened())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start python3")?;
        let mut said = String::new();
        let stdout = process.stdout.take().context("no stdout")?;
        BufReader::new(stdout).read_line(&mut said)?;
        ensure!(said.trim() == "ready", "slow_wire.py does not start: {:?}", process.wait());
        Ok(Self { process })
    }

    /// What happens to each frame from now on, in each direction.
    pub fn set(&mut self, delay: Duration, loss: f64) -> Result<()> {
        let stdin = self.process.stdin.as_mut().context("no stdin")?;
        Ok(writeln!(stdin, "{} {loss}", delay.as_secs_f64() * 1000.0)?)
    }
}

impl Drop for SlowWire {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A network namespace that lives as long as a process which waits for the end of its stdin: ours.
#[derive(Debug)]
struct Namespace {
    holder: Child,
}

impl Namespace {
    fn new() -> Result<Self> {
        let holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run unshare (util-linux)")?;
        let mut namespace = Self { holder };
        // Of this thread, which may have moved in somewhere.
        let ours = fs::read_link("/proc/thread-self/ns/net")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read_link(namespace.path()).is_ok_and(|theirs| theirs == ours) {
            if let Some(status) = namespace.holder.try_wait()? {
                bail!("unshare --net is refused ({status})");
            }
            ensure!(Instant::now() < deadline, "unshare --net makes no namespace");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(namespace)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.holder.id())
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg(program);
        command
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        let output = self
            .command(Path::new("ip"))
            .args(arguments.split(' '))
            .output()
            .context("cannot run nsenter (util-linux)")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ip {arguments}: {}", stderr.trim());
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
