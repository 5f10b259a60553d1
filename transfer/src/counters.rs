use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{channel::Refusal, lease::Ending};

/// What a ledger has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LedgerCounters {
    /// Blocks given whole to the network, with all their layer groups, those of handoffs that failed later
    /// included.
    pub blocks_sent: u64,
    pub bytes_sent: u64,
    pub handoffs_expected: u64,
    pub handoffs_acked: u64,
    pub handoffs_aborted: u64,
    pub handoffs_expired: u64,
    pub handoffs_broken: u64,
    /// In the order of [`Refusal::ALL`].
    pub refusals: [u64; Refusal::ALL.len()],
}

impl LedgerCounters {
    /// How the handoffs that have ended did, by name.
    pub fn endings(&self) -> [(&'static str, u64); 4] {
        [
            ("acked", self.handoffs_acked),
            ("aborted", self.handoffs_aborted),
            ("expired", self.handoffs_expired),
            ("broken", self.handoffs_broken),
        ]
    }

    /// How often a subscription was refused for this reason.
    pub fn refused(&self, refusal: Refusal) -> u64 {
        let kinds = Refusal::ALL.into_iter().zip(self.refusals);
        kinds.filter(|(kind, _)| *kind == refusal).map(|(_, count)| count).sum()
    }
}

impl std::iter::Sum for LedgerCounters {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, more| {
            sum.blocks_sent += more.blocks_sent;
            sum.bytes_sent += more.bytes_sent;
            sum.handoffs_expected += more.handoffs_expected;
            sum.handoffs_acked += more.handoffs_acked;
            sum.handoffs_aborted += more.handoffs_aborted;
            sum.handoffs_expired += more.handoffs_expired;
            sum.handoffs_broken += more.handoffs_broken;
            for (count, more) in sum.refusals.iter_mut().zip(more.refusals) {
                *count += more;
            }
            sum
        })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Tallies {
    blocks_sent: AtomicU64,
    bytes_sent: AtomicU64,
    expected: AtomicU64,
    acked: AtomicU64,
    aborted: AtomicU64,
    expired: AtomicU64,
    broken: AtomicU64,
    refusals: [AtomicU64; Refusal::ALL.len()],
}

impl Tallies {
    pub(crate) fn expected(&self) {
        self.expected.fetch_add(1, Relaxed);
    }

    pub(crate) fn sent(&self, blocks: u64, bytes: u64) {
        self.blocks_sent.fetch_add(blocks, Relaxed);
        self.bytes_sent.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn ended(&self, ending: &Ending) {
        let tally = match ending {
            Ending::Acked => &self.acked,
            Ending::Aborted => &self.aborted,
            Ending::Expired => &self.expired,
            Ending::Broken(_) => &self.broken,
        };
        tally.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        let tallies = Refusal::ALL.into_iter().zip(&self.refusals);
        for (_, tally) in tallies.filter(|(kind, _)| *kind == refusal) {
            tally.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> LedgerCounters {
        let read = |tally: &AtomicU64| tally.load(Relaxed);
        LedgerCounters {
            blocks_sent: read(&self.blocks_sent),
            bytes_sent: read(&self.bytes_sent),
            handoffs_expected: read(&self.expected),
            handoffs_acked: read(&self.acked),
            handoffs_aborted: read(&self.aborted),
            handoffs_expired: read(&self.expired),
            handoffs_broken: read(&self.broken),
            refusals: self.refusals.each_ref().map(read),
        }
    }
}
