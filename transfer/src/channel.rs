use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use baton_arena::{Arena, Landing, PeerArena};
use baton_types::{Epoch, HandoffKey, PromptDigest};

use crate::shm::MappedBlock;

/// A way for KV blocks from one worker's arena to another's. One object serves both directions: it
/// pulls for this worker's decodes, and answers other workers' pulls from the [`Exports`] that it was
/// made with.
#[async_trait]
pub trait Channel: Send + Sync + 'static {
    /// Takes over one handoff: subscribes at the peer, lays each block into a slot of the sink, verifies
    /// every block and the seal over all of them, acknowledges. Dropping the future tells the peer
    /// that the handoff is void.
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError>;

    /// From now on this worker's blocks lie in this arena, those of its engine's former lives aside.
    /// For channels that reach into memory.
    fn use_arena(&self, _arena: &Arena) {}

    /// What carries blocks, by the names by which users choose it, the best first: `shm`, `ucx`, `quic`.
    /// What UCX has picked underneath stands behind a colon once it was used: `ucx:rc_mlx5/mlx5_0:1`.
    fn transports(&self) -> Vec<String>;
}

/// Where a consumer finds a producer, and how it knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    pub worker_name: String,
    /// `host:port`.
    pub address: String,
    /// SHA-256 of the certificate that the peer must present.
    pub certificate_fingerprint: [u8; 32],
}

/// What a consumer asks a producer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    pub handoff: HandoffKey,
    pub consumer_epoch: Epoch,
    /// Digest of what both engines must share.
    pub compatibility: [u8; 32],
    /// Blocks before it are not wanted: the consumer has them.
    pub first_block: u32,
    pub prompt_tokens: u32,
    pub prompt_digest: PromptDigest,
}

/// The producer's last word on a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Blocks of the whole prompt, those before `first_block` included.
    pub prompt_blocks: u32,
    pub prompt_tokens: u32,
    pub prompt_digest: PromptDigest,
    /// Prompt tokens that the producer found in its own prefix cache.
    pub cached_tokens: u32,
}

/// Where a consumer's blocks go.
#[async_trait]
pub trait BlockSink: Send + Sync {
    /// The longest block that it takes. A peer that announces a longer one is broken off before any
    /// of it is read.
    fn max_block_bytes(&self) -> u32 {
        64 << 20
    }

    /// Blocks that make one of the engine's, if it hands them over layer group by layer group: block `index`
    /// is of group `index % layer_groups`. Those of each group come in their order.
    fn layer_groups(&self) -> u32 {
        1
    }

    /// A slot for a block of `len` bytes, waiting for a free one: this is what slows a sender down.
    /// Slots are asked for in the order of coming and one after the other, but others may be on their way and be
    /// verified meanwhile. The channel keeps the slot
    /// until nothing can write into it any more, whatever becomes of the sink.
    async fn reserve(&self, index: u32, len: u32) -> Result<Landing, TransferError>;

    /// What lies in the slot is what the producer sent: its checksum was taken there. `crc32` is that of
    /// zlib over the same bytes, for whoever reads them next; it was taken *before* they were held against
    /// what the producer sent, so that whatever changes later does not agree with it.
    async fn verified(&self, index: u32, block: Landing, crc32: u32) -> Result<(), TransferError>;

    /// Whether it would take a block of `len` bytes where it lies, in this other worker's arena. Such a block needs
    /// no slot, and comes to [`Self::verified_there`]; any other is copied. Asked before any of it is read.
    fn takes_from(
        &self,
        _index: u32,
        _len: u32,
        _arena: &Arc<PeerArena>,
    ) -> Result<bool, TransferError> {
        Ok(false)
    }

    /// As [`Self::verified`], of a block that stays where it is until it is dropped: the channel ends no handoff
    /// well before all of them are.
    async fn verified_there(
        &self,
        index: u32,
        _block: MappedBlock,
        _crc32: u32,
    ) -> Result<(), TransferError> {
        Err(TransferError::Memory(format!("block {index} is to be copied")))
    }
}

/// What was pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulled {
    pub seal: Seal,
    pub blocks: u32,
    pub bytes: u64,
    /// What carried them: `quic`, `ucx`, `shm`.
    pub transport: &'static str,
}

/// The producing side's store of what may be pulled.
#[async_trait]
pub trait Exports: Send + Sync + 'static {
    /// Opens a handoff for its consumer, once. `peer` is the SHA-256 of the certificate that the
    /// consumer presented. The two legs of a request start together, so a handoff that nobody
    /// announced yet is waited for, for a bounded time, before it is refused.
    async fn attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal>;
}

/// The blocks of one handoff, those of each layer group in their order, then its seal. Dropping it unfinished
/// says that the consumer is gone.
#[async_trait]
pub trait ExportStream: Send {
    /// Waits for what comes next. Nothing is lost when the future is dropped. After
    /// [`Exported::Sealed`], [`Exported::Refused`] or [`Exported::Aborted`] nothing comes.
    async fn next(&mut self) -> Exported;

    /// Waits until the producer takes the handoff back: what is under way is to be broken off.
    async fn revoked(&mut self);

    /// When the consumer should have all of it: of the handoffs that share a link the one that is due first
    /// goes first.
    fn due(&self) -> Instant;

    /// One block of `bytes` was given to the network whole.
    fn sent(&mut self, bytes: u64);

    /// How it ended for the consumer: `Ok` after its acknowledgement.
    fn finish(self: Box<Self>, outcome: Result<(), TransferError>);
}

