use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Body, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::{net::TcpStream, time::Instant};

use super::sse::Chunked;
use crate::{Answer, EngineError, EngineRequest};

/// An idle connection is not used after this time: vLLM's server closes its own after 5 s.
const IDLE_LIMIT: Duration = Duration::from_secs(3);
/// Time for one of our own small questions.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_LIMIT_BYTES: usize = 8 << 20;

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
#[derive(Clone, Debug)]
pub(super) struct EngineHttp {
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    address: String,
    host: Option<HeaderValue>,
    idle: Mutex<Vec<(Instant, Link)>>,
}

impl EngineHttp {
    /// `address` is `host:port`.
    pub(super) fn new(address: String) -> Self {
        let host = HeaderValue::from_str(&address).ok();
        Self { pool: Arc::new(Pool { address, host, idle: Mutex::default() }) }
    }

    pub(super) fn address(&self) -> &str {
        &self.pool.address
    }

    pub(super) async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError> {
        let (head, body) = self.exchange(&request).await?.into_parts();
        let mut headers = head.headers;
        let events = headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        for name in &NOT_FORWARDED {
            headers.remove(name);
        }
        let body = Chunked::new(body, events).boxed();
        Ok(Answer { status: head.status, headers, body })
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
            let (head, mut body) = self.exchange(&request).await?.into_parts();
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

    async fn exchange(
        &self,
        request: &EngineRequest,
    ) -> Result<http::Response<Exchange>, EngineError> {
        if let Some(link) = self.pool.take() {
            // The engine may be closing it at this moment: then a fresh connection says the truth.
            if let Ok(answer) = self.exchange_over(link, request).await {
                return Ok(answer);
            }
        }
        let link = self.connect().await?;
        self.exchange_over(link, request).await.map_err(|e| EngineError::BrokeOff(e.to_string()))
    }

    async fn connect(&self) -> Result<Link, EngineError> {
        let unreachable = |reason: String| EngineError::Unreachable {
            address: self.address().to_owned(),
            reason,
        };
        let stream =
            TcpStream::connect(self.address()).await.map_err(|e| unreachable(e.to_string()))?;
        stream.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(e.to_string()))?;
        Ok(Link { sender, connection: Box::pin(connection), closed: false })
    }

    async fn exchange_over(
        &self,
        mut link: Link,
        request: &EngineRequest,
    ) -> Result<http::Response<Exchange>, hyper::Error> {
        std::future::poll_fn(|cx| {
            link.drive(cx);
            link.sender.poll_ready(cx)
        })
        .await?;
        let mut answer = Box::pin(link.sender.send_request(self.http_request(request)));
        let response = std::future::poll_fn(|cx| {
            link.drive(cx);
            answer.as_mut().poll(cx)
        })
        .await?;
        drop(answer);
        Ok(response.map(|body| Exchange { body, link: Some(link), pool: self.pool.clone() }))
    }

    fn http_request(&self, request: &EngineRequest) -> Request<Full<Bytes>> {
        let mut headers = request.headers.clone();
        for name in &NOT_FORWARDED {
            headers.remove(name);
        }
        // Answers are read for their token counts: they must come as they are.
        headers.remove(header::ACCEPT_ENCODING);
        if let Some(host) = &self.pool.host {
            headers.insert(header::HOST, host.clone());
        }
        let mut http = Request::new(Full::new(request.body.clone()));
        *http.method_mut() = request.method.clone();
        // A path that is no URI would have been refused at the front; the root answers it with 404.
        *http.uri_mut() = request.path.parse().unwrap_or_default();
        *http.headers_mut() = headers;
        http
    }
}

impl Pool {
    /// The connection that was used last, if it is still fresh.
    fn take(&self) -> Option<Link> {
        let mut idle = self.idle.lock();
        idle.retain(|(since, _)| since.elapsed() < IDLE_LIMIT);
        idle.pop().map(|(_, link)| link)
    }

    fn give_back(&self, link: Link) {
        self.idle.lock().push((Instant::now(), link));
    }
}

type Connection = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// One connection, driven by whoever uses it.
struct Link {
    sender: http1::SendRequest<Full<Bytes>>,
    connection: Pin<Box<Connection>>,
    closed: bool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("closed", &self.closed).finish_non_exhaustive()
    }
}

impl Link {
    fn drive(&mut self, cx: &mut Context<'_>) {
        // How it ended is told by the answer's own error.
        if !self.closed && self.connection.as_mut().poll(cx).is_ready() {
            self.closed = true;
        }
    }
}

/// The body of one answer, and the connection it comes over.
#[derive(Debug)]
pub(super) struct Exchange {
    body: Incoming,
    /// Gone back to the pool once the answer is whole.
    link: Option<Link>,
    pool: Arc<Pool>,
}

impl Stream for Exchange {
    type Item = Result<Bytes, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(link) = &mut this.link {
                link.drive(cx);
            }
            let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
                return Poll::Pending;
            };
            match frame {
                Some(Ok(frame)) => {
                    // Trailers say nothing that a client needs.
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Some(Err(error)) => {
                    this.link = None;
                    return Poll::Ready(Some(Err(EngineError::BrokeOff(error.to_string()))));
                }
                None => {
                    if let Some(mut link) = this.link.take() {
                        link.drive(cx);
                        if !link.closed && link.sender.is_ready() {
                            this.pool.give_back(link);
                        }
                    }
                    return Poll::Ready(None);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
