//! Other workers' arenas that this worker's engine has mapped, so that it loads their blocks where they lie.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
};

use baton_arena::PeerArena;
use baton_engine::ToEngine;
use parking_lot::Mutex;

use super::Rank;

/// Of one life of the engine's KV side. Each arena has a number of its own, which is not used again.
#[derive(Debug, Default)]
pub(super) struct EngineMaps {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    next: u32,
    arenas: Vec<Asked>,
}

/// An arena that the engine was asked to map.
#[derive(Debug)]
struct Asked {
    number: u32,
    /// Gone when neither the channel nor any block keeps it.
    arena: Weak<PeerArena>,
    /// Ranks that have mapped it.
    mapped_by: HashSet<u32>,
    is_refused: bool,
}

impl EngineMaps {
    /// The arena's number, if all ranks of the engine have mapped it. Asks them to, where that was not done yet: its
    /// blocks are copied meanwhile.
    pub(super) fn number_of(&self, arena: &Arc<PeerArena>, ranks: &[Rank]) -> Option<u32> {
        let mut known = self.known.lock();
        let asked = known.arenas.iter().find(|asked| asked.arena.as_ptr() == Arc::as_ptr(arena));
        if let Some(asked) = asked {
            let is_mapped = !asked.is_refused && asked.mapped_by.len() == ranks.len();
            return is_mapped.then_some(asked.number);
        }
        let number = known.next;
        known.next = number.wrapping_add(1);
        known.arenas.push(Asked {
            number,
            arena: Arc::downgrade(arena),
            mapped_by: HashSet::new(),
            is_refused: false,
        });
        let file = arena.file();
        for rank in ranks {
            rank.queue.send(ToEngine::Map { arena: number, file: file.clone() });
        }
        None
    }

    /// A rank's answer.
    pub(super) fn answered(&self, rank: u32, number: u32, refused: Option<&str>) {
        let mut known = self.known.lock();
        let Some(asked) = known.arenas.iter_mut().find(|asked| asked.number == number) else {
            return; // It was let go of meanwhile.
        };
        let path = asked.arena.upgrade().map(|arena| arena.file().path.clone());
        if let Some(reason) = refused {
            if !std::mem::replace(&mut asked.is_refused, true) {
                tracing::warn!(
                    rank,
                    ?path,
                    reason,
                    "a peer's blocks are copied: the engine cannot map its arena"
                );
            }
        } else if asked.mapped_by.insert(rank) && asked.mapped_by.len() == 1 {
            tracing::info!(rank, ?path, "a peer's blocks are loaded where they lie");
        }
    }

    /// Has the engine let go of the arenas that nobody needs any more.
    pub(super) fn forget_gone(&self, ranks: &[Rank]) {
        self.known.lock().arenas.retain(|asked| {
            let is_needed = asked.arena.strong_count() > 0;
            if !is_needed {
                let unmap = || ToEngine::Unmap { arena: asked.number };
                ranks.iter().for_each(|rank| rank.queue.send(unmap()));
            }
            is_needed
        });
    }
}
