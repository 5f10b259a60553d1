use std::{sync::Arc, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::Chain};
use futures::StreamExt;
use http::{HeaderMap, HeaderName, Method, StatusCode, header, uri::PathAndQuery};
use parking_lot::Mutex;
use tokio::time::Instant;

pub(super) mod framing;
mod link;

use self::{
    framing::Head,
    link::{Exchange, Link},
};
use super::sse::Chunked;
use crate::{Answer, EngineError, EngineRequest};

/// An idle connection is not used after this time: vLLM's server closes its own after 5 s.
const IDLE_LIMIT: Duration = Duration::from_secs(3);
/// Time for one of our own small questions.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_LIMIT_BYTES: usize = 8 << 20;

/// A body up to this size is sent from one buffer with its head.
const JOINED_BODY_BYTES: usize = 16 << 10;
/// Of most requests' heads.
const HEAD_ROOM_BYTES: usize = 512;

/// Of one connection only (RFC 9110, 7.6.1), or about it.
const NOT_FORWARDED: [HeaderName; 11] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
];

/// Host and port of a `http://HOST:PORT` URL.
pub(super) fn authority(url: &str) -> Result<String, EngineError> {
    let wrong =
        |reason: &str| EngineError::NotStarted(format!("{url:?} is not an engine's URL: {reason}"));
    let uri: http::Uri = url.parse().map_err(|_| wrong("expected http://HOST:PORT"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("expected http://"));
    }
    let host = uri.host().ok_or_else(|| wrong("it has no host"))?;
    Ok(format!("{host}:{}", uri.port_u16().unwrap_or(80)))
}

/// A client for one engine, with a pool of idle connections.
///
/// Each exchange drives its own connection, so that there is one task a request, and dropping an answer
/// closes its connection: that is how vLLM learns that nobody listens any more.
///
/// It speaks HTTP/1.1 itself, with httparse for the heads. A worker holds thousands of these connections, most of which
/// wait for a token most of the time, and hyper's hold 25 KB each meanwhile: buffers to read and write, and a queue of
/// requests (docs/performance.md).
#[derive(Clone, Debug)]
pub(super) struct EngineHttp {
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    address: String,
    idle: Mutex<Vec<(Instant, Link)>>,
}

impl EngineHttp {
    /// `address` is `host:port`.
    pub(super) fn new(address: String) -> Self {
        Self { pool: Arc::new(Pool { address, idle: Mutex::default() }) }
    }

    pub(super) fn address(&self) -> &str {
        &self.pool.address
    }

    pub(super) async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError> {
        let (head, body) = self.exchange(&request).await?;
        let events = head
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        let body = Chunked::new(body, events).boxed();
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    /// Asks something small of the engine itself.
    pub(super) async fn ask(&self, path: &'static str) -> Result<(StatusCode, Bytes), EngineError> {
        let asking = async {
            let request = EngineRequest {
                method: Method::GET,
                path: path.to_owned(),
                headers: HeaderMap::new(),
                body: Bytes::new(),
            };
            let (head, mut body) = self.exchange(&request).await?;
            let mut answer = BytesMut::new();
            while let Some(chunk) = body.next().await {
                answer.extend_from_slice(&chunk?);
                if answer.len() > ASK_LIMIT_BYTES {
                    let reason = format!("more than {ASK_LIMIT_BYTES} bytes");
                    return Err(EngineError::Unexpected { what: path, reason });
                }
            }
            Ok((head.status, answer.freeze()))
        };
        tokio::time::timeout(ASK_TIMEOUT, asking).await.unwrap_or_else(|_| {
            let reason = format!("no answer to {path} within {} s", ASK_TIMEOUT.as_secs());
            Err(EngineError::Unreachable { address: self.address().to_owned(), reason })
        })
    }

    async fn exchange(&self, request: &EngineRequest) -> Result<(Head, Exchange), EngineError> {
        if let Some(link) = self.pool.take() {
            // The engine may be closing it at this moment: then a fresh connection says the truth.
            if let Ok(answer) = self.exchange_over(link, request).await {
                return Ok(answer);
            }
        }
        let link = Link::connect(self.address()).await.map_err(|e| EngineError::Unreachable {
            address: self.address().to_owned(),
            reason: e.to_string(),
        })?;
        self.exchange_over(link, request).await.map_err(|e| EngineError::BrokeOff(e.to_string()))
    }

    async fn exchange_over(
        &self,
        mut link: Link,
        request: &EngineRequest,
    ) -> std::io::Result<(Head, Exchange)> {
        let wants_body = request.method != Method::HEAD;
        let head = link.ask(self.message(request), wants_body).await?;
        let body = Exchange::new(link, head.framing, self.pool.clone());
        Ok((head, body))
    }

    /// A request as it goes over the wire.
    fn message(&self, request: &EngineRequest) -> Chain<Bytes, Bytes> {
        let (joined, apart) = match request.body.len() {
            ..=JOINED_BODY_BYTES => (request.body.clone(), Bytes::new()),
            _ => (Bytes::new(), request.body.clone()),
        };
        let mut message = BytesMut::with_capacity(HEAD_ROOM_BYTES + joined.len());
        let mut line = |parts: &[&[u8]]| {
            parts.iter().for_each(|part| message.put_slice(part));
            message.put_slice(b"\r\n");
        };
        // A path that is no URI would have been refused at the front; the root answers it with 404.
        let path = request.path.parse().unwrap_or(PathAndQuery::from_static("/")).to_string();
        line(&[request.method.as_str().as_bytes(), b" ", path.as_bytes(), b" HTTP/1.1"]);
        line(&[b"host: ", self.address().as_bytes()]);
        for (name, value) in &request.headers {
            // Answers are read for their token counts: they must come as they are.
            if !NOT_FORWARDED.contains(name) && *name != header::ACCEPT_ENCODING {
                line(&[name.as_str().as_bytes(), b": ", value.as_bytes()]);
            }
        }
        if request.method == Method::POST || !request.body.is_empty() {
            line(&[b"content-length: ", request.body.len().to_string().as_bytes()]);
        }
        line(&[]);
        message.put_slice(&joined);
        message.freeze().chain(apart)
    }
}

impl Pool {
    /// The connection that was used last, if it is still fresh.
    fn take(&self) -> Option<Link> {
        let mut idle = self.idle.lock();
        idle.retain(|(since, _)| since.elapsed() < IDLE_LIMIT);
        while let Some((_, link)) = idle.pop() {
            if link.is_quiet() {
                return Some(link);
            }
        }
        None
    }

    fn give_back(&self, link: Link) {
        if link.is_reusable() {
            self.idle.lock().push((Instant::now(), link));
        }
    }
}

#[cfg(test)]
mod tests;
