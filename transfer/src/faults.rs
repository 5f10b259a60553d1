//! A network and a memory that fail, by a seed.
//!
//! Whether a handoff is disturbed, how, and at which of its blocks, follows from the seed, the prompt
//! and the attempt alone: however the tasks of a run are scheduled, the same seed disturbs the same
//! handoffs in the same way. Blocks are disturbed *below* verification: between the producer's ledger
//! and its channel, between the consumer's channel and its arena, and in the arena itself.
//! [`DatagramRelay`] disturbs what passes between two sockets.

mod channel;
mod datagrams;
mod exports;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use baton_types::{HandoffKey, PromptDigest};
use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

pub use self::datagrams::DatagramRelay;
use self::{channel::FaultyChannel, exports::FaultyExports};
use crate::channel::{Channel, Exported, Exports, Interpose, Subscription};

/// What goes wrong with one handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disturbance {
    /// A block is never sent.
    Drop,
    /// A block is sent late. Nothing is wrong with that.
    Delay,
    /// A block is sent after the one that follows it.
    Reorder,
    /// A block is sent twice.
    Duplicate,
    /// A bit of a block changes on its way.
    Flip,
    /// A block loses its end.
    Truncate,
    /// Another handoff's block comes in place of one, under that block's name.
    Replace,
    /// Another handoff's block comes in place of one, under its own name.
    Foreign,
    /// The producer sends nothing more.
    StallProducer,
    /// The consumer takes nothing more.
    StallConsumer,
    /// The producer gives up.
    CutProducer,
    /// The consumer gives up.
    CutConsumer,
    /// A bit changes in the consumer's arena after the block was verified there.
    Rot,
}

impl Disturbance {
    pub const ALL: [Self; 13] = [
        Self::Drop,
        Self::Delay,
        Self::Reorder,
        Self::Duplicate,
        Self::Flip,
        Self::Truncate,
        Self::Replace,
        Self::Foreign,
        Self::StallProducer,
        Self::StallConsumer,
        Self::CutProducer,
        Self::CutConsumer,
        Self::Rot,
    ];

    fn place(self) -> usize {
        Self::ALL.iter().position(|other| *other == self).unwrap_or_default()
    }
}

/// How much goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FaultPlan {
    pub seed: u64,
    /// Share of the attempts at a handoff that are disturbed.
    pub disturbed_ratio: f64,
    pub block_size_tokens: u32,
    pub layer_groups: u32,
}

/// A plan, and how far it was carried out. Clones share the count.
#[derive(Clone)]
pub struct Faults {
    plan: FaultPlan,
    done: Arc<[AtomicU64; Disturbance::ALL.len()]>,
    /// The last blocks of two handoffs, to be put in others' places.
    strays: Arc<Mutex<[Option<Exported>; 2]>>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("plan", &self.plan).finish_non_exhaustive()
    }
}

impl Interpose for Faults {
    fn exports(&self, exports: Arc<dyn Exports>) -> Arc<dyn Exports> {
        Arc::new(FaultyExports { exports, faults: self.clone() })
    }

    fn channel(&self, channel: Arc<dyn Channel>) -> Arc<dyn Channel> {
        Arc::new(FaultyChannel { channel, faults: self.clone() })
    }
}

/// What happens to one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fate {
    what: Disturbance,
    /// At the block of this index.
    index: u32,
    /// For whatever else is to be chosen.
    dice: u64,
}

impl Faults {
    pub fn new(plan: FaultPlan) -> Self {
        let done = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        Self { plan, done, strays: Arc::default() }
    }

    /// How often each was done.
    pub fn done(&self) -> Vec<(Disturbance, u64)> {
        let counts = self.done.iter().map(|count| count.load(Relaxed));
        Disturbance::ALL.into_iter().zip(counts).collect()
    }

    fn did(&self, what: Disturbance) {
        if let Some(count) = self.done.get(what.place()) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// Keeps a block that went by, and one of another handoff.
    fn keep(&self, block: Exported) {
        let mut strays = self.strays.lock();
        if strays[0].as_ref().map(handoff_of) != Some(handoff_of(&block)) {
            strays.swap(0, 1);
        }
        strays[0] = Some(block);
    }

    /// A block that is none of this handoff's, nor the same.
    fn stray(&self, handoff: HandoffKey, bytes: &[u8]) -> Option<(HandoffKey, u32, u64, Bytes)> {
        self.strays.lock().iter().flatten().find_map(|stray| match stray {
            Exported::Block { handoff: of, index, crc, bytes: stray }
                if *of != handoff && stray != bytes =>
            {
                Some((*of, *index, *crc, stray.clone()))
            }
            _ => None,
        })
    }

    fn fate(&self, subscription: &Subscription) -> Option<Fate> {
        let blocks = subscription.prompt_tokens.div_ceil(self.plan.block_size_tokens.max(1));
        let blocks = blocks * self.plan.layer_groups;
        let wanted = blocks.checked_sub(subscription.first_block).filter(|wanted| *wanted > 0)?;
        let generation = subscription.handoff.generation.0;
        let mut random = self.random(&subscription.prompt_digest, generation);
        if random.f64() >= self.plan.disturbed_ratio {
            return None;
        }
        let what = *random.choice(&Disturbance::ALL)?;
        let index = subscription.first_block + random.u32(0..wanted);
        Some(Fate { what, index, dice: random.u64(..) })
    }

    fn random(&self, prompt: &PromptDigest, generation: u32) -> fastrand::Rng {
        let mut hasher = Sha256::new();
        hasher.update(self.plan.seed.to_le_bytes());
        hasher.update(prompt.0);
        hasher.update(generation.to_le_bytes());
        let digest: [u8; 32] = hasher.finalize().into();
        let seed = digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        fastrand::Rng::with_seed(seed)
    }
}

fn handoff_of(block: &Exported) -> Option<HandoffKey> {
    match block {
        Exported::Block { handoff, .. } => Some(*handoff),
        _ => None,
    }
}

/// A copy with one bit changed, which the dice choose.
fn flipped(bytes: &[u8], dice: u64) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    let len = u64::try_from(copy.len()).unwrap_or(u64::MAX).max(1);
    let byte = usize::try_from(dice / 8 % len).unwrap_or_default();
    if let Some(byte) = copy.get_mut(byte) {
        *byte ^= 1 << (dice % 8);
    }
    copy
}
