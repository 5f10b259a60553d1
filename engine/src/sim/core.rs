//! The engine without its clock: sequences, their KV, and their handoffs. Acts when told to, answers
//! through [`Core::outbox`] and each request's channel.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use baton_types::PromptDigest;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    block_pool::BlockHash,
    exports::{Exports, NewExport},
    handoff::{BlockHasher, HandoffName, Part},
    kv_store::{Attention, KvStore},
    sampling::{Drawn, Finish, Sampling},
    scheduler::{NewSequence, Scheduler, SequenceId},
    shards::{Shards, Source},
    step::{Admission, Step},
};
use crate::kv_port::{BlockToLoad, FromEngine, MappedBlockToLoad, ToEngine};

/// One sequence to generate.
#[derive(Debug)]
pub(super) struct Submission {
    /// Of the HTTP request: its choices are aborted together.
    pub(super) request: u64,
    pub(super) choice: u32,
    pub(super) prompt: Vec<u32>,
    /// Of the prompt's full blocks.
    pub(super) block_hashes: Vec<BlockHash>,
    /// Goes on where `block_hashes` ends.
    pub(super) hasher: BlockHasher,
    pub(super) sampling: Sampling,
    pub(super) handoff: Option<Handoff>,
    pub(super) events: UnboundedSender<ChoiceEvent>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Handoff {
    pub(super) name: HandoffName,
    pub(super) part: Part,
    pub(super) prompt_digest: PromptDigest,
}

#[derive(Debug)]
pub(super) struct ChoiceEvent {
    pub(super) choice: u32,
    pub(super) what: ChoiceProgress,
}

#[derive(Debug)]
pub(super) enum ChoiceProgress {
    Token {
        drawn: Drawn,
        finish: Option<Finish>,
    },
    /// Nothing more will come.
    Failed(String),
}

/// Which of the engine's ranks say something to the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Each the same, of its own slots.
    ByAll,
    ByRank(u32),
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) scheduler: Scheduler,
    pub(super) store: KvStore,
    pub(super) exports: Exports,
    /// Export slots go by their number on each rank.
    pub(super) outbox: VecDeque<(Said, FromEngine)>,
    pub(super) shards: Shards,
    sequences: HashMap<SequenceId, Sequence>,
    /// By request and choice.
    by_choice: BTreeMap<(u64, u32), SequenceId>,
    /// Handoffs whose KV did not come yet.
    consumers: HashMap<HandoffName, SequenceId>,
    /// Those of them whose KV was found to be corrupt: the worker is about to give them up.
    spoiled: HashSet<HandoffName>,
    port_is_lost: bool,
    /// Of the step that is under way.
    layer_groups_computed: u32,
}

#[derive(Debug)]
struct Sequence {
    request: u64,
    choice: u32,
    tokens: Vec<u32>,
    prompt_tokens: u32,
    hasher: BlockHasher,
    sampling: Sampling,
    handoff: Option<Handoff>,
    attention: Attention,
    events: UnboundedSender<ChoiceEvent>,
}

impl Core {
    pub(super) fn new(scheduler: Scheduler, store: KvStore, shards: Shards) -> Self {
        Self {
            scheduler,
            store,
            exports: Exports::new(shards.export_slots(), shards.layer_groups()),
            outbox: VecDeque::new(),
            shards,
            sequences: HashMap::new(),
            by_choice: BTreeMap::new(),
            consumers: HashMap::new(),
            spoiled: HashSet::new(),
            port_is_lost: false,
            layer_groups_computed: 0,
        }
    }

