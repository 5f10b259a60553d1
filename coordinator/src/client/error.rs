use std::time::Duration;

use baton_core::{Rejection, ShedReason};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;

use super::{answer::Head, peek::PeekError};

/// Everything that a client can be told instead of an answer, in OpenAI's error shape. Its words name
/// no machine of ours.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(transparent)]
    Body(#[from] PeekError),
    #[error("the request body has more than {limit} bytes, the limit of this server")]
    BodyTooLarge { limit: u64 },
    #[error("the request body did not arrive within {seconds} s")]
    BodyTooSlow { seconds: u64 },
    #[error("the request body broke off")]
    BodyBrokeOff,
    #[error("the header x-baton-priority is no whole number: smaller ones come first, 0 is usual")]
    Priority,
    #[error("there is no {method} {path} here")]
    NoSuchPath { method: http::Method, path: String },
    #[error("{path} does not take {method}")]
    MethodNotAllowed { method: http::Method, path: String },
    #[error("this server wants an API key: give it as `Authorization: Bearer KEY`")]
    NoKey,
    #[error("the API key that was given is not known here")]
    WrongKey,
    #[error("{limit} requests of this API key are in flight, as many as it may have")]
    TooManyRequests { limit: u32 },
    #[error("this API key has used the tokens of its minute; try again in {} s", seconds(.retry_after))]
    TooManyTokens { retry_after: Duration },
    #[error("the model `{model}` does not exist")]
    UnknownModel { model: String },
    #[error("no worker is ready to take requests; try again shortly")]
    NoWorker,
    #[error("the {leg} leg of this request failed and was tried again in vain")]
    LegFailed { leg: baton_types::Leg },
    #[error(
        "no prefill worker is ready, and requests are not to be served without; try again shortly"
    )]
    NoPrefillWorker,
    #[error("there is more to do than can be done in time; try again in {} s", seconds(.retry_after))]
    Overloaded { reason: ShedReason, retry_after: Duration },
    #[error("no worker gave a first token in time")]
    FirstTokenTimeout,
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl From<Rejection> for ClientError {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::UnknownModel { model } => Self::UnknownModel { model },
            Rejection::NoWorker => Self::NoWorker,
            Rejection::NoPrefillWorker => Self::NoPrefillWorker,
            Rejection::Overloaded { reason, retry_after } => {
                Self::Overloaded { reason, retry_after }
            }
            Rejection::LegFailed { leg, .. } => Self::LegFailed { leg },
            Rejection::FirstTokenTimeout => Self::FirstTokenTimeout,
        }
    }
}

/// Whole ones, as `Retry-After` has them.
fn seconds(time: &Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'static str>,
    code: &'static str,
}

impl ClientError {
    /// The one table from what went wrong to what HTTP and OpenAI call it.
    fn row(&self) -> (StatusCode, &'static str, Option<&'static str>, &'static str) {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        match self {
            Self::Body(PeekError::Malformed { .. }) => {
                (StatusCode::BAD_REQUEST, INVALID, None, "invalid_body")
            }
            Self::Body(PeekError::Reserved) => {
                (StatusCode::BAD_REQUEST, INVALID, Some("kv_transfer_params"), "reserved_parameter")
            }
            Self::BodyTooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, INVALID, None, "body_too_large")
            }
            Self::BodyTooSlow { .. } => {
                (StatusCode::REQUEST_TIMEOUT, INVALID, None, "body_timeout")
            }
            Self::Priority => (StatusCode::BAD_REQUEST, INVALID, Some("priority"), "bad_priority"),
            Self::BodyBrokeOff => (StatusCode::BAD_REQUEST, INVALID, None, "body_incomplete"),
            Self::NoSuchPath { .. } => (StatusCode::NOT_FOUND, INVALID, None, "no_such_path"),
            Self::MethodNotAllowed { .. } => {
                (StatusCode::METHOD_NOT_ALLOWED, INVALID, None, "method_not_allowed")
            }
            // As OpenAI has it, a missing key is an invalid one.
            Self::NoKey | Self::WrongKey => {
                (StatusCode::UNAUTHORIZED, INVALID, None, "invalid_api_key")
            }
            Self::TooManyRequests { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "requests", None, "rate_limit_exceeded")
            }
            Self::TooManyTokens { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "tokens", None, "rate_limit_exceeded")
            }
            Self::UnknownModel { .. } => {
                (StatusCode::NOT_FOUND, INVALID, Some("model"), "model_not_found")
            }
            Self::NoWorker => (StatusCode::SERVICE_UNAVAILABLE, SERVER, None, "no_worker"),
            Self::NoPrefillWorker => {
                (StatusCode::SERVICE_UNAVAILABLE, SERVER, None, "no_prefill_worker")
            }
            // OpenAI's word for it; the code says which limit.
            Self::Overloaded { reason, .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", None, reason.as_str())
            }
            Self::LegFailed { .. } => (StatusCode::BAD_GATEWAY, SERVER, None, "leg_failed"),
            Self::FirstTokenTimeout => {
                (StatusCode::GATEWAY_TIMEOUT, SERVER, None, "first_token_timeout")
            }
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, SERVER, None, "shutting_down"),
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.row().0
    }

    fn json(&self) -> Vec<u8> {
        let (_, r#type, param, code) = self.row();
        let message = self.to_string();
        let envelope = Envelope { error: Body { message: &message, r#type, param, code } };
        serde_json::to_vec(&envelope).unwrap_or_default()
    }

    /// As a whole answer.
    pub(crate) fn to_parts(&self) -> (Head, Bytes) {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self {
            Self::Overloaded { retry_after, .. } | Self::TooManyTokens { retry_after } => {
                headers.insert(header::RETRY_AFTER, seconds(retry_after).into());
            }
            Self::TooManyRequests { .. } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::NoKey | Self::WrongKey => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        (Head { status: self.status(), headers }, Bytes::from(self.json()))
    }
}

/// The last event of a stream that cannot go on. OpenAI's clients raise it as an error.
pub(crate) fn broken_stream_event() -> Vec<u8> {
    let message = "the worker that was answering failed; the answer is incomplete";
    let body = Body { message, r#type: "server_error", param: None, code: "answer_broke_off" };
    let json = serde_json::to_vec(&Envelope { error: body }).unwrap_or_default();
    [b"data: ", json.as_slice(), b"\n\n"].concat()
}
