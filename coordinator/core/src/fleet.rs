use baton_types::{Epoch, Leg, Role};

use crate::keyed::Keyed;

/// One attachment of a worker: a worker that comes back has a new key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerKey(pub(crate) u64);

/// How a worker's engine passes KV on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoffMode {
    /// It does not: aggregated work only.
    None,
    /// By Baton, fenced and checksummed, between engines whose compatibility digests are equal.
    Fenced { compatibility: [u8; 32] },
    /// By the engines themselves: decode starts with what prefill answered.
    Engine,
}

/// What a worker says of itself when it attaches.
#[derive(Clone, Debug)]
pub struct WorkerDescription {
    pub name: String,
    pub epoch: Epoch,
    pub role: Role,
    pub models: Vec<String>,
    pub handoff: HandoffMode,
}

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) description: WorkerDescription,
    /// Jobs started and not ended, by leg.
    jobs: [u32; 3],
    /// When it was last given work, counted in placements: equals take turns.
    last_placed: u64,
}

impl Worker {
    pub(crate) fn jobs_running(&self) -> u32 {
        self.jobs.iter().sum()
    }

    pub(crate) fn serves(&self, model: Option<&str>) -> bool {
        model.is_none_or(|model| self.description.models.iter().any(|name| name == model))
    }

    /// Less loaded first, then the one that waited longest.
    pub(crate) fn load_order(&self) -> (u32, u64) {
        (self.jobs_running(), self.last_placed)
    }
}

/// A worker as others may see it.
#[derive(Clone, Copy, Debug)]
pub struct WorkerView<'a> {
    pub key: WorkerKey,
    pub description: &'a WorkerDescription,
    pub jobs_running: u32,
}

/// The workers that are attached now.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    workers: Keyed<Worker>,
    placements: u64,
}

impl Fleet {
    pub(crate) fn attach(&mut self, description: WorkerDescription) -> WorkerKey {
        WorkerKey(self.workers.insert(Worker { description, jobs: [0; 3], last_placed: 0 }))
    }

    pub(crate) fn detach(&mut self, key: WorkerKey) -> Option<Worker> {
        self.workers.remove(key.0)
    }

    pub(crate) fn get(&self, key: WorkerKey) -> Option<&Worker> {
        self.workers.get(key.0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (WorkerKey, &Worker)> {
        self.workers.iter().map(|(key, worker)| (WorkerKey(key), worker))
    }

    pub(crate) fn named(&self, name: &str) -> Option<WorkerKey> {
        self.iter().find(|(_, worker)| worker.description.name == name).map(|(key, _)| key)
    }

    pub(crate) fn count(&self, role: Role) -> usize {
        self.iter().filter(|(_, worker)| worker.description.role == role).count()
    }

    pub(crate) fn len(&self) -> usize {
        self.workers.len()
    }

    pub(crate) fn job_started(&mut self, key: WorkerKey, leg: Leg) {
        self.placements += 1;
        let placements = self.placements;
        if let Some(worker) = self.workers.get_mut(key.0) {
            worker.jobs[leg as usize] += 1;
            worker.last_placed = placements;
        }
    }

    pub(crate) fn job_ended(&mut self, key: WorkerKey, leg: Leg) {
        if let Some(worker) = self.workers.get_mut(key.0) {
            let jobs = &mut worker.jobs[leg as usize];
            debug_assert!(*jobs > 0, "a job ends once");
            *jobs = jobs.saturating_sub(1);
        }
    }
}
