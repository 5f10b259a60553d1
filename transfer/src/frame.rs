//! What passes over one handoff's stream. All integers are little-endian.
//!
//! The consumer opens the stream with a subscription, then sends single bytes; the producer answers
//! with frames of one kind byte, a body whose length the kind fixes, and, after a block's head, the
//! block itself.
//!
//! ```text
//! consumer ─► subscription: magic "BTKV" · version u32 · epoch 16 · handoff 16 · generation u32
//!                           · consumer epoch 16 · compatibility 32 · first block u32
//!                           · prompt tokens u32 · prompt digest 32 · check u8 · key 32
//!             1 ack · 2 progress · 3 taken: index u32
//! producer ─► 1 block: epoch 16 · handoff 16 · generation u32 · index u32 · length u32 · crc u64,
//!             then the bytes
//!             2 sealed: prompt blocks u32 · prompt tokens u32 · prompt digest 32
//!                       · cached tokens u32 · blocks sent u32 · digest 32
//!             3 refused: reason u8 · 4 waiting · 5 wrong version: u32
//!             6 mapped: as 1, then offset u64 · wanted back u8, and no bytes · 10 kept
//!             8 block under a MAC: as 1, with a MAC 32 after the CRC
//! ```
//!
//! The magic and the version keep their places in every version, and so does frame 5. Whoever gives a
//! handoff up resets the stream, so that nothing that is still under way holds it up.

use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use bytes::{BufMut, Bytes, BytesMut};
use sha2::{Digest, Sha256};

use crate::{
    channel::{Refusal, Seal, Subscription, TransferError},
    mac::{Mac, MacKey},
};

pub(crate) const VERSION: u32 = 5;
const MAGIC: [u8; 4] = *b"BTKV";

/// Magic and version.
pub(crate) const PRELUDE_BYTES: usize = 8;
/// What follows them in a subscription.
pub(crate) const SUBSCRIPTION_BYTES: usize = 16 + 16 + 4 + 16 + 32 + 4 + 4 + 32 + 1 + 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("it does not begin like a subscription")]
    Magic,
    #[error("version {theirs}")]
    Version { theirs: u32 },
    #[error("no frame is of kind {0}")]
    Kind(u8),
    #[error("no refusal has code {0}")]
    RefusalCode(u8),
    #[error("no check has code {0}")]
    Check(u8),
    #[error("{0} is neither yes nor no")]
    Flag(u8),
    #[error("a frame of the wrong length")]
    Length,
}

impl From<FrameError> for TransferError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Version { theirs } => Self::Version { ours: VERSION, theirs },
            other => Self::Protocol(other.to_string()),
        }
    }
}

/// What a consumer asks, and the key under which it wants every block's MAC, if it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) subscription: Subscription,
    pub(crate) key: Option<MacKey>,
}

pub(crate) fn encode_subscription(subscription: &Subscription, key: Option<&MacKey>) -> Bytes {
    let mut bytes = BytesMut::with_capacity(PRELUDE_BYTES + SUBSCRIPTION_BYTES);
    bytes.put_slice(&MAGIC);
    bytes.put_u32_le(VERSION);
    put_key(&mut bytes, &subscription.handoff);
    bytes.put_slice(subscription.consumer_epoch.as_bytes());
    bytes.put_slice(&subscription.compatibility);
    bytes.put_u32_le(subscription.first_block);
    bytes.put_u32_le(subscription.prompt_tokens);
    bytes.put_slice(&subscription.prompt_digest.0);
    match key {
        None => bytes.put_bytes(0, 1 + 32),
        Some(MacKey(key)) => {
            bytes.put_u8(1);
            bytes.put_slice(key);
        }
    }
    bytes.freeze()
}

fn put_key(bytes: &mut BytesMut, key: &HandoffKey) {
    bytes.put_slice(key.epoch.as_bytes());
    bytes.put_slice(key.id.as_bytes());
    bytes.put_u32_le(key.generation.0);
}

/// Whether a subscription of our version follows.
pub(crate) fn decode_prelude(prelude: &[u8]) -> Result<(), FrameError> {
    let mut fields = Fields(prelude);
    if fields.take()? != MAGIC {
        return Err(FrameError::Magic);
    }
    match fields.u32()? {
        VERSION => fields.end(()),
        theirs => Err(FrameError::Version { theirs }),
    }
}

