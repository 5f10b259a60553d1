//! The life of one handoff on the producing side, as a machine without clock, lock or I/O.
//!
//! ```text
//! Reserved ──push──► Streaming ──seal──► Sealed ──acknowledge──► Acked
//!     └──────────────────┴──────────────────┴──► Aborted · Expired · Broken
//! ```
//!
//! The consumer attaches once, in any of the first three. Entering a final state frees every block
//! that was not taken yet.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use baton_types::{Generation, HandoffKey};
use bytes::Bytes;

use crate::{
    channel::{Exported, Refusal, Seal, Subscription, TransferError},
    order::Order,
};

/// How a handoff ended for its producer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The consumer has all of it and said so.
    Acked,
    /// Given up here: the job was cancelled, or the engine has a new epoch.
    Aborted,
    /// Nothing moved for the time of its lease.
    Expired,
    /// The consumer gave up or went away, or what was produced was not what it had subscribed to.
    Broken(TransferError),
}

/// Why the ledger did not take something from the producer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandoffError {
    #[error("no such handoff is open; it ended, or was never expected")]
    NotOpen,
    #[error("generation {given} of this handoff is older than {known}")]
    Stale { given: Generation, known: Generation },
    #[error("block {given} was exported where block {expected} is due")]
    OutOfOrder { given: u32, expected: u32 },
    #[error("the handoff was sealed with unlike numbers of blocks of its layer groups")]
    Uneven,
    #[error("the handoff was sealed already")]
    Sealed,
    #[error("a block of {bytes} bytes is too long to be sent")]
    BlockTooLong { bytes: usize },
    #[error("the sealed prompt is not the one that the consumer subscribed to")]
    WrongPrompt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Reserved,
    Streaming,
    Sealed,
}

/// What the consumer gets when it asks for more.
#[derive(Debug)]
pub(crate) enum Taken {
    Item(Exported),
    NothingYet,
}

/// One open handoff. A final state is its removal: dropping it frees its blocks.
#[derive(Debug)]
pub(crate) struct Handoff {
    key: HandoffKey,
    consumer: [u8; 32],
    lease: Duration,
    expires: Instant,
    phase: Phase,
    subscription: Option<Subscription>,
    order: Order,
    waiting: VecDeque<Exported>,
    seal: Option<Seal>,
    seal_taken: bool,
}

impl Handoff {
    pub(crate) fn new(
        key: HandoffKey,
        consumer: [u8; 32],
        layer_groups: u32,
        lease: Duration,
        now: Instant,
    ) -> Self {
        Self {
            key,
            consumer,
            lease,
            expires: now + lease,
            phase: Phase::Reserved,
            subscription: None,
            order: Order::from(0, layer_groups),
            waiting: VecDeque::new(),
            seal: None,
            seal_taken: false,
        }
    }

