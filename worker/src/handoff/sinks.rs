//! Where a handoff's blocks go: a rank's own into its import slots, and those of an engine that splits its heads
//! differently by way of pieces that are laid together.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use baton_arena::{Landing, PeerArena};
use baton_engine::BlockToLoad;
use baton_transfer::{BlockSink, MappedBlock, TransferError};
use crc_fast::{CrcAlgorithm::Crc32IsoHdlc, Digest};
use parking_lot::Mutex;
use tokio::{sync::Mutex as AsyncMutex, time::Instant};

use super::{Name, imports::Imports, pieces::Reslicing};

/// The blocks of one rank of an engine that is like this one.
pub(super) struct Whole<'a> {
    pub(super) imports: &'a Imports,
    pub(super) name: Name,
    pub(super) rank: u32,
    /// When the last block was.
    pub(super) verified: &'a Mutex<Instant>,
}

#[async_trait]
impl BlockSink for Whole<'_> {
    fn max_block_bytes(&self) -> u32 {
        u32::try_from(self.imports.block_bytes()).unwrap_or(u32::MAX)
    }

    fn layer_groups(&self) -> u32 {
        self.imports.layer_groups()
    }

    async fn reserve(&self, index: u32, len: u32) -> Result<Landing, TransferError> {
        is_whole(index, len, self.imports.block_bytes())?;
        self.imports.reserve(self.rank).await
    }

    async fn verified(&self, index: u32, block: Landing, crc32: u32) -> Result<(), TransferError> {
        *self.verified.lock() = Instant::now();
        self.imports.lend(self.name, index, [(self.rank, block, crc32)])?;
        self.count(index);
        Ok(())
    }

    fn takes_from(
        &self,
        index: u32,
        len: u32,
        arena: &Arc<PeerArena>,
    ) -> Result<bool, TransferError> {
        is_whole(index, len, self.imports.block_bytes())?;
        Ok(self.imports.number_of(arena).is_some())
    }

    async fn verified_there(
        &self,
        index: u32,
        block: MappedBlock,
        crc32: u32,
    ) -> Result<(), TransferError> {
        *self.verified.lock() = Instant::now();
        self.imports.lend_mapped(self.name, self.rank, index, block, crc32)?;
        self.count(index);
        Ok(())
    }
}

impl Whole<'_> {
    /// All ranks' parts are one block.
    fn count(&self, index: u32) {
        let blocks = if self.rank == 0 { self.imports.whole_blocks(index) } else { 0 };
        self.imports.count(blocks, self.imports.block_bytes());
    }
}

fn is_whole(index: u32, len: u32, expected: u64) -> Result<(), TransferError> {
    if u64::from(len) == expected {
        return Ok(());
    }
    Err(TransferError::Truncated { index, bytes: len.into(), expected })
}

/// Blocks for all ranks of this engine, made of those of all ranks of another.
///
/// A piece is verified where it landed, then copied to where its bytes belong. When the last piece of a block
/// has come, the checksum of each rank's block is taken, and only then each piece is read back out of the
/// blocks and held against the checksum that was taken before it was verified: so no bit can change on the
/// way unseen, and no rank loads a block of which any piece is missing or wrong.
pub(super) struct Assembly<'a> {
    imports: &'a Imports,
    name: Name,
    reslicing: &'a Reslicing,
    verified: &'a Mutex<Instant>,
    rows: Mutex<HashMap<u32, Row>>,
    /// Who waits for the slots of a row holds it, so that rows come one after the other and no two of them wait
    /// for one another's slots.
    making_row: AsyncMutex<()>,
    /// Pieces of a block.
    needed: usize,
}

/// One block, in an import slot of each rank.
struct Row {
    places: Vec<Landing>,
    /// The pieces that lie in it, each with its checksum.
    laid: Vec<(u32, u32)>,
}

impl<'a> Assembly<'a> {
    pub(super) fn new(
        imports: &'a Imports,
        name: Name,
        reslicing: &'a Reslicing,
        verified: &'a Mutex<Instant>,
    ) -> Self {
        let needed = (0..reslicing.sources()).filter(|source| reslicing.is_needed(*source)).count();
        Self {
            imports,
            name,
            reslicing,
            verified,
            rows: Mutex::default(),
            making_row: AsyncMutex::default(),
            needed,
        }
    }

