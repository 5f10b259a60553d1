use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    response::Response,
    routing::{MethodFilter, get, on},
};
use baton_config::LimitsConfig;
use baton_tokens::PromptTokenizer;
use http::{HeaderName, Method};
use tokio::net::TcpListener;

use super::{
    auth::{Tenants, admit},
    error::ClientError,
    forward::forward,
    pages,
    peek::Endpoint,
    unread::refuse_unread,
};
use crate::{
    listener::{self, ConnectionLimits},
    shell::Shell,
    tls::TlsFiles,
};

/// What every handler has at hand.
#[derive(Clone, Debug)]
pub(super) struct Front {
    pub(super) shell: Shell,
    pub(super) limits: Arc<LimitsConfig>,
    /// Names the tenant of requests that are nobody's otherwise.
    pub(super) tenant_header: Option<HeaderName>,
    /// Where prompts are tokenized here.
    pub(super) tokenizer: Option<Arc<PromptTokenizer>>,
}

/// Who gets in, and how.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    /// HTTPS in place of HTTP.
    pub(crate) https: Option<Arc<TlsFiles>>,
    pub(crate) tenants: Arc<Tenants>,
}

/// Accepts clients until it is dropped.
pub(crate) async fn serve(
    shell: Shell,
    limits: LimitsConfig,
    tenant_header: Option<String>,
    tokenizer: Option<PromptTokenizer>,
    access: Access,
    listener: TcpListener,
) {
    let connections = ConnectionLimits {
        connections: limits.max_connections as usize,
        header_timeout: limits.header_timeout,
    };
    let tokenizer = tokenizer.map(Arc::new);
    // The configuration takes nothing that is no header's name.
    let tenant_header = tenant_header.and_then(|name| HeaderName::try_from(name).ok());
    let front = Front { shell, limits: Arc::new(limits), tenant_header, tokenizer };
    let router = router(front, access.tenants);
    listener::serve(router, listener, connections, access.https).await;
}

fn router(front: Front, tenants: Arc<Tenants>) -> Router {
    let api = Router::new()
        .route("/v1/chat/completions", post_only(generation))
        .route("/v1/completions", post_only(generation))
        .route("/v1/models", get(pages::models))
        .route("/tokenize", post_only(whole))
        .route("/detokenize", post_only(whole))
        .route("/v1/{*rest}", post_only(whole));
    let api = if tenants.is_empty() {
        api
    } else {
        let metrics = front.shell.metrics.clone();
        api.layer(axum::middleware::from_fn_with_state((tenants, metrics), admit))
    };
    api.route("/health", get(pages::health))
        .route("/ready", get(pages::ready))
        .route("/metrics", get(pages::metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(front)
}

fn post_only<H, T>(handler: H) -> axum::routing::MethodRouter<Front>
where
    H: axum::handler::Handler<T, Front>,
    T: 'static,
{
    on(MethodFilter::POST, handler)
}

async fn generation(State(front): State<Front>, request: Request) -> Response {
    forward(&front, Endpoint::Generation, request).await
}

async fn whole(State(front): State<Front>, request: Request) -> Response {
    forward(&front, Endpoint::Whole, request).await
}

async fn no_such_path(method: Method, request: Request) -> Response {
    let error = ClientError::NoSuchPath { method, path: request.uri().path().to_owned() };
    let (parts, body) = request.into_parts();
    refuse_unread(&error, &parts.headers, body).await
}

async fn method_not_allowed(method: Method, request: Request) -> Response {
    let error = ClientError::MethodNotAllowed { method, path: request.uri().path().to_owned() };
    let (parts, body) = request.into_parts();
    refuse_unread(&error, &parts.headers, body).await
}
