//! What probes ask a worker.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use baton_config::WorkerConfig;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::{counters::Counters, run::WorkerError};

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
        Ok(Self(Some(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "probes are no longer answered");
            }
        }))))
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
