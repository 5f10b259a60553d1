use std::{future::poll_fn, time::Instant};

use axum::{body::Body, extract::Request, response::Response};
use baton_config::LimitsConfig;
use baton_core::Tenant;
use baton_proto as wire;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use uuid::Uuid;

use super::{
    answer::AnswerBody,
    auth,
    error::ClientError,
    peek::{Endpoint, Peeked, clamped, peek},
    server::Front,
    unread::refuse_unread,
};
use crate::{
    prompt::{self, PromptFields},
    shell::{ForwardedRequest, IncomingRequest},
};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PRIORITY: HeaderName = HeaderName::from_static("x-baton-priority");

/// Takes a request to the workers and their answer back.
pub(super) async fn forward(front: &Front, endpoint: Endpoint, request: Request) -> Response {
    let arrived = Instant::now();
    let request_id = request.headers().get(&REQUEST_ID).cloned().unwrap_or_else(|| {
        // A UUID is a valid header value.
        HeaderValue::from_str(&Uuid::new_v4().simple().to_string())
            .unwrap_or(HeaderValue::from_static(""))
    });
    let (parts, mut body) = request.into_parts();
    let mut response = match read_body(&mut body, &parts.headers, &front.limits).await {
        Ok(body) => match try_forward(front, endpoint, &parts, body, &request_id, arrived).await {
            Ok(response) => return response,
            Err(error) => refuse(&error),
        },
        Err(error) => refuse_unread(&error, &parts.headers, body).await,
    };
    response.headers_mut().insert(REQUEST_ID, request_id);
    response
}

async fn try_forward(
    front: &Front,
    endpoint: Endpoint,
    parts: &Parts,
    body: Bytes,
    request_id: &HeaderValue,
    arrived: Instant,
) -> Result<Response, ClientError> {
    let is_json = endpoint == Endpoint::Generation || content_is_json(&parts.headers);
    // What is not JSON (an upload of speech, say) is the engine's to read.
    let Peeked { mut shape, streams, prompt } = if is_json {
        peek(endpoint, &body)?
    } else {
        let unsplittable = Some("endpoint");
        let shape =
            baton_core::RequestShape { unsplittable, answers_whole: true, ..Default::default() };
        Peeked { shape, streams: false, prompt: PromptFields::default() }
    };
    let known = parts.extensions.get::<auth::Tenant>();
    if let Some(tenant) = known {
        shape.tenant = Tenant { name: tenant.name.clone(), weight: tenant.weight };
        if shape.priority == 0 {
            shape.priority = tenant.priority;
        }
    }
    if let Some(priority) = priority(&parts.headers)? {
        shape.priority = priority;
    }
    let named = front.tenant_header.as_ref().and_then(|name| parts.headers.get(name));
    // A key says more than a header.
    if let Some(tenant) = named.filter(|_| known.is_none()) {
        shape.tenant = tenant_of(tenant);
    }
    let prompt = prompt::read(&body, prompt, front.tokenizer.as_ref()).await;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let tracer = front.shell.tracer.as_ref();
    let trace = tracer.and_then(|tracer| tracer.begin(&parts.headers, &path)).map(Box::new);
    let headers = forwarded_headers(&parts.headers, request_id);
    let (answer, in_flight) = front.shell.arrive(IncomingRequest {
        shape,
        prompt,
        streams,
        request_id: request_id.clone(),
        arrived,
        trace,
        budget: known.and_then(|tenant| tenant.budget.clone()),
        forward: ForwardedRequest { path, headers, body },
    });
    let head =
        poll_fn(|context| answer.poll_head(context)).await.ok_or(ClientError::ShuttingDown)?;
    let mut response = Response::new(Body::new(AnswerBody { answer, _guard: in_flight }));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

/// Of the header, which comes before the JSON's.
fn priority(headers: &HeaderMap) -> Result<Option<i32>, ClientError> {
    let Some(value) = headers.get(&PRIORITY) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|value| value.trim().parse().ok());
    number.map(|number| Some(clamped(number))).ok_or(ClientError::Priority)
}

/// What a proxy in front says; longer names than anybody needs are cut.
fn tenant_of(value: &HeaderValue) -> Tenant {
    const LONGEST: usize = 128;
    let name = String::from_utf8_lossy(value.as_bytes());
    Tenant { name: name.chars().take(LONGEST).collect::<String>().into(), ..Tenant::default() }
}

async fn read_body(
    body: &mut Body,
    headers: &HeaderMap,
    limits: &LimitsConfig,
) -> Result<Bytes, ClientError> {
    let limit = limits.max_body_bytes;
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(ClientError::BodyTooLarge { limit });
    }
    let limited = Limited::new(body, usize::try_from(limit).unwrap_or(usize::MAX));
    match tokio::time::timeout(limits.body_timeout, limited.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(ClientError::BodyTooLarge { limit })
        }
        Ok(Err(_)) => Err(ClientError::BodyBrokeOff),
        Err(_) => Err(ClientError::BodyTooSlow { seconds: limits.body_timeout.as_secs() }),
    }
}

fn content_is_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_none_or(|value| {
        value.to_str().is_ok_and(|value| value.to_ascii_lowercase().contains("json"))
    })
}

/// Everything that is not about the connection itself goes on to the engine.
fn forwarded_headers(headers: &HeaderMap, request_id: &HeaderValue) -> Vec<wire::Header> {
    let to_wire = |name: &HeaderName, value: &HeaderValue| wire::Header {
        name: name.as_str().to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
    };
    headers
        .iter()
        .filter(|(name, _)| !is_hop_by_hop(name) && **name != header::HOST && **name != REQUEST_ID)
        .map(|(name, value)| to_wire(name, value))
        .chain([to_wire(&REQUEST_ID, request_id)])
        .collect()
}

/// RFC 9110, section 7.6.1, and what our own framing decides.
pub(crate) fn is_hop_by_hop(name: &HeaderName) -> bool {
    [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::DATE,
        header::EXPECT,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::SERVER,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
    ]
    .contains(name)
}

pub(super) fn refuse(error: &ClientError) -> Response {
    let (head, body) = error.to_parts();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}
