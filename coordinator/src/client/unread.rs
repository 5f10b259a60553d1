//! Refusals of requests whose body has not been read.
//!
//! A server that answers and closes while bytes are still on their way resets the connection, and
//! with it goes the answer that says why (RFC 9112, section 9.6).

use std::time::Duration;

use axum::{body::Body, response::Response};
use http::{HeaderMap, HeaderValue, header};
use http_body_util::BodyExt;

use super::{error::ClientError, forward::refuse};

/// More than that, or for longer, nobody may keep us reading what is thrown away.
const DISCARDED_BYTES: usize = 4 << 20;
const DISCARDED_FOR: Duration = Duration::from_secs(1);

/// Takes in what is left of the body, within bounds. A client with more to send is told that the
/// connection ends with this answer, so that it sends no other request over it.
pub(super) async fn refuse_unread(
    error: &ClientError,
    headers: &HeaderMap,
    body: Body,
) -> Response {
    let mut response = refuse(error);
    if !is_discarded(headers, body).await {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn is_discarded(headers: &HeaderMap, mut body: Body) -> bool {
    // A client that asks first sends nothing as long as nobody reads.
    if headers.contains_key(header::EXPECT) {
        return false;
    }
    let discard = async {
        let mut left = DISCARDED_BYTES;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            let length = frame.data_ref().map_or(0, bytes::Bytes::len);
            let Some(rest) = left.checked_sub(length) else { return false };
            left = rest;
        }
        true
    };
    tokio::time::timeout(DISCARDED_FOR, discard).await.unwrap_or(false)
}
