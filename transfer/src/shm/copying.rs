//! Blocks are copied and verified, or verified where they lie, by a few threads, which all handoffs of a worker
//! share.
//!
//! One thread alone is kept from the speed of a copy by its checksums. Nor is it the runtime's thread that
//! reads them, but where there is too little to wake another for: that one hears what the producer announces next
//! meanwhile.

use std::{collections::VecDeque, num::NonZero, sync::Arc, thread::available_parallelism};

use baton_arena::{Landing, PIECE_BYTES, PeerArena};
use parking_lot::Mutex;
use tokio::{sync::oneshot, task::spawn_blocking};

use crate::{
    arrivals::{Sums, verify_sums},
    channel::TransferError,
    frame::BlockHead,
};

/// What a thread copies before it tells: long beside waking who waits for it.
const PORTION_BYTES: u64 = 1 << 20;

/// Of one handoff so much is under way at the most, and one block more.
const UNDER_WAY_BYTES: u64 = 8 << 20;
const UNDER_WAY_BLOCKS: usize = 128;

/// Less than this is copied before a thread is awake.
const WORTH_WAKING_BYTES: u64 = 512 << 10;

/// More do not make memory faster.
const MOST_THREADS: usize = 4;

/// A block, where it lies in the producer's arena, and the slot that it is to be copied to, if it is.
#[derive(Debug)]
struct Announced {
    head: BlockHead,
    offset: u64,
    landing: Option<Landing>,
}

/// A block where it is to be read, and its CRC-32, where it is what it was said to be.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) head: BlockHead,
    pub(super) place: Place,
    pub(super) verified: Result<u32, TransferError>,
}

#[derive(Debug)]
pub(super) enum Place {
    Copied(Landing),
    /// So far into the producer's arena, as it was announced.
    There(u64),
}

impl Announced {
    fn placed(self, arena: &PeerArena) -> Placed {
        let Self { head, offset, landing } = self;
        let mut sums = Sums::default();
        let len = head.len as usize;
        let read = match &landing {
            Some(landing) => landing.copy_from(arena, offset, |piece| sums.add(piece)),
            None => arena
                .bytes(offset, len)
                .map(|bytes| bytes.chunks(PIECE_BYTES).for_each(|piece| sums.add(piece))),
        };
        let found_bytes = landing.as_ref().map_or(len, Landing::len_bytes);
        let verified = read
            .map_err(|error| TransferError::Protocol(error.to_string()))
            .and_then(|()| verify_sums(&head, found_bytes, &sums));
        let place = landing.map_or(Place::There(offset), Place::Copied);
        Placed { head, place, verified }
    }
}

/// Blocks of one handoff that a thread takes one after the other.
struct Portion {
    blocks: Vec<Announced>,
    arena: Arc<PeerArena>,
    /// Closed where nobody waits for them any more.
    done: oneshot::Sender<Vec<Placed>>,
}

/// The threads, of which there are none while there is nothing to copy.
pub(super) struct Copiers {
    line: Arc<Mutex<Line>>,
    most_threads: usize,
}

#[derive(Default)]
struct Line {
    waiting: VecDeque<Portion>,
    threads: usize,
}

impl Copiers {
    pub(super) fn new() -> Self {
        // Asked once: it reads files.
        let cores = available_parallelism().map_or(1, NonZero::get);
        Self { line: Arc::default(), most_threads: cores.min(MOST_THREADS) }
    }

    fn give(&self, portion: Portion) {
        let mut line = self.line.lock();
        line.waiting.push_back(portion);
        if line.threads < self.most_threads {
            line.threads += 1;
            let line = Arc::clone(&self.line);
            spawn_blocking(move || copy_all(&line));
        }
    }
}

fn copy_all(line: &Mutex<Line>) {
    while let Some(Portion { blocks, arena, done }) = next(line) {
        if !done.is_closed() {
            let copied = blocks.into_iter().map(|block| block.placed(&arena)).collect();
            // Who has given the handoff up meanwhile gives the slots back.
            let _ = done.send(copied);
        }
    }
}

/// With nothing left to copy the thread is gone.
fn next(line: &Mutex<Line>) -> Option<Portion> {
    let mut line = line.lock();
    let next = line.waiting.pop_front();
    if next.is_none() {
        line.threads -= 1;
    }
    next
}

/// What is being copied for one handoff, in the order of its blocks. Dropped, it lets go of what no thread
/// has begun.
pub(super) struct Copying<'a> {
    copiers: &'a Copiers,
    gathered: Vec<Announced>,
    gathered_bytes: u64,
    under_way: VecDeque<UnderWay>,
    is_short_of_slots: bool,
}

struct UnderWay {
    blocks: usize,
    bytes: u64,
    done: oneshot::Receiver<Vec<Placed>>,
}

impl<'a> Copying<'a> {
    pub(super) fn new(copiers: &'a Copiers) -> Self {
        Self {
            copiers,
            gathered: Vec::new(),
            gathered_bytes: 0,
            under_way: VecDeque::new(),
            is_short_of_slots: false,
        }
    }

    /// Blocks that were gathered and have not come back.
    pub(super) fn len(&self) -> usize {
        self.gathered.len() + self.under_way.iter().map(|portion| portion.blocks).sum::<usize>()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn has_room(&self) -> bool {
        let bytes = self.under_way.iter().map(|portion| portion.bytes).sum::<u64>();
        !self.is_short_of_slots
            && self.len() < UNDER_WAY_BLOCKS
            && bytes + self.gathered_bytes < UNDER_WAY_BYTES
    }

    /// There is no slot for the next block: there may be one when a block has been copied.
    pub(super) fn waits_for_slots(&mut self) {
        self.is_short_of_slots = true;
    }

    pub(super) fn gather(
        &mut self,
        head: BlockHead,
        offset: u64,
        landing: Option<Landing>,
        arena: &Arc<PeerArena>,
    ) {
        self.gathered_bytes += u64::from(head.len);
        self.gathered.push(Announced { head, offset, landing });
        if self.gathered_bytes >= PORTION_BYTES {
            self.give(arena);
        }
    }

    /// Copies what was gathered: a little at once, more on other threads, which [`Self::done`] tells of.
    pub(super) fn start(&mut self, arena: &Arc<PeerArena>) -> Vec<Placed> {
        if self.under_way.is_empty() && self.gathered_bytes < WORTH_WAKING_BYTES {
            (self.gathered_bytes, self.is_short_of_slots) = (0, false);
            return self.gathered.drain(..).map(|block| block.placed(arena)).collect();
        }
        self.give(arena);
        Vec::new()
    }

    fn give(&mut self, arena: &Arc<PeerArena>) {
        if self.gathered.is_empty() {
            return;
        }
        let blocks = std::mem::take(&mut self.gathered);
        let bytes = std::mem::take(&mut self.gathered_bytes);
        let (done, waited_for) = oneshot::channel();
        self.under_way.push_back(UnderWay { blocks: blocks.len(), bytes, done: waited_for });
        self.copiers.give(Portion { blocks, arena: Arc::clone(arena), done });
    }

    /// The blocks that were given to a thread first, once they are copied. Waits for ever where none are.
    /// Nothing is lost when the future is dropped.
    pub(super) async fn done(&mut self) -> Result<Vec<Placed>, TransferError> {
        let Some(first) = self.under_way.front_mut() else { return std::future::pending().await };
        let copied = (&mut first.done).await;
        self.under_way.pop_front();
        self.is_short_of_slots = false;
        copied.map_err(|_| TransferError::Memory("blocks were not copied".to_owned()))
    }
}
