//! Room for blocks of engines that split their heads differently, until they are laid together.

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use baton_arena::{Arena, ArenaError, ArenaLayout, Landing, Slot, SlotPool};
use baton_transfer::{Refusal, TransferError};
use baton_types::{Compatibility, FaultKind, Reslice, ResliceError, Run};
use tokio::sync::Mutex;

/// A piece stays only until it is verified and copied.
const ROOM_BYTES: u64 = 32 << 20;
/// So that one can come while another is copied, of each rank of the producer.
const MIN_SLOTS_A_SOURCE: u64 = 2;
/// For whoever registers or pins them.
const SLOT_ALIGNMENT_BYTES: u64 = 4096;
/// Kinds of producers that are remembered, each with its room.
const MAX_KINDS: usize = 4;

#[derive(Debug, thiserror::Error)]
pub(super) enum PiecesError {
    #[error("blocks of the producer's ranks cannot become blocks of this engine's: {0}")]
    Impossible(#[from] ResliceError),
    #[error("no room for blocks of another engine's ranks: {0}")]
    Room(#[from] ArenaError),
}

impl PiecesError {
    /// The name in metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Impossible(_) => TransferError::Refused(Refusal::Incompatible).name(),
            Self::Room(error) => TransferError::NoRoom(error.to_string()).name(),
        }
    }

    pub(super) fn kind(&self) -> FaultKind {
        match self {
            Self::Impossible(_) => FaultKind::Refused,
            Self::Room(_) => FaultKind::Unavailable,
        }
    }
}

/// How blocks of the kinds of producers that there are become blocks of this engine.
#[derive(Debug)]
pub(super) struct Pieces {
    beside: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    made: u64,
    /// By the producer's digest, the newest last.
    kinds: Vec<([u8; 32], Arc<Reslicing>)>,
}

/// How blocks of one kind of producers become blocks of this engine, and room for them.
#[derive(Debug)]
pub(super) struct Reslicing {
    reslice: Reslice,
    block_bytes: u64,
    arena: Arena,
    pool: SlotPool,
}

impl Pieces {
    /// Room is made, where it is needed, beside this arena.
    pub(super) fn beside(arena: &Arena) -> Self {
        Self { beside: arena.path().to_owned(), known: Mutex::default() }
    }

    pub(super) async fn of_blocks_of(
        &self,
        theirs: &Compatibility,
        ours: &Compatibility,
    ) -> Result<Arc<Reslicing>, PiecesError> {
        let digest = theirs.of_rank(0).digest();
        let mut known = self.known.lock().await;
        if let Some((_, reslicing)) = known.kinds.iter().find(|(kind, _)| *kind == digest) {
            return Ok(reslicing.clone());
        }
        let reslice = Reslice::between(theirs, ours)?;
        let (block_bytes, sources) = (theirs.block_bytes, u64::from(reslice.sources()));
        let slots = (ROOM_BYTES / block_bytes.max(1)).max(MIN_SLOTS_A_SOURCE * sources);
        let import_slots = u32::try_from(slots).unwrap_or(u32::MAX);
        let slot_bytes = block_bytes.next_multiple_of(SLOT_ALIGNMENT_BYTES);
        let layout = ArenaLayout { slot_bytes, export_slots: 0, import_slots };
        let mut path = OsString::from(&self.beside);
        path.push(format!(".pieces{}", known.made));
        known.made += 1;
        let path = PathBuf::from(path);
        // Touching every page takes a while.
        let arena = tokio::task::spawn_blocking(move || Arena::create(&path, layout)).await;
        let arena =
            arena.unwrap_or(Err(ArenaError::Layout { layout, reason: "the worker stops" }))?;
        let pool = SlotPool::new((0..import_slots).map(Slot));
        let reslicing = Arc::new(Reslicing { reslice, block_bytes, arena, pool });
        if known.kinds.len() >= MAX_KINDS {
            known.kinds.remove(0);
        }
        known.kinds.push((digest, reslicing.clone()));
        Ok(reslicing)
    }
}

impl Reslicing {
    /// Ranks of the producer.
    pub(super) fn sources(&self) -> u32 {
        self.reslice.sources()
    }

    pub(super) fn is_needed(&self, source: u32) -> bool {
        !self.covers(source).is_empty()
    }

    pub(super) fn covers(&self, source: u32) -> &[Vec<Run>] {
        self.reslice.covers(source)
    }

    /// Bytes of a block of one rank of the producer.
    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// A place for a block of a rank of the producer, waiting for a free one.
    pub(super) async fn reserve(&self) -> Result<Landing, TransferError> {
        let no_room = |error: &dyn std::error::Error| TransferError::NoRoom(error.to_string());
        let slot = self.pool.reserve().await.map_err(|e| no_room(&e))?;
        self.arena.landing(slot, self.block_bytes).map_err(|e| no_room(&e))
    }
}