    pub(super) fn submit(&mut self, new: Submission) {
        let fail = |reason: &str| {
            let what = ChoiceProgress::Failed(reason.to_owned());
            // Whoever asked may be gone by now: then nobody waits for the reason.
            let _ = new.events.send(ChoiceEvent { choice: new.choice, what });
        };
        if let Some(handoff) = &new.handoff {
            if self.port_is_lost {
                return fail("the worker that hands KV over is gone");
            }
            let free = match handoff.part {
                Part::Produce | Part::Lend => self.exports.open(NewExport {
                    name: handoff.name,
                    request: new.request,
                    prompt_tokens: length(&new.prompt),
                    prompt_digest: handoff.prompt_digest,
                }),
                Part::Consume => !self.consumers.contains_key(&handoff.name),
            };
            if !free {
                return fail("another request has this handoff");
            }
        }
        let added = self.scheduler.add(NewSequence {
            prompt_tokens: length(&new.prompt),
            max_tokens: length(&new.prompt).saturating_add(new.sampling.max_tokens),
            block_hashes: new.block_hashes,
            remote_kv: new.handoff.is_some_and(|handoff| handoff.part == Part::Consume),
            goes_first: new.handoff.is_some_and(|handoff| handoff.part == Part::Lend),
        });
        let id = match added {
            Ok(id) => id,
            Err(never) => {
                self.abort_exports(new.request);
                let what = ChoiceProgress::Failed(never.to_string());
                let _ = new.events.send(ChoiceEvent { choice: new.choice, what });
                return;
            }
        };
        if let Some(Handoff { name, part: Part::Consume, .. }) = new.handoff {
            self.consumers.insert(name, id);
        }
        self.by_choice.insert((new.request, new.choice), id);
        let sequence = Sequence {
            request: new.request,
            choice: new.choice,
            prompt_tokens: length(&new.prompt),
            tokens: new.prompt,
            hasher: new.hasher,
            sampling: new.sampling,
            handoff: new.handoff,
            attention: Attention::default(),
            events: new.events,
        };
        self.sequences.insert(id, sequence);
    }

    /// The client of a request, or of one of its choices, wants no more of it.
    pub(super) fn abort(&mut self, request: u64, choice: Option<u32>) {
        let (first, last) = choice.map_or((0, u32::MAX), |choice| (choice, choice));
        let gone: Vec<_> =
            self.by_choice.range((request, first)..=(request, last)).map(|(_, id)| *id).collect();
        for id in gone {
            self.end(id);
        }
        if choice.is_none() {
            self.abort_exports(request);
        }
    }

    fn abort_exports(&mut self, request: u64) {
        for HandoffName { handoff, generation } in
            self.exports.abort_request(request, &mut self.scheduler)
        {
            self.say(FromEngine::Aborted { handoff, generation });
        }
    }

    fn say(&mut self, message: FromEngine) {
        self.outbox.push_back((Said::ByAll, message));
    }

    /// Forgets a sequence; a handoff that it still waited for is aborted.
    fn end(&mut self, id: SequenceId) -> Option<Sequence> {
        self.scheduler.remove(id);
        let sequence = self.sequences.remove(&id)?;
        self.by_choice.remove(&(sequence.request, sequence.choice));
        if let Some(Handoff { name, part: Part::Consume, .. }) = sequence.handoff
            && self.consumers.remove(&name).is_some()
        {
            self.spoiled.remove(&name);
            let HandoffName { handoff, generation } = name;
            self.say(FromEngine::Aborted { handoff, generation });
        }
        Some(sequence)
    }

    /// What a rank was told. What concerns all of them may come once for each.
    pub(super) fn handle(&mut self, rank: u32, message: ToEngine) {
        match message {
            ToEngine::Load { handoff, generation, blocks } => {
                let places = blocks.iter().map(|block| {
                    let BlockToLoad { index, slot, crc32 } = *block;
                    (index, Source::Slot(slot), crc32)
                });
                self.load(rank, HandoffName { handoff, generation }, places);
                let slots = blocks.iter().map(|block| block.slot).collect();
                let loaded = FromEngine::Loaded { handoff, generation, slots };
                self.outbox.push_back((Said::ByRank(rank), loaded));
            }
            ToEngine::LoadMapped { handoff, generation, arena, blocks } => {
                let places = blocks.iter().map(|block| {
                    let MappedBlockToLoad { index, offset, crc32 } = *block;
                    (index, Source::Peer { arena, offset }, crc32)
                });
                self.load(rank, HandoffName { handoff, generation }, places);
                let indices = blocks.iter().map(|block| block.index).collect();
                let loaded = FromEngine::LoadedMapped { handoff, generation, indices };
                self.outbox.push_back((Said::ByRank(rank), loaded));
            }
            ToEngine::Map { arena, file } => {
                let refused = self.shards.map(arena, &file).err().map(|error| error.to_string());
                let mapped = FromEngine::Mapped { arena, refused };
                self.outbox.push_back((Said::ByRank(rank), mapped));
            }
            ToEngine::Unmap { arena } => self.shards.unmap(arena),
            ToEngine::Complete { handoff, generation } => {
                let name = HandoffName { handoff, generation };
                if self.spoiled.contains(&name) {
                    self.fail_consumer(name, "a corrupt block was not told of");
                } else if let Some(id) = self.consumers.get(&name).copied()
                    && self.scheduler.complete_remote(id)
                {
                    self.consumers.remove(&name);
                }
            }
            ToEngine::Failed { handoff, generation, reason } => {
                self.fail_consumer(HandoffName { handoff, generation }, &reason);
            }
            ToEngine::Release { slots } => {
                let shards = &self.shards;
                let of_all = slots.into_iter().filter_map(|slot| shards.slot_of_all(rank, slot));
                self.exports.release(rank, of_all);
                self.pump_exports();
            }
            ToEngine::Cancel { handoff, generation } => {
                self.exports.cancel(HandoffName { handoff, generation }, &mut self.scheduler);
            }
        }
    }

