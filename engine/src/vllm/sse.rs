use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures::Stream;

use crate::EngineError;

/// What lies ready is joined up to this size.
const JOIN_LIMIT_BYTES: usize = 256 << 10;
/// An event that does not end within this size is no event.
const EVENT_LIMIT_BYTES: usize = 32 << 20;

/// Joins what has already come into one chunk; of a server-sent event stream, each chunk ends between
/// events.
#[derive(Debug)]
pub(super) struct Chunked<S> {
    inner: S,
    events: bool,
    /// What came and was not given on: of an event stream, at most the beginning of one event.
    held: Held,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Open,
    Ended,
    Broke(EngineError),
}

impl<S> Chunked<S> {
    pub(super) fn new(inner: S, events: bool) -> Self {
        Self { inner, events, held: Held::default(), source: Source::Open }
    }
}

impl<S> Stream for Chunked<S>
where
    S: Stream<Item = Result<Bytes, EngineError>> + Unpin,
{
    type Item = Result<Bytes, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let is_dry = this.fill(cx);
            let whole = if this.events && !this.is_complete() {
                end_of_last_event(this.held.as_slice()).unwrap_or(0)
            } else {
                this.held.len()
            };
            if whole > 0 {
                return Poll::Ready(Some(Ok(this.held.take(whole))));
            }
            match std::mem::replace(&mut this.source, Source::Ended) {
                Source::Ended => return Poll::Ready(None),
                Source::Broke(error) => {
                    // What is left is half an event: of no use to anybody.
                    this.held = Held::default();
                    return Poll::Ready(Some(Err(error)));
                }
                Source::Open if this.held.len() > EVENT_LIMIT_BYTES => {
                    this.held = Held::default();
                    let reason = format!("an event of more than {EVENT_LIMIT_BYTES} bytes");
                    return Poll::Ready(Some(Err(EngineError::BrokeOff(reason))));
                }
                Source::Open => this.source = Source::Open,
            }
            if is_dry {
                return Poll::Pending;
            }
        }
    }
}

impl<S> Chunked<S>
where
    S: Stream<Item = Result<Bytes, EngineError>> + Unpin,
{
    /// Takes what lies ready, within the limit. Answers whether that was all for now.
    fn fill(&mut self, cx: &mut Context<'_>) -> bool {
        let limit = self.held.len() + JOIN_LIMIT_BYTES;
        while matches!(self.source, Source::Open) && self.held.len() < limit {
            match Pin::new(&mut self.inner).poll_next(cx) {
                Poll::Ready(Some(Ok(chunk))) => self.held.push(chunk),
                Poll::Ready(Some(Err(error))) => self.source = Source::Broke(error),
                Poll::Ready(None) => self.source = Source::Ended,
                Poll::Pending => return true,
            }
        }
        false
    }

    /// Nothing will come that could make what is held more than it is.
    fn is_complete(&self) -> bool {
        matches!(self.source, Source::Ended)
    }
}

/// Bytes that came in pieces. A single piece is given on without a copy.
#[derive(Debug, Default)]
enum Held {
    #[default]
    Nothing,
    One(Bytes),
    Joined(BytesMut),
}

impl Held {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::One(bytes) => bytes,
            Self::Joined(bytes) => bytes,
        }
    }

    fn push(&mut self, chunk: Bytes) {
        *self = match std::mem::take(self) {
            Self::Nothing => Self::One(chunk),
            Self::One(first) => {
                let mut joined = BytesMut::with_capacity(2 * (first.len() + chunk.len()));
                joined.extend_from_slice(&first);
                joined.extend_from_slice(&chunk);
                Self::Joined(joined)
            }
            Self::Joined(mut joined) => {
                joined.extend_from_slice(&chunk);
                Self::Joined(joined)
            }
        };
    }

    /// The first `len` bytes; the rest stays.
    fn take(&mut self, len: usize) -> Bytes {
        let mut all = match std::mem::take(self) {
            Self::Nothing => Bytes::new(),
            Self::One(bytes) => bytes,
            Self::Joined(bytes) => bytes.freeze(),
        };
        let taken = all.split_to(len.min(all.len()));
        if !all.is_empty() {
            *self = Self::One(all);
        }
        taken
    }
}

/// Where the last whole event ends: after an empty line, with either kind of line end.
fn end_of_last_event(bytes: &[u8]) -> Option<usize> {
    let empty_line_before = |end: usize| {
        matches!(bytes.get(..end), Some([.., b'\n']))
            || matches!(bytes.get(..end), Some([.., b'\n', b'\r']))
    };
    (0..bytes.len()).rev().find(|&at| bytes[at] == b'\n' && empty_line_before(at)).map(|at| at + 1)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    /// Each inner list lies ready at once; between the lists the stream is pending.
    async fn cut(events: bool, arrivals: &[&[&'static str]]) -> Vec<String> {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let inner = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        let mut chunked = Chunked::new(Box::pin(inner), events);
        let mut chunks = Vec::new();
        for arrival in arrivals {
            for piece in *arrival {
                sender.send(Ok(Bytes::from_static(piece.as_bytes()))).unwrap();
            }
            while let Some(chunk) = futures::poll!(chunked.next()).map(Option::unwrap).ready() {
                chunks.push(String::from_utf8(chunk.unwrap().to_vec()).unwrap());
            }
        }
        drop(sender);
        while let Some(chunk) = chunked.next().await {
            chunks.push(String::from_utf8(chunk.unwrap().to_vec()).unwrap());
        }
        chunks
    }

    trait Ready<T> {
        fn ready(self) -> Option<T>;
    }

    impl<T> Ready<T> for Poll<T> {
        fn ready(self) -> Option<T> {
            match self {
                Poll::Ready(value) => Some(value),
                Poll::Pending => None,
            }
        }
    }

    #[tokio::test]
    async fn events_that_lie_ready_are_one_chunk() {
        let chunks =
            cut(true, &[&["data: 1\n\n"], &["data: 2\n\n", "data: 3\n\n"], &["data: [DONE]\n\n"]]);
        assert_eq!(chunks.await, ["data: 1\n\n", "data: 2\n\ndata: 3\n\n", "data: [DONE]\n\n"]);
    }

    #[tokio::test]
    async fn an_event_in_pieces_is_whole_again() {
        let chunks = cut(
            true,
            &[&["data: 1\n\nda"], &["ta: 2"], &["\n"], &["\ndata: 3\r\n\r\ndata"], &[": 4\n\n"]],
        );
        assert_eq!(chunks.await, ["data: 1\n\n", "data: 2\n\ndata: 3\r\n\r\n", "data: 4\n\n"]);
    }

    #[tokio::test]
    async fn what_is_left_at_the_end_is_given_on() {
        assert_eq!(cut(true, &[&["data: 1\n\ndata: 2"]]).await, ["data: 1\n\n", "data: 2"]);
    }

    #[tokio::test]
    async fn other_bodies_are_only_joined() {
        assert_eq!(cut(false, &[&["{\"a\"", ":1"], &["}"]]).await, ["{\"a\":1", "}"]);
    }

    #[tokio::test]
    async fn an_event_larger_than_the_join_limit_comes_whole() {
        let piece: &'static str = Box::leak("x".repeat(JOIN_LIMIT_BYTES / 2).into_boxed_str());
        let chunks = cut(true, &[&["data: ", piece, piece, piece, "\n\ndata: 2\n\n"]]).await;
        assert_eq!(chunks.concat().len(), 6 + 3 * piece.len() + 2 + 9);
        assert!(chunks.iter().all(|chunk| chunk.ends_with("\n\n")));
    }
}