    pub(crate) fn generation(&self) -> Generation {
        self.key.generation
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.subscription.is_some()
    }

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        now >= self.expires
    }

    pub(crate) fn renew(&mut self, now: Instant) {
        self.expires = self.expires.max(now + self.lease);
    }

    /// Adds the block that comes next of its layer group, unless the consumer does not want it.
    pub(crate) fn push(
        &mut self,
        index: u32,
        crc: u64,
        bytes: &Bytes,
        now: Instant,
    ) -> Result<(), HandoffError> {
        if self.phase == Phase::Sealed {
            return Err(HandoffError::Sealed);
        }
        self.order
            .take(index)
            .map_err(|expected| HandoffError::OutOfOrder { given: index, expected })?;
        self.phase = Phase::Streaming;
        self.renew(now);
        let unwanted = self.subscription.as_ref().is_some_and(|wanted| index < wanted.first_block);
        if !unwanted {
            let (handoff, bytes) = (self.key, bytes.clone());
            self.waiting.push_back(Exported::Block { handoff, index, crc, bytes });
        }
        Ok(())
    }

    /// Says that no block follows. `WrongPrompt` where the consumer attached for another prompt:
    /// the handoff is then void.
    pub(crate) fn seal(&mut self, seal: Seal, now: Instant) -> Result<Seal, HandoffError> {
        if self.phase == Phase::Sealed {
            return Err(HandoffError::Sealed);
        }
        let prompt_blocks = self.order.end().ok_or(HandoffError::Uneven)?;
        let seal = Seal { prompt_blocks, ..seal };
        self.phase = Phase::Sealed;
        self.renew(now);
        self.seal = Some(seal);
        match &self.subscription {
            Some(wanted) if !is_of_the_prompt(&seal, wanted) => {
                self.waiting.push_front(Exported::Refused(Refusal::WrongPrompt));
                Err(HandoffError::WrongPrompt)
            }
            _ => {
                self.waiting.push_back(Exported::Sealed(seal));
                Ok(seal)
            }
        }
    }

    /// Opens the handoff for its consumer. The caller has compared epoch, compatibility and
    /// generation. Answers the blocks that the consumer does not want.
    pub(crate) fn attach(
        &mut self,
        subscription: &Subscription,
        peer: [u8; 32],
        now: Instant,
    ) -> Result<VecDeque<Exported>, Refusal> {
        if peer != self.consumer {
            return Err(Refusal::WrongPeer);
        }
        if self.is_attached() {
            return Err(Refusal::AlreadyTaken);
        }
        if self.seal.is_some_and(|seal| !is_of_the_prompt(&seal, subscription)) {
            return Err(Refusal::WrongPrompt);
        }
        let first_block = subscription.first_block;
        let (unwanted, wanted) = std::mem::take(&mut self.waiting).into_iter().partition(
            |item| matches!(item, Exported::Block { index, .. } if *index < first_block),
        );
        self.waiting = wanted;
        self.subscription = Some(subscription.clone());
        self.renew(now);
        Ok(unwanted)
    }

    /// Gives the attached consumer what comes next.
    pub(crate) fn take(&mut self, now: Instant) -> Taken {
        match self.waiting.pop_front() {
            None => Taken::NothingYet,
            Some(item) => {
                self.renew(now);
                self.seal_taken |= matches!(item, Exported::Sealed(_));
                Taken::Item(item)
            }
        }
    }

    /// What an acknowledgement means now: only after the seal was taken is it the good end.
    pub(crate) fn acknowledged(&self) -> Ending {
        if self.seal_taken {
            Ending::Acked
        } else {
            let early = "an acknowledgement before the seal".to_owned();
            Ending::Broken(TransferError::Protocol(early))
        }
    }
}