    /// Copies blocks in. Those of a handoff that is gone are not wanted any more, but their slots
    /// are given back all the same.
    fn load(
        &mut self,
        rank: u32,
        name: HandoffName,
        blocks: impl Iterator<Item = (u32, Source, u32)>,
    ) {
        let Some(id) = self.consumers.get(&name).copied() else { return };
        for (index, source, crc32) in blocks {
            let (position, group) =
                (index / self.shards.layer_groups(), index % self.shards.layer_groups());
            let Some(block) = self.scheduler.blocks(id).get(position as usize).copied() else {
                return self.fail_consumer(name, "a block came that is not of the prompt");
            };
            let target = self.store.block_mut(block);
            let found = match self.shards.import(rank, source, group, target) {
                Ok(found) => found,
                Err(error) => return self.fail_consumer(name, &error.to_string()),
            };
            if found != crc32 {
                self.spoiled.insert(name);
                let HandoffName { handoff, generation } = name;
                let corrupt = FromEngine::Corrupt { handoff, generation, index };
                return self.outbox.push_back((Said::ByRank(rank), corrupt));
            }
        }
    }

    fn fail_consumer(&mut self, name: HandoffName, reason: &str) {
        self.spoiled.remove(&name);
        let Some(id) = self.consumers.remove(&name) else { return };
        if let Some(sequence) = self.end(id) {
            let what = ChoiceProgress::Failed(format!("the KV handoff failed: {reason}"));
            let _ = sequence.events.send(ChoiceEvent { choice: sequence.choice, what });
        }
    }

    /// Nobody is left who could bring or take KV.
    pub(super) fn lose_port(&mut self) {
        if self.port_is_lost {
            return;
        }
        self.port_is_lost = true;
        let names: Vec<_> = self.consumers.keys().copied().collect();
        for name in names {
            self.fail_consumer(name, "the worker that hands KV over is gone");
        }
        self.exports.abandon(&mut self.scheduler);
        self.outbox.clear();
    }

    pub(super) fn begin_step(&mut self) -> Step {
        let step = self.scheduler.plan_step();
        self.layer_groups_computed = 0;
        for preempted in &step.preempted {
            if let Some(sequence) = self.sequences.get_mut(preempted) {
                sequence.attention = Attention::default();
            }
        }
        for admission in &step.admitted {
            self.admitted(admission);
        }
        self.pump_exports();
        step
    }

