//! Every decoder of what vLLM, our connector and our scheduler inside it send, held against what must be
//! true whatever comes.

use bytes::{Bytes, BytesMut};
use futures::{FutureExt, StreamExt, stream};

use super::{
    connector,
    frames::{self, Hello},
    http::framing::{Head, Malformed},
    kv_events, probe, scheduler,
    sse::Chunked,
};
use crate::{EngineError, FromEngine, Pacing};

/// What is read has come whole: no read waits.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let ready = future.now_or_never();
    assert!(ready.is_some(), "nothing is waited for");
    ready
}

/// A connection to the worker's socket: a hello, then all that its sender says.
pub fn worker_socket(mut bytes: &[u8]) {
    let from = &mut bytes;
    let mut buffer = Vec::new();
    let Some(Ok(Some(hello))) = at_once(frames::read::<Hello>(from, &mut buffer)) else { return };
    match connector::fitting(&hello) {
        Ok(Some(compatibility)) => {
            assert!(compatibility.tensor_parallel_rank < compatibility.tensor_parallel_size);
            while let Some(Ok(Some(message))) =
                at_once(frames::read::<FromEngine>(from, &mut buffer))
            {
                let mut again = Vec::new();
                assert!(frames::append(&message, &mut again).is_ok());
                let read = at_once(frames::read(&mut &again[..], &mut buffer));
                assert_eq!(read.and_then(Result::ok).flatten(), Some(message));
            }
        }
        Ok(None) => {
            let pacing = Pacing::new(None);
            pacing.set_itl_target_ms(50.0);
            let _ = at_once(scheduler::hear(from, &pacing));
            if let Some(pace) = pacing.pace() {
                let model = pace.model;
                let numbers = model.prefill_ms.iter().chain(&model.decode_ms);
                assert!(numbers.chain([&pace.step_ms]).all(|ms| ms.is_finite() && *ms >= 0.0));
            }
        }
        Err(refused) => assert!(!refused.to_string().is_empty()),
    }
}

/// Messages of vLLM about its prefix cache.
pub fn kv_events(bytes: &[u8]) {
    kv_events::fuzz(bytes);
}

/// An answer's body, in pieces of a size that the first byte says; of an event stream, where its lowest bit
/// is set.
pub fn answer_body(bytes: &[u8]) {
    let Some((&how, body)) = bytes.split_first() else { return };
    let is_events = how & 1 == 1;
    let pieces = body.chunks(1 + usize::from(how >> 1));
    let pieces =
        stream::iter(pieces.map(|piece| Ok::<_, EngineError>(Bytes::copy_from_slice(piece))));
    let Some(chunks) = at_once(Chunked::new(pieces, is_events).collect::<Vec<_>>()) else { return };
    let chunks: Vec<Bytes> = chunks.into_iter().flatten().collect();
    assert_eq!(chunks.concat(), body);
    if is_events && let Some((_, whole)) = chunks.split_last() {
        assert!(whole.iter().all(|chunk| chunk.ends_with(b"\n\n") || chunk.ends_with(b"\n\r\n")));
    }
}

/// An engine's side of a connection, however it is cut into pieces: the first byte says how. The same head and the same
/// body come of it as if it had come at once.
pub fn engine_exchange(bytes: &[u8]) {
    let Some((&how, wire)) = bytes.split_first() else { return };
    let in_pieces = exchanged(wire.chunks(1 + usize::from(how >> 1)), how & 1 == 0);
    let at_once = exchanged(std::iter::once(wire), how & 1 == 0);
    // A long head is only refused before it is whole.
    if in_pieces != Err(Malformed::LongHead) {
        assert_eq!(in_pieces, at_once);
    }
}

/// The head as far as it says something, the body, and whether it is complete.
fn exchanged<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    has_body: bool,
) -> Result<Option<(String, Vec<u8>, bool)>, Malformed> {
    let mut head: Option<Head> = None;
    let (mut arrived, mut body) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        arrived.extend_from_slice(piece);
        if head.is_none() {
            head = Head::take(&mut arrived, has_body)?;
        }
        let Some(head) = &mut head else { continue };
        let cut = head.framing.cut(&mut arrived)?;
        assert!(cut.body <= cut.used && cut.used <= arrived.len());
        assert!(cut.used == arrived.len() || head.framing.is_complete());
        body.extend_from_slice(&arrived[..cut.body]);
        arrived.clear();
    }
    Ok(head.map(|head| {
        let is_complete = head.framing.is_complete();
        (format!("{} {:?}", head.status, head.headers), body, is_complete)
    }))
}

/// What vLLM says of itself: its models, its version, its metrics.
pub fn engine_description(bytes: &[u8]) {
    probe::fuzz(bytes);
}
