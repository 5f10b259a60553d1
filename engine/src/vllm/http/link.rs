use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut, buf::Chain};
use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    Pool,
    framing::{Framing, Head, Malformed},
};
use crate::EngineError;

const ARRIVING_BYTES: usize = 64 << 10;

thread_local! {
    /// Where all connections of a thread read to. Most of them wait most of the time, and a buffer for each would be
    /// most of what a stream costs.
    static ARRIVING: RefCell<Box<[u8]>> = RefCell::new(vec![0; ARRIVING_BYTES].into_boxed_slice());
}

/// One connection to an engine.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    /// What came and was not looked at: a part of a head, or what came behind it.
    arrived: BytesMut,
    /// For another request, once the answer is whole.
    is_reusable: bool,
}

impl Link {
    pub(super) async fn connect(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, arrived: BytesMut::new(), is_reusable: true })
    }

    pub(super) fn is_reusable(&self) -> bool {
        self.is_reusable && self.arrived.is_empty()
    }

    /// Nothing has come unasked, and the engine has not closed it.
    pub(super) fn is_quiet(&self) -> bool {
        matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Sends a request and waits for the head of its answer. An answer that comes before all of the request has been
    /// taken ends the sending, and its connection is not used again.
    pub(super) async fn ask(
        &mut self,
        mut request: Chain<Bytes, Bytes>,
        wants_body: bool,
    ) -> io::Result<Head> {
        let mut refused = None;
        poll_fn(|cx| {
            while request.has_remaining() && refused.is_none() {
                match self.poll_send(cx, &mut request) {
                    Poll::Ready(Ok(())) => {}
                    // It may have said why.
                    Poll::Ready(Err(error)) => refused = Some(error),
                    Poll::Pending => break,
                }
            }
            let head = ready!(self.poll_head(cx, wants_body));
            self.is_reusable &= !request.has_remaining();
            Poll::Ready(head.map_err(|error| refused.take().unwrap_or(error)))
        })
        .await
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        request: &mut Chain<Bytes, Bytes>,
    ) -> Poll<io::Result<()>> {
        let mut slices = [IoSlice::new(&[]); 2];
        let count = request.chunks_vectored(&mut slices);
        let stream = Pin::new(&mut self.stream);
        let sent = ready!(stream.poll_write_vectored(cx, &slices[..count]))?;
        if sent == 0 {
            return Poll::Ready(Err(ErrorKind::WriteZero.into()));
        }
        request.advance(sent);
        Poll::Ready(Ok(()))
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, wants_body: bool) -> Poll<io::Result<Head>> {
        loop {
            if let Some(head) = Head::take(&mut self.arrived, wants_body).map_err(malformed)? {
                self.is_reusable &= head.keeps_alive;
                return Poll::Ready(Ok(head));
            }
            let arrived = &mut self.arrived;
            let read =
                ready!(poll_read(&mut self.stream, cx, |bytes| arrived.extend_from_slice(bytes)))?;
            if read == 0 {
                return Poll::Ready(Err(closed()));
            }
        }
    }

    /// The next bytes of a body, which may be none where only its framing came; nothing where it ends with the
    /// connection.
    fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        framing: &mut Framing,
    ) -> Poll<io::Result<Option<Bytes>>> {
        let mut cut = |bytes: &mut [u8]| {
            let cut = framing.cut(bytes).map_err(malformed)?;
            self.is_reusable &= cut.used == bytes.len();
            Ok(cut.body)
        };
        if !self.arrived.is_empty() {
            let mut bytes = std::mem::take(&mut self.arrived);
            return Poll::Ready(cut(&mut bytes).map(|length| {
                bytes.truncate(length);
                Some(bytes.freeze())
            }));
        }
        let mut body = Ok(None);
        let read = ready!(poll_read(&mut self.stream, cx, |bytes| {
            body = cut(bytes).map(|length| Some(Bytes::copy_from_slice(&bytes[..length])));
        }))?;
        if read == 0 && !framing.ends_with_connection() {
            return Poll::Ready(Err(closed()));
        }
        Poll::Ready(body)
    }
}

fn malformed(error: Malformed) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

fn closed() -> io::Error {
    io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection before its answer was whole")
}

/// Gives what has come to `take`, and answers how much it was.
fn poll_read(
    stream: &mut TcpStream,
    cx: &mut Context<'_>,
    take: impl FnOnce(&mut [u8]),
) -> Poll<io::Result<usize>> {
    ARRIVING.with_borrow_mut(|buffer| {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        let read = buffer.filled().len();
        if read > 0 {
            take(buffer.filled_mut());
        }
        Poll::Ready(Ok(read))
    })
}

/// The body of one answer, and the connection it comes over, which goes back to the pool once it is whole.
#[derive(Debug)]
pub(super) struct Exchange {
    /// Until the body ended or broke off.
    link: Option<Link>,
    framing: Framing,
    pool: Arc<Pool>,
}

impl Exchange {
    pub(super) fn new(link: Link, framing: Framing, pool: Arc<Pool>) -> Self {
        Self { link: Some(link), framing, pool }
    }
}

impl Stream for Exchange {
    type Item = Result<Bytes, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while let Some(mut link) = this.link.take() {
            if this.framing.is_complete() {
                this.pool.give_back(link);
                break;
            }
            let polled = link.poll_body(cx, &mut this.framing);
            match polled {
                Poll::Pending => {
                    this.link = Some(link);
                    return Poll::Pending;
                }
                Poll::Ready(Ok(Some(bytes))) => {
                    this.link = Some(link);
                    if !bytes.is_empty() {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Poll::Ready(Ok(None)) => break,
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Some(Err(EngineError::BrokeOff(error.to_string()))));
                }
            }
        }
        Poll::Ready(None)
    }
}
