use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// One process of the cluster, with its log. It ends when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn start(
        name: &str,
        arguments: &[&str],
        environment: &[(&str, String)],
        directory: &Path,
    ) -> Result<Self> {
        let mut command = Command::new(baton()?);
        command.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
        Self::spawn(name, command, directory)
    }

    /// Starts any command that becomes the program, with its log in `directory`.
    pub fn spawn(name: &str, mut command: Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let append = || File::options().create(true).append(true).open(&log);
        let child = command
            .env("BATON_LOG", std::env::var("BATON_LOG").unwrap_or_else(|_| "info".into()))
            // Held open as long as we live: a process of ours ends with us.
            .stdin(Stdio::piped())
            .stdout(append()?)
            .stderr(append()?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended ({status}):\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Ends it without a chance to say goodbye.
    pub fn kill(&mut self) {
        // It may have ended of itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to stop, as an operator would, and waits until it has.
    pub fn terminate(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &id]).status()?;
        ensure!(status.success(), "cannot signal {}", self.name);
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "{} does not stop:\n{}", self.name, self.log_tail());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // First the polite way, so that a vLLM that it drives ends too.
        if self.terminate().is_err() {
            self.kill();
        }
    }
}

/// The program, as this build made it.
pub fn baton() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let target = test.parent().and_then(Path::parent).context("a test lies in target/*/deps")?;
    let baton = target.join("baton");
    ensure!(
        baton.exists(),
        "{} is not built: run `cargo test --workspace`, or `cargo build -p baton` first",
        baton.display()
    );
    Ok(baton)
}
