//! One engine's blocks as the parts that its tensor parallel ranks hold.
//!
//! The cache itself is whole. A part is cut out of a block when it is exported, as a rank of an engine that
//! computes on several cards would have computed it, and laid back into the whole when it is imported.

use std::collections::{HashMap, hash_map::Entry};

use baton_arena::{Arena, ArenaError, ArenaFile, PeerArena, Slot};
use baton_config::SimConfig;
use baton_types::{Compatibility, Reslice, ResliceError, Run};
use crc_fast::{CrcAlgorithm::Crc32IsoHdlc, Digest};

/// Heads of each token, where its bytes can be shared out so; else it is one head.
const KV_HEADS: u32 = 4;

fn heads(config: &SimConfig) -> u32 {
    if config.kv_bytes_per_token.is_multiple_of(KV_HEADS) { KV_HEADS } else { 1 }
}

/// Why the heads cannot be split so.
pub(super) fn check(config: &SimConfig) -> Result<(), String> {
    let (heads, ranks) = (heads(config), config.tensor_parallel);
    if heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads) {
        return Ok(());
    }
    Err(format!("expected a divisor or a multiple of the {heads} KV heads"))
}

/// Where each head lies in a block of one of so many ranks.
pub(super) fn kv_heads(config: &SimConfig, ranks: u32) -> String {
    let SimConfig { kv_bytes_per_token, block_size_tokens, .. } = config;
    let heads = heads(config);
    let on_rank = (heads / ranks).max(1);
    format!("sim/{heads}/1*t{block_size_tokens}.h{on_rank}.{}", kv_bytes_per_token / heads)
}

/// Slots go by their number on each rank: a block of the cache has the same on all.
#[derive(Debug)]
pub(super) struct Shards {
    arena: Arena,
    block_bytes: u64,
    /// For each rank, in the order of its own part.
    parts: Vec<Vec<Run>>,
    /// Other workers' arenas, by the numbers that the worker gave them. All ranks are one process.
    peers: HashMap<u32, PeerArena>,
}

/// Where a rank's part of a block is to be imported from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Slot(Slot),
    Peer { arena: u32, offset: u64 },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ImportError {
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("arena {0} is not mapped")]
    NotMapped(u32),
}

impl Shards {
    /// `whole` is the layout of the cache, `part` that of each rank.
    pub(super) fn new(
        arena: Arena,
        whole: &Compatibility,
        part: &Compatibility,
    ) -> Result<Self, ResliceError> {
        let reslice = Reslice::between(whole, part)?;
        let mut parts = vec![Vec::new(); part.tensor_parallel_size as usize];
        for run in reslice.covers(0).iter().flatten() {
            parts[run.to_rank as usize].push(*run);
        }
        parts.iter_mut().for_each(|part| part.sort_unstable_by_key(|run| run.to));
        Ok(Self { arena, block_bytes: part.block_bytes, parts, peers: HashMap::new() })
    }

    pub(super) fn ranks(&self) -> u32 {
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX)
    }

    /// Export slots of one rank.
    pub(super) fn export_slots(&self) -> u32 {
        self.arena.layout().export_slots / self.ranks().max(1)
    }

    /// This rank's own name for a slot of all.
    pub(super) fn slot_on(&self, rank: u32, slot: Slot) -> Slot {
        Slot(self.export_slots() * rank + slot.0)
    }

    /// Which slot of all ranks a slot of this rank is of.
    pub(super) fn slot_of_all(&self, rank: u32, slot: Slot) -> Option<Slot> {
        let slot = slot.0.checked_sub(self.export_slots() * rank)?;
        (slot < self.export_slots()).then_some(Slot(slot))
    }

    /// Maps another worker's arena, if it is not yet.
    pub(super) fn map(&mut self, arena: u32, file: &ArenaFile) -> Result<(), ArenaError> {
        if let Entry::Vacant(unmapped) = self.peers.entry(arena) {
            unmapped.insert(PeerArena::open(file)?);
        }
        Ok(())
    }

    pub(super) fn unmap(&mut self, arena: u32) {
        self.peers.remove(&arena);
    }

    /// Gives every rank its part of a block.
    pub(super) fn export(&self, slot: Slot, block: &[u8]) -> Result<(), ArenaError> {
        for (rank, part) in (0..).zip(&self.parts) {
            for run in part {
                let bytes = &block[run.from..run.from + run.bytes];
                self.arena.write(self.slot_on(rank, slot), run.to as u64, bytes)?;
            }
        }
        Ok(())
    }

    /// Lays one rank's part into a block, and answers the checksum over what was laid there: it is what
    /// will be computed with.
    pub(super) fn import(
        &self,
        rank: u32,
        source: Source,
        block: &mut [u8],
    ) -> Result<u32, ImportError> {
        let view;
        let lies = match source {
            Source::Slot(slot) => {
                view = self.arena.view(slot, self.block_bytes)?;
                view.as_ref()
            }
            Source::Peer { arena, offset } => {
                let peer = self.peers.get(&arena).ok_or(ImportError::NotMapped(arena))?;
                peer.bytes(offset, usize::try_from(self.block_bytes).unwrap_or(usize::MAX))?
            }
        };
        let mut checksum = Digest::new(Crc32IsoHdlc);
        for run in self.parts.get(rank as usize).into_iter().flatten() {
            let target = &mut block[run.from..run.from + run.bytes];
            target.copy_from_slice(&lies[run.to..run.to + run.bytes]);
            checksum.update(target);
        }
        #[allow(clippy::cast_possible_truncation)] // A CRC of 32 bits comes in 64.
        let checksum = checksum.finalize() as u32;
        Ok(checksum)
    }
}

#[cfg(test)]
impl Shards {
    /// Of an engine of one rank.
    pub(super) fn of_one(arena: Arena, block_tokens: u32, entry_bytes: u32) -> Self {
        let config = SimConfig {
            block_size_tokens: block_tokens,
            kv_bytes_per_token: entry_bytes,
            ..SimConfig::default()
        };
        let whole = super::compatibility_on(&config, 1).unwrap();
        Self::new(arena, &whole, &whole).unwrap()
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }
}