    fn admitted(&mut self, admission: &Admission) {
        let Some(sequence) = self.sequences.get(&admission.sequence) else { return };
        let Some(Handoff { name, part, prompt_digest }) = sequence.handoff else { return };
        let HandoffName { handoff, generation } = name;
        match part {
            Part::Lend if admission.cached_tokens + 1 < sequence.prompt_tokens => {
                // Whoever was to have it computes it as well as this engine would.
                let request = sequence.request;
                if let Some(sequence) = self.end(admission.sequence) {
                    let what = ChoiceProgress::Failed("it is not cached any more".to_owned());
                    let _ = sequence.events.send(ChoiceEvent { choice: sequence.choice, what });
                }
                self.abort_exports(request);
            }
            Part::Produce | Part::Lend => {
                self.exports.found_cached(name, admission.cached_tokens);
                let (tokens, id) = (admission.cached_tokens, admission.sequence);
                let groups = self.shards.layer_groups();
                self.exports.collect(name, tokens, groups, id, &mut self.scheduler);
            }
            Part::Consume if admission.waits_for_remote => {
                let block_size = self.scheduler.limits().block_size_tokens;
                let first_block = admission.cached_tokens / block_size;
                let blocks = self.scheduler.blocks(admission.sequence);
                // A block that never comes must not pass for what lay there before.
                for block in &blocks[first_block as usize..] {
                    self.store.block_mut(*block).fill(0);
                }
                let prompt_tokens = sequence.prompt_tokens;
                self.say(FromEngine::Subscribe {
                    handoff,
                    generation,
                    prompt_tokens,
                    prompt_digest,
                    first_block: first_block * self.shards.layer_groups(),
                });
            }
            Part::Consume => {
                // Admitted again after it was preempted, it is nobody's consumer any more.
                if self.consumers.remove(&name).is_some() {
                    self.say(FromEngine::NotNeeded { handoff, generation });
                }
            }
        }
    }

    /// The next layer group of the step is computed: its blocks leave.
    pub(super) fn end_layer_group(&mut self, step: &Step) {
        if self.layer_groups_computed == 0 {
            // What is to leave later is only not looked at before.
            self.compute(step);
        }
        self.layer_groups_computed += 1;
        for work in &step.work {
            if let Some(sequence) = self.sequences.get(&work.sequence)
                && let Some(Handoff { name, part, .. }) = sequence.handoff
                && part.exports()
            {
                let (computed, groups) =
                    (work.first_token + work.tokens, self.layer_groups_computed);
                self.exports.collect(name, computed, groups, work.sequence, &mut self.scheduler);
            }
        }
        self.pump_exports();
    }

    fn compute(&mut self, step: &Step) {
        for work in &step.work {
            let Some(sequence) = self.sequences.get(&work.sequence) else { continue };
            let blocks = self.scheduler.blocks(work.sequence);
            let first = work.first_token as usize;
            let tokens = &sequence.tokens[first..first + work.tokens as usize];
            for (position, token) in (first..).zip(tokens) {
                self.store.compute(blocks, position, *token);
            }
        }
    }

    /// Computes what is left of the step's KV, samples, and tells everyone concerned.
    pub(super) fn end_step(&mut self, step: &Step) {
        while self.layer_groups_computed < self.shards.layer_groups() {
            self.end_layer_group(step);
        }
        self.scheduler.finish_step(step);
        for work in step.work.iter().filter(|work| work.samples) {
            self.sample(work.sequence);
        }
        self.pump_exports();
    }

    fn sample(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let blocks = self.scheduler.blocks(id);
        let kv = sequence.attention.read(&self.store, blocks, sequence.tokens.len());
        let generated = length(&sequence.tokens) - sequence.prompt_tokens;
        let last_token = sequence.tokens.last().copied().unwrap_or_default();
        let drawn = sequence.sampling.next(kv, last_token, generated);
        let finish = sequence.sampling.finish(drawn.token, generated + 1);

        sequence.tokens.push(drawn.token);
        let block_size = self.scheduler.limits().block_size_tokens as usize;
        if sequence.tokens.len().is_multiple_of(block_size) {
            let block = &sequence.tokens[sequence.tokens.len() - block_size..];
            self.scheduler.push_block_hash(id, sequence.hasher.next(block));
        }
        let what = ChoiceProgress::Token { drawn, finish };
        let heard = sequence.events.send(ChoiceEvent { choice: sequence.choice, what }).is_ok();
        if finish.is_some() || !heard {
            self.end(id);
        }
    }

    fn pump_exports(&mut self) {
        let Self { exports, store, shards, scheduler, outbox, .. } = self;
        exports.pump(store, shards, scheduler, outbox);
    }
}

fn length(tokens: &[u32]) -> u32 {
    u32::try_from(tokens.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
