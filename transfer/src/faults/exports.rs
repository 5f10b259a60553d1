//! Between a producer's ledger and its channel.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::time::sleep;

use super::{Disturbance, Fate, Faults, flipped};
use crate::channel::{ExportStream, Exported, Exports, Refusal, Subscription, TransferError};

pub(super) struct FaultyExports {
    pub(super) exports: Arc<dyn Exports>,
    pub(super) faults: Faults,
}

#[async_trait]
impl Exports for FaultyExports {
    async fn attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal> {
        let stream = self.exports.attach(subscription, peer).await?;
        Ok(Box::new(FaultyStream {
            stream,
            fate: self.faults.fate(subscription),
            faults: self.faults.clone(),
            ready: VecDeque::new(),
            held_back: None,
            mood: Mood::Sound,
        }))
    }
}

struct FaultyStream {
    stream: Box<dyn ExportStream>,
    fate: Option<Fate>,
    faults: Faults,
    ready: VecDeque<Exported>,
    /// Goes after what comes next.
    held_back: Option<Exported>,
    mood: Mood,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Sound,
    /// What is ready comes after this.
    Late(Duration),
    Silent,
}

#[async_trait]
impl ExportStream for FaultyStream {
    async fn next(&mut self) -> Exported {
        loop {
            match self.mood {
                Mood::Sound => {}
                Mood::Late(delay) => {
                    sleep(delay).await;
                    self.mood = Mood::Sound;
                }
                Mood::Silent => {
                    self.stream.revoked().await;
                    return Exported::Aborted;
                }
            }
            if let Some(item) = self.ready.pop_front() {
                return item;
            }
            let item = self.stream.next().await;
            self.disturb(item);
        }
    }

    async fn revoked(&mut self) {
        self.stream.revoked().await;
    }

    fn due(&self) -> Instant {
        self.stream.due()
    }

    fn sent(&mut self, bytes: u64) {
        self.stream.sent(bytes);
    }

    fn finish(self: Box<Self>, outcome: Result<(), TransferError>) {
        self.stream.finish(outcome);
    }
}

impl FaultyStream {
    /// Puts what shall come of it among what is ready.
    fn disturb(&mut self, item: Exported) {
        let Exported::Block { handoff, index, crc, bytes } = item else {
            self.ready.push_back(item);
            self.ready.extend(self.held_back.take());
            return;
        };
        let block = |bytes| Exported::Block { handoff, index, crc, bytes };
        let Some(Fate { what, dice, .. }) = self.fate.filter(|fate| fate.index == index) else {
            self.faults.keep(block(bytes.to_vec().into()));
            self.ready.push_back(block(bytes));
            self.ready.extend(self.held_back.take());
            return;
        };
        match what {
            Disturbance::Drop => {}
            Disturbance::Delay => {
                self.mood = Mood::Late(Duration::from_millis(1 + dice % 50));
                self.ready.push_back(block(bytes));
            }
            Disturbance::Reorder => self.held_back = Some(block(bytes)),
            Disturbance::Duplicate => {
                self.ready.push_back(block(bytes.clone()));
                self.ready.push_back(block(bytes));
            }
            Disturbance::Flip => self.ready.push_back(block(flipped(&bytes, dice).into())),
            Disturbance::Truncate => {
                let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX).max(1);
                let kept = usize::try_from(dice % len).unwrap_or_default();
                self.ready.push_back(block(bytes.slice(..kept)));
            }
            Disturbance::Replace | Disturbance::Foreign => {
                let Some((of, at, sum, stray)) = self.faults.stray(handoff, &bytes) else {
                    // Nobody else has sent a block yet.
                    return self.ready.push_back(block(bytes));
                };
                self.ready.push_back(if what == Disturbance::Replace {
                    block(stray)
                } else {
                    Exported::Block { handoff: of, index: at, crc: sum, bytes: stray }
                });
            }
            Disturbance::StallProducer => self.mood = Mood::Silent,
            Disturbance::CutProducer => self.ready.push_back(Exported::Aborted),
            // The consumer's side does these.
            Disturbance::StallConsumer | Disturbance::CutConsumer | Disturbance::Rot => {
                return self.ready.push_back(block(bytes));
            }
        }
        self.faults.did(what);
    }
}
