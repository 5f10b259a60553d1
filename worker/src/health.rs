//! What probes ask a worker.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use baton_config::WorkerConfig;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
};

use crate::{counters::Counters, run::WorkerError};

/// Asking takes one answer and no time. Whoever only holds a connection open loses it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Further ones wait: others must not use up what the worker may have open.
const CONNECTIONS: usize = 256;

/// Answers until it is dropped.
#[derive(Debug)]
pub(crate) struct Health(Option<JoinHandle<()>>);

impl Drop for Health {
    fn drop(&mut self) {
        if let Some(serving) = &self.0 {
            serving.abort();
        }
    }
}

#[derive(Clone)]
struct Seen {
    counters: Arc<Counters>,
    leaving: watch::Receiver<bool>,
}

impl Health {
    /// Where the configuration names an address.
    pub(crate) fn serve(
        config: &WorkerConfig,
        counters: &Arc<Counters>,
        leaving: watch::Receiver<bool>,
    ) -> Result<Self, WorkerError> {
        let Some(address) = config.health_listen else { return Ok(Self(None)) };
        let listener = listen(address).map_err(|source| WorkerError::Health { address, source })?;
        let router = Router::new()
            .route("/health", get(|| async { StatusCode::OK }))
            .route("/ready", get(ready))
            .with_state(Seen { counters: counters.clone(), leaving });
        Ok(Self(Some(tokio::spawn(answer(listener, router)))))
    }
}

async fn answer(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.keep_alive(false);
    // Connections end with this task.
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, mostly: others may be freed meanwhile.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(stream), service);
        connections.spawn(async move {
            // Whether it was answered is whoever asked's to see.
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// It can be given requests. `/health`, in contrast, says only that this process runs: it starts its
/// engine again by itself, and waits for its coordinator for as long as it takes.
async fn ready(State(seen): State<Seen>) -> (StatusCode, &'static str) {
    let away = if *seen.leaving.borrow() {
        "leaving: it finishes what it has\n"
    } else if seen.counters.lives.get() == 0 {
        "waiting for its engine\n"
    } else if seen.counters.attached.get() == 0 {
        "waiting for a coordinator\n"
    } else {
        return (StatusCode::OK, "ready\n");
    };
    (StatusCode::SERVICE_UNAVAILABLE, away)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn said(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn who_only_holds_connections_open_keeps_nobody_from_asking() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/health", get(|| async { "here" }));
        let serving = tokio::spawn(answer(listener, router));
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /health HTTP/1.1\r\n").await.unwrap();
            held.push(stream);
        }
        let mut asks = TcpStream::connect(address).await.unwrap();
        asks.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(said(asks).await.ends_with("here"), "it has its turn when they lose theirs");
        for stream in held {
            assert_eq!(said(stream).await, "");
        }
        serving.abort();
    }
}
