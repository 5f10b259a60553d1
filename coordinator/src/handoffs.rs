use std::collections::HashMap;

use baton_core::WorkerKey;
use baton_proto as wire;

/// What each worker handed over to each other since both attached: prompts for decode, and starts of prompts that
/// another copied from its cache.
#[derive(Debug, Default)]
pub(crate) struct HandoffMatrix {
    pairs: HashMap<(WorkerKey, WorkerKey), Pair>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) handoffs: u64,
    /// Beside them.
    pub(crate) failed: u64,
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
    /// Summed over handoffs, from the receiver's subscription to its last verified block. It waits for
    /// prefill to compute meanwhile.
    pub(crate) micros: u64,
    /// What carried the last one.
    pub(crate) transport: String,
}

/// A transport's name is a worker's word.
const LONGEST_TRANSPORT_CHARS: usize = 64;

impl HandoffMatrix {
    pub(crate) fn add(&mut self, from: WorkerKey, to: WorkerKey, moved: &wire::HandoffResult) {
        let pair = self.pairs.entry((from, to)).or_default();
        pair.handoffs += 1;
        pair.blocks = pair.blocks.saturating_add(moved.blocks.into());
        pair.bytes = pair.bytes.saturating_add(moved.bytes);
        pair.micros = pair.micros.saturating_add(moved.micros);
        if pair.transport != moved.transport {
            pair.transport = moved.transport.chars().take(LONGEST_TRANSPORT_CHARS).collect();
        }
    }

    /// As long as both are attached.
    pub(crate) fn failed(&mut self, from: WorkerKey, to: WorkerKey) {
        self.pairs.entry((from, to)).or_default().failed += 1;
    }

    pub(crate) fn worker_gone(&mut self, worker: WorkerKey) {
        self.pairs.retain(|(from, to), _| *from != worker && *to != worker);
    }

    pub(crate) fn len(&self) -> usize {
        self.pairs.len()
    }

    /// At most so many, of those that failed most, and then of those that carried most.
    pub(crate) fn busiest(&self, most: usize) -> Vec<((WorkerKey, WorkerKey), &Pair)> {
        let mut pairs: Vec<_> = self.pairs.iter().map(|(key, pair)| (*key, pair)).collect();
        if pairs.len() > most {
            pairs.select_nth_unstable_by(most, |a, b| {
                (b.1.failed, b.1.bytes).cmp(&(a.1.failed, a.1.bytes))
            });
            pairs.truncate(most);
        }
        pairs.sort_unstable_by_key(|(key, _)| *key);
        pairs
    }
}
