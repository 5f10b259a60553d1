//! The engine's face: OpenAI's HTTP API as vLLM serves it.

mod choice;
mod error;
mod fields;
mod generation;
mod request;
mod services;
mod stream;
mod whole;

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::SystemTime,
};

use baton_config::SimConfig;
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::CONTENT_TYPE};
use tokio::sync::mpsc::UnboundedSender;

use self::{
    error::ApiError,
    fields::Fields,
    generation::{FirstEvent, Generation},
    request::{GenerationRequest, Surface},
};
use super::stepper::Command;
use crate::contract::{Answer, EngineError, EngineRequest};

#[derive(Debug)]
pub(super) struct Api {
    model: String,
    max_model_tokens: u32,
    block_size_tokens: u32,
    commands: UnboundedSender<Command>,
    next_request: AtomicU64,
    /// Unix time.
    started: u64,
}

/// What every chunk of an answer repeats.
#[derive(Debug)]
struct AnswerHead {
    id: String,
    created: u64,
    model: String,
}

/// Why there is no answer yet: the client's or the handoff's fault, or the engine's end.
enum NoAnswer {
    Api(ApiError),
    Engine(EngineError),
}

impl From<ApiError> for NoAnswer {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

impl Api {
    pub(super) fn new(config: &SimConfig, commands: UnboundedSender<Command>) -> Self {
        Self {
            model: config.model.clone(),
            max_model_tokens: config.max_model_tokens,
            block_size_tokens: config.block_size_tokens,
            commands,
            next_request: AtomicU64::new(0),
            started: unix_seconds(),
        }
    }

    pub(super) async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError> {
        match self.route(&request).await {
            Ok(answer) => Ok(answer),
            Err(NoAnswer::Api(error)) => Ok(error.into_answer()),
            Err(NoAnswer::Engine(error)) => Err(error),
        }
    }

    async fn route(&self, request: &EngineRequest) -> Result<Answer, NoAnswer> {
        let path = request.path.split('?').next().unwrap_or_default();
        let is_post = match path {
            "/v1/chat/completions"
            | "/v1/completions"
            | "/v1/embeddings"
            | "/tokenize"
            | "/detokenize" => true,
            "/health" | "/version" | "/v1/models" => false,
            _ => return Err(ApiError::not_found("Not Found").into()),
        };
        if is_post != (request.method == Method::POST) {
            return Err(ApiError::method_not_allowed().into());
        }
        let fields = || Fields::parse(&request.body);
        Ok(match path {
            "/v1/chat/completions" => self.generate(Surface::Chat, request).await?,
            "/v1/completions" => self.generate(Surface::Completion, request).await?,
            "/v1/embeddings" => self.embeddings(fields()?)?,
            "/tokenize" => self.tokenize(fields()?)?,
            "/detokenize" => self.detokenize(fields()?)?,
            "/v1/models" => self.models(),
            "/version" => Self::version(),
            _ => error::answer(StatusCode::OK, "text/plain; charset=utf-8", Bytes::new()),
        })
    }

    /// Answers once it is known that the request will be: a handoff that fails is an error, not a
    /// stream that breaks off.
    async fn generate(
        &self,
        surface: Surface,
        request: &EngineRequest,
    ) -> Result<Answer, NoAnswer> {
        let mut fields = Fields::parse(&request.body)?;
        self.check_model(&mut fields)?;
        let asked = GenerationRequest::read(surface, fields, self.max_model_tokens)?;
        let head = AnswerHead {
            id: answer_id(&asked, &request.headers),
            created: unix_seconds(),
            model: self.model.clone(),
        };
        let number = self.next_request.fetch_add(1, Relaxed);
        let mut generation =
            Generation::begin(number, &head.model, &asked, self.block_size_tokens, &self.commands);
        generation.first().await.map_err(|instead| match instead {
            FirstEvent::Failed(reason) => NoAnswer::Api(ApiError::internal(reason)),
            FirstEvent::EngineEnded => {
                NoAnswer::Engine(EngineError::Ended("before it answered".to_owned()))
            }
        })?;
        if !asked.stream {
            return whole::answer(&asked, generation, head).await.map_err(NoAnswer::Engine);
        }
        let mut headers = HeaderMap::new();
        let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
        headers.insert(CONTENT_TYPE, content_type);
        let body = stream::events(asked, generation, &head).boxed();
        Ok(Answer { status: StatusCode::OK, headers, body })
    }

    /// A request that names no model means this one.
    fn check_model(&self, fields: &mut Fields) -> Result<(), ApiError> {
        match fields.optional::<String>("model")? {
            Some(model) if model != self.model => {
                let message = format!("The model `{model}` does not exist.");
                let param = Some("model".to_owned());
                Err(ApiError { param, ..ApiError::not_found(message) })
            }
            _ => Ok(()),
        }
    }
}

/// As vLLM does: the client's own id where it gave one.
fn answer_id(asked: &GenerationRequest, headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let id = given
        .or(asked.request_id.as_deref())
        .map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned);
    match asked.surface {
        Surface::Chat => format!("chatcmpl-{id}"),
        Surface::Completion => format!("cmpl-{id}"),
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
