//! Between engines that split KV heads over different numbers of ranks: which bytes of which rank's
//! block go where. Nothing here touches a byte.

use crate::{
    Compatibility, CompatibilityMismatch,
    heads::{Axis, HeadLayout, HeadLayoutError, Pages},
};

/// A block that has more pieces than this, on all ranks together, is not worth cutting up.
const MAX_CELLS: u64 = 1 << 20;
/// More than any engine has.
const MAX_RANKS: u32 = 1 << 10;

/// How blocks of all ranks of a consumer are made of those of all ranks of a producer.
///
/// Of tensor parallel ranks in the order of vLLM: each has as many neighbouring heads as the others, and
/// where there are more ranks than heads, neighbouring ranks have the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reslice {
    covers: Vec<Vec<Vec<Run>>>,
}

/// Neighbouring bytes that stay together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where they begin in the producer rank's block.
    pub from: usize,
    pub to_rank: u32,
    /// Where they begin in that rank's block.
    pub to: usize,
    pub bytes: usize,
}

/// Why blocks cannot be made of a peer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResliceError {
    #[error(transparent)]
    Mismatch(#[from] CompatibilityMismatch),
    #[error(transparent)]
    Layout(#[from] HeadLayoutError),
    #[error("{layout} has {heads} of {total} KV heads on each of {ranks} ranks, which cannot be")]
    Heads { layout: String, heads: u32, total: u32, ranks: u32 },
    #[error("{layout} has not the {block_bytes} bytes that a block is said to have")]
    Bytes { layout: String, block_bytes: u64 },
    #[error("a block of {layout} has more than {MAX_CELLS} pieces on all ranks together")]
    TooFine { layout: String },
}

impl Reslice {
    /// From the ranks of a producer to those of a consumer, whatever rank either description is of.
    pub fn between(from: &Compatibility, to: &Compatibility) -> Result<Self, ResliceError> {
        to.check(from)?;
        let (source, target) = (Split::of(from)?, Split::of(to)?);
        let covers = (0..source.ranks).map(|rank| source.covers(rank, &target)).collect();
        Ok(Self { covers })
    }

    /// Ranks of the producer.
    pub fn sources(&self) -> u32 {
        u32::try_from(self.covers.len()).unwrap_or(u32::MAX)
    }

    /// What becomes of a block of this rank of the producer. Each cover is the whole block, run by run from
    /// its first byte to its last; there are several where several ranks of the consumer hold the same head,
    /// and none where another rank of the producer gives the same bytes.
    pub fn covers(&self, source: u32) -> &[Vec<Run>] {
        self.covers.get(source as usize).map_or(&[], Vec::as_slice)
    }
}

/// A model's heads on the ranks of one engine.
pub(crate) struct Split {
    layout: HeadLayout,
    ranks: u32,
    /// Ranks that hold the same head.
    replicas: u32,
}

impl Split {
    pub(crate) fn of(described: &Compatibility) -> Result<Self, ResliceError> {
        let layout: HeadLayout = described.kv_heads.parse()?;
        let (total, heads) = (layout.heads(), layout.heads_on_rank());
        let ranks = described.tensor_parallel_size;
        let replicas = if ranks > total { ranks / total } else { 1 };
        let held = u64::from(ranks) * u64::from(heads);
        if !(1..=MAX_RANKS).contains(&ranks) || held != u64::from(total) * u64::from(replicas) {
            return Err(ResliceError::Heads { layout: layout.to_string(), heads, total, ranks });
        }
        if layout.block_bytes() != Some(described.block_bytes) {
            let (layout, block_bytes) = (layout.to_string(), described.block_bytes);
            return Err(ResliceError::Bytes { layout, block_bytes });
        }
        let cells = |pages: &Pages| u64::from(pages.layers) * cells_of_page(pages);
        let on_rank: u64 = layout.pages().iter().map(cells).sum();
        if on_rank.saturating_mul(ranks.into()) > MAX_CELLS {
            return Err(ResliceError::TooFine { layout: layout.to_string() });
        }
        Ok(Self { layout, ranks, replicas })
    }

    pub(crate) fn kin(&self) -> HeadLayout {
        self.layout.kin()
    }

    /// The first of the model's heads that this rank holds.
    fn first_head(&self, rank: u32) -> u32 {
        rank / self.replicas * self.layout.heads_on_rank()
    }

    fn covers(&self, rank: u32, target: &Self) -> Vec<Vec<Run>> {
        let is_needed = rank.is_multiple_of(self.replicas);
        let copies = if is_needed { target.replicas } else { 0 };
        (0..copies).map(|copy| self.cover(rank, target, copy)).collect()
    }

    fn cover(&self, rank: u32, target: &Self, copy: u32) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let (mut from, mut to_page) = (0, 0);
        for (pages, to_pages) in self.layout.pages().iter().zip(target.layout.pages()) {
            let bytes = pages.cell_bytes as usize;
            for _ in 0..pages.layers {
                for cell in 0..cells_of_page(pages) {
                    let mut at = position(pages, cell);
                    let head = self.first_head(rank) + at[Axis::Head as usize];
                    let group = head / target.layout.heads_on_rank();
                    at[Axis::Head as usize] = head % target.layout.heads_on_rank();
                    let run = Run {
                        from,
                        to_rank: group * target.replicas + copy,
                        to: to_page + cell_at(to_pages, at) * bytes,
                        bytes,
                    };
                    match runs.last_mut() {
                        Some(last) if last.goes_on_with(&run) => last.bytes += bytes,
                        _ => runs.push(run),
                    }
                    from += bytes;
                }
                to_page += usize::try_from(cells_of_page(to_pages)).unwrap_or(usize::MAX) * bytes;
            }
        }
        runs
    }
}

impl Run {
    fn goes_on_with(&self, next: &Self) -> bool {
        self.to_rank == next.to_rank && self.to + self.bytes == next.to
    }
}

fn cells_of_page(pages: &Pages) -> u64 {
    pages.axes.iter().map(|(_, size)| u64::from(*size)).product()
}

/// Which keys or values, token and head lie at this place of a page.
fn position(pages: &Pages, cell: u64) -> [u32; 3] {
    let mut at = [0; 3];
    let mut rest = cell;
    for (axis, size) in pages.axes.iter().rev() {
        at[*axis as usize] = u32::try_from(rest % u64::from(*size)).unwrap_or_default();
        rest /= u64::from(*size);
    }
    at
}

fn cell_at(pages: &Pages, at: [u32; 3]) -> usize {
    pages
        .axes
        .iter()
        .fold(0, |cell, (axis, size)| cell * *size as usize + at[*axis as usize] as usize)
}

#[cfg(test)]
#[path = "reslice_tests.rs"]
mod tests;
