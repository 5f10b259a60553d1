//! What the coordinator knows of the workers' prefix caches, as a live one does: what they tell, some milliseconds
//! late, or, where it does not listen, what was routed where.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use baton_core::{
    Core, Heard, KvUpdate, PromptBlocks, RequestShape, RoutedIndex, RoutedLimits, WorkerKey,
};
use baton_engine::{KvCacheChanges, KvCacheFollower, KvCacheLog, sim::Scheduler};
use baton_types::BlockHash;

use super::{
    Setup,
    world::{Happening, World, block_hashes, nanos_of},
};
use crate::trace::{Trace, TraceRequest};

/// A live worker gathers changes for so long.
const PACE: Duration = Duration::from_millis(5);
/// And tells so many of them at once.
const MOST_CHANGES: usize = 1 << 14;

pub(super) struct Knowledge {
    block_size_tokens: u32,
    /// Tokens that each of a request's `prefix_blocks` stands for.
    prefix_block_tokens: u32,
    /// By the workers' numbers; none where prompts have nothing in common, or nobody listens.
    tellings: Vec<Telling>,
    /// Where nobody listens.
    routed: Option<RoutedIndex<WorkerKey>>,
    shares_prefixes: bool,
    lots: fastrand::Rng,
}

struct Telling {
    follower: KvCacheFollower,
    sequence: u64,
    on_the_way: VecDeque<(u64, KvCacheChanges)>,
}

impl Telling {
    /// From here on everything is told anew.
    fn restart(&mut self) {
        self.follower.restart();
        self.on_the_way.clear();
    }
}

impl Knowledge {
    pub(super) fn new(setup: &Setup, trace: &Trace) -> Self {
        Self {
            block_size_tokens: setup.block_size_tokens,
            prefix_block_tokens: trace.prefix_block_tokens,
            tellings: Vec::new(),
            routed: (!setup.precise).then(|| RoutedIndex::new(RoutedLimits::default())),
            shares_prefixes: trace.requests.iter().any(|request| !request.prefix_blocks.is_empty()),
            lots: fastrand::Rng::with_seed(setup.seed ^ 0x7e11),
        }
    }

    /// Workers come in the order of their numbers.
    pub(super) fn worker_joined(&mut self, scheduler: &mut Scheduler) {
        if self.routed.is_some() || !self.shares_prefixes {
            return;
        }
        let log = KvCacheLog::default();
        let follower = log.follow();
        scheduler.tell(log);
        self.tellings.push(Telling { follower, sequence: 0, on_the_way: VecDeque::new() });
    }

    /// A worker is the same that it was, under another key.
    pub(super) fn worker_renamed(&mut self, worker: usize, former: WorkerKey) {
        if let Some(telling) = self.tellings.get_mut(worker) {
            telling.restart();
        }
        if let Some(routed) = &mut self.routed {
            routed.worker_gone(former);
        }
    }

    /// Fills in what a prompt is looked up by, or what is guessed of it.
    pub(super) fn of_prompt(
        &mut self,
        request: &TraceRequest,
        now: Duration,
        shape: &mut RequestShape,
    ) {
        let names = self.names(request);
        if names.is_empty() {
            return;
        }
        let tokens = self.block_size_tokens;
        let Some(routed) = &mut self.routed else {
            shape.blocks = Arc::new([PromptBlocks { tokens, names: names.into() }]);
            return;
        };
        let mut held = Vec::new();
        routed.matched(&names, now, &mut held);
        shape.held_tokens =
            held.into_iter().map(|(worker, blocks)| (worker, blocks * tokens)).collect();
    }

    /// A prompt went to a worker.
    pub(super) fn routed(&mut self, worker: WorkerKey, request: &TraceRequest, now: Duration) {
        if self.routed.is_some() {
            let names = self.names(request);
            if let Some(routed) = &mut self.routed {
                routed.routed(worker, &names, |names| names, now);
            }
        }
    }

    fn names(&self, request: &TraceRequest) -> Vec<BlockHash> {
        let names = block_hashes(request, self.prefix_block_tokens, self.block_size_tokens);
        names.into_iter().filter_map(|name| BlockHash::new(name.0)).collect()
    }
}

impl World<'_> {
    /// A worker's cache may have changed: what did is on its way.
    pub(super) fn tell(&mut self, worker: usize) {
        let Some(telling) = self.knowledge.tellings.get_mut(worker) else { return };
        let trouble = &self.setup.trouble;
        let arrives = self.now + nanos_of(PACE + trouble.reports_late);
        let mut messages = 0;
        while let Some(changes) = telling.follower.take(MOST_CHANGES) {
            telling.sequence += 1;
            let is_lost =
                trouble.reports_lost > 0.0 && self.knowledge.lots.f64() < trouble.reports_lost;
            if !is_lost {
                telling.on_the_way.push_back((telling.sequence, changes));
                messages += 1;
            }
        }
        for _ in 0..messages {
            self.foresee(arrives, Happening::Told { worker });
        }
    }

    pub(super) fn told(&mut self, worker: usize) {
        let Some(telling) = self.knowledge.tellings.get_mut(worker) else { return };
        let Some((sequence, changes)) = telling.on_the_way.pop_front() else { return };
        let KvCacheChanges { restart, removed, stored } = &changes;
        let update = KvUpdate { sequence, restart: *restart, removed, stored };
        if self.core.kv_told(self.workers[worker].key, &update) == Heard::NeedsRestart {
            telling.restart();
        }
    }

    /// Workers that were not understood are asked again, as often as they report.
    pub(super) fn ask_who_is_unheard(&mut self) {
        let core: &Core = &self.core;
        for (telling, worker) in self.knowledge.tellings.iter_mut().zip(&self.workers) {
            if telling.on_the_way.is_empty() && !core.told().is_heard(worker.key) {
                telling.restart();
            }
        }
    }
}
