//! Blocks that their consumer reads where they lie, in the producer's arena.

use std::{fmt, sync::Arc};

use baton_arena::{ArenaError, PeerArena};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A block that was verified in another worker's arena. It stays there until this is dropped, unless its worker
/// takes the handoff back meanwhile, which fails it: what was read of it then counts for nothing.
pub struct MappedBlock {
    arena: Arc<PeerArena>,
    offset: u64,
    len: usize,
    index: u32,
    let_go: UnboundedSender<u32>,
}

impl fmt::Debug for MappedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, len, index, .. } = self;
        f.debug_struct("MappedBlock")
            .field("index", index)
            .field("offset", offset)
            .field("len", len)
            .finish_non_exhaustive()
    }
}

impl MappedBlock {
    /// Whose it is. Stays mapped as long as there is a block of it.
    pub fn arena(&self) -> &Arc<PeerArena> {
        &self.arena
    }

    /// Bytes from that arena's beginning.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What lies there now. It is what was verified only if its checksum says so.
    pub fn bytes(&self) -> Result<&[u8], ArenaError> {
        self.arena.bytes(self.offset, self.len)
    }
}

impl Drop for MappedBlock {
    fn drop(&mut self) {
        // A handoff that is over has given all of its blocks up.
        let _ = self.let_go.send(self.index);
    }
}

/// Those of one handoff.
pub(super) struct Lent {
    let_go: UnboundedSender<u32>,
    come_back: UnboundedReceiver<u32>,
    out: usize,
    any: bool,
}

impl Lent {
    pub(super) fn new() -> Self {
        let (let_go, come_back) = unbounded_channel();
        Self { let_go, come_back, out: 0, any: false }
    }

    pub(super) fn lend(
        &mut self,
        arena: &Arc<PeerArena>,
        offset: u64,
        len: u32,
        index: u32,
    ) -> MappedBlock {
        self.out += 1;
        self.any = true;
        let (arena, let_go) = (Arc::clone(arena), self.let_go.clone());
        MappedBlock { arena, offset, len: len as usize, index, let_go }
    }

    /// Whether any block was ever lent.
    pub(super) fn any(&self) -> bool {
        self.any
    }

    /// Whether somebody may still read one.
    pub(super) fn is_out(&self) -> bool {
        self.out > 0
    }

    /// The index of the next block that is let go of. Waits for ever where none is out. Nothing is lost when the
    /// future is dropped.
    pub(super) async fn come_back(&mut self) -> u32 {
        match self.come_back.recv().await {
            Some(index) => {
                self.out = self.out.saturating_sub(1);
                index
            }
            None => std::future::pending().await,
        }
    }

    /// One that has come back by now.
    pub(super) fn back_by_now(&mut self) -> Option<u32> {
        let index = self.come_back.try_recv().ok()?;
        self.out = self.out.saturating_sub(1);
        Some(index)
    }
}
