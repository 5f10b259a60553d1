//! A vLLM server beside the worker: its process, its HTTP API over loopback, and the socket at which
//! our connector inside it hands KV blocks over.

pub(crate) mod arena_files;
mod connector;
mod frames;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod http;
mod kv_events;
mod probe;
mod process;
mod scheduler;
mod sse;

use std::{path::Path, sync::OnceLock, time::Duration};

use async_trait::async_trait;
use baton_config::{ArenaConfig, VllmConfig, VllmSource};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    Answer, Engine, EngineDescription, EngineError, EngineLoad, EngineRequest, KvCache, KvCacheLog,
    KvPort, Pacing, sim::Profile,
};
use connector::ConnectorListener;
use http::EngineHttp;
use kv_events::{EventSockets, KvEventsFollower};
use process::EngineProcess;

/// An engine that somebody else runs is looked at this often.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);
/// It has ended when it does not answer this many times in a row.
const HEALTH_FAILURES: u32 = 3;

/// Ours, in the connector's package: keeps the pace that it is told.
const SCHEDULER_CLASS: &str = "baton_connector.scheduler.PacedScheduler";

/// Drives one vLLM server. Made inside a tokio runtime.
#[derive(Debug)]
pub struct VllmEngine {
    http: EngineHttp,
    start_timeout: Duration,
    /// Absent where somebody else runs the server.
    process: Option<EngineProcess>,
    ports: Mutex<Option<mpsc::Receiver<KvPort>>>,
    /// Where it was told to publish KV events.
    event_sockets: Option<EventSockets>,
    pacing: Pacing,
    takes_priority: bool,
    wants_usage_asked: bool,
    /// Known once the engine serves.
    kv_cache: OnceLock<(KvCache, KvEventsFollower)>,
    _connector: Option<ConnectorListener>,
}

impl VllmEngine {
    /// Listens for the connector, then starts the process where the worker runs it.
    pub fn start(
        config: &VllmConfig,
        arena: &ArenaConfig,
        worker_name: &str,
    ) -> Result<Self, EngineError> {
        let profile = config.profile.as_deref().map(Profile::read).transpose();
        let profile = profile.map_err(|error| EngineError::NotStarted(error.to_string()))?;
        let pacing = Pacing::new(profile.map(|profile| profile.model));
        let (ports, connector) = match &config.connector_socket {
            None => (None, None),
            Some(socket) => {
                let (sender, receiver) = mpsc::channel(1);
                let listener =
                    ConnectorListener::bind(socket, arena, worker_name, sender, pacing.clone())?;
                (Some(receiver), Some(listener))
            }
        };
        let event_sockets = match &config.source {
            VllmSource::Command { command, .. } if !sets(command, "--kv-events-config") => {
                EventSockets::beside(&arena.directory, worker_name)
            }
            VllmSource::Command { .. } | VllmSource::Url(_) => None,
        };
        let (mut takes_priority, mut wants_usage_asked) = (false, false);
        let (address, process) = match &config.source {
            VllmSource::Url(url) => (http::authority(url)?, None),
            VllmSource::Command { command, environment, port } => {
                let socket = config.connector_socket.as_deref();
                let mut arguments = serve_arguments(
                    *port,
                    socket.map(|socket| (socket, config.layer_groups)),
                    event_sockets.as_ref(),
                );
                let order = order_arguments(command, socket);
                takes_priority = order.iter().chain(command).any(|word| word == "priority");
                arguments.extend(order);
                // With it all clients are told the usage.
                wants_usage_asked = !sets(command, "--enable-force-include-usage");
                let launch =
                    process::Launch { command, environment, arguments, port: *port, worker_name };
                (format!("127.0.0.1:{port}"), Some(EngineProcess::spawn(&launch)?))
            }
        };
        Ok(Self {
            http: EngineHttp::new(address),
            start_timeout: config.start_timeout,
            process,
            ports: Mutex::new(ports),
            event_sockets,
            pacing,
            takes_priority,
            wants_usage_asked,
            kv_cache: OnceLock::new(),
            _connector: connector,
        })
    }

    async fn follow_kv_events(&self, description: &EngineDescription) {
        let (Some(sockets), Some(model)) = (&self.event_sockets, description.models.first()) else {
            return;
        };
        let cache = match probe::cache_config(&self.http).await {
            Ok(cache) => cache,
            Err(error) => {
                tracing::warn!(%error, "vLLM's prefix cache is not followed");
                return;
            }
        };
        self.kv_cache.get_or_init(|| {
            let log = KvCacheLog::default();
            let probe::CacheConfig { block_size_tokens, capacity_tokens } = cache;
            let follower = KvEventsFollower::start(
                sockets.clone(),
                model.clone(),
                block_size_tokens,
                log.clone(),
            );
            (KvCache { block_size_tokens, capacity_tokens, log }, follower)
        });
    }

    async fn process_ended(&self) -> EngineError {
        match &self.process {
            Some(process) => process.ended().await,
            None => std::future::pending().await,
        }
    }
}

