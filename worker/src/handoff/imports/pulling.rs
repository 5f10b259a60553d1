//! One handoff on its way: from every rank of the producer, until this engine has copied all of it.

use std::sync::Arc;

use baton_transfer::{BlockSink, Pulled, Seal, Subscription, TransferError};
use baton_types::{Compatibility, Fault, FaultKind, HandoffKey, Origin};
use futures::future::try_join_all;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::{
    super::{
        Name, fault,
        pieces::Reslicing,
        sinks::{Assembly, Piece, Whole},
    },
    Imports, Producer, Prompt,
};

impl Imports {
    /// Takes a handoff over, to its end.
    pub(super) async fn pull(self: Arc<Self>, name: Name, producer: Producer, prompt: Prompt) {
        let started = Instant::now();
        let verified = Mutex::new(started);
        let pulled = self.pull_all(name, &producer, prompt, &verified).await;
        let duration = verified.into_inner() - started;
        let loaded = match pulled {
            Ok(pulled) => self.all_loaded(name).await.map(|()| pulled),
            Err(fault) => Err(fault),
        };
        match loaded {
            Ok(pulled) => self.complete(name, pulled, prompt.first_block, duration),
            Err(fault) => self.fail(name, fault),
        }
    }

    /// Takes over what all ranks of the producer have, at the same time: rank to rank where both engines are
    /// alike, else made of one another's blocks.
    async fn pull_all(
        &self,
        name: Name,
        producer: &Producer,
        prompt: Prompt,
        verified: &Mutex<Instant>,
    ) -> Result<Pulled, Fault> {
        let theirs = producer.compatibility.as_ref();
        let all = match theirs.filter(|theirs| theirs.check_ranks(&self.compatibility).is_err()) {
            None => {
                let whole = |rank| Whole { imports: self, name, rank, verified };
                let sinks: Vec<_> = (0..).take(self.ranks.len()).map(whole).collect();
                let pulls = (0..).zip(&sinks).map(|(rank, sink)| {
                    self.pull_rank(name, producer, &self.compatibility, rank, prompt, sink)
                });
                try_join_all(pulls).await
            }
            Some(theirs) => {
                let reslicing = self.reslicing(theirs).await?;
                let assembly = Assembly::new(self, name, &reslicing, verified);
                let sources: Vec<_> = (0..reslicing.sources()).map(|s| assembly.piece(s)).collect();
                let pulls = (0..).zip(&sources).map(|(rank, sink): (u32, &Piece<'_>)| {
                    // What others give as well is acknowledged, and not sent.
                    let first_block =
                        if sink.is_needed() { prompt.first_block } else { self.blocks_of(prompt) };
                    let prompt = Prompt { first_block, ..prompt };
                    self.pull_rank(name, producer, theirs, rank, prompt, sink)
                });
                try_join_all(pulls).await
            }
        };
        let all = all.map_err(|error| {
            self.counters.handoff_errors.add(error.name());
            fault::of_transfer(&error)
        })?;
        all.iter().try_for_each(|pulled| self.check_whole(pulled))?;
        let bytes = all.iter().map(|pulled| pulled.bytes).sum();
        let blocks = all.iter().map(|pulled| pulled.blocks).max().unwrap_or_default();
        let first = all.first().ok_or_else(|| {
            Fault::new(Origin::Handoff, FaultKind::Failed, "the producer has no rank")
        })?;
        Ok(Pulled { blocks, bytes, ..*first })
    }

    async fn pull_rank(
        &self,
        name: Name,
        producer: &Producer,
        engine: &Compatibility,
        rank: u32,
        prompt: Prompt,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let epoch = producer.epoch.of_rank(rank);
        let subscription = Subscription {
            handoff: HandoffKey { epoch, id: name.0, generation: name.1 },
            consumer_epoch: *self.epoch.lock(),
            compatibility: engine.of_rank(rank).digest(),
            first_block: prompt.first_block,
            prompt_tokens: prompt.prompt_tokens,
            prompt_digest: prompt.prompt_digest,
        };
        self.transfer.channel.pull(&producer.address, subscription, sink).await
    }

    async fn reslicing(&self, theirs: &Compatibility) -> Result<Arc<Reslicing>, Fault> {
        self.pieces.of_blocks_of(theirs, &self.compatibility).await.map_err(|error| {
            self.counters.handoff_errors.add(error.name());
            Fault::new(Origin::Handoff, error.kind(), error.to_string())
        })
    }

    /// Of all layer groups.
    fn blocks_of(&self, prompt: Prompt) -> u32 {
        // A layout of no tokens a block is of no engine; one is the strictest reading.
        let blocks = prompt.prompt_tokens.div_ceil(self.compatibility.block_size_tokens.max(1));
        blocks.saturating_mul(self.layer_groups())
    }

    /// The channel proved that what was sealed is what came; that it is the whole prompt is for those to
    /// say who know how many tokens a block holds.
    fn check_whole(&self, pulled: &Pulled) -> Result<(), Fault> {
        let Seal { prompt_blocks, prompt_tokens, prompt_digest, .. } = pulled.seal;
        let expected = self.blocks_of(Prompt { prompt_tokens, prompt_digest, first_block: 0 });
        if prompt_blocks == expected {
            return Ok(());
        }
        let reason = format!(
            "{prompt_tokens} tokens make {expected} blocks, the producer sealed {prompt_blocks}"
        );
        Err(Fault::new(Origin::Handoff, FaultKind::Corrupt, reason))
    }

    /// Waits until the engine has copied every block.
    async fn all_loaded(&self, name: Name) -> Result<(), Fault> {
        loop {
            let given_back = match self.consumers.lock().get(&name) {
                Some(consumer) if consumer.lent.is_empty() => return Ok(()),
                Some(consumer) => consumer.given_back.clone(),
                None => return Ok(()), // Its job has gone; nobody asks any more.
            };
            if timeout(self.transfer.stall_timeout, given_back.notified()).await.is_err() {
                let reason = format!(
                    "the engine loaded no block for {} s",
                    self.transfer.stall_timeout.as_secs_f32()
                );
                return Err(Fault::new(Origin::Engine, FaultKind::TimedOut, reason));
            }
        }
    }
}
