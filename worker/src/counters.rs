use std::{
    collections::HashMap,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

/// What this worker has done since it started, over all lives of its engine.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// KV blocks that arrived from other workers and whose checksum was right.
    pub(crate) handoff_blocks_received: Count,
    /// Those of them that were loaded where they lay, in the other worker's arena.
    pub(crate) handoff_blocks_mapped: Count,
    /// The bytes of all.
    pub(crate) handoff_bytes_received: Count,
    /// KV blocks of prompts whose KV was taken over that need not be sent: this engine had them.
    pub(crate) handoff_blocks_reused: Count,
    /// Handoffs to this worker that failed.
    pub(crate) handoffs_failed: Count,
    /// Why, by the names of [`baton_transfer::TransferError::name`].
    pub(crate) handoff_errors: ByName,
    /// Decode jobs whose engine answered without waiting for its handoff.
    pub(crate) handoffs_bypassed: Count,
    /// Jobs under way, of all coordinators.
    pub(crate) running: Running,
    /// Those, and prefills that are through but whose blocks are still here.
    pub(crate) jobs_open: Gauge,
    /// 1 while the engine serves and its KV side is there.
    pub(crate) lives: Gauge,
    /// Coordinators that this worker is attached to.
    pub(crate) attached: Gauge,
}

/// Jobs under way.
#[derive(Debug, Default)]
pub(crate) struct Running {
    pub(crate) prefills: Gauge,
    /// Those of requests that are not split among them.
    pub(crate) decodes: Gauge,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counts of things that have names.
#[derive(Debug, Default)]
pub(crate) struct ByName(Mutex<HashMap<&'static str, u64>>);

impl ByName {
    pub(crate) fn add(&self, name: &'static str) {
        *self.0.lock().entry(name).or_default() += 1;
    }

    pub(crate) fn get(&self) -> HashMap<String, u64> {
        self.0.lock().iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }
}

/// How many there are of something now.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU32);

impl Gauge {
    /// Counts one more until what it returns is dropped.
    pub(crate) fn one(&self) -> One<'_> {
        self.0.fetch_add(1, Relaxed);
        One(self)
    }

    pub(crate) fn get(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

#[derive(Debug)]
pub(crate) struct One<'a>(&'a Gauge);

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}
