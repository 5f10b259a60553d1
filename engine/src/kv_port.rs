use baton_arena::{ArenaFile, Slot};
use baton_types::{Compatibility, Generation, HandoffId, PromptDigest};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// One life of an engine's KV side: how blocks get in and out of it.
///
/// Blocks pass through the staging arena. The engine owns the arena's export slots: it fills one,
/// names it in [`FromEngine::Exported`], and may use it again after [`ToEngine::Release`]. The worker
/// owns the import slots: it fills them, names them in [`ToEngine::Load`], and has them back with
/// [`FromEngine::Loaded`]. Blocks of a worker on the same host may stay in that worker's arena: the worker has the
/// engine map it ([`ToEngine::Map`]), names them in [`ToEngine::LoadMapped`], and hears of them in
/// [`FromEngine::LoadedMapped`].
///
/// Of an engine with tensor parallelism each rank does all of this for its own part of each block, in slots
/// of its own ([`baton_arena::ArenaLayout::of_rank`]). All are told the same of a handoff, and it is complete
/// for none before it is for all.
///
/// An engine of several layer groups ([`Compatibility::layer_groups`]) hands each block over as so many blocks, one
/// for each group. Wherever a block goes by an index here, it is that of such a block: `b · layer_groups + g`.
#[derive(Debug)]
pub struct KvPort {
    /// Of the first rank; the others differ from it in their number alone.
    pub compatibility: Compatibility,
    pub arena: baton_arena::Arena,
    /// In their order.
    pub ranks: Vec<RankPort>,
}

/// One tensor parallel rank's end of a [`KvPort`].
#[derive(Debug)]
pub struct RankPort {
    /// Ends when the rank's KV side goes away, and with it that of the engine.
    pub from_engine: mpsc::Receiver<FromEngine>,
    pub to_engine: mpsc::Sender<ToEngine>,
}

impl RankPort {
    /// Both ends of a rank's queues, with room for so many messages: the worker's, then the engine's.
    pub fn pair(messages: usize) -> (Self, mpsc::Sender<FromEngine>, mpsc::Receiver<ToEngine>) {
        let (tell, from_engine) = mpsc::channel(messages);
        let (to_engine, hear) = mpsc::channel(messages);
        (Self { from_engine, to_engine }, tell, hear)
    }
}

/// One block of KV, all layers of its group together, in a slot of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockInSlot {
    /// Position in the prompt: block `index` holds tokens `index / layer_groups * block_size_tokens ..`.
    pub index: u32,
    pub slot: Slot,
}

/// A block that the worker verified, and how the engine sees that it still is what was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockToLoad {
    pub index: u32,
    pub slot: Slot,
    /// CRC-32 (that of zlib) over the block's bytes, taken in the arena *before* they were held
    /// against what the producer sent. To be compared while they are copied in.
    pub crc32: u32,
}

/// The same of a block that lies in another worker's arena. That one may take it back and write there at any
/// time, so the checksum is to be taken of what was copied, or no copy be used before `Complete` says that it
/// was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedBlockToLoad {
    pub index: u32,
    /// Bytes from that arena's beginning.
    pub offset: u64,
    pub crc32: u32,
}

impl BlockToLoad {
    /// The checksum that goes with these bytes.
    pub fn checksum(bytes: &[u8]) -> u32 {
        crc_fast::crc32_iso_hdlc(bytes)
    }
}

/// What the engine's KV side tells. As JSON this is also the vLLM connector's protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromEngine {
    /// Producer: these blocks are computed and lie in the arena. Those of each layer group come in their order.
    Exported { handoff: HandoffId, generation: Generation, blocks: Vec<BlockInSlot> },
    /// Producer: that was all of the prompt.
    Sealed {
        handoff: HandoffId,
        generation: Generation,
        prompt_tokens: u32,
        #[serde(with = "hex_digest")]
        prompt_digest: PromptDigest,
        /// Prompt tokens that the producer itself found in its prefix cache.
        cached_tokens: u32,
    },
    /// Consumer: has room for the prompt and wants its blocks from `first_block` on.
    Subscribe {
        handoff: HandoffId,
        generation: Generation,
        prompt_tokens: u32,
        #[serde(with = "hex_digest")]
        prompt_digest: PromptDigest,
        /// Blocks before it, of all layer groups, are in the engine's own prefix cache.
        first_block: u32,
    },
    /// Consumer: holds the whole prompt already; nothing need be sent.
    NotNeeded { handoff: HandoffId, generation: Generation },
    /// Consumer: these slots were copied into the paged cache.
    Loaded { handoff: HandoffId, generation: Generation, slots: Vec<Slot> },
    /// Consumer: these blocks were copied into the paged cache from where they lay, or will not be.
    LoadedMapped { handoff: HandoffId, generation: Generation, indices: Vec<u32> },
    /// Consumer: answers [`ToEngine::Map`]. Where it was refused, blocks of that arena are copied as they were.
    Mapped {
        arena: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
    },
    /// Consumer: what lies in the place of this block is not what the worker verified. Answered with
    /// [`ToEngine::Failed`], before which the request must neither start nor fail.
    Corrupt { handoff: HandoffId, generation: Generation, index: u32 },
    /// Either side: the request is gone. Of a producer, its remaining exports are void.
    Aborted { handoff: HandoffId, generation: Generation },
}

/// What the engine's KV side is told. As JSON this is also the vLLM connector's protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToEngine {
    /// Consumer: these verified blocks lie in the arena: copy them in and answer `Loaded`. Decode
    /// must not start before `Complete`.
    Load { handoff: HandoffId, generation: Generation, blocks: Vec<BlockToLoad> },
    /// Consumer: the arena of another worker of this user on this host. To be mapped for reading, and only if it is
    /// a regular file, not a link, of this user, closed to all others, and the very one that is named. Answer
    /// `Mapped`, of the same number.
    Map { arena: u32, file: ArenaFile },
    /// Consumer: nothing will be loaded from that arena any more, and nothing is.
    Unmap { arena: u32 },
    /// Consumer: as `Load`, of verified blocks that lie in a mapped arena. Answer `LoadedMapped`.
    LoadMapped {
        handoff: HandoffId,
        generation: Generation,
        arena: u32,
        blocks: Vec<MappedBlockToLoad>,
    },
    /// Consumer: all blocks were given by `Load`, and the seal agrees with them.
    Complete { handoff: HandoffId, generation: Generation },
    /// Consumer: the KV will not come; fail the request.
    Failed { handoff: HandoffId, generation: Generation, reason: String },
    /// Producer: these export slots are free again.
    Release { slots: Vec<Slot> },
    /// Producer: nobody wants this handoff any more; export no more of it.
    Cancel { handoff: HandoffId, generation: Generation },
}

mod hex_digest {
    use baton_types::PromptDigest;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(digest: &PromptDigest, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<PromptDigest, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}
