use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A real Prometheus that scrapes its targets each second.
#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    http: reqwest::Client,
    base: String,
    directory: TempDir,
}

/// The directory of `prometheus` and `promtool`, or `None` after saying that the test is skipped. Where
/// `BATON_REQUIRE_PROMETHEUS` is set there is no skipping.
pub fn prometheus_or_skip(test: &str) -> Option<PathBuf> {
    let named = std::env::var_os("BATON_PROMETHEUS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = named
        .into_iter()
        .chain(std::env::split_paths(&path))
        .find(|directory| ["prometheus", "promtool"].iter().all(|p| directory.join(p).is_file()));
    if found.is_none() {
        let made = "scripts/install-prometheus.sh made";
        assert!(
            std::env::var_os("BATON_REQUIRE_PROMETHEUS").is_none(),
            "{test} needs BATON_PROMETHEUS to name what {made}"
        );
        println!("SKIPPED {test}: set BATON_PROMETHEUS to what {made}");
    }
    found
}

impl Prometheus {
    /// Scrapes `target` (`host:port`) as the job `baton`, with the rules of a file.
    pub async fn start(programs: &Path, target: &str, rules: &Path) -> Result<Self> {
        let prometheus = Self::start_without_targets(programs, rules).await?;
        prometheus.scrape("baton", target)?;
        Ok(prometheus)
    }

    /// Is told later whom to scrape.
    pub async fn start_without_targets(programs: &Path, rules: &Path) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let file = directory.path().join("prometheus.yml");
        let targets = directory.path().join("*.targets.json");
        fs::write(
            &file,
            format!(
                "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\n\
                 rule_files: [{rules:?}]\n\
                 scrape_configs:\n  - job_name: baton\n    \
                 file_sd_configs: [{{ files: [{targets:?}], refresh_interval: 1s }}]\n"
            ),
        )?;
        let child = Command::new(programs.join("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start prometheus")?;
        let http = reqwest::Client::builder().no_proxy().build()?;
        let prometheus = Self { child, http, base: format!("http://127.0.0.1:{port}"), directory };
        let deadline = Instant::now() + Duration::from_secs(60);
        while prometheus.get("/-/ready", &[]).await.is_err() {
            ensure!(Instant::now() < deadline, "prometheus does not become ready");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(prometheus)
    }

    /// Scrapes one more target (`host:port`), in the place of the job's former one.
    pub fn scrape(&self, job: &str, target: &str) -> Result<()> {
        let groups = json!([{ "targets": [target], "labels": { "job": job } }]);
        let file = self.directory.path().join(format!("{job}.targets.json"));
        // Never half a file: it is read whenever it changes.
        let unfinished = file.with_extension("unfinished");
        fs::write(&unfinished, groups.to_string())?;
        Ok(fs::rename(unfinished, file)?)
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<String> {
        let url = format!("{}{path}", self.base);
        let response = self.http.get(reqwest::Url::parse_with_params(&url, query)?).send().await?;
        let status = response.status();
        let text = response.text().await?;
        ensure!(status.is_success(), "{path} {query:?}: {text}");
        Ok(text)
    }

    async fn api(&self, path: &str, query: &[(&str, &str)]) -> Result<Value> {
        let answer: Value = serde_json::from_str(&self.get(path, query).await?)?;
        if answer["status"] != "success" {
            bail!("{path} {query:?}: {answer}");
        }
        Ok(answer["data"].clone())
    }

    /// The values of an expression now; those that are no number are left out.
    pub async fn query(&self, expression: &str) -> Result<Vec<f64>> {
        let data = self.api("/api/v1/query", &[("query", expression)]).await?;
        let samples = data["result"].as_array().context("a vector")?;
        let values = samples.iter().filter_map(|sample| sample["value"][1].as_str()?.parse().ok());
        Ok(values.filter(|value: &f64| !value.is_nan()).collect())
    }

    /// The alerts that are pending or fire: `labels`, `annotations`, `state`, `value`.
    pub async fn alerts(&self) -> Result<Vec<Value>> {
        let data = self.api("/api/v1/alerts", &[]).await?;
        Ok(data["alerts"].as_array().context("alerts")?.clone())
    }

    /// Each alert rule as Prometheus read it: `name`, `query`, `health`, `state`, ….
    pub async fn alert_rules(&self) -> Result<Vec<Value>> {
        let data = self.api("/api/v1/rules", &[("type", "alert")]).await?;
        let groups = data["groups"].as_array().context("groups of rules")?;
        Ok(groups.iter().flat_map(|group| group["rules"].as_array()).flatten().cloned().collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
