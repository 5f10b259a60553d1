//! The staging arena: KV blocks in shared memory, between an engine and its worker.
//!
//! An arena is one file of equal slots. The first `export_slots` are handed out by the engine, the
//! others by the worker; a slot has one writer at a time, and passes from one process to the other by
//! a message on the socket between them, never by what lies in the memory itself.
#![allow(unsafe_code)] // Maps memory that another process maps too; each block says why it is sound.

mod peer;
mod slots;

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use serde::{Deserialize, Serialize};

pub use peer::{ArenaFile, PeerArena};
pub use slots::{ReserveError, ReservedSlot, SlotPool};

/// What is copied, or read, before it is read again: so little is then still in the nearest cache.
pub const PIECE_BYTES: usize = 32 << 10;

/// One block's place in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArenaLayout {
    pub slot_bytes: u64,
    /// Slots `0 .. export_slots` are the engine's to fill.
    pub export_slots: u32,
    /// The slots after them are the worker's to fill.
    pub import_slots: u32,
}

impl ArenaLayout {
    pub fn total_slots(&self) -> u32 {
        self.export_slots.saturating_add(self.import_slots)
    }

    pub fn is_export(&self, slot: Slot) -> bool {
        slot.0 < self.export_slots
    }

    pub fn is_import(&self, slot: Slot) -> bool {
        !self.is_export(slot) && slot.0 < self.total_slots()
    }

    /// The export and the import slots of one of an engine's tensor parallel ranks: of each half as many as
    /// the others have.
    pub fn of_rank(&self, rank: u32, ranks: u32) -> (Range<u32>, Range<u32>) {
        let part = |first: u32, slots: u32| {
            let each = slots / ranks.max(1);
            let begin = first.saturating_add(each.saturating_mul(rank));
            begin..begin.saturating_add(each)
        };
        (part(0, self.export_slots), part(self.export_slots, self.import_slots))
    }