pub(crate) fn decode_subscription(body: &[u8]) -> Result<Asked, FrameError> {
    let mut fields = Fields(body);
    let subscription = Subscription {
        handoff: fields.key()?,
        consumer_epoch: fields.epoch()?,
        compatibility: fields.take()?,
        first_block: fields.u32()?,
        prompt_tokens: fields.u32()?,
        prompt_digest: PromptDigest(fields.take()?),
    };
    let ([check], key) = (fields.take()?, fields.take()?);
    let key = match (check, key) {
        (0, key) if key == [0; 32] => None,
        (1, key) => Some(MacKey(key)),
        (other, _) => return Err(FrameError::Check(other)),
    };
    fields.end(Asked { subscription, key })
}

/// What a consumer says after its subscription: one byte each, but for `Taken`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConsumerWord {
    /// All blocks and the seal were verified, and no block is needed any more.
    Ack,
    /// Blocks are being placed, however slowly.
    Progress,
    /// A block is needed no more in the producer's arena. On shared memory only, where its index follows.
    Taken,
}

impl ConsumerWord {
    pub(crate) fn encode(self) -> Bytes {
        Bytes::from_static(match self {
            Self::Ack => &[1],
            Self::Progress => &[2],
            Self::Taken => &[3],
        })
    }

