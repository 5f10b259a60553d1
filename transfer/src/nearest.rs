//! Shared memory with peers on this host, a network with all others.

use std::{collections::HashSet, fmt, sync::Arc};

use async_trait::async_trait;
use baton_arena::Arena;
use parking_lot::Mutex;

use crate::{
    channel::{BlockSink, Channel, PeerAddress, Pulled, Subscription, TransferError},
    shm::ShmChannel,
};

/// Peers whose arenas were not to be had, of which that is remembered.
const MAX_REMEMBERED: usize = 1024;

/// Two channels as one. Both answer this worker's consumers; for its own handoffs the peer's place
/// decides.
pub struct NearestChannel {
    near: Arc<ShmChannel>,
    far: Arc<dyn Channel>,
    /// Peers that seem to be here, and whose memory cannot be had: by the fingerprint.
    out_of_reach: Mutex<HashSet<[u8; 32]>>,
}

impl fmt::Debug for NearestChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NearestChannel").field("transports", &self.transports()).finish()
    }
}

impl NearestChannel {
    pub fn new(near: Arc<ShmChannel>, far: Arc<dyn Channel>) -> Self {
        Self { near, far, out_of_reach: Mutex::default() }
    }

    fn is_near(&self, peer: &PeerAddress) -> bool {
        self.near.reaches(peer) && !self.out_of_reach.lock().contains(&peer.certificate_fingerprint)
    }

    fn give_up_on(&self, peer: &PeerAddress, error: &TransferError) {
        let mut out_of_reach = self.out_of_reach.lock();
        if out_of_reach.len() >= MAX_REMEMBERED {
            out_of_reach.clear();
        }
        if out_of_reach.insert(peer.certificate_fingerprint) {
            let (worker, instead) = (&peer.worker_name, self.far.transports());
            tracing::warn!(worker, %error, ?instead, "no shared memory with a peer on this host");
        }
    }
}

#[async_trait]
impl Channel for NearestChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        if self.is_near(peer) {
            let pulled = self.near.pull(peer, subscription.clone(), sink).await;
            match &pulled {
                // It heard nothing of this handoff, so that another way to it is open.
                Err(error @ TransferError::Unreachable { .. }) => self.give_up_on(peer, error),
                // It did: this handoff is lost, and the next goes the other way.
                Err(
                    error @ (TransferError::Memory(_) | TransferError::WrongCertificate { .. }),
                ) => {
                    self.give_up_on(peer, error);
                    return pulled;
                }
                _ => return pulled,
            }
        }
        self.far.pull(peer, subscription, sink).await
    }

    fn use_arena(&self, arena: &Arena) {
        self.near.use_arena(arena);
        self.far.use_arena(arena);
    }

    fn transports(&self) -> Vec<String> {
        let mut all = self.near.transports();
        all.extend(self.far.transports());
        all
    }
}
