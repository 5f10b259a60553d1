//! What passes over a handoff's stream while UCX moves its blocks. All integers are little-endian.
//!
//! ```text
//! consumer ─► subscription as in `frame`, then the address of its UCX worker: length u16, bytes
//!             1 ack · 2 progress
//!             3 region: id u32 · base u64 · length u64 · key length u16, key
//!             4 grant: region u32 · offset u64, for the first block that has none
//! producer ─► 1 block: its head as in `frame`: there is one, it wants a slot
//!             2 to 5 as in `frame`
//!             6 landed: so many u32 of the granted blocks, the first ones, were written
//!             9 whole: a block's head as in `frame`, then its bytes: it wants no grant
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::RecvStream;

use crate::{
    channel::TransferError,
    frame::{BlockHead, ConsumerWord, FrameError, ProducerFrame},
    quic::code::read_failed,
};

/// The longest address and key that are taken from a peer.
const MAX_BLOB_BYTES: usize = 16 << 10;

const REGION: u8 = 3;
const GRANT: u8 = 4;
const LANDED: u8 = 6;
const WHOLE: u8 = 9;

/// The longest block that comes over the stream itself: asking for a place would take longer than its bytes.
pub(super) const MAX_WHOLE_BYTES: u32 = 64 << 10;

const READ_BYTES: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Said(ConsumerWord),
    Region { id: u32, base: u64, len_bytes: u64, key: Bytes },
    Grant { region: u32, offset: u64 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Said(ProducerFrame),
    Landed { blocks: u32 },
    Whole { head: BlockHead, bytes: Bytes },
}

pub(super) fn put_address(into: &mut BytesMut, address: &[u8]) {
    put_blob(into, address);
}

impl Word {
    pub(super) fn encode(&self, into: &mut BytesMut) {
        match self {
            Self::Said(word) => into.put(word.encode()),
            Self::Region { id, base, len_bytes, key } => {
                into.put_u8(REGION);
                into.put_u32_le(*id);
                into.put_u64_le(*base);
                into.put_u64_le(*len_bytes);
                put_blob(into, key);
            }
            Self::Grant { region, offset } => {
                into.put_u8(GRANT);
                into.put_u32_le(*region);
                into.put_u64_le(*offset);
            }
        }
    }

    /// The next word, where it has come whole.
    pub(super) fn take(from: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(kind) = from.first().copied() else { return Ok(None) };
        match kind {
            REGION => {
                const FIXED: usize = 1 + 4 + 8 + 8;
                let Some(blob) = from.get(FIXED..) else { return Ok(None) };
                let Some(len) = blob_len(blob)? else { return Ok(None) };
                let mut word = from.split_to(FIXED + 2 + len).freeze();
                word.advance(1);
                let (id, base, len_bytes) =
                    (word.get_u32_le(), word.get_u64_le(), word.get_u64_le());
                word.advance(2);
                Ok(Some(Self::Region { id, base, len_bytes, key: word }))
            }
            GRANT => {
                if from.len() < 1 + 4 + 8 {
                    return Ok(None);
                }
                from.advance(1);
                Ok(Some(Self::Grant { region: from.get_u32_le(), offset: from.get_u64_le() }))
            }
            other => {
                let word = ConsumerWord::decode(other)?;
                from.advance(1);
                Ok(Some(Self::Said(word)))
            }
        }
    }
}

impl Frame {
    pub(super) fn encode(&self, into: &mut BytesMut) {
        match self {
            Self::Said(frame) => into.put(frame.encode()),
            Self::Landed { blocks } => {
                into.put_u8(LANDED);
                into.put_u32_le(*blocks);
            }
            Self::Whole { head, bytes } => {
                into.put_u8(WHOLE);
                into.put(ProducerFrame::Block(*head).encode());
                into.put_slice(bytes);
            }
        }
    }

    /// The next frame, where it has come whole.
    pub(super) fn take(from: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(kind) = from.first().copied() else { return Ok(None) };
        if kind == WHOLE {
            return Self::take_whole(from);
        }
        let body_bytes = if kind == LANDED { 4 } else { ProducerFrame::body_bytes(kind)? };
        if from.len() < 1 + body_bytes {
            return Ok(None);
        }
        from.advance(1);
        let mut body = from.split_to(body_bytes);
        if kind == LANDED {
            return Ok(Some(Self::Landed { blocks: body.get_u32_le() }));
        }
        ProducerFrame::decode(kind, &body).map(|frame| Some(Self::Said(frame)))
    }

