use std::time::Duration;

use baton_engine::KvCacheFollower;
use baton_proto::KvEvents;
use baton_types::BlockHash;
use tokio::time::Instant;

use crate::{life::Life, outbox::Outbox};

/// Changes of one message: 128 KiB.
const MOST_CHANGES: usize = 1 << 14;
/// What changes in this time goes together. A coordinator that learns of a block this much later has
/// lost nothing: the request that stored it has just begun.
const PACE: Duration = Duration::from_millis(5);

/// Tells one coordinator of the engine's prefix cache.
#[derive(Debug)]
pub(crate) struct KvTelling {
    /// Absent where the engine does not tell.
    follower: Option<KvCacheFollower>,
    sequence: u64,
    not_before: Instant,
}

impl KvTelling {
    pub(crate) fn new(life: &Life) -> Self {
        let follower = life.engine.kv_cache().map(|cache| cache.log.follow());
        Self { follower, sequence: 0, not_before: Instant::now() }
    }

    /// The coordinator has missed something.
    pub(crate) fn restart(&mut self) {
        if let Some(follower) = &mut self.follower {
            follower.restart();
        }
    }

    /// The next message, once there is one and the last one has left. Can be cancelled.
    pub(crate) async fn next(&mut self, outbox: &Outbox) -> KvEvents {
        let Some(follower) = &mut self.follower else { return std::future::pending().await };
        outbox.kv_events_room().await;
        tokio::time::sleep_until(self.not_before).await;
        let changes = follower.next(MOST_CHANGES).await;
        self.not_before = Instant::now() + PACE;
        self.sequence += 1;
        let numbers =
            |blocks: Vec<BlockHash>| blocks.into_iter().map(BlockHash::get).collect::<Vec<_>>();
        KvEvents {
            sequence: self.sequence,
            restart: changes.restart,
            removed: numbers(changes.removed),
            stored: numbers(changes.stored),
        }
    }
}
