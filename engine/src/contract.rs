use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use http::{HeaderMap, StatusCode};
use tokio::sync::mpsc;

use crate::{kv_cache::KvCacheLog, kv_port::KvPort, pacing::Pacing};

/// An OpenAI-compatible engine with a paged KV cache.
///
/// Requests and answers are HTTP in shape whether or not there is a network between: what the client
/// sent goes in, what it shall receive comes out. The engine learns its part in a handoff from
/// `kv_transfer_params` in the request's JSON:
///
/// ```json
/// {"kv_transfer_params": {"baton": {"role": "produce", "handoff": "<uuid>", "generation": 0}}}
/// ```
///
/// with `role` `produce` (export the prompt's blocks), `consume` (load them instead of computing), or `lend`: as
/// `produce`, and before all that waits, where all of the prompt but its last token is cached; else nothing is
/// exported, and no answer need come.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Waits until the engine serves, then tells what it is.
    async fn ready(&self) -> Result<EngineDescription, EngineError>;

    /// Runs one request. Dropping the answer, or this future, aborts it in the engine and frees
    /// what it held.
    async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError>;

    /// The engine's own view of its load.
    async fn load(&self) -> Result<EngineLoad, EngineError>;

    /// Each life of the engine's KV side, as it attaches. A new port ends the one before it.
    /// Can be taken once; `None` where the engine takes no part in handoffs.
    fn kv_ports(&self) -> Option<mpsc::Receiver<KvPort>>;

    /// What its prefix cache holds; `None` where it does not tell.
    fn kv_cache(&self) -> Option<KvCache> {
        None
    }

    /// How long its steps take, and the pace that it can be set; `None` where it does not tell.
    fn pacing(&self) -> Option<Pacing> {
        None
    }

    /// Whether it serves the lowest `priority` of a request's JSON first. Others refuse the member.
    fn takes_priority(&self) -> bool {
        false
    }

    /// Whether it is to be asked for the usage of each stream, because an event may carry several tokens
    /// and only the usage at the end tells how many there were.
    fn wants_usage_asked(&self) -> bool {
        false
    }

    /// Waits until the engine has ended, and says why. Never returns where an engine cannot end by
    /// itself. After it, a new engine must be started.
    async fn ended(&self) -> EngineError {
        std::future::pending().await
    }

    /// Ends the engine in good order, where it runs in a process of ours. Dropping it ends it too,
    /// without waiting.
    async fn stop(&self) {}
}

/// A prefix cache whose changes can be followed.
#[derive(Clone, Debug)]
pub struct KvCache {
    pub block_size_tokens: u32,
    /// Of the whole cache, where that is known.
    pub capacity_tokens: Option<u64>,
    pub log: KvCacheLog,
}

#[derive(Clone, Debug)]
pub struct EngineDescription {
    /// For people: `vllm 0.32.0`.
    pub engine: String,
    /// Names that a request may give for the model; the first is the one to show.
    pub models: Vec<String>,
    /// Those of them that are LoRA adapters of the first.
    pub adapters: Vec<String>,
    /// Longest prompt plus output.
    pub max_model_tokens: u32,
}

#[derive(Clone, Debug)]
pub struct EngineRequest {
    pub method: http::Method,
    /// Path and query below the engine's root: `/v1/completions`.
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// The head of an answer, and its body as it comes.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// Chunks ready to be sent on. Of a server-sent event stream each chunk ends between events.
    /// An error is an answer that broke off.
    pub body: BoxStream<'static, Result<Bytes, EngineError>>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineLoad {
    pub requests_running: u32,
    pub requests_waiting: u32,
    /// Of the KV cache, 0 to 1.
    pub kv_used_ratio: f32,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    #[error("cannot start the engine: {0}")]
    NotStarted(String),
    #[error("cannot reach the engine at {address}: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("the engine ended: {0}")]
    Ended(String),
    #[error("the engine broke its answer off: {0}")]
    BrokeOff(String),
    #[error("the engine answered {what} with something else: {reason}")]
    Unexpected { what: &'static str, reason: String },
}
