use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, Request, State, rejection::QueryRejection},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use baton_types::{ParseRoleError, Role};
use http::{HeaderValue, Method, StatusCode, header};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    page,
    state::{ClusterState, Mode, TransferState, UnknownMode},
    token::AdminToken,
};
use crate::{
    placed::Explanation,
    shell::{Shell, UnknownWorker},
};

const MAX_BODY_BYTES: usize = 16 << 10;

#[derive(Clone, Debug)]
struct Admin {
    shell: Shell,
    token: AdminToken,
}

/// The page can be had without the token: it holds nothing, and asks for the token itself.
pub(crate) fn router(shell: Shell, token: AdminToken) -> Router {
    let admin = Admin { shell, token };
    let guarded = Router::new()
        .route("/admin/state", get(state))
        .route("/admin/mode", post(set_mode))
        .route("/admin/workers/{name}/drain", post(drain))
        .route("/admin/workers/{name}/undrain", post(undrain))
        .route("/admin/workers/{name}/role", post(set_role))
        .route("/debug/placement", get(placement))
        .route("/debug/transfer", get(transfer))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(admin.clone(), only_with_token));
    Router::new()
        .merge(guarded)
        .merge(page::routes())
        .route("/", get(|| async { Redirect::temporary("/ui") }))
        .route("/health", get(|| async { StatusCode::OK }))
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(admin)
}

async fn only_with_token(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    if admin.token.is_shown_by(request.headers()) {
        return next.run(request).await;
    }
    warn!(path = request.uri().path(), "an operator's request without the right token");
    let mut response = AdminError::NoToken.into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

async fn state(State(admin): State<Admin>) -> Json<ClusterState> {
    Json(admin.shell.cluster_state())
}

#[derive(Deserialize)]
struct OfRequest {
    request: String,
}

async fn placement(
    State(admin): State<Admin>,
    query: Result<Query<OfRequest>, QueryRejection>,
) -> Result<Json<Explanation>, AdminError> {
    let Query(OfRequest { request }) = query.map_err(|_| AdminError::NoRequest)?;
    admin.shell.explain(&request).map(Json).ok_or(AdminError::UnknownRequest)
}

async fn transfer(State(admin): State<Admin>) -> Json<Vec<TransferState>> {
    Json(admin.shell.transfer_state())
}

async fn metrics(State(admin): State<Admin>) -> Response {
    crate::metrics::page(&admin.shell)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModeOrder {
    mode: String,
}

#[derive(Debug, Serialize)]
struct ModeNow {
    mode: Mode,
}

async fn set_mode(State(admin): State<Admin>, body: Bytes) -> Result<Json<ModeNow>, AdminError> {
    let order: ModeOrder = serde_json::from_slice(&body)?;
    let mode = order.mode.parse()?;
    admin.shell.set_mode(mode);
    Ok(Json(ModeNow { mode }))
}

#[derive(Debug, Serialize)]
struct WorkerNow {
    worker: String,
    state: &'static str,
}

async fn drain(
    State(admin): State<Admin>,
    Path(worker): Path<String>,
) -> Result<Json<WorkerNow>, AdminError> {
    set_drains(&admin, worker, true)
}

async fn undrain(
    State(admin): State<Admin>,
    Path(worker): Path<String>,
) -> Result<Json<WorkerNow>, AdminError> {
    set_drains(&admin, worker, false)
}

fn set_drains(admin: &Admin, worker: String, drains: bool) -> Result<Json<WorkerNow>, AdminError> {
    let state = admin.shell.set_drains(&worker, drains)?;
    Ok(Json(WorkerNow { worker, state }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RoleOrder {
    role: String,
}

#[derive(Debug, Serialize)]
struct RoleOrdered {
    worker: String,
    role: Role,
}

async fn set_role(
    State(admin): State<Admin>,
    Path(worker): Path<String>,
    body: Bytes,
) -> Result<Json<RoleOrdered>, AdminError> {
    let order: RoleOrder = serde_json::from_slice(&body).map_err(AdminError::RoleBody)?;
    let role: Role = order.role.parse()?;
    admin.shell.set_role(&worker, role)?;
    Ok(Json(RoleOrdered { worker, role }))
}

async fn no_such_path(method: Method, request: Request) -> AdminError {
    AdminError::NoSuchPath { method, path: request.uri().path().to_owned() }
}

async fn method_not_allowed(method: Method, request: Request) -> AdminError {
    AdminError::MethodNotAllowed { method, path: request.uri().path().to_owned() }
}

#[derive(Debug, thiserror::Error)]
enum AdminError {
    #[error("show the token of [admin]: authorization: Bearer TOKEN")]
    NoToken,
    #[error("the body is not {{\"mode\": …}}: {0}")]
    Body(#[from] serde_json::Error),
    #[error(transparent)]
    Mode(#[from] UnknownMode),
    #[error("the body is not {{\"role\": …}}: {0}")]
    RoleBody(serde_json::Error),
    #[error(transparent)]
    Role(#[from] ParseRoleError),
    #[error(transparent)]
    Worker(#[from] UnknownWorker),
    #[error("give the x-request-id of the request: /debug/placement?request=ID")]
    NoRequest,
    #[error("no request of this id is open, or among the last that ended")]
    UnknownRequest,
    #[error("there is no {method} {path} here")]
    NoSuchPath { method: Method, path: String },
    #[error("{path} does not take {method}")]
    MethodNotAllowed { method: Method, path: String },
}

#[derive(Serialize)]
struct Envelope {
    error: ErrorBody,
}

#[derive(Serialize)]
struct ErrorBody {
    message: String,
    code: &'static str,
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let (status, code) = match self {
            Self::NoToken => (StatusCode::UNAUTHORIZED, "no_token"),
            Self::Body(_) | Self::RoleBody(_) => (StatusCode::BAD_REQUEST, "invalid_body"),
            Self::Role(_) => (StatusCode::BAD_REQUEST, "unknown_role"),
            Self::Mode(_) => (StatusCode::BAD_REQUEST, "unknown_mode"),
            Self::Worker(_) => (StatusCode::NOT_FOUND, "unknown_worker"),
            Self::NoRequest => (StatusCode::BAD_REQUEST, "no_request"),
            Self::UnknownRequest => (StatusCode::NOT_FOUND, "unknown_request"),
            Self::NoSuchPath { .. } => (StatusCode::NOT_FOUND, "no_such_path"),
            Self::MethodNotAllowed { .. } => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
        };
        let error = ErrorBody { message: self.to_string(), code };
        (status, Json(Envelope { error })).into_response()
    }
}