    /// Takes the blocks of this rank of the producer.
    pub(super) fn piece(&'a self, source: u32) -> Piece<'a> {
        Piece { assembly: self, source }
    }

    /// Sees to it that this block has a slot on each rank. A piece gets a place of its own only after that, so
    /// that those which have come can always be laid down, and make room for others.
    async fn row(&self, index: u32) -> Result<(), TransferError> {
        let is_there = || self.rows.lock().contains_key(&index);
        if is_there() {
            return Ok(());
        }
        let _making = self.making_row.lock().await;
        if is_there() {
            return Ok(());
        }
        let mut places = Vec::new();
        // Always the lower rank first: who has a slot of the last one waits for no slot any more.
        for rank in 0..self.imports.count_ranks() {
            places.push(self.imports.reserve(rank).await?);
        }
        self.rows.lock().insert(index, Row { places, laid: Vec::new() });
        Ok(())
    }

    /// Copies a verified piece to where it belongs. Answers the block, when that was its last piece.
    fn lay(
        &self,
        index: u32,
        source: u32,
        piece: &[u8],
        crc32: u32,
    ) -> Result<Option<Row>, TransferError> {
        let mut rows = self.rows.lock();
        let row = rows.get_mut(&index).ok_or(TransferError::Cancelled)?;
        for run in self.reslicing.covers(source).iter().flatten() {
            let bytes = piece.get(run.from..run.from + run.bytes).unwrap_or_default();
            row.places
                .get(run.to_rank as usize)
                .ok_or(TransferError::Cancelled)?
                .write_at(run.to as u64, bytes)
                .map_err(|error| TransferError::NoRoom(error.to_string()))?;
        }
        row.laid.push((source, crc32));
        let is_complete = row.laid.len() == self.needed;
        Ok(is_complete.then(|| rows.remove(&index)).flatten())
    }

    /// Gives a block to the engine that is what its pieces were.
    fn complete(&self, index: u32, row: Row) -> Result<(), TransferError> {
        let Row { places, laid } = row;
        let checksums: Vec<_> =
            places.iter().map(|place| BlockToLoad::checksum(place.as_bytes())).collect();
        for (source, crc32) in laid {
            for cover in self.reslicing.covers(source) {
                let mut read_back = Digest::new(Crc32IsoHdlc);
                for run in cover {
                    let place = places.get(run.to_rank as usize).map(Landing::as_bytes);
                    let bytes = place.and_then(|place| place.get(run.to..run.to + run.bytes));
                    read_back.update(bytes.unwrap_or_default());
                }
                if read_back.finalize() != u64::from(crc32) {
                    return Err(TransferError::Rotten { index });
                }
            }
        }
        let blocks = (0..).zip(places).zip(checksums);
        let blocks = blocks.map(|((rank, place), checksum)| (rank, place, checksum));
        self.imports.lend(self.name, index, blocks)?;
        self.imports.count(self.imports.whole_blocks(index), 0);
        Ok(())
    }
}

/// The blocks of one rank of an engine that is not like this one.
pub(super) struct Piece<'a> {
    assembly: &'a Assembly<'a>,
    source: u32,
}

impl Piece<'_> {
    /// False where another rank has the same.
    pub(super) fn is_needed(&self) -> bool {
        self.assembly.reslicing.is_needed(self.source)
    }
}

#[async_trait]
impl BlockSink for Piece<'_> {
    fn max_block_bytes(&self) -> u32 {
        u32::try_from(self.assembly.reslicing.block_bytes()).unwrap_or(u32::MAX)
    }

    fn layer_groups(&self) -> u32 {
        self.assembly.imports.layer_groups()
    }

    async fn reserve(&self, index: u32, len: u32) -> Result<Landing, TransferError> {
        is_whole(index, len, self.assembly.reslicing.block_bytes())?;
        self.assembly.row(index).await?;
        self.assembly.reslicing.reserve().await
    }

    async fn verified(&self, index: u32, block: Landing, crc32: u32) -> Result<(), TransferError> {
        let Assembly { imports, reslicing, verified, .. } = self.assembly;
        *verified.lock() = Instant::now();
        let complete = self.assembly.lay(index, self.source, block.as_bytes(), crc32)?;
        imports.count(0, reslicing.block_bytes());
        // Its place is free for the next piece.
        drop(block);
        complete.map_or(Ok(()), |row| self.assembly.complete(index, row))
    }
}

#[cfg(test)]
#[path = "sinks_tests.rs"]
mod tests;
