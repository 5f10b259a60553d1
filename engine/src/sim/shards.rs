//! One engine's blocks as the parts that its tensor parallel ranks hold.
//!
//! The cache itself is whole. A part is cut out of a block when it is exported, as a rank of an engine that
//! computes on several cards would have computed it, and laid back into the whole when it is imported. Layers are
//! parts of each head's bytes: a layer group's part of a block is that of all its heads.

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

/// Why a head's bytes cannot be shared out to the layer groups.
pub(super) fn check_groups(config: &SimConfig) -> Result<(), String> {
    let head_bytes = config.kv_bytes_per_token / heads(config);
    if head_bytes.is_multiple_of(config.layer_groups) {
        return Ok(());
    }
    Err(format!("expected a divisor of the {head_bytes} bytes of each of a token's KV heads"))
}

/// Of one head of one token in one layer group.
fn cell_bytes(config: &SimConfig) -> u32 {
    config.kv_bytes_per_token / heads(config) / config.layer_groups
}

/// Where each head lies in a block of one layer group, on one of so many ranks.
pub(super) fn kv_heads(config: &SimConfig, ranks: u32) -> String {
    let (block_size_tokens, heads) = (config.block_size_tokens, heads(config));
    let on_rank = (heads / ranks).max(1);
    format!("sim/{heads}/1*t{block_size_tokens}.h{on_rank}.{}", cell_bytes(config))
}

/// Slots go by their number on each rank: a block of the cache has the same on all.
#[derive(Debug)]
pub(super) struct Shards {
    arena: Arena,
    block_bytes: u64,
    /// For each layer group and each rank, in the order of the rank's own part.
    parts: Vec<Vec<Vec<Run>>>,
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
    /// `whole` is the layout of a layer group of the cache, `part` that of the same on each rank.
    pub(super) fn new(
        arena: Arena,
        config: &SimConfig,
        whole: &Compatibility,
        part: &Compatibility,
    ) -> Result<Self, ResliceError> {
        let reslice = Reslice::between(whole, part)?;
        let (groups, cell_bytes) = (config.layer_groups as usize, cell_bytes(config) as usize);
        let mut parts = vec![vec![Vec::new(); part.tensor_parallel_size as usize]; groups];
        for run in reslice.covers(0).iter().flatten() {
            for (group, parts) in parts.iter_mut().enumerate() {
                parts[run.to_rank as usize].extend(in_block(*run, group, groups, cell_bytes));
            }
        }
        parts.iter_mut().flatten().for_each(|part| part.sort_unstable_by_key(|run| run.to));
        Ok(Self { arena, block_bytes: part.block_bytes, parts, peers: HashMap::new() })
    }

    pub(super) fn layer_groups(&self) -> u32 {
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn ranks(&self) -> u32 {
        self.parts.first().map_or(0, |parts| u32::try_from(parts.len()).unwrap_or(u32::MAX))
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

    /// Gives every rank its part of a layer group of a block.
    pub(super) fn export(&self, slot: Slot, group: u32, block: &[u8]) -> Result<(), ArenaError> {
        for (rank, part) in (0..).zip(self.parts.get(group as usize).into_iter().flatten()) {
            let runs: Vec<_> =
                part.iter().map(|run| &block[run.from..run.from + run.bytes]).collect();
            let slot = self.slot_on(rank, slot);
            match runs[..] {
                [run] => self.arena.write(slot, 0, run)?,
                _ => self.arena.write(slot, 0, &runs.concat())?,
            }
        }
        Ok(())
    }

    /// Lays one rank's part of a layer group into a block, and answers the checksum over what was laid there: it is what
    /// will be computed with.
    pub(super) fn import(
        &self,
        rank: u32,
        source: Source,
        group: u32,
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
        let parts = self.parts.get(group as usize);
        for run in parts.and_then(|parts| parts.get(rank as usize)).into_iter().flatten() {
            let target = &mut block[run.from..run.from + run.bytes];
            target.copy_from_slice(&lies[run.to..run.to + run.bytes]);
            checksum.update(target);
        }
        #[allow(clippy::cast_possible_truncation)] // A CRC of 32 bits comes in 64.
        let checksum = checksum.finalize() as u32;
        Ok(checksum)
    }
}

/// Where the cells of a run lie in a block of all layer groups, whose cells hold those of one group after the
/// other.
fn in_block(run: Run, group: usize, groups: usize, cell_bytes: usize) -> impl Iterator<Item = Run> {
    // Of one group alone cells lie side by side.
    let bytes = if groups == 1 { run.bytes } else { cell_bytes };
    (0..run.bytes / bytes).map(move |cell| Run {
        from: run.from * groups + cell * bytes * groups + group * bytes,
        to: run.to + cell * bytes,
        bytes,
        ..run
    })
}

#[cfg(test)]
impl Shards {
    /// Of an engine of one rank.
    pub(super) fn of_one(
        arena: Arena,
        block_tokens: u32,
        entry_bytes: u32,
        layer_groups: u32,
    ) -> Self {
        let config = SimConfig {
            block_size_tokens: block_tokens,
            kv_bytes_per_token: entry_bytes,
            layer_groups,
            ..SimConfig::default()
        };
        let whole = super::compatibility_on(&config, 1).unwrap();
        Self::new(arena, &config, &whole, &whole).unwrap()
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }
}