/// What the worker adds to the user's command: for the connector its socket and the number of layer groups.
fn serve_arguments(
    port: u16,
    connector: Option<(&Path, u32)>,
    event_sockets: Option<&EventSockets>,
) -> Vec<String> {
    let mut arguments =
        vec!["--host".into(), "127.0.0.1".into(), "--port".into(), port.to_string()];
    if let Some((socket, layer_groups)) = connector {
        let transfer = serde_json::json!({
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "baton_connector",
            // The request's own parameters say which part an engine has in a handoff, so that a worker
            // can change pools without a restart.
            "kv_role": "kv_both",
            // A decode that silently recomputes would pass for a handoff.
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": { "socket": socket, "layer_groups": layer_groups },
        });
        arguments.extend(["--kv-transfer-config".into(), transfer.to_string()]);
    }
    if let Some(sockets) = event_sockets {
        arguments.extend(["--kv-events-config".into(), sockets.argument()]);
    }
    arguments
}

/// Who goes first, and how much of a prompt each step takes in: ours to say, unless the user's command
/// says it.
fn order_arguments(command: &[String], connector_socket: Option<&Path>) -> Vec<String> {
    let mut arguments = Vec::new();
    if !sets(command, "--scheduling-policy") {
        arguments.extend(["--scheduling-policy".to_owned(), "priority".to_owned()]);
    }
    if connector_socket.is_some() && !sets(command, "--scheduler-cls") {
        arguments.extend(["--scheduler-cls".to_owned(), SCHEDULER_CLASS.to_owned()]);
    }
    arguments
}

/// Whether the user's command says it. Of KV events: then somebody else follows them, who may count on
/// their address.
fn sets(command: &[String], flag: &str) -> bool {
    command.iter().any(|argument| {
        // vLLM takes names with underscores too.
        let name = argument.split_once('=').map_or(argument.as_str(), |(name, _)| name);
        name.replace('_', "-") == flag
    })
}

#[async_trait]
impl Engine for VllmEngine {
    async fn ready(&self) -> Result<EngineDescription, EngineError> {
        let started = tokio::time::timeout(self.start_timeout, probe::until_healthy(&self.http));
        tokio::select! {
            biased;
            error = self.process_ended() => Err(error),
            healthy = started => match healthy {
                Ok(()) => {
                    let description = probe::describe(&self.http).await?;
                    self.follow_kv_events(&description).await;
                    Ok(description)
                }
                Err(_) => Err(EngineError::NotStarted(format!(
                    "vLLM at {} does not answer /health after {} s",
                    self.http.address(),
                    self.start_timeout.as_secs(),
                ))),
            },
        }
    }

    async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError> {
        self.http.run(request).await
    }

    async fn load(&self) -> Result<EngineLoad, EngineError> {
        probe::load(&self.http).await
    }

    fn kv_ports(&self) -> Option<mpsc::Receiver<KvPort>> {
        self.ports.lock().take()
    }

    fn kv_cache(&self) -> Option<KvCache> {
        self.kv_cache.get().map(|(cache, _)| cache.clone())
    }

    fn pacing(&self) -> Option<Pacing> {
        Some(self.pacing.clone())
    }

    /// Tokens that come while its server is busy go out together.
    fn wants_usage_asked(&self) -> bool {
        self.wants_usage_asked
    }

    fn takes_priority(&self) -> bool {
        self.takes_priority
    }

    async fn ended(&self) -> EngineError {
        if self.process.is_some() {
            return self.process_ended().await;
        }
        let mut failures = 0;
        loop {
            tokio::time::sleep(HEALTH_INTERVAL).await;
            match probe::health(&self.http).await {
                Ok(()) => failures = 0,
                Err(error) => {
                    failures += 1;
                    if failures >= HEALTH_FAILURES {
                        return error;
                    }
                }
            }
        }
    }

    async fn stop(&self) {
        if let Some(process) = &self.process {
            process.stop().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connector_is_asked_for_only_where_it_has_a_socket() {
        assert_eq!(serve_arguments(8101, None, None), ["--host", "127.0.0.1", "--port", "8101"]);
        let with = serve_arguments(8101, Some((Path::new("/run/baton/p0.sock"), 4)), None);
        assert_eq!(with[4], "--kv-transfer-config");
        let config: serde_json::Value = serde_json::from_str(&with[5]).unwrap();
        assert_eq!(config["kv_load_failure_policy"], "fail");
        assert_eq!(config["kv_connector_extra_config"]["socket"], "/run/baton/p0.sock");
        assert_eq!(config["kv_connector_extra_config"]["layer_groups"], 4);
    }

    #[test]
    fn order_is_ours_unless_the_command_says_otherwise() {
        let command = |arguments: &[&str]| -> Vec<String> {
            arguments.iter().map(|argument| (*argument).to_owned()).collect()
        };
        let socket = Some(Path::new("/run/baton/p0.sock"));
        let ours = ["--scheduling-policy", "priority", "--scheduler-cls", SCHEDULER_CLASS];
        assert_eq!(order_arguments(&command(&["vllm", "serve"]), socket), ours);
        assert_eq!(order_arguments(&command(&["vllm", "serve"]), None), ours[..2]);
        let users = command(&["vllm", "--scheduling_policy=fcfs", "--scheduler-cls", "mine.Own"]);
        assert!(order_arguments(&users, socket).is_empty());
    }
}
