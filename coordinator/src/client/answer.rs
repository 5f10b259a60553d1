use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;

/// An answer that comes whole is sent in frames of this size.
const FRAME_BYTES: usize = 64 << 10;

/// The place where a request's answer is laid down by the worker's stream and picked up by the
/// client's connection. It holds at most what the client may leave unread, so a slow client costs its
/// own buffer and nobody's time.
#[derive(Debug)]
pub(crate) struct Answer {
    state: Mutex<State>,
    max_unread_bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Apart, for what each token touches to lie close together.
    head: Option<Box<Head>>,
    /// Made for what comes and given away whole. A buffer that each stream kept for its next token would be out of
    /// the caches by then; one that another stream has just done with is not.
    unread: BytesMut,
    end: Option<End>,
    waiting: Option<Waker>,
}

#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// The connection is to be broken, because the answer's framing has no way to say what happened.
    Broken,
}

/// The client left more unread than it may.
#[derive(Debug)]
pub(crate) struct TooSlow;

/// What a connection gets that has to be broken.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(crate) struct BrokenOff;

impl Answer {
    pub(crate) fn new(max_unread_bytes: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), max_unread_bytes })
    }

    pub(crate) fn max_unread_bytes(&self) -> usize {
        self.max_unread_bytes
    }

    pub(crate) fn begin(&self, head: Head) {
        let head = Some(Box::new(head));
        self.change(|state| state.head = head);
    }

    pub(crate) fn push(&self, payload: &[u8]) -> Result<(), TooSlow> {
        if payload.is_empty() {
            return Ok(());
        }
        let mut too_slow = false;
        self.change(|state| {
            too_slow = state.unread.len() + payload.len() > self.max_unread_bytes;
            if too_slow {
                state.end = Some(End::Broken);
            } else if state.unread.is_empty() {
                // Of just the size that it needs: see `State::unread`.
                state.unread = BytesMut::from(payload);
            } else {
                state.unread.extend_from_slice(payload);
            }
        });
        if too_slow { Err(TooSlow) } else { Ok(()) }
    }

    pub(crate) fn complete(&self) {
        self.change(|state| state.end = state.end.or(Some(End::Complete)));
    }

    pub(crate) fn break_off(&self) {
        self.change(|state| state.end = state.end.or(Some(End::Broken)));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = self.state.lock();
            change(&mut state);
            state.waiting.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until the answer begins.
    pub(crate) fn poll_head(&self, context: &Context<'_>) -> Poll<Option<Head>> {
        let mut state = self.state.lock();
        match (state.head.take(), state.end) {
            (Some(head), _) => Poll::Ready(Some(*head)),
            (None, Some(_)) => Poll::Ready(None),
            (None, None) => {
                state.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The body of a client's response. `_guard` is dropped with it, whether the answer was complete or
/// the client went away.
#[derive(Debug)]
pub(crate) struct AnswerBody<G> {
    pub(crate) answer: Arc<Answer>,
    pub(crate) _guard: G,
}

impl<G: Unpin> Body for AnswerBody<G> {
    type Data = Bytes;
    type Error = BrokenOff;

    /// All that lies there becomes one frame, however many tokens it holds, up to a size that the
    /// connection can buffer.
    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let mut state = self.answer.state.lock();
        if !state.unread.is_empty() && state.end != Some(End::Broken) {
            let frame = if state.unread.len() <= FRAME_BYTES {
                std::mem::take(&mut state.unread)
            } else {
                state.unread.split_to(FRAME_BYTES)
            };
            return Poll::Ready(Some(Ok(Frame::data(frame.freeze()))));
        }
        match state.end {
            Some(End::Complete) => Poll::Ready(None),
            Some(End::Broken) => Poll::Ready(Some(Err(BrokenOff))),
            None => {
                match &mut state.waiting {
                    Some(waiting) => waiting.clone_from(context.waker()),
                    none => *none = Some(context.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = self.answer.state.lock();
        state.end == Some(End::Complete) && state.unread.is_empty()
    }

    /// An answer that is all there has a length, and is sent with one.
    fn size_hint(&self) -> SizeHint {
        let state = self.answer.state.lock();
        match state.end {
            Some(End::Complete) => SizeHint::with_exact(state.unread.len() as u64),
            _ => SizeHint::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use http_body_util::BodyExt;

    use super::*;

    fn head() -> Head {
        Head { status: StatusCode::OK, headers: HeaderMap::new() }
    }

    #[tokio::test]
    async fn what_is_there_comes_as_one_frame_and_the_end_after_it() {
        let answer = Answer::new(1024);
        answer.begin(head());
        answer.push(b"a").unwrap();
        answer.push(b"b").unwrap();
        let mut body = AnswerBody { answer: answer.clone(), _guard: () };
        assert_eq!(body.size_hint().exact(), None);
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");

        let next = tokio::spawn(async move { body.frame().await.map(Result::unwrap) });
        tokio::task::yield_now().await;
        answer.complete();
        assert!(next.await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_whole_answer_has_a_length() {
        let answer = Answer::new(1024);
        answer.begin(head());
        answer.push(b"abc").unwrap();
        answer.complete();
        let body = AnswerBody { answer, _guard: () };
        assert_eq!(body.size_hint().exact(), Some(3));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "abc");
    }

    #[tokio::test]
    async fn a_large_answer_comes_in_frames_that_a_connection_can_buffer() {
        let answer = Answer::new(1 << 20);
        answer.begin(head());
        let large: Vec<u8> = (0..=u8::MAX).cycle().take(2 * FRAME_BYTES + 1).collect();
        answer.push(&large).unwrap();
        answer.complete();
        let mut body = AnswerBody { answer, _guard: () };
        let (mut lengths, mut whole) = (Vec::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            lengths.push(data.len());
            whole.extend_from_slice(&data);
        }
        assert_eq!(lengths, [FRAME_BYTES, FRAME_BYTES, 1]);
        assert!(whole == large);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_bounded() {
        let answer = Answer::new(4);
        answer.begin(head());
        answer.push(b"1234").unwrap();
        assert!(answer.push(b"5").is_err());
        let mut body = AnswerBody { answer, _guard: () };
        assert!(body.frame().await.unwrap().is_err());
    }

    #[test]
    fn an_answer_that_ends_before_it_began_has_no_head() {
        let answer = Answer::new(4);
        let context = Context::from_waker(Waker::noop());
        assert!(answer.poll_head(&context).is_pending());
        answer.break_off();
        assert!(matches!(answer.poll_head(&context), Poll::Ready(None)));
    }
}
