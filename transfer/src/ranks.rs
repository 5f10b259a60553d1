//! What an engine's tensor parallel ranks export, each rank for itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use baton_types::{Compatibility, Epoch, Generation, HandoffId};
use parking_lot::Mutex;

use crate::{
    channel::{ExportStream, Exports, Refusal, Subscription},
    counters::LedgerCounters,
    ledger::Ledger,
};

/// A ledger for each rank of the engine. A consumer takes each rank's blocks by a subscription of its own,
/// which names the rank by its epoch ([`Epoch::of_rank`]). Clones share the ledgers.
#[derive(Clone, Debug)]
pub struct RankLedgers {
    /// Never empty; those beyond the ranks of the engine's present life are of no epoch that anybody knows.
    ledgers: Arc<Mutex<Vec<Ledger>>>,
    lease: Duration,
}

impl RankLedgers {
    /// Of no engine yet. `lease` is as in [`Ledger::new`].
    pub fn new(lease: Duration) -> Self {
        let ledgers = Arc::new(Mutex::new(vec![nobodys(lease)]));
        Self { ledgers, lease }
    }

    /// The engine has a new life: every open handoff was of the old one and is void. Answers the ledgers of
    /// its ranks, in their order.
    pub fn begin_epoch(&self, epoch: Epoch, engine: &Compatibility) -> Vec<Ledger> {
        let ranks = engine.tensor_parallel_size.max(1);
        let mut ledgers = self.ledgers.lock();
        let count = ledgers.len().max(ranks as usize);
        ledgers.resize_with(count, || nobodys(self.lease));
        for (rank, ledger) in (0..).zip(ledgers.iter()) {
            if rank < ranks {
                let digest = engine.of_rank(rank).digest();
                ledger.begin_epoch(epoch.of_rank(rank), digest, engine.layer_groups);
            } else {
                ledger.begin_epoch(Epoch::random(), NO_ENGINE, 1);
            }
        }
        ledgers[..ranks as usize].to_vec()
    }

    /// Ends every rank's part of a handoff whose lease ran out, and answers which. To be called now and
    /// then.
    pub fn expire(&self, now: Instant) -> Vec<(HandoffId, Generation)> {
        self.all().iter().flat_map(|ledger| ledger.expire(now)).collect()
    }

    /// Of all ranks together: a handoff counts once for each.
    pub fn counters(&self) -> LedgerCounters {
        self.all().iter().map(Ledger::counters).sum()
    }

    fn all(&self) -> Vec<Ledger> {
        self.ledgers.lock().clone()
    }
}

const NO_ENGINE: [u8; 32] = [0; 32];

fn nobodys(lease: Duration) -> Ledger {
    Ledger::new(Epoch::random(), NO_ENGINE, lease)
}

#[async_trait]
impl Exports for RankLedgers {
    async fn attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal> {
        let ledgers = self.all();
        let meant = ledgers.iter().find(|ledger| ledger.epoch() == subscription.handoff.epoch);
        // The first refuses an epoch that is none of theirs.
        match meant.or(ledgers.first()) {
            Some(ledger) => ledger.attach(subscription, peer).await,
            None => Err(Refusal::WrongEpoch),
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_types::{HandoffKey, PromptDigest};

    use super::*;

    const PEER: [u8; 32] = [9; 32];

    fn engine(ranks: u32) -> Compatibility {
        Compatibility {
            model: "m".into(),
            revision: String::new(),
            kv_dtype: "float32".into(),
            kv_layout: "flat".into(),
            block_size_tokens: 16,
            block_bytes: 4,
            tensor_parallel_rank: 0,
            tensor_parallel_size: ranks,
            connector_version: "1".into(),
            kv_heads: String::new(),
            layer_groups: 1,
        }
    }

    #[tokio::test]
    async fn each_rank_is_taken_by_its_own_name_and_no_other() {
        let all = RankLedgers::new(Duration::from_secs(5));
        let (epoch, id, generation) = (Epoch::random(), HandoffId::random(), Generation(0));
        let ledgers = all.begin_epoch(epoch, &engine(2));
        let mut endings = Vec::new();
        for (rank, ledger) in (0_u8..).zip(&ledgers) {
            endings.push(ledger.expect(id, generation, PEER).unwrap());
            ledger.push(id, generation, 0, vec![rank; 4].into()).unwrap();
            ledger.seal(id, generation, 3, PromptDigest([1; 32]), 0).unwrap();
        }
        let subscription = |epoch: Epoch, rank: u32| Subscription {
            handoff: HandoffKey { epoch, id, generation },
            consumer_epoch: Epoch::random(),
            compatibility: engine(2).of_rank(rank).digest(),
            first_block: 0,
            prompt_tokens: 3,
            prompt_digest: PromptDigest([1; 32]),
        };
        // One rank's epoch does for no other rank.
        let crossed = all.attach(&subscription(epoch, 1), PEER).await.err();
        assert_eq!(crossed, Some(Refusal::Incompatible));
        let strange = all.attach(&subscription(epoch.of_rank(2), 1), PEER).await.err();
        assert_eq!(strange, Some(Refusal::WrongEpoch));
        for rank in 0..2 {
            let mut stream =
                all.attach(&subscription(epoch.of_rank(rank), rank), PEER).await.unwrap();
            let crate::Exported::Block { handoff, bytes, .. } = stream.next().await else {
                panic!("a block is due")
            };
            assert_eq!(handoff.epoch, epoch.of_rank(rank));
            assert_eq!(u32::from(bytes[0]), rank);
            assert!(matches!(stream.next().await, crate::Exported::Sealed(_)));
            stream.finish(Ok(()));
        }
        for ending in endings {
            assert_eq!(ending.await.unwrap(), crate::Ending::Acked);
        }
        assert_eq!(all.counters().handoffs_acked, 2);

        // An engine of fewer ranks: the second rank's open handoffs are void, and nobody attaches there.
        let open = ledgers[1].expect(HandoffId::random(), generation, PEER).unwrap();
        let next = Epoch::random();
        assert_eq!(all.begin_epoch(next, &engine(1)).len(), 1);
        assert_eq!(open.await.unwrap(), crate::Ending::Aborted);
        let gone = all.attach(&subscription(next.of_rank(1), 1), PEER).await.err();
        assert_eq!(gone, Some(Refusal::WrongEpoch));
        assert_eq!(all.counters().handoffs_acked, 2, "what was counted stays counted");
    }
}