    fn take_whole(from: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(kind) = from.get(1).copied() else { return Ok(None) };
        let head_bytes = 2 + ProducerFrame::body_bytes(kind)?;
        let Some(body) = from.get(2..head_bytes) else { return Ok(None) };
        let ProducerFrame::Block(head) = ProducerFrame::decode(kind, body)? else {
            return Err(FrameError::Kind(kind));
        };
        if head.len > MAX_WHOLE_BYTES {
            return Err(FrameError::Length);
        }
        let whole = head_bytes + head.len as usize;
        if from.len() < whole {
            from.reserve(whole - from.len());
            return Ok(None);
        }
        let mut bytes = from.split_to(whole).freeze();
        bytes.advance(head_bytes);
        Ok(Some(Self::Whole { head, bytes }))
    }
}

/// The address behind a subscription, where it has come whole.
pub(super) fn take_address(from: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(len) = blob_len(from)? else { return Ok(None) };
    from.advance(2);
    Ok(Some(from.split_to(len).freeze()))
}

fn put_blob(into: &mut BytesMut, blob: &[u8]) {
    // UCX's own are a few hundred bytes. One that is longer than can be said is cut, and refused there.
    let len = u16::try_from(blob.len()).unwrap_or(u16::MAX);
    into.put_u16_le(len);
    into.put_slice(&blob[..usize::from(len)]);
}

/// The length of the blob, where all of it is there.
fn blob_len(from: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some((len, rest)) = from.split_first_chunk() else { return Ok(None) };
    let len = usize::from(u16::from_le_bytes(*len));
    if len == 0 || len > MAX_BLOB_BYTES {
        return Err(FrameError::Length);
    }
    Ok((rest.len() >= len).then_some(len))
}

/// A stream, and what has come of it that was not taken yet.
pub(super) struct Inbox {
    pub(super) recv: RecvStream,
    pub(super) unread: BytesMut,
}

impl Inbox {
    pub(super) fn new(recv: RecvStream) -> Self {
        Self { recv, unread: BytesMut::new() }
    }

