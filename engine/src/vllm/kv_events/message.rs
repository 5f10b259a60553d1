//! vLLM's messages, in MessagePack: `vllm/distributed/kv_events.py`.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, Visitor},
};

/// All that changed in one step of the engine.
#[derive(Debug, Deserialize)]
pub(super) struct EventBatch {
    /// Seconds, by the engine's clock.
    _told_at: f64,
    pub(super) events: Vec<Event>,
    /// The engine core's number, where several share one server.
    #[serde(default)]
    _data_parallel_rank: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
pub(super) enum Event {
    BlockStored(BlockStored),
    BlockRemoved(BlockRemoved),
    AllBlocksCleared,
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// Blocks that follow each other in one sequence.
#[derive(Debug, Deserialize)]
pub(super) struct BlockStored {
    pub(super) block_hashes: Vec<EngineHash>,
    pub(super) parent_block_hash: Option<EngineHash>,
    /// Of all the blocks.
    pub(super) token_ids: Vec<u32>,
    pub(super) block_size: u32,
    #[serde(default)]
    pub(super) medium: Option<String>,
    #[serde(default)]
    pub(super) lora_name: Option<String>,
    /// For each block what its KV depends on beside its tokens.
    #[serde(default)]
    pub(super) extra_keys: Option<Vec<Option<Vec<ExtraKey>>>>,
    /// One of several kinds of attention that the model mixes.
    #[serde(default)]
    pub(super) group_idx: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct BlockRemoved {
    pub(super) block_hashes: Vec<EngineHash>,
    #[serde(default)]
    pub(super) medium: Option<String>,
    #[serde(default)]
    pub(super) group_idx: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum ExtraKey {
    /// The LoRA adapter's name, or the cache salt.
    Text(String),
    /// An image and its place, mostly.
    Other(#[allow(dead_code)] IgnoredAny),
}

/// vLLM's own name of a block: the low 64 bits of its hash, or all its bytes where
/// `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES` is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EngineHash(pub(super) u64);

impl<'de> Deserialize<'de> for EngineHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrBytes;
        impl Visitor<'_> for NumberOrBytes {
            type Value = EngineHash;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a block's hash: a number or bytes")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<EngineHash, E> {
                Ok(EngineHash(number))
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<EngineHash, E> {
                bytes
                    .last_chunk()
                    .map(|low| EngineHash(u64::from_be_bytes(*low)))
                    .ok_or_else(|| E::invalid_length(bytes.len(), &self))
            }
        }
        deserializer.deserialize_any(NumberOrBytes)
    }
}
