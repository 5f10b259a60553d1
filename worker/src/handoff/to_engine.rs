use std::sync::Arc;

use baton_arena::Slot;
use baton_engine::ToEngine;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

/// What the engine is to be told. Never waits, so that whoever drops a block may release its slot; it
/// stays small, for it holds a few words for each slot and handoff.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: Vec<ToEngine>,
    released: Vec<Slot>,
}

impl Queue {
    /// Adds a message. Blocks to be loaded join those of the same handoff that wait already.
    pub(super) fn send(&self, message: ToEngine) {
        let mut waiting = self.shared.waiting.lock();
        match (waiting.messages.last_mut(), message) {
            (
                Some(ToEngine::Load { handoff, generation, blocks }),
                ToEngine::Load { handoff: other, generation: other_generation, blocks: more },
            ) if *handoff == other && *generation == other_generation => blocks.extend(more),
            (
                Some(ToEngine::LoadMapped { handoff, generation, arena, blocks }),
                ToEngine::LoadMapped {
                    handoff: other,
                    generation: other_generation,
                    arena: other_arena,
                    blocks: more,
                },
            ) if (*handoff, *generation, *arena) == (other, other_generation, other_arena) => {
                blocks.extend(more);
            }
            (_, message) => waiting.messages.push(message),
        }
        drop(waiting);
        self.shared.news.notify_one();
    }

    /// The engine may fill this slot again.
    pub(super) fn release(&self, slot: Slot) {
        self.shared.waiting.lock().released.push(slot);
        self.shared.news.notify_one();
    }

    /// Gives everything to the engine until it is gone.
    pub(super) async fn pump(&self, to_engine: &mpsc::Sender<ToEngine>) {
        loop {
            self.shared.news.notified().await;
            let Waiting { mut messages, released } =
                std::mem::take(&mut *self.shared.waiting.lock());
            if !released.is_empty() {
                messages.push(ToEngine::Release { slots: released });
            }
            for message in messages {
                if to_engine.send(message).await.is_err() {
                    return;
                }
            }
        }
    }
}
