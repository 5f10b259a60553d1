use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde::Serialize;

use crate::contract::Answer;

/// An error that the client is told of, in OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The field of the request that is to blame.
    pub(super) param: Option<String>,
}

impl ApiError {
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), param: None }
    }

    pub(super) fn bad_field(field: &str, message: impl Into<String>) -> Self {
        Self { param: Some(field.to_owned()), ..Self::bad_request(message) }
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, message: message.into(), param: None }
    }

    pub(super) fn method_not_allowed() -> Self {
        let message = "Method Not Allowed".to_owned();
        Self { status: StatusCode::METHOD_NOT_ALLOWED, message, param: None }
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, message: message.into(), param: None }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::BAD_REQUEST => "BadRequestError",
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
            _ => "InternalServerError",
        }
    }

    pub(super) fn into_answer(self) -> Answer {
        #[derive(Serialize)]
        struct Body<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: &'a str,
            #[serde(rename = "type")]
            kind: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let inner = Inner {
            message: &self.message,
            kind: self.kind(),
            param: self.param.as_deref(),
            code: self.status.as_u16(),
        };
        json_answer(self.status, &Body { error: inner })
    }
}

/// A whole answer of JSON.
pub(super) fn json_answer(status: StatusCode, body: &impl Serialize) -> Answer {
    // Our own structs, whose keys are all strings, can always be written.
    let body = serde_json::to_vec(body).unwrap_or_default();
    answer(status, "application/json", Bytes::from(body))
}

pub(super) fn answer(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    Answer { status, headers, body: stream::iter([Ok(body)]).boxed() }
}
