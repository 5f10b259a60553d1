//! The producing side of handoffs: blocks on their way from the paged cache into export slots.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet, VecDeque},
};

use baton_arena::Slot;
use baton_types::PromptDigest;

use super::{
    block_pool::BlockId, core::Said, handoff::HandoffName, kv_store::KvStore, scheduler::Scheduler,
    shards::Shards,
};
use crate::kv_port::{BlockInSlot, FromEngine};

/// Every handoff that is not sealed, in the order of coming. Blocks are held from their computation
/// until they are copied out, so that the sequence itself may end meanwhile.
#[derive(Debug)]
pub(super) struct Exports {
    export_slots: u32,
    layer_groups: u32,
    free_slots: VecDeque<Slot>,
    owner_of_slot: HashMap<Slot, Owner>,
    slots_of: HashMap<HandoffName, u32>,
    open: Vec<Export>,
}

#[derive(Debug)]
struct Owner {
    name: HandoffName,
    /// Which have not released it.
    ranks: HashSet<u32>,
}

#[derive(Debug)]
struct Export {
    name: HandoffName,
    request: u64,
    prompt_tokens: u32,
    prompt_digest: PromptDigest,
    cached_tokens: Option<u32>,
    /// Blocks of each layer group that were held so far.
    collected_blocks: Vec<u32>,
    held: VecDeque<HeldBlock>,
}

#[derive(Clone, Copy, Debug)]
struct HeldBlock {
    /// Of the engine's block.
    index: u32,
    layer_group: u32,
    block: BlockId,
    /// The others of its entries are zeroed in the slot.
    tokens: u32,
}

/// A new handoff of a prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewExport {
    pub(super) name: HandoffName,
    pub(super) request: u64,
    pub(super) prompt_tokens: u32,
    pub(super) prompt_digest: PromptDigest,
}

impl Exports {
    pub(super) fn new(export_slots: u32, layer_groups: u32) -> Self {
        Self {
            export_slots,
            layer_groups,
            free_slots: (0..export_slots).map(Slot).collect(),
            owner_of_slot: HashMap::new(),
            slots_of: HashMap::new(),
            open: Vec::new(),
        }
    }

    /// False if a handoff of this name is open already.
    pub(super) fn open(&mut self, new: NewExport) -> bool {
        if self.open.iter().any(|export| export.name == new.name) {
            return false;
        }
        self.open.push(Export {
            name: new.name,
            request: new.request,
            prompt_tokens: new.prompt_tokens,
            prompt_digest: new.prompt_digest,
            cached_tokens: None,
            collected_blocks: vec![0; self.layer_groups as usize],
            held: VecDeque::new(),
        });
        true
    }

    /// What the producer found in its prefix cache when it began.
    pub(super) fn found_cached(&mut self, name: HandoffName, cached_tokens: u32) {
        if let Some(export) = self.open.iter_mut().find(|export| export.name == name) {
            export.cached_tokens.get_or_insert(cached_tokens);
        }
    }

    /// The first `computed_tokens` of the sequence are computed in so many layer groups: holds what is new.
    pub(super) fn collect(
        &mut self,
        name: HandoffName,
        computed_tokens: u32,
        layer_groups: u32,
        sequence: super::scheduler::SequenceId,
        scheduler: &mut Scheduler,
    ) {
        let block_size = scheduler.limits().block_size_tokens;
        let Some(export) = self.open.iter_mut().find(|export| export.name == name) else { return };
        let ready = if computed_tokens >= export.prompt_tokens {
            export.prompt_tokens.div_ceil(block_size)
        } else {
            computed_tokens / block_size
        };
        for (layer_group, collected) in (0..layer_groups).zip(&mut export.collected_blocks) {
            while *collected < ready {
                let index = *collected;
                let Some(block) = scheduler.blocks(sequence).get(index as usize).copied() else {
                    break;
                };
                scheduler.retain(block);
                let tokens = (export.prompt_tokens - index * block_size).min(block_size);
                export.held.push_back(HeldBlock { index, layer_group, block, tokens });
                *collected += 1;
            }
        }
    }

