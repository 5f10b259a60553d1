use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use baton_config::ClusterConfig;
use baton_coordinator::admin::{ClusterState, Mode, TOKEN_VARIABLE};
use baton_core::Split;
use baton_harness::compare::{Coordinator, OperatorError, Standing};
use baton_types::Role;
use hyper::StatusCode;
use serde_json::{Value, json};

use crate::http::Question;

const DEFAULT_URL: &str = "http://127.0.0.1:9400";

/// Where the coordinator's `[admin]` listens, and what opens it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Access {
    /// URL of the coordinator's [admin] listener [default: http://127.0.0.1:9400].
    #[arg(long, env = "BATON_ADMIN", value_name = "URL")]
    admin: Option<String>,
    /// File whose first line is its token; $BATON_ADMIN_TOKEN goes before it.
    #[arg(long, env = "BATON_ADMIN_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// File with the CA's certificate, where the listener has [admin.https].
    #[arg(long, env = "BATON_ADMIN_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Takes what is not given from this baton.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Access {
    pub(crate) fn client(&self) -> anyhow::Result<AdminClient> {
        let mut from_file = FromFile::default();
        if let Some(file) = &self.config {
            from_file = FromFile::of(ClusterConfig::read(file)?)
                .with_context(|| format!("{}: it has no [admin]", file.display()))?;
        }
        let url = self.admin.clone().or(from_file.url).unwrap_or_else(|| DEFAULT_URL.to_owned());
        let token_file = self.token_file.clone().or(from_file.token_file);
        let client = match (std::env::var(TOKEN_VARIABLE), token_file) {
            (Ok(token), _) => AdminClient::with_token(&url, &token),
            (Err(_), Some(file)) => AdminClient::new(&url, &file)?,
            (Err(_), None) => anyhow::bail!(
                "no token: give --token-file FILE or --config baton.toml, or set {TOKEN_VARIABLE}"
            ),
        };
        Ok(AdminClient { ca: self.ca.clone().or(from_file.ca), ..client })
    }
}

/// What a baton.toml says of its `[admin]`.
#[derive(Debug, Default)]
struct FromFile {
    url: Option<String>,
    token_file: Option<PathBuf>,
    ca: Option<PathBuf>,
}

impl FromFile {
    fn of(cluster: ClusterConfig) -> Option<Self> {
        let admin = cluster.admin?;
        let scheme = if admin.https.is_some() { "https" } else { "http" };
        Some(Self {
            url: Some(format!("{scheme}://{}", admin.listen)),
            token_file: admin.token_file,
            ca: cluster.tls.map(|tls| tls.ca),
        })
    }
}

/// Speaks with one coordinator.
pub(crate) struct AdminClient {
    pub(crate) url: String,
    pub(crate) token: String,
    /// Whose certificates it trusts, with https.
    pub(crate) ca: Option<PathBuf>,
}

impl AdminClient {
    pub(crate) fn new(url: &str, token_file: &Path) -> anyhow::Result<Self> {
        let token = fs::read_to_string(token_file)
            .with_context(|| format!("cannot read the token file {}", token_file.display()))?;
        Ok(Self::with_token(url, &token))
    }

    fn with_token(url: &str, token: &str) -> Self {
        let token = token.lines().next().unwrap_or_default().trim().to_owned();
        Self { url: url.trim_end_matches('/').to_owned(), token, ca: None }
    }

    pub(crate) async fn state(&self) -> anyhow::Result<ClusterState> {
        let text = self.ask("/admin/state", None).await?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} answers what this version does not know", self.url))
    }

    pub(crate) async fn set_mode(&self, mode: Mode) -> anyhow::Result<()> {
        self.post("/admin/mode", &json!({ "mode": mode })).await.map(|_| ())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.ask(path, Some(body.to_string())).await?)?)
    }

    async fn ask(&self, path: &str, body: Option<String>) -> anyhow::Result<String> {
        let token = Some(self.token.as_str());
        let ca = self.ca.as_deref();
        let (status, text) = Question { base: &self.url, ca, path, token, body }.ask().await?;
        if status == StatusCode::UNAUTHORIZED {
            anyhow::bail!("{} does not take this token", self.url);
        }
        if !status.is_success() {
            let said = serde_json::from_str::<Value>(&text).ok();
            let message = said.as_ref().and_then(|said| said["error"]["message"].as_str());
            anyhow::bail!("{}", message.unwrap_or(&format!("{} answers {status}", self.url)));
        }
        Ok(text)
    }
}

impl Coordinator for AdminClient {
    async fn standing(&self) -> Result<Standing, OperatorError> {
        let state = self.state().await?;
        let workers = |role: Role| state.workers.iter().filter(move |w| w.role == role.as_str());
        Ok(Standing {
            split: state.mode.into(),
            prefill_workers: u32::try_from(workers(Role::Prefill).count())?,
            decode_workers: u32::try_from(workers(Role::Decode).count())?,
        })
    }

    async fn switch(&self, split: Split) -> Result<(), OperatorError> {
        Ok(self.set_mode(split.into()).await?)
    }
}
