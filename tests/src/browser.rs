use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A real Chromium without a window, with one page, driven over its DevTools protocol.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: mpsc::Receiver<Value>,
    sent: u64,
    session: Option<String>,
    complaints: Vec<String>,
    _profile: TempDir,
}

/// The browser, or `None` after saying that the test is skipped. Where `BATON_REQUIRE_CHROMIUM` is set
/// there is no skipping.
pub fn chromium_or_skip(test: &str) -> Option<Browser> {
    let Some(program) = program() else {
        assert!(
            std::env::var_os("BATON_REQUIRE_CHROMIUM").is_none(),
            "{test} needs chromium on the PATH, or BATON_CHROMIUM to name it"
        );
        println!("SKIPPED {test}: there is no chromium on the PATH, and BATON_CHROMIUM names none");
        return None;
    };
    Some(Browser::start(&program).expect("chromium starts"))
}

fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("BATON_CHROMIUM") {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&path)
        .flat_map(|directory| names.map(|name| directory.join(name)))
        .find(|program| program.is_file())
}

impl Browser {
    fn start(program: &Path) -> Result<Self> {
        let profile = tempfile::tempdir()?;
        // Commands come in at descriptor 3 and answers leave at 4.
        let script = "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>/dev/null";
        let mut child = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(program)
            .args([
                "--headless=new",
                "--remote-debugging-pipe",
                // Tests may run as root, where Chromium has no sandbox.
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--no-default-browser-check",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-proxy-server",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let commands = child.stdin.take().context("a pipe for commands")?;
        let mut answers = BufReader::new(child.stdout.take().context("a pipe for answers")?);
        let (sender, messages) = mpsc::channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while answers.read_until(0, &mut message).is_ok_and(|read| read > 0) {
                message.pop();
                let told = serde_json::from_slice(&message).map(|message| sender.send(message));
                if !matches!(told, Ok(Ok(()))) {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Self {
            child,
            commands,
            messages,
            sent: 0,
            session: None,
            complaints: Vec::new(),
            _profile: profile,
        };
        let page = browser.command("Target.createTarget", &json!({ "url": "about:blank" }))?;
        let target = json!({ "targetId": page["targetId"], "flatten": true });
        let attached = browser.command("Target.attachToTarget", &target)?;
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page.enable", "Runtime.enable", "Log.enable"] {
            browser.command(domain, &json!({}))?;
        }
        Ok(browser)
    }

    fn command(&mut self, method: &str, parameters: &Value) -> Result<Value> {
        self.sent += 1;
        let mut command = json!({ "id": self.sent, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            command["sessionId"] = session.as_str().into();
        }
        self.commands.write_all(&serde_json::to_vec(&command)?)?;
        self.commands.write_all(&[0])?;
        self.commands.flush()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).context("chromium says nothing")?;
            if message["id"] == self.sent {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].clone());
            }
            self.hear(&message);
        }
    }

    /// Errors of scripts, and what the page's policy forbids.
    fn hear(&mut self, message: &Value) {
        match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push(message["params"].to_string()),
            Some("Log.entryAdded") if message["params"]["entry"]["level"] == "error" => {
                self.complaints.push(message["params"]["entry"].to_string());
            }
            _ => {}
        }
    }

    /// Opens a page and waits until its scripts have begun.
    pub fn open(&mut self, url: &str) -> Result<()> {
        let navigated = self.command("Page.navigate", &json!({ "url": url }))?;
        ensure!(navigated["errorText"].is_null(), "{url}: {navigated}");
        self.until("the page is there", "document.readyState === 'complete'")
    }

    /// Runs a script in each page before the page's own.
    pub fn before_pages(&mut self, script: &str) -> Result<()> {
        let source = json!({ "source": script });
        self.command("Page.addScriptToEvaluateOnNewDocument", &source).map(drop)
    }

    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let parameters =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let result = self.command("Runtime.evaluate", &parameters)?;
        if let Some(thrown) = result.get("exceptionDetails") {
            bail!("{expression}: {thrown}");
        }
        Ok(result["result"]["value"].clone())
    }

    /// Waits until an expression is true.
    pub fn until(&mut self, what: &str, expression: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.evaluate(expression)? != true {
            if Instant::now() > deadline {
                let page = self.evaluate("document.body.innerText")?;
                bail!("never: {what} ({expression})\n{}", page.as_str().unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    pub fn look(&mut self, width: u32, height: u32, scheme: &str) -> Result<()> {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1,
            "mobile": false });
        self.command("Emulation.setDeviceMetricsOverride", &size)?;
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.command("Emulation.setEmulatedMedia", &media).map(drop)
    }

    /// The whole page as PNG, below the directory that `BATON_SCREENSHOTS` names; nothing without it.
    pub fn screenshot(&mut self, name: &str) -> Result<()> {
        let Some(directory) = std::env::var_os("BATON_SCREENSHOTS").map(PathBuf::from) else {
            return Ok(());
        };
        let shot =
            self.command("Page.captureScreenshot", &json!({ "captureBeyondViewport": true }))?;
        let png = STANDARD.decode(shot["data"].as_str().context("a picture")?)?;
        std::fs::create_dir_all(&directory)?;
        Ok(std::fs::write(directory.join(format!("{name}.png")), png)?)
    }

    /// What scripts failed at and what was forbidden since this was last asked.
    pub fn complaints(&mut self) -> Vec<String> {
        while let Ok(message) = self.messages.try_recv() {
            self.hear(&message);
        }
        std::mem::take(&mut self.complaints)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended of itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