fn is_of_the_prompt(seal: &Seal, subscription: &Subscription) -> bool {
    seal.prompt_tokens == subscription.prompt_tokens
        && seal.prompt_digest == subscription.prompt_digest
        && subscription.first_block <= seal.prompt_blocks
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use baton_types::{Epoch, HandoffId, HandoffKey, PromptDigest};
    use proptest::prelude::*;

    use super::*;

    const LEASE: Duration = Duration::from_secs(10);
    const CONSUMER: [u8; 32] = [7; 32];
    const KEY: HandoffKey = HandoffKey {
        epoch: Epoch::from_u128(1),
        id: HandoffId::from_u128(2),
        generation: Generation(0),
    };
    const PROMPT: PromptDigest = PromptDigest([1; 32]);

    fn subscription(first_block: u32) -> Subscription {
        Subscription {
            handoff: KEY,
            consumer_epoch: Epoch::from_u128(3),
            compatibility: [0; 32],
            first_block,
            prompt_tokens: 100,
            prompt_digest: PROMPT,
        }
    }

    fn seal(prompt_tokens: u32) -> Seal {
        Seal { prompt_blocks: 0, prompt_tokens, prompt_digest: PROMPT, cached_tokens: 0 }
    }

    /// Counts the blocks that somebody still holds.
    #[derive(Clone, Default)]
    struct Held(Arc<AtomicUsize>);

    struct Block(Held);

    impl AsRef<[u8]> for Block {
        fn as_ref(&self) -> &[u8] {
            b"kv"
        }
    }

    impl Drop for Block {
        fn drop(&mut self) {
            self.0.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl Held {
        fn block(&self) -> Bytes {
            self.0.fetch_add(1, Ordering::Relaxed);
            Bytes::from_owner(Block(self.clone()))
        }

        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Push { skip: u32 },
        Seal { prompt_tokens: u32 },
        Attach { first_block: u32, rightly: bool },
        Take,
        Wait { seconds: u64 },
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => prop_oneof![9 => Just(0), 1 => 1..3_u32].prop_map(|skip| Step::Push { skip }),
            1 => prop_oneof![3 => Just(100), 1 => Just(99)]
                .prop_map(|prompt_tokens| Step::Seal { prompt_tokens }),
            1 => (0..6_u32, prop::bool::weighted(0.8))
                .prop_map(|(first_block, rightly)| Step::Attach { first_block, rightly }),
            5 => Just(Step::Take),
            1 => (0..6_u64).prop_map(|seconds| Step::Wait { seconds }),
        ]
    }

    proptest! {
        #[test]
        fn a_consumer_gets_its_blocks_in_order_once_and_nothing_outlives_the_handoff(
            steps in prop::collection::vec(steps(), 0..80),
        ) {
            let held = Held::default();
            let mut now = Instant::now();
            let mut last_move = now;
            let mut handoff = Handoff::new(KEY, CONSUMER, 1, LEASE, now);
            let (mut pushed, mut sealed, mut first) = (0, None, None);
            let (mut taken, mut last_word) = (Vec::new(), None);
            for step in steps {
                let was_expired = handoff.is_expired(now);
                prop_assert_eq!(was_expired, now >= last_move + LEASE);
                match step {
                    Step::Push { skip } => {
                        let given = handoff.push(pushed + skip, 9, &held.block(), now);
                        let due = match sealed {
                            Some(_) => Err(HandoffError::Sealed),
                            None if skip > 0 => {
                                Err(HandoffError::OutOfOrder { given: pushed + skip, expected: pushed })
                            }
                            None => Ok(()),
                        };
                        prop_assert_eq!(given, due);
                        if due.is_ok() {
                            pushed += 1;
                            last_move = now;
                        }
                    }
                    Step::Seal { prompt_tokens } => {
                        let given = handoff.seal(seal(prompt_tokens), now);
                        if sealed.is_some() {
                            prop_assert_eq!(given, Err(HandoffError::Sealed));
                            continue;
                        }
                        let fits = prompt_tokens == 100 && first.is_none_or(|first| first <= pushed);
                        let wrong = first.is_some() && !fits;
                        prop_assert_eq!(given.is_err(), wrong);
                        sealed = Some(prompt_tokens);
                        last_move = now;
                    }
                    Step::Attach { first_block, rightly } => {
                        let peer = if rightly { CONSUMER } else { [8; 32] };
                        let given = handoff.attach(&subscription(first_block), peer, now).map(drop);
                        let due = if !rightly {
                            Err(Refusal::WrongPeer)
                        } else if first.is_some() {
                            Err(Refusal::AlreadyTaken)
                        } else if sealed.is_some_and(|tokens| tokens != 100 || first_block > pushed) {
                            Err(Refusal::WrongPrompt)
                        } else {
                            Ok(())
                        };
                        prop_assert_eq!(given, due);
                        if due.is_ok() {
                            first = Some(first_block);
                            last_move = now;
                        }
                    }
                    // Only an attached consumer asks, and none after the last word.
                    Step::Take if first.is_none() || last_word.is_some() => {}
                    Step::Take => match handoff.take(now) {
                        Taken::NothingYet => {}
                        Taken::Item(Exported::Block { index, .. }) => {
                            last_move = now;
                            taken.push(index);
                        }
                        Taken::Item(word) => {
                            last_move = now;
                            last_word = Some(word);
                        }
                    },
                    Step::Wait { seconds } => now += Duration::from_secs(seconds),
                }
                // Nobody holds a block but the handoff, as many as can still be wanted.
                let unwanted = first.unwrap_or(0).min(pushed);
                prop_assert_eq!(held.count() + taken.len(), (pushed - unwanted) as usize);
                let acked = handoff.acknowledged() == Ending::Acked;
                prop_assert_eq!(acked, matches!(last_word, Some(Exported::Sealed(_))));
            }
            let from = first.unwrap_or(0);
            prop_assert!(taken.iter().copied().eq(from..from + u32::try_from(taken.len()).unwrap()));
            match last_word {
                Some(Exported::Sealed(seal)) => {
                    prop_assert_eq!(seal.prompt_blocks, pushed);
                    prop_assert_eq!(taken.len(), (pushed - from) as usize);
                }
                Some(Exported::Refused(refusal)) => prop_assert_eq!(refusal, Refusal::WrongPrompt),
                other => prop_assert!(other.is_none()),
            }
            drop(handoff);
            prop_assert_eq!(held.count(), 0);
        }
    }
}
