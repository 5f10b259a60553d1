use std::{convert::Infallible, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    response::Response,
    routing::{MethodFilter, get, on},
};
use baton_config::LimitsConfig;
use baton_tokens::PromptTokenizer;
use http::{HeaderName, Method};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use tower_service::Service;
use tracing::{debug, warn};

use super::{
    error::ClientError,
    forward::{forward, refuse},
    pages,
    peek::Endpoint,
};
use crate::shell::Shell;

/// What a connection holds of its request's head, and of its answer on the way out. A token's frame is
/// copied into it and written as one piece: that costs less than to gather the pieces in the kernel.
const BUFFER_BYTES: usize = 64 << 10;

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

/// Accepts clients until it is dropped. One hyper connection each, since `axum::serve` costs 8 KB more
/// a stream.
pub(crate) async fn serve(
    shell: Shell,
    limits: LimitsConfig,
    tenant_header: Option<String>,
    tokenizer: Option<PromptTokenizer>,
    listener: TcpListener,
) {
    let connections = Arc::new(Semaphore::new(limits.max_connections as usize));
    let limits = Arc::new(limits);
    // The configuration takes nothing that is no header's name.
    let tenant_header = tenant_header.and_then(|name| HeaderName::try_from(name).ok());
    let router = router(Front {
        shell,
        limits: limits.clone(),
        tenant_header,
        tokenizer: tokenizer.map(Arc::new),
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(BUFFER_BYTES)
        .writev(false);
    loop {
        // The semaphore is never closed.
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: others may be freed meanwhile.
                warn!(%error, "cannot accept a client");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "a client was gone before it was served");
            continue;
        }
        let router = router.clone();
        let service = hyper::service::service_fn(move |request: Request<_>| {
            let mut router = router.clone();
            async move { Ok::<_, Infallible>(call(&mut router, request).await) }
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "a client's connection ended");
            }
            drop(permit);
        });
    }
}

async fn call(router: &mut Router, request: Request<hyper::body::Incoming>) -> Response {
    match router.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

fn router(front: Front) -> Router {
    Router::new()
        .route("/v1/chat/completions", post_only(generation))
        .route("/v1/completions", post_only(generation))
        .route("/v1/models", get(pages::models))
        .route("/tokenize", post_only(whole))
        .route("/detokenize", post_only(whole))
        .route("/v1/{*rest}", post_only(whole))
        .route("/health", get(pages::health))
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
    refuse(&ClientError::NoSuchPath { method, path: request.uri().path().to_owned() })
}

async fn method_not_allowed(method: Method, request: Request) -> Response {
    refuse(&ClientError::MethodNotAllowed { method, path: request.uri().path().to_owned() })
}
