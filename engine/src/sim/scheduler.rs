//! Decides what each step computes, and in which blocks. No bytes, no tokens, no clock: only ids and
//! counts, so that virtual time can drive it through hundreds of thousands of requests.

use std::collections::VecDeque;

use super::{
    block_pool::{BlockHash, BlockId, BlockPool},
    step::{Admission, Budget, Step, Work},
};
use crate::{kv_cache::KvCacheLog, pacing::StepPace};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerLimits {
    pub block_size_tokens: u32,
    pub kv_blocks: u32,
    /// Sequences computed in one step.
    pub max_seqs: u32,
    /// Prefill and decode tokens computed in one step.
    pub max_step_tokens: u32,
    /// Blocks for all of a sequence's tokens are held from its admission on, so that nobody is ever
    /// preempted; vLLM takes them as they are needed.
    pub reserves_output: bool,
}

/// One block of so many is kept for sequences that grow, where prompts are begun at a measured pace.
const SPARE_PART: u32 = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId {
    index: u32,
    life: u32,
}

impl SequenceId {
    /// Below the most sequences that were there at once; used again once its sequence is gone.
    pub fn index(self) -> usize {
        self.index as usize
    }
}

#[derive(Clone, Debug, Default)]
pub struct NewSequence {
    pub prompt_tokens: u32,
    /// Prompt and output.
    pub max_tokens: u32,
    /// Of each full block of the prompt, in order.
    pub block_hashes: Vec<BlockHash>,
    /// The prompt's KV comes from elsewhere: all but the last token is waited for, not computed.
    pub remote_kv: bool,
    /// Its prompt is taken to be cached but for the last token, which is computed with the next step, whoever
    /// waits or is under way. No more than that is computed of it at once.
    pub goes_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a sequence of {max_tokens} tokens does not fit the KV cache of {kv_tokens} tokens")]
pub struct NeverFits {
    pub max_tokens: u32,
    pub kv_tokens: u64,
}

/// Continuous batching over a paged KV cache. Decodes go first, then prefills under way, then who
/// waits, in the order of coming; a long prompt is cut to what a step has left. Who finds no block
/// takes those of the sequence that came last.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    pace: Option<StepPace>,
    pool: BlockPool,
    sequences: Vec<Entry>,
    unused_entries: Vec<u32>,
    live: u32,
    /// May name sequences that are gone.
    waiting: VecDeque<SequenceId>,
    /// Their remote KV came; may name sequences that are gone.
    loaded: VecDeque<SequenceId>,
    /// In the order of admission.
    running: Vec<SequenceId>,
    steps: u64,
}

#[derive(Debug, Default)]
struct Entry {
    life: u32,
    sequence: Option<Sequence>,
}

#[derive(Debug)]
struct Sequence {
    /// Prompt and what was sampled so far.
    tokens: u32,
    /// Those of them whose KV is in `blocks`.
    computed: u32,
    /// Prompt and output, at most.
    max_tokens: u32,
    /// A chunk of it was computed since it was admitted.
    begun: bool,
    blocks: Vec<BlockId>,
    hashes: Vec<BlockHash>,
    /// Blocks that the prefix cache knows.
    named: u32,
    remote_kv: bool,
    goes_first: bool,
    waits_for_remote: bool,
    planned_in_step: u64,
}

/// Which of the running sequences a pass over them plans.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Decodes,
    Prefills,
}

impl Scheduler {
    /// Tells from now on which blocks its prefix cache holds.
    pub fn tell(&mut self, log: KvCacheLog) {
        self.pool.tell(log);
    }

