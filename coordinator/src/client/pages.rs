use std::time::{SystemTime, UNIX_EPOCH};

use axum::{Json, extract::State, response::IntoResponse};
use http::StatusCode;
use serde::Serialize;

use super::server::Front;

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
}

/// The models of all workers, as an engine lists its own.
pub(super) async fn models(State(front): State<Front>) -> impl IntoResponse {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let data = front.shell.models().into_iter().map(|(id, max_model_len)| Model {
        root: id.clone(),
        id,
        object: "model",
        created,
        owned_by: "baton",
        parent: None,
        max_model_len,
    });
    Json(ModelList { object: "list", data: data.collect() })
}

/// This process serves.
pub(super) async fn health() -> impl IntoResponse {
    StatusCode::OK
}

/// Each role has a worker.
pub(super) async fn ready(State(front): State<Front>) -> impl IntoResponse {
    if front.shell.is_ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "waiting for a prefill and a decode worker\n")
    }
}

pub(super) async fn metrics(State(front): State<Front>) -> impl IntoResponse {
    crate::metrics::page(&front.shell)
}