    pub(crate) fn decode(byte: u8) -> Result<Self, FrameError> {
        match byte {
            1 => Ok(Self::Ack),
            2 => Ok(Self::Progress),
            3 => Ok(Self::Taken),
            other => Err(FrameError::Kind(other)),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProducerFrame {
    /// `len` bytes follow.
    Block(BlockHead),
    /// As [`Self::Block`], but the bytes lie in the producer's arena, so far from its begin. On shared
    /// memory only.
    Mapped {
        head: BlockHead,
        offset: u64,
        /// The producer is short of slots: it is better copied than left there.
        wanted_back: bool,
    },
    /// Answers the acknowledgement: until that came, every block that was not said to be taken lay where it was
    /// announced. On shared memory only.
    Kept,
    Sealed(SealedFrame),
    Refused(Refusal),
    /// The producer lives, and has nothing to send yet.
    Waiting,
    /// The consumer's version is not known here; ours is this.
    WrongVersion {
        ours: u32,
    },
}

/// What a block says of itself. It names its handoff though the stream does too: what a producer's own
/// mistake puts into another's stream is seen, and in whose place it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHead {
    pub(crate) handoff: HandoffKey,
    pub(crate) index: u32,
    pub(crate) len: u32,
    pub(crate) crc: u64,
    /// Where the consumer asked for it. Never of a block in memory that is shared.
    pub(crate) mac: Option<Mac>,
}

impl BlockHead {
    fn put(&self, bytes: &mut BytesMut) {
        put_key(bytes, &self.handoff);
        bytes.put_u32_le(self.index);
        bytes.put_u32_le(self.len);
        bytes.put_u64_le(self.crc);
        if let Some(Mac(mac)) = &self.mac {
            bytes.put_slice(mac);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SealedFrame {
    pub(crate) seal: Seal,
    pub(crate) blocks_sent: u32,
    /// See [`BlocksDigest`].
    pub(crate) digest: [u8; 32],
}

impl ProducerFrame {
    /// Bytes of the body that follows this kind byte.
    pub(crate) fn body_bytes(kind: u8) -> Result<usize, FrameError> {
        match kind {
            1 => Ok(16 + 16 + 4 + 4 + 4 + 8),
            2 => Ok(4 + 4 + 32 + 4 + 4 + 32),
            3 => Ok(1),
            4 => Ok(0),
            5 => Ok(4),
            6 => Ok(16 + 16 + 4 + 4 + 4 + 8 + 8 + 1),
            8 => Ok(16 + 16 + 4 + 4 + 4 + 8 + 32),
            10 => Ok(0),
            other => Err(FrameError::Kind(other)),
        }
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(96);
        match self {
            Self::Block(head) => {
                bytes.put_u8(if head.mac.is_some() { 8 } else { 1 });
                head.put(&mut bytes);
            }
            Self::Mapped { head, offset, wanted_back } => {
                bytes.put_u8(6);
                head.put(&mut bytes);
                bytes.put_u64_le(*offset);
                bytes.put_u8((*wanted_back).into());
            }
            Self::Kept => bytes.put_u8(10),
            Self::Sealed(SealedFrame { seal, blocks_sent, digest }) => {
                bytes.put_u8(2);
                bytes.put_u32_le(seal.prompt_blocks);
                bytes.put_u32_le(seal.prompt_tokens);
                bytes.put_slice(&seal.prompt_digest.0);
                bytes.put_u32_le(seal.cached_tokens);
                bytes.put_u32_le(*blocks_sent);
                bytes.put_slice(digest);
            }
            Self::Refused(refusal) => {
                bytes.put_u8(3);
                bytes.put_u8(refusal_code(*refusal));
            }
            Self::Waiting => bytes.put_u8(4),
            Self::WrongVersion { ours } => {
                bytes.put_u8(5);
                bytes.put_u32_le(*ours);
            }
        }
        bytes.freeze()
    }

    pub(crate) fn decode(kind: u8, body: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields(body);
        let frame = match kind {
            1 => Self::Block(fields.head()?),
            8 => {
                let head = fields.head()?;
                Self::Block(BlockHead { mac: Some(Mac(fields.take()?)), ..head })
            }
            6 => Self::Mapped {
                head: fields.head()?,
                offset: fields.u64()?,
                wanted_back: fields.flag()?,
            },
            10 => Self::Kept,
            2 => Self::Sealed(SealedFrame {
                seal: Seal {
                    prompt_blocks: fields.u32()?,
                    prompt_tokens: fields.u32()?,
                    prompt_digest: PromptDigest(fields.take()?),
                    cached_tokens: fields.u32()?,
                },
                blocks_sent: fields.u32()?,
                digest: fields.take()?,
            }),
            3 => {
                let [code] = fields.take()?;
                Self::Refused(refusal_of(code)?)
            }
            4 => Self::Waiting,
            5 => Self::WrongVersion { ours: fields.u32()? },
            other => return Err(FrameError::Kind(other)),
        };
        fields.end(frame)
    }
}

fn refusal_code(refusal: Refusal) -> u8 {
    match refusal {
        Refusal::UnknownHandoff => 1,
        Refusal::WrongEpoch => 2,
        Refusal::WrongGeneration => 3,
        Refusal::WrongPeer => 4,
        Refusal::AlreadyTaken => 5,
        Refusal::Incompatible => 6,
        Refusal::WrongPrompt => 7,
        Refusal::Aborted => 8,
    }
}

fn refusal_of(code: u8) -> Result<Refusal, FrameError> {
    let found = Refusal::ALL.into_iter().find(|refusal| refusal_code(*refusal) == code);
    found.ok_or(FrameError::RefusalCode(code))
}

/// SHA-256 over index (`u32`) and CRC (`u64`) of every block that was sent, in order. Both sides keep
/// one: that they agree at the end shows that no block was lost, added, or put in another's place.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlocksDigest(Sha256);

impl BlocksDigest {
    pub(crate) fn add(&mut self, index: u32, crc: u64) {
        self.0.update(index.to_le_bytes());
        self.0.update(crc.to_le_bytes());
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// Takes a frame's fields off its front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (field, rest) = self.0.split_first_chunk().ok_or(FrameError::Length)?;
        self.0 = rest;
        Ok(*field)
    }

    fn flag(&mut self) -> Result<bool, FrameError> {
        match self.take()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(FrameError::Flag(other)),
        }
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.take().map(u64::from_le_bytes)
    }

    /// Ids are bytes, in the order in which they are written.
    fn epoch(&mut self) -> Result<Epoch, FrameError> {
        self.take().map(u128::from_be_bytes).map(Epoch::from_u128)
    }

    fn key(&mut self) -> Result<HandoffKey, FrameError> {
        Ok(HandoffKey {
            epoch: self.epoch()?,
            id: HandoffId::from_u128(u128::from_be_bytes(self.take()?)),
            generation: Generation(self.u32()?),
        })
    }

    fn head(&mut self) -> Result<BlockHead, FrameError> {
        Ok(BlockHead {
            handoff: self.key()?,
            index: self.u32()?,
            len: self.u32()?,
            crc: self.u64()?,
            mac: None,
        })
    }

    fn end<T>(self, decoded: T) -> Result<T, FrameError> {
        if self.0.is_empty() { Ok(decoded) } else { Err(FrameError::Length) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn subscriptions()(
            ids in any::<[u128; 3]>(),
            numbers in any::<[u32; 3]>(),
            compatibility in any::<[u8; 32]>(),
            digest in any::<[u8; 32]>(),
        ) -> Subscription {
            Subscription {
                handoff: HandoffKey {
                    epoch: Epoch::from_u128(ids[0]),
                    id: HandoffId::from_u128(ids[1]),
                    generation: Generation(numbers[0]),
                },
                consumer_epoch: Epoch::from_u128(ids[2]),
                compatibility,
                first_block: numbers[1],
                prompt_tokens: numbers[2],
                prompt_digest: PromptDigest(digest),
            }
        }
    }

    prop_compose! {
        fn heads(with_mac: bool)(
            ids in any::<[u128; 2]>(),
            numbers in any::<[u32; 3]>(),
            crc in any::<u64>(),
            mac in any::<Option<[u8; 32]>>(),
        ) -> BlockHead {
            let handoff = HandoffKey {
                epoch: Epoch::from_u128(ids[0]),
                id: HandoffId::from_u128(ids[1]),
                generation: Generation(numbers[0]),
            };
            let mac = mac.filter(|_| with_mac).map(Mac);
            BlockHead { handoff, index: numbers[1], len: numbers[2], crc, mac }
        }
    }

    fn frames() -> impl Strategy<Value = ProducerFrame> {
        let sealed = (any::<[u32; 4]>(), any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(
            |([prompt_blocks, prompt_tokens, cached_tokens, blocks_sent], prompt, digest)| {
                let prompt_digest = PromptDigest(prompt);
                let seal = Seal { prompt_blocks, prompt_tokens, prompt_digest, cached_tokens };
                ProducerFrame::Sealed(SealedFrame { seal, blocks_sent, digest })
            },
        );
        prop_oneof![
            heads(true).prop_map(ProducerFrame::Block),
            (heads(false), any::<u64>(), any::<bool>()).prop_map(|(head, offset, wanted_back)| {
                ProducerFrame::Mapped { head, offset, wanted_back }
            }),
            Just(ProducerFrame::Kept),
            sealed,
            prop::sample::select(Refusal::ALL.to_vec()).prop_map(ProducerFrame::Refused),
            Just(ProducerFrame::Waiting),
            any::<u32>().prop_map(|ours| ProducerFrame::WrongVersion { ours }),
        ]
    }

    proptest! {
        #[test]
        fn a_subscription_arrives_as_it_was_sent(
            subscription in subscriptions(),
            key in any::<Option<[u8; 32]>>(),
        ) {
            let key = key.map(MacKey);
            let bytes = encode_subscription(&subscription, key.as_ref());
            let (prelude, body) = bytes.split_at(PRELUDE_BYTES);
            prop_assert_eq!(body.len(), SUBSCRIPTION_BYTES);
            prop_assert_eq!(decode_prelude(prelude), Ok(()));
            prop_assert_eq!(decode_subscription(body), Ok(Asked { subscription, key }));
        }

        #[test]
        fn a_frame_arrives_as_it_was_sent(frame in frames()) {
            let bytes = frame.encode();
            let (kind, body) = bytes.split_first().unwrap();
            prop_assert_eq!(ProducerFrame::body_bytes(*kind), Ok(body.len()));
            prop_assert_eq!(ProducerFrame::decode(*kind, body), Ok(frame));
        }

        #[test]
        fn whatever_decodes_is_what_would_be_encoded(
            kind in 0..11_u8,
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Ok(length) = ProducerFrame::body_bytes(kind) {
                prop_assert!(length < 100);
            }
            if let Ok(frame) = ProducerFrame::decode(kind, &body) {
                let bytes = frame.encode();
                prop_assert_eq!(bytes.split_first().unwrap(), (&kind, &body[..]));
            }
            if let Ok(Asked { subscription, key }) = decode_subscription(&body) {
                let bytes = encode_subscription(&subscription, key.as_ref());
                prop_assert_eq!(&bytes[PRELUDE_BYTES..], &body[..]);
            }
            prop_assert!(decode_prelude(&body).is_err());
        }
    }

    #[test]
    fn another_version_is_told_from_garbage() {
        let theirs = VERSION + 1;
        let mut prelude = [0; PRELUDE_BYTES];
        prelude[..4].copy_from_slice(&MAGIC);
        prelude[4..].copy_from_slice(&theirs.to_le_bytes());
        assert_eq!(decode_prelude(&prelude), Err(FrameError::Version { theirs }));
        assert_eq!(decode_prelude(b"GET / HT"), Err(FrameError::Magic));
        assert_eq!(decode_prelude(b"BTKV"), Err(FrameError::Length));
    }

    #[test]
    fn the_words_of_a_consumer_are_single_bytes() {
        for word in [ConsumerWord::Ack, ConsumerWord::Progress, ConsumerWord::Taken] {
            assert_eq!(word.encode().len(), 1);
            assert_eq!(ConsumerWord::decode(word.encode()[0]), Ok(word));
        }
        assert_eq!(ConsumerWord::decode(0), Err(FrameError::Kind(0)));
    }

    #[test]
    fn the_digest_depends_on_the_order_of_blocks() {
        let of = |blocks: &[(u32, u64)]| {
            let mut digest = BlocksDigest::default();
            blocks.iter().for_each(|(index, crc)| digest.add(*index, *crc));
            digest.finish()
        };
        assert_eq!(of(&[(0, 7), (1, 8)]), of(&[(0, 7), (1, 8)]));
        assert_ne!(of(&[(0, 7), (1, 8)]), of(&[(0, 8), (1, 7)]));
        assert_ne!(of(&[(0, 7)]), of(&[]));
    }
}
