//! Blocks that are copied and verified together: on two threads, where there is enough of them.
//!
//! One thread copies as fast as memory goes, and then reads every block twice again for its checksums. Two
//! make up for that.

use std::{collections::VecDeque, sync::Arc};

use baton_arena::{Landing, PeerArena};
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use crate::{arrivals::verify, channel::TransferError, frame::BlockHead};

/// The most that is copied at a time: a fraction of a millisecond, in which nothing else is heard.
pub(super) const BATCH_BYTES: u64 = 4 << 20;

/// Less than this is copied before a second thread is awake.
const SHARED_BYTES: u64 = 512 << 10;

/// A block, where it lies in the producer's arena, and the slot for it.
#[derive(Debug)]
struct Announced {
    head: BlockHead,
    offset: u64,
    landing: Landing,
}

/// A block in its slot, and its CRC-32, where it is what it was said to be.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) head: BlockHead,
    pub(super) landing: Landing,
    pub(super) verified: Result<u32, TransferError>,
}

#[derive(Debug, Default)]
pub(super) struct Batch {
    waiting: VecDeque<Announced>,
    bytes: u64,
}

impl Batch {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(&mut self, head: BlockHead, offset: u64, landing: Landing) {
        self.bytes += u64::from(head.len);
        self.waiting.push_back(Announced { head, offset, landing });
    }

    /// Copies and verifies all of them. Answers them in their order.
    pub(super) async fn copy(self, arena: &Arc<PeerArena>) -> Result<Vec<Copied>, TransferError> {
        if self.bytes < SHARED_BYTES || self.waiting.len() < 2 {
            return Ok(self.waiting.into_iter().map(|block| block.copied(arena)).collect());
        }
        // Each takes the next block that nobody has: who comes late has less to do.
        let waiting = Arc::new(Mutex::new(self.waiting));
        let theirs = {
            let (waiting, arena) = (Arc::clone(&waiting), Arc::clone(arena));
            spawn_blocking(move || take(&waiting, &arena))
        };
        let mut copied = take(&waiting, arena);
        let theirs = theirs.await.map_err(|error| TransferError::Memory(error.to_string()))?;
        copied.extend(theirs);
        copied.sort_by_key(|copied| copied.head.index);
        Ok(copied)
    }
}

fn take(waiting: &Mutex<VecDeque<Announced>>, arena: &PeerArena) -> Vec<Copied> {
    let next = || waiting.lock().pop_front();
    std::iter::from_fn(next).map(|block| block.copied(arena)).collect()
}

impl Announced {
    fn copied(self, arena: &PeerArena) -> Copied {
        let Self { head, offset, landing } = self;
        let copied = landing.copy_from(arena, offset);
        let verified = copied
            .map_err(|error| TransferError::Protocol(error.to_string()))
            .and_then(|()| verify(&head, landing.as_bytes(), None));
        Copied { head, landing, verified }
    }
}
