use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{Router, extract::Request, response::Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use tower_service::Service;
use tracing::{debug, warn};

use crate::tls::{self, TlsFiles};

/// What a connection holds of its request's head, and of its answer on the way out. A token's frame is
/// copied into it and written as one piece: that costs less than to gather the pieces in the kernel.
const BUFFER_BYTES: usize = 64 << 10;

#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// Further ones wait to be accepted.
    pub(crate) connections: usize,
    pub(crate) header_timeout: Duration,
}

/// Accepts connections until it is dropped. One hyper connection each, since `axum::serve` costs 8 KB
/// more a stream. With certificates they are HTTPS.
pub(crate) async fn serve(
    router: Router,
    listener: TcpListener,
    limits: ConnectionLimits,
    https: Option<Arc<TlsFiles>>,
) {
    let connections = Arc::new(Semaphore::new(limits.connections));
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
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "a connection was gone before it was served");
            continue;
        }
        let router = router.clone();
        let service = hyper::service::service_fn(move |request: Request<_>| {
            let mut router = router.clone();
            async move { Ok::<_, Infallible>(call(&mut router, request).await) }
        });
        if let Some(https) = https.clone() {
            let http = http.clone();
            tokio::spawn(async move {
                match tls::handshake(&https, stream).await {
                    Ok(stream) => run(http.serve_connection(TokioIo::new(stream), service)).await,
                    Err(error) => debug!(%error, "no TLS with a client"),
                }
                drop(permit);
            });
        } else {
            let connection = http.serve_connection(TokioIo::new(stream), service);
            tokio::spawn(async move {
                run(connection).await;
                drop(permit);
            });
        }
    }
}

async fn run(connection: impl Future<Output = hyper::Result<()>>) {
    if let Err(error) = connection.await {
        debug!(%error, "a connection ended");
    }
}

async fn call(router: &mut Router, request: Request<hyper::body::Incoming>) -> Response {
    match router.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