#[derive(Clone, Debug)]
pub enum Exported {
    Block {
        /// Whose block it is, as it was written down when the engine exported it.
        handoff: HandoffKey,
        index: u32,
        /// CRC-64/NVME over the block's bytes, taken when the engine exported it.
        crc: u64,
        bytes: bytes::Bytes,
    },
    Sealed(Seal),
    /// What was produced is not what the consumer subscribed to.
    Refused(Refusal),
    /// The producer's engine gave up.
    Aborted,
}

/// What stands between a worker and its channel, on both sides of it: nothing, which is `()`, or what
/// a test puts there.
pub trait Interpose: Send + Sync + 'static {
    /// What the channel shall see of the worker's exports.
    fn exports(&self, exports: Arc<dyn Exports>) -> Arc<dyn Exports> {
        exports
    }

    /// What the worker shall see of its channel.
    fn channel(&self, channel: Arc<dyn Channel>) -> Arc<dyn Channel> {
        channel
    }
}

impl Interpose for () {}

/// Why a producer does not open a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such handoff here")]
    UnknownHandoff,
    #[error("the handoff was of another epoch of this engine")]
    WrongEpoch,
    #[error("the handoff is of another generation")]
    WrongGeneration,
    #[error("the handoff is meant for another worker")]
    WrongPeer,
    #[error("the handoff was taken already")]
    AlreadyTaken,
    #[error("the two engines' KV is not compatible")]
    Incompatible,
    #[error("the handoff's prompt is another")]
    WrongPrompt,
    #[error("the handoff was aborted")]
    Aborted,
}

impl Refusal {
    pub const ALL: [Self; 8] = [
        Self::UnknownHandoff,
        Self::WrongEpoch,
        Self::WrongGeneration,
        Self::WrongPeer,
        Self::AlreadyTaken,
        Self::Incompatible,
        Self::WrongPrompt,
        Self::Aborted,
    ];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownHandoff => "unknown_handoff",
            Self::WrongEpoch => "wrong_epoch",
            Self::WrongGeneration => "wrong_generation",
            Self::WrongPeer => "wrong_peer",
            Self::AlreadyTaken => "already_taken",
            Self::Incompatible => "incompatible",
            Self::WrongPrompt => "wrong_prompt",
            Self::Aborted => "aborted",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("cannot reach {worker} at {address}: {reason}")]
    Unreachable { worker: String, address: String, reason: String },
    #[error("{worker} presented a certificate that is not the one it registered")]
    WrongCertificate { worker: String },
    #[error("the peer speaks transfer protocol {theirs}, this worker {ours}")]
    Version { ours: u32, theirs: u32 },
    #[error("the peer refused: {0}")]
    Refused(Refusal),
    #[error("the peer broke off: {0}")]
    BrokeOff(String),
    #[error("the peer sent what the protocol does not allow: {0}")]
    Protocol(String),
    #[error("block {index} arrived with CRC {found:016x}, sent with {expected:016x}")]
    Corrupt { index: u32, expected: u64, found: u64 },
    #[error("block {index} has a right CRC and a wrong MAC: somebody on the way made it so")]
    Forged { index: u32 },
    #[error("block {index} changed after it was verified, where the engine was to load it from")]
    Rotten { index: u32 },
    #[error("block {index} has {bytes} bytes, {expected} make a block")]
    Truncated { index: u32, bytes: u64, expected: u64 },
    #[error("block {index} arrived where block {expected} is due")]
    UnexpectedBlock { index: u32, expected: u32 },
    #[error("block {index} is of handoff {of}, this is {due}")]
    ForeignBlock { index: u32, of: HandoffKey, due: HandoffKey },
    #[error("the seal names {sealed} of {field}, {found} arrived")]
    SealMismatch { field: &'static str, sealed: String, found: String },
    #[error("nothing moved for {seconds} s")]
    Stalled { seconds: u32 },
    #[error("this worker has no room: {0}")]
    NoRoom(String),
    #[error("the memory of {0}")]
    Memory(String),
    #[error("the handoff was given up here")]
    Cancelled,
}

impl TransferError {
    /// Every [`Self::name`].
    pub const NAMES: [&str; 27] = [
        "unreachable",
        "wrong_certificate",
        "version",
        "broke_off",
        "protocol",
        "corrupt",
        "forged",
        "rotten",
        "truncated",
        "duplicate",
        "out_of_order",
        "cross_epoch",
        "cross_handoff",
        "late",
        "seal_mismatch",
        "stalled",
        "no_room",
        "cancelled",
        "memory",
        "unknown_handoff",
        "wrong_epoch",
        "wrong_generation",
        "wrong_peer",
        "already_taken",
        "incompatible",
        "wrong_prompt",
        "aborted",
    ];

    /// The name in metrics. What a producer refused has the name of the refusal.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::WrongCertificate { .. } => "wrong_certificate",
            Self::Version { .. } => "version",
            Self::Refused(refusal) => refusal.as_str(),
            Self::BrokeOff(_) => "broke_off",
            Self::Protocol(_) => "protocol",
            Self::Corrupt { .. } => "corrupt",
            Self::Forged { .. } => "forged",
            Self::Rotten { .. } => "rotten",
            Self::Truncated { .. } => "truncated",
            Self::UnexpectedBlock { index, expected } if index < expected => "duplicate",
            Self::UnexpectedBlock { .. } => "out_of_order",
            Self::ForeignBlock { of, due, .. } if of.epoch != due.epoch => "cross_epoch",
            // A block of an attempt that was given up.
            Self::ForeignBlock { of, due, .. } if of.id == due.id => "late",
            Self::ForeignBlock { .. } => "cross_handoff",
            Self::SealMismatch { .. } => "seal_mismatch",
            Self::Stalled { .. } => "stalled",
            Self::NoRoom(_) => "no_room",
            Self::Memory(_) => "memory",
            Self::Cancelled => "cancelled",
        }
    }
}