    /// Waits for more. Answers whether there is: the stream may have ended. Nothing is lost when the
    /// future is dropped.
    pub(super) async fn more(&mut self) -> Result<bool, TransferError> {
        let chunk = self.recv.read_chunk(READ_BYTES, true).await;
        match chunk.map_err(|error| read_failed(&error))? {
            Some(chunk) => {
                self.unread.extend_from_slice(&chunk.bytes);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// What a consumer says: an address, then words to the first fault.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_words(bytes: &[u8]) {
    let mut unread = BytesMut::from(bytes);
    if let Ok(Some(address)) = take_address(&mut unread) {
        assert!(address.len() <= MAX_BLOB_BYTES);
    }
    while let Ok(Some(word)) = Word::take(&mut unread) {
        let mut encoded = BytesMut::new();
        word.encode(&mut encoded);
        assert_eq!(Word::take(&mut encoded), Ok(Some(word)));
    }
}

/// What a producer says, to the first fault.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_frames(bytes: &[u8]) {
    let mut unread = BytesMut::from(bytes);
    while let Ok(Some(frame)) = Frame::take(&mut unread) {
        let mut encoded = BytesMut::new();
        frame.encode(&mut encoded);
        assert_eq!(Frame::take(&mut encoded), Ok(Some(frame)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use baton_types::{Epoch, Generation, HandoffId, HandoffKey};

    use crate::{channel::Refusal, frame::BlockHead, mac::Mac};

    fn words() -> impl Strategy<Value = Word> {
        let key = prop::collection::vec(any::<u8>(), 1..300).prop_map(Bytes::from);
        prop_oneof![
            Just(Word::Said(ConsumerWord::Ack)),
            Just(Word::Said(ConsumerWord::Progress)),
            (any::<u32>(), any::<[u64; 2]>(), key)
                .prop_map(|(id, [base, len_bytes], key)| Word::Region { id, base, len_bytes, key }),
            (any::<u32>(), any::<u64>())
                .prop_map(|(region, offset)| Word::Grant { region, offset }),
        ]
    }

    fn frames() -> impl Strategy<Value = Frame> {
        prop_oneof![
            any::<u32>().prop_map(|blocks| Frame::Landed { blocks }),
            any::<([u128; 2], u32, u32, u32, Option<u64>)>().prop_map(
                |(ids, generation, index, len, crc)| {
                    let handoff = HandoffKey {
                        epoch: Epoch::from_u128(ids[0]),
                        id: HandoffId::from_u128(ids[1]),
                        generation: Generation(generation),
                    };
                    let (crc, mac) = (
                        crc.unwrap_or(1),
                        crc.is_none().then_some(Mac([index.to_le_bytes()[0]; 32])),
                    );
                    Frame::Said(ProducerFrame::Block(BlockHead { handoff, index, len, crc, mac }))
                }
            ),
            prop::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| {
                let handoff = HandoffKey {
                    epoch: Epoch::from_u128(1),
                    id: HandoffId::from_u128(2),
                    generation: Generation(3),
                };
                let len = u32::try_from(bytes.len()).unwrap();
                let head = BlockHead { handoff, index: 4, len, crc: 5, mac: None };
                Frame::Whole { head, bytes: bytes.into() }
            }),
            Just(Frame::Said(ProducerFrame::Waiting)),
            Just(Frame::Said(ProducerFrame::Refused(Refusal::Aborted))),
        ]
    }

    /// All that can be taken, when the bytes come in pieces of this size.
    fn in_pieces<T>(
        bytes: &[u8],
        piece: usize,
        take: impl Fn(&mut BytesMut) -> Result<Option<T>, FrameError>,
    ) -> Vec<T> {
        let (mut unread, mut taken) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            unread.extend_from_slice(piece);
            while let Some(next) = take(&mut unread).unwrap() {
                taken.push(next);
            }
        }
        assert!(unread.is_empty());
        taken
    }

    proptest! {
        #[test]
        fn words_arrive_as_they_were_sent(
            sent in prop::collection::vec(words(), 0..8),
            piece in 1..64_usize,
        ) {
            let mut bytes = BytesMut::new();
            sent.iter().for_each(|word| word.encode(&mut bytes));
            prop_assert_eq!(in_pieces(&bytes, piece, Word::take), sent);
        }

        #[test]
        fn frames_arrive_as_they_were_sent(
            sent in prop::collection::vec(frames(), 0..8),
            piece in 1..64_usize,
        ) {
            let mut bytes = BytesMut::new();
            sent.iter().for_each(|frame| frame.encode(&mut bytes));
            prop_assert_eq!(in_pieces(&bytes, piece, Frame::take), sent);
        }

        #[test]
        fn garbage_is_taken_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let (mut words, mut frames) = (BytesMut::from(&bytes[..]), BytesMut::from(&bytes[..]));
            while let Ok(Some(_)) = Word::take(&mut words) {}
            while let Ok(Some(_)) = Frame::take(&mut frames) {}
            let _ = take_address(&mut BytesMut::from(&bytes[..]));
        }
    }

    #[test]
    fn a_block_that_comes_whole_is_short() {
        let handoff = HandoffKey {
            epoch: Epoch::from_u128(1),
            id: HandoffId::from_u128(2),
            generation: Generation(3),
        };
        let head = BlockHead { handoff, index: 0, len: MAX_WHOLE_BYTES + 1, crc: 0, mac: None };
        let mut unread = BytesMut::new();
        Frame::Whole { head, bytes: Bytes::new() }.encode(&mut unread);
        assert_eq!(Frame::take(&mut unread), Err(FrameError::Length));
        let mut unread = BytesMut::from(&[WHOLE, 4][..]);
        assert_eq!(Frame::take(&mut unread), Err(FrameError::Kind(4)));
    }

    #[test]
    fn an_address_may_neither_be_empty_nor_without_end() {
        let mut unread = BytesMut::from(&[0, 0, 1][..]);
        assert_eq!(take_address(&mut unread), Err(FrameError::Length));
        let mut unread = BytesMut::from(&[0xff, 0xff, 1][..]);
        assert_eq!(take_address(&mut unread), Err(FrameError::Length));
    }
}