    /// Copies out what there are slots for, and seals what is complete.
    pub(super) fn pump(
        &mut self,
        store: &KvStore,
        shards: &Shards,
        scheduler: &mut Scheduler,
        outbox: &mut VecDeque<(Said, FromEngine)>,
    ) {
        let block_size = scheduler.limits().block_size_tokens;
        let kept_back = self.export_slots / 4;
        for position in 0..self.open.len() {
            let mut blocks = Vec::new();
            let HandoffName { handoff, generation } = self.open[position].name;
            while let Some(held) = self.open[position].held.front().copied() {
                let name = self.open[position].name;
                let Some(slot) = self.take_slot(name, kept_back, shards.ranks()) else { break };
                copy_out(shards, store, held, slot);
                scheduler.release(held.block);
                self.open[position].held.pop_front();
                let index = held.index * self.layer_groups + held.layer_group;
                blocks.push(BlockInSlot { index, slot });
            }
            if !blocks.is_empty() {
                let exported = FromEngine::Exported { handoff, generation, blocks };
                outbox.push_back((Said::ByAll, exported));
            }
        }
        self.open.retain(|export| {
            let all = export.prompt_tokens.div_ceil(block_size);
            let complete = export.collected_blocks.iter().all(|collected| *collected == all);
            let sealed = complete && export.held.is_empty();
            if sealed {
                let sealed = FromEngine::Sealed {
                    handoff: export.name.handoff,
                    generation: export.name.generation,
                    prompt_tokens: export.prompt_tokens,
                    prompt_digest: export.prompt_digest,
                    cached_tokens: export.cached_tokens.unwrap_or(0),
                };
                outbox.push_back((Said::ByAll, sealed));
            }
            !sealed
        });
    }

    /// A quarter of the slots is for handoffs that have none: one whose consumer is slow cannot stop
    /// all others.
    fn take_slot(&mut self, name: HandoffName, kept_back: u32, ranks: u32) -> Option<Slot> {
        let slots = self.slots_of.get(&name).copied().unwrap_or(0);
        if slots > 0 && self.free_slots.len() <= kept_back as usize {
            return None;
        }
        let slot = self.free_slots.pop_front()?;
        self.owner_of_slot.insert(slot, Owner { name, ranks: (0..ranks).collect() });
        self.slots_of.insert(name, slots + 1);
        Some(slot)
    }

    /// The worker is done with this rank's parts of these slots. Slots that it does not have are none of its.
    pub(super) fn release(&mut self, rank: u32, slots: impl IntoIterator<Item = Slot>) {
        for slot in slots {
            let owner = self.owner_of_slot.get_mut(&slot);
            let Some(owner) = owner.filter(|owner| owner.ranks.contains(&rank)) else {
                tracing::warn!(slot = slot.0, rank, "a slot was released that was not exported");
                continue;
            };
            owner.ranks.remove(&rank);
            if !owner.ranks.is_empty() {
                continue;
            }
            let name = owner.name;
            self.owner_of_slot.remove(&slot);
            self.free_slots.push_back(slot);
            if let Some(count) = self.slots_of.get_mut(&name) {
                *count -= 1;
                if *count == 0 {
                    self.slots_of.remove(&name);
                }
            }
        }
    }

    /// Gives up the handoffs that match, and answers their names. Slots that the worker has stay its
    /// own until it releases them.
    fn drop_where(
        &mut self,
        scheduler: &mut Scheduler,
        unwanted: impl Fn(&Export) -> bool,
    ) -> Vec<HandoffName> {
        let mut names = Vec::new();
        self.open.retain(|export| {
            let unwanted = unwanted(export);
            if unwanted {
                export.held.iter().for_each(|held| scheduler.release(held.block));
                names.push(export.name);
            }
            !unwanted
        });
        names
    }

    pub(super) fn cancel(&mut self, name: HandoffName, scheduler: &mut Scheduler) {
        self.drop_where(scheduler, |export| export.name == name);
    }

    pub(super) fn abort_request(
        &mut self,
        request: u64,
        scheduler: &mut Scheduler,
    ) -> Vec<HandoffName> {
        self.drop_where(scheduler, |export| export.request == request)
    }

    /// The worker is gone, and with it whoever could release a slot.
    pub(super) fn abandon(&mut self, scheduler: &mut Scheduler) {
        self.drop_where(scheduler, |_| true);
        self.free_slots.extend(self.owner_of_slot.drain().map(|(slot, _)| slot));
        self.slots_of.clear();
    }

    pub(super) fn slots_used(&self) -> u32 {
        u32::try_from(self.owner_of_slot.len()).unwrap_or(u32::MAX)
    }
}

fn copy_out(shards: &Shards, store: &KvStore, held: HeldBlock, slot: Slot) {
    let entries = store.entries(held.block, held.tokens as usize);
    let mut block = Cow::Borrowed(entries);
    if entries.len() < store.block_bytes() {
        block.to_mut().resize(store.block_bytes(), 0);
    }
    if let Err(error) = shards.export(slot, held.layer_group, &block) {
        // The arena was made for blocks of this size: a block that is not there fails its checks.
        tracing::error!(%error, "cannot export a block");
    }
}