    pub fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            pace: None,
            pool: BlockPool::new(limits.kv_blocks),
            sequences: Vec::new(),
            unused_entries: Vec::new(),
            live: 0,
            waiting: VecDeque::new(),
            loaded: VecDeque::new(),
            running: Vec::new(),
            steps: 0,
        }
    }

    /// Queues a sequence behind those that wait.
    pub fn add(&mut self, new: NewSequence) -> Result<SequenceId, NeverFits> {
        let max_tokens = new.max_tokens.max(new.prompt_tokens);
        if self.blocks_for(max_tokens) > self.limits.kv_blocks {
            let kv_tokens =
                u64::from(self.limits.kv_blocks) * u64::from(self.limits.block_size_tokens);
            return Err(NeverFits { max_tokens, kv_tokens });
        }
        let sequence = Sequence {
            tokens: new.prompt_tokens,
            computed: 0,
            max_tokens,
            begun: false,
            blocks: Vec::new(),
            hashes: new.block_hashes,
            named: 0,
            remote_kv: new.remote_kv,
            goes_first: new.goes_first,
            waits_for_remote: false,
            planned_in_step: 0,
        };
        let index = self.unused_entries.pop().unwrap_or_else(|| {
            self.sequences.push(Entry::default());
            u32::try_from(self.sequences.len() - 1).unwrap_or(u32::MAX)
        });
        let entry = &mut self.sequences[index as usize];
        entry.sequence = Some(sequence);
        let id = SequenceId { index, life: entry.life };
        self.live += 1;
        if new.goes_first {
            self.waiting.push_front(id);
        } else {
            self.waiting.push_back(id);
        }
        Ok(id)
    }

    /// Ends a sequence, wherever it stands, and gives back what it held. False if it was gone.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(entry) = self.sequences.get_mut(id.index as usize) else { return false };
        if entry.life != id.life {
            return false;
        }
        let Some(sequence) = entry.sequence.take() else { return false };
        entry.life = entry.life.wrapping_add(1);
        self.unused_entries.push(id.index);
        self.live -= 1;
        self.running.retain(|running| *running != id);
        release_all(&mut self.pool, &sequence.blocks);
        true
    }

    /// Chooses the work of the next step, and gives it its blocks. Every step that is planned must
    /// be finished before the next is. A step without work means that nothing can go on before
    /// something is added, removed or completed, unless somebody was preempted in it.
    pub fn plan_step(&mut self) -> Step {
        let mut step = Step::default();
        self.plan_step_into(&mut step);
        step
    }

    /// [`Self::plan_step`] into a step that was used before.
    pub fn plan_step_into(&mut self, step: &mut Step) {
        self.steps += 1;
        step.clear();
        let mut budget = Budget::new(self.limits.max_step_tokens, self.pace);
        let mut starved = self.plan_running(Pass::Decodes, step, &mut budget);
        self.admit_loaded(step, &mut budget);
        if !starved {
            self.admit_waiting(step, &mut budget, |sequence| sequence.goes_first);
        }
        budget.decodes_planned(step);
        starved |= self.plan_running(Pass::Prefills, step, &mut budget);
        if !starved && step.preempted.is_empty() {
            self.admit_waiting(step, &mut budget, |_| true);
        }
        if step.work.is_empty() && !self.loaded.is_empty() {
            // All seats are taken by sequences without blocks, and the blocks by sequences without
            // a seat: somebody must give way.
            if let Some(last) = self.running.pop() {
                self.preempt(last, step);
                self.admit_loaded(step, &mut budget);
            }
        }
    }

    /// Without one, [`SchedulerLimits::max_step_tokens`] alone limits a step.
    pub fn set_pace(&mut self, pace: Option<StepPace>) {
        self.pace = pace;
    }

    /// The step's work is computed: what it filled can be found from now on, and each sequence that
    /// sampled has one token more.
    pub fn finish_step(&mut self, step: &Step) {
        for work in &step.work {
            let Some(sequence) = get_mut(&mut self.sequences, work.sequence) else { continue };
            sequence.computed = work.first_token + work.tokens;
            name_full_blocks(&mut self.pool, sequence, self.limits.block_size_tokens);
            if work.samples {
                sequence.tokens += 1;
            }
        }
    }

    /// Names the next full block of a sequence, once its tokens are known.
    pub fn push_block_hash(&mut self, id: SequenceId, hash: BlockHash) {
        if let Some(sequence) = get_mut(&mut self.sequences, id) {
            sequence.hashes.push(hash);
        }
    }

    /// The remote KV lies in the sequence's blocks; only its last token is left to compute. False if
    /// the sequence does not wait for it.
    pub fn complete_remote(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = get_mut(&mut self.sequences, id) else { return false };
        if !sequence.waits_for_remote {
            return false;
        }
        sequence.waits_for_remote = false;
        sequence.remote_kv = false;
        sequence.begun = true;
        sequence.computed = sequence.tokens.saturating_sub(1);
        name_full_blocks(&mut self.pool, sequence, self.limits.block_size_tokens);
        self.loaded.push_back(id);
        true
    }

    /// The sequence's blocks, in the order of its tokens.
    pub fn blocks(&self, id: SequenceId) -> &[BlockId] {
        let entry = self.sequences.get(id.index as usize).filter(|entry| entry.life == id.life);
        entry.and_then(|entry| entry.sequence.as_ref()).map_or(&[], |sequence| &sequence.blocks)
    }

    /// How many of these blocks, from the first on, the prefix cache holds. They count as used just now.
    pub fn lend_prefix(&mut self, hashes: &[BlockHash]) -> usize {
        let held: Vec<BlockId> = hashes.iter().map_while(|hash| self.pool.find(*hash)).collect();
        for block in &held {
            self.pool.retain(*block);
        }
        release_all(&mut self.pool, &held);
        held.len()
    }

    /// Lays blocks that came from elsewhere into the prefix cache, as far as there is room.
    pub fn lay_prefix(&mut self, hashes: &[BlockHash]) {
        let mut blocks = Vec::with_capacity(hashes.len());
        for hash in hashes {
            let block = match self.pool.find(*hash) {
                Some(held) => {
                    self.pool.retain(held);
                    held
                }
                None => {
                    let Some(block) = self.pool.allocate() else { break };
                    self.pool.name(block, *hash);
                    block
                }
            };
            blocks.push(block);
        }
        release_all(&mut self.pool, &blocks);
    }

    /// Keeps a block of a sequence beyond the sequence's own end, until [`Self::release`].
    pub fn retain(&mut self, block: BlockId) {
        self.pool.retain(block);
    }

    pub fn release(&mut self, block: BlockId) {
        self.pool.release(block);
    }

    pub fn blocks_used(&self) -> u32 {
        self.pool.total() - self.pool.free()
    }

    pub fn blocks_total(&self) -> u32 {
        self.pool.total()
    }

    pub fn sequences_running(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap_or(u32::MAX)
    }

    /// Sequences that are not computed: queued, preempted, or waiting for remote KV.
    pub fn sequences_waiting(&self) -> u32 {
        self.live - self.sequences_running()
    }

    pub fn limits(&self) -> SchedulerLimits {
        self.limits
    }

    /// Plans those of one kind, and says whether somebody found no block.
    fn plan_running(&mut self, pass: Pass, step: &mut Step, budget: &mut Budget) -> bool {
        let mut starved = false;
        let mut position = 0;
        while position < self.running.len() && budget.tokens > 0 {
            let id = self.running[position];
            position += 1;
            let Some(sequence) = get_mut(&mut self.sequences, id) else { continue };
            let remaining = sequence.tokens - sequence.computed;
            let is_planned = sequence.planned_in_step == self.steps;
            if is_planned || (remaining == 1) != (pass == Pass::Decodes) {
                continue;
            }
            let (computed, held) = (sequence.computed, sequence.blocks.len());
            let wanted = match pass {
                Pass::Decodes => 1,
                Pass::Prefills => budget.chunk(computed, remaining),
            };
            if wanted == 0 {
                continue;
            }
            let missing = self.missing_blocks(computed + wanted, held);
            if missing == 0 {
                self.plan(id, wanted, step, budget);
                continue;
            }
            while self.pool.free() < missing && self.preempt_after(position, step) {}
            let room = u64::from(self.pool.free()) + held as u64;
            let room = room * u64::from(self.limits.block_size_tokens) - u64::from(computed);
            let tokens = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
            starved |= tokens < wanted;
            if tokens > 0 {
                self.plan(id, tokens, step, budget);
            }
        }
        starved
    }

    /// Takes the blocks of the last sequence from `position` on that this step does not compute.
    fn preempt_after(&mut self, position: usize, step: &mut Step) -> bool {
        let (sequences, now) = (&mut self.sequences, self.steps);
        let later = self.running.get(position..).unwrap_or_default();
        let victim = later.iter().rposition(|id| {
            get_mut(sequences, *id).is_some_and(|sequence| sequence.planned_in_step != now)
        });
        let Some(victim) = victim else { return false };
        let victim = self.running.remove(position + victim);
        self.preempt(victim, step);
        true
    }

    fn preempt(&mut self, id: SequenceId, step: &mut Step) {
        if let Some(sequence) = get_mut(&mut self.sequences, id) {
            release_all(&mut self.pool, &sequence.blocks);
            sequence.blocks.clear();
            sequence.computed = 0;
            sequence.named = 0;
            sequence.begun = false;
            self.waiting.push_front(id);
            step.preempted.push(id);
        }
    }

    fn admit_loaded(&mut self, step: &mut Step, budget: &mut Budget) {
        while self.has_seat() && budget.tokens > 0 {
            let Some(id) = self.loaded.pop_front() else { break };
            if get_mut(&mut self.sequences, id).is_some() {
                self.running.push(id);
                self.plan(id, 1, step, budget);
            }
        }
    }

    /// From the first on, as long as they are `asked_for`.
    fn admit_waiting(
        &mut self,
        step: &mut Step,
        budget: &mut Budget,
        asked_for: impl Fn(&Sequence) -> bool,
    ) {
        while let Some(id) = self.waiting.front().copied() {
            let Some(sequence) = get_mut(&mut self.sequences, id) else {
                self.waiting.pop_front();
                continue;
            };
            if !asked_for(sequence) {
                break;
            }
            let goes_first = sequence.goes_first;
            let block_size = self.limits.block_size_tokens;
            let tokens = sequence.tokens;
            let hits = find_prefix(&self.pool, sequence, block_size);
            let hit_blocks = u32::try_from(hits.len()).unwrap_or(u32::MAX);
            let cached_tokens = hit_blocks * block_size;
            let remaining = tokens - cached_tokens;
            let waits_for_remote = sequence.remote_kv && remaining > 1;
            let planned = if waits_for_remote {
                remaining
            } else if goes_first && self.has_seat() {
                budget.tokens.min(1)
            } else if self.has_seat() {
                budget.chunk(cached_tokens, remaining)
            } else {
                0
            };
            if planned == 0 {
                break;
            }
            let held = match get_mut(&mut self.sequences, id) {
                Some(sequence) if self.limits.reserves_output => sequence.max_tokens,
                _ => cached_tokens + planned,
            };
            // What is begun at a measured pace shall come to its end: room for the whole prompt, and some for the
            // decodes beside it to grow.
            let (needed, spare) = match self.pace {
                Some(_) if !self.running.is_empty() => (held.max(tokens), self.spare_blocks()),
                _ => (held, 0),
            };
            let missing = self.missing_blocks(needed, hits.len()) + spare;
            let unused_hits = hits.iter().filter(|hit| !self.pool.is_used(**hit)).count() as u64;
            if u64::from(self.pool.free()) < u64::from(missing) + unused_hits {
                break;
            }
            self.waiting.pop_front();
            for hit in &hits {
                self.pool.retain(*hit);
            }
            if let Some(sequence) = get_mut(&mut self.sequences, id) {
                sequence.blocks = hits;
                sequence.named = hit_blocks;
                sequence.computed = cached_tokens;
                sequence.waits_for_remote = waits_for_remote;
                sequence.remote_kv = waits_for_remote;
            }
            step.admitted.push(Admission { sequence: id, cached_tokens, waits_for_remote });
            if self.limits.reserves_output {
                self.grow(id, held);
            }
            if waits_for_remote {
                self.grow(id, tokens);
            } else {
                self.running.push(id);
                self.plan(id, planned, step, budget);
            }
        }
    }

    /// The blocks must be there.
    fn plan(&mut self, id: SequenceId, tokens: u32, step: &mut Step, budget: &mut Budget) {
        let now = self.steps;
        let Some(sequence) = get_mut(&mut self.sequences, id) else { return };
        sequence.planned_in_step = now;
        let begins = !std::mem::replace(&mut sequence.begun, true);
        let first_token = sequence.computed;
        let end = first_token + tokens;
        let samples = end == sequence.tokens;
        if u64::from(end) > sequence.blocks.len() as u64 * u64::from(self.limits.block_size_tokens)
        {
            self.grow(id, end);
        }
        let work = Work { sequence: id, first_token, tokens, samples };
        budget.take(&work);
        step.push(work, begins);
    }

    fn grow(&mut self, id: SequenceId, tokens: u32) {
        let wanted = self.blocks_for(tokens) as usize;
        let Some(sequence) = get_mut(&mut self.sequences, id) else { return };
        while sequence.blocks.len() < wanted {
            let block = self.pool.allocate();
            debug_assert!(block.is_some(), "blocks are counted before they are taken");
            let Some(block) = block else { break };
            sequence.blocks.push(block);
        }
    }

    fn has_seat(&self) -> bool {
        self.running.len() < self.limits.max_seqs as usize
    }

    fn spare_blocks(&self) -> u32 {
        self.pool.total() / SPARE_PART
    }

    fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.limits.block_size_tokens)
    }

    fn missing_blocks(&self, tokens: u32, held: usize) -> u32 {
        self.blocks_for(tokens).saturating_sub(u32::try_from(held).unwrap_or(u32::MAX))
    }
}

fn get_mut(sequences: &mut [Entry], id: SequenceId) -> Option<&mut Sequence> {
    let entry = sequences.get_mut(id.index as usize).filter(|entry| entry.life == id.life)?;
    entry.sequence.as_mut()
}

/// The cached blocks at a sequence's start. At least one token is always left, for its logits.
fn find_prefix(pool: &BlockPool, sequence: &Sequence, block_size: u32) -> Vec<BlockId> {
    let most = (sequence.tokens.saturating_sub(1) / block_size) as usize;
    sequence.hashes.iter().take(most).map_while(|hash| pool.find(*hash)).collect()
}

fn name_full_blocks(pool: &mut BlockPool, sequence: &mut Sequence, block_size: u32) {
    let full = sequence.computed / block_size;
    while sequence.named < full {
        let index = sequence.named as usize;
        let (Some(block), Some(hash)) = (sequence.blocks.get(index), sequence.hashes.get(index))
        else {
            break;
        };
        pool.name(*block, *hash);
        sequence.named += 1;
    }
}

/// From the end, so that a prefix outlives what follows it.
fn release_all(pool: &mut BlockPool, blocks: &[BlockId]) {
    for block in blocks.iter().rev() {
        pool.release(*block);
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