    fn total_bytes(&self) -> Option<usize> {
        let bytes = self.slot_bytes.checked_mul(u64::from(self.total_slots()))?;
        usize::try_from(bytes).ok().filter(|bytes| *bytes > 0)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    #[error("an arena of {export_slots} + {import_slots} slots of {slot_bytes} bytes cannot be: {reason}", 
        export_slots = layout.export_slots, import_slots = layout.import_slots, slot_bytes = layout.slot_bytes)]
    Layout { layout: ArenaLayout, reason: &'static str },
    #[error("cannot {action} the arena {path}: {source}", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the file {path} is not the arena of a worker of this user: {reason}", path = path.display())]
    NotAPeers { path: PathBuf, reason: &'static str },
    #[error("slot {slot} is not in an arena of {slots} slots", slot = slot.0)]
    NoSuchSlot { slot: Slot, slots: u32 },
    #[error("{offset} + {len} bytes do not fit a slot of {slot_bytes} bytes")]
    OutOfSlot { offset: u64, len: u64, slot_bytes: u64 },
}

/// A mapped arena. Clones share the mapping; the file goes when its creator's last clone does.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    map: MmapRaw,
    path: PathBuf,
    layout: ArenaLayout,
    remove_on_drop: bool,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.remove_on_drop {
            // Somebody else may have tidied up already.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Arena {
    /// Makes the file, readable by its owner only, and touches every page, so that no handoff pays for
    /// a first touch.
    pub fn create(path: &Path, layout: ArenaLayout) -> Result<Self, ArenaError> {
        let io = |action| move |source| ArenaError::Io { action, path: path.to_owned(), source };
        let bytes = layout
            .total_bytes()
            .ok_or(ArenaError::Layout { layout, reason: "it is empty or too large" })?;

        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create_new(true);
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path).map_err(io("create"))?;
        let allocated = file
            .set_len(bytes as u64)
            .and_then(|()| MmapOptions::new().len(bytes).populate().map_raw(&file))
            .map_err(io("map"));
        match allocated {
            Ok(map) => Ok(Self {
                shared: Arc::new(Mapping {
                    map,
                    path: path.to_owned(),
                    layout,
                    remove_on_drop: true,
                }),
            }),
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(error)
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    pub fn layout(&self) -> ArenaLayout {
        self.shared.layout
    }

    /// Copies `bytes` into a slot.
    pub fn write(&self, slot: Slot, offset: u64, bytes: &[u8]) -> Result<(), ArenaError> {
        let start = self.locate(slot, offset, bytes.len() as u64)?;
        // SAFETY: `locate` checked that the range lies in the mapping, and `bytes` is a Rust borrow of
        // other memory. That nobody else writes the slot meanwhile is the arena's protocol; should a
        // broken engine do it all the same, the bytes are garbage and their checksum says so.
        unsafe {
            let target = self.shared.map.as_mut_ptr().add(start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
        Ok(())
    }

    /// The first `len` bytes of a slot, without a copy. Whoever holds the view sees to it that the
    /// slot is not given back before the view is gone.
    pub fn view(&self, slot: Slot, len: u64) -> Result<SlotView, ArenaError> {
        let start = self.locate(slot, 0, len)?;
        let len = usize::try_from(len).map_err(|_| self.out_of_slot(0, len))?;
        Ok(SlotView { arena: self.clone(), start, len })
    }

    /// Where in this arena these bytes lie, counted from its begin; `None` where they lie elsewhere.
    pub fn offset_of(&self, bytes: &[u8]) -> Option<u64> {
        let start = bytes.as_ptr().addr().checked_sub(self.shared.map.as_mut_ptr().addr())?;
        let end = start.checked_add(bytes.len())?;
        (end <= self.shared.map.len()).then_some(start as u64)
    }

    /// A reserved slot as the place for one block of `len` bytes.
    pub fn landing(&self, slot: ReservedSlot, len: u64) -> Result<Landing, ArenaError> {
        let view = self.view(slot.slot(), len)?;
        Ok(Landing { view, slot })
    }

    /// Where the mapping begins in this process. It stays there as long as a clone of the arena lives.
    pub fn base(&self) -> *mut u8 {
        self.shared.map.as_mut_ptr()
    }

    /// Bytes of the whole mapping.
    pub fn len_bytes(&self) -> usize {
        self.shared.map.len()
    }

    /// How many clones of it and views into it there are, this one included.
    pub fn holders(&self) -> usize {
        Arc::strong_count(&self.shared)
    }

    fn locate(&self, slot: Slot, offset: u64, len: u64) -> Result<usize, ArenaError> {
        let layout = self.shared.layout;
        if slot.0 >= layout.total_slots() {
            return Err(ArenaError::NoSuchSlot { slot, slots: layout.total_slots() });
        }
        if offset.checked_add(len).is_none_or(|end| end > layout.slot_bytes) {
            return Err(self.out_of_slot(offset, len));
        }
        usize::try_from(u64::from(slot.0) * layout.slot_bytes + offset)
            .map_err(|_| self.out_of_slot(offset, len))
    }

    fn out_of_slot(&self, offset: u64, len: u64) -> ArenaError {
        ArenaError::OutOfSlot { offset, len, slot_bytes: self.shared.layout.slot_bytes }
    }
}

/// Bytes of one slot, borrowed from the mapping.
#[derive(Clone, Debug)]
pub struct SlotView {
    arena: Arena,
    start: usize,
    len: usize,
}

impl SlotView {
    /// For senders that take `Bytes`; nothing is copied.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

/// A slot that one block is on its way to. Whoever lets a peer write into it keeps it until nothing more
/// can be written, so that the slot is nobody else's meanwhile.
#[derive(Debug)]
pub struct Landing {
    view: SlotView,
    slot: ReservedSlot,
}

impl Landing {
    pub fn slot(&self) -> Slot {
        self.slot.slot()
    }

    pub fn arena(&self) -> &Arena {
        &self.view.arena
    }

    /// Bytes from the arena's beginning.
    pub fn offset(&self) -> usize {
        self.view.start
    }

    pub fn len_bytes(&self) -> usize {
        self.view.len
    }

    /// Copies the block from where it lies in another worker's arena, and shows each piece of it to `copied`
    /// as it now lies here, while it is still in the processor's cache. Pieces come in order and are
    /// [`PIECE_BYTES`] long, the last one aside.
    pub fn copy_from(
        &self,
        peer: &PeerArena,
        offset: u64,
        mut copied: impl FnMut(&[u8]),
    ) -> Result<(), ArenaError> {
        let len = self.view.len;
        let source = peer.at(offset, len)?;
        for begin in (0..len).step_by(PIECE_BYTES) {
            let piece = begin..len.min(begin + PIECE_BYTES);
            // SAFETY: `at` and `view` checked that both blocks lie in their mappings, which live as long as
            // the two borrows, and the piece lies in the block; they are two mappings, so the ranges do not
            // overlap. No reference to either is made. Should the other worker write there meanwhile, the
            // bytes are garbage, and their checksum, which is taken over this copy, says so.
            unsafe {
                let target = self.view.arena.shared.map.as_mut_ptr().add(self.view.start + begin);
                std::ptr::copy_nonoverlapping(source.add(begin), target, piece.len());
            }
            copied(&self.as_bytes()[piece]);
        }
        Ok(())
    }

    /// Lays the block down, given in pieces.
    pub fn write(&self, pieces: &[&[u8]]) -> Result<(), ArenaError> {
        let mut offset = 0;
        for piece in pieces {
            self.arena().write(self.slot(), offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Lays down a part of the block.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), ArenaError> {
        self.arena().write(self.slot(), offset, bytes)
    }

    /// The block as it lies now.
    pub fn as_bytes(&self) -> &[u8] {
        self.view.as_ref()
    }

    /// The slot, for who takes the block over.
    pub fn into_slot(self) -> ReservedSlot {
        self.slot
    }
}

impl AsRef<[u8]> for SlotView {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `view` checked the range, and the mapping lives as long as `self.arena`. The slot's
        // holder does not write while it is lent (see the module's head); a broken engine that does
        // can only change the bytes' values, which a checksum over them then shows.
        unsafe {
            std::slice::from_raw_parts(self.arena.shared.map.as_ptr().add(self.start), self.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(dir: &tempfile::TempDir) -> Arena {
        let layout = ArenaLayout { slot_bytes: 64, export_slots: 2, import_slots: 3 };
        Arena::create(&dir.path().join("arena"), layout).unwrap()
    }

    #[test]
    fn what_is_written_is_viewed_and_the_file_goes_with_the_arena() {
        let dir = tempfile::tempdir().unwrap();
        let arena = arena(&dir);
        arena.write(Slot(4), 8, b"kv").unwrap();
        let view = arena.view(Slot(4), 10).unwrap();
        assert_eq!(&view.as_ref()[8..], b"kv");
        assert_eq!(fs::read(arena.path()).unwrap()[4 * 64 + 8..][..2], *b"kv");

        let path = arena.path().to_owned();
        let bytes = view.into_bytes();
        drop(arena);
        assert!(path.exists(), "a view keeps the mapping");
        drop(bytes);
        assert!(!path.exists());
    }

    #[test]
    fn a_slot_ends_where_the_next_begins() {
        let dir = tempfile::tempdir().unwrap();
        let arena = arena(&dir);
        assert!(matches!(arena.write(Slot(5), 0, b"x"), Err(ArenaError::NoSuchSlot { .. })));
        assert!(matches!(arena.write(Slot(0), 64, b"x"), Err(ArenaError::OutOfSlot { .. })));
        assert!(matches!(arena.write(Slot(0), u64::MAX, b"x"), Err(ArenaError::OutOfSlot { .. })));
        assert!(matches!(arena.view(Slot(0), 65), Err(ArenaError::OutOfSlot { .. })));
    }

    #[test]
    fn an_arena_has_slots_and_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = arena(&dir);
        let again = Arena::create(first.path(), first.layout());
        assert!(matches!(again, Err(ArenaError::Io { action: "create", .. })));
        let empty = ArenaLayout { slot_bytes: 64, export_slots: 0, import_slots: 0 };
        let empty = Arena::create(&dir.path().join("empty"), empty);
        assert!(matches!(empty, Err(ArenaError::Layout { .. })));
    }
}
