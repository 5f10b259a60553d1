use baton_arena::{Arena, ArenaLayout, Slot};
use baton_types::{Generation, HandoffId};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::{
    kv_port::BlockInSlot,
    sim::{handoff::prompt_digest, scheduler::SchedulerLimits},
};

const BLOCK_TOKENS: u32 = 4;
const ENTRY_BYTES: u32 = 32;

struct Rig {
    core: Core,
    _directory: tempfile::TempDir,
    requests: u64,
}

impl Rig {
    fn new(export_slots: u32) -> Self {
        Self::of_groups(1, export_slots)
    }

    fn of_groups(layer_groups: u32, export_slots: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layout = ArenaLayout {
            slot_bytes: u64::from(BLOCK_TOKENS * ENTRY_BYTES / layer_groups),
            export_slots,
            import_slots: 8,
        };
        let arena = Arena::create(&directory.path().join("arena"), layout).unwrap();
        let limits = SchedulerLimits {
            block_size_tokens: BLOCK_TOKENS,
            kv_blocks: 32,
            max_seqs: 8,
            max_step_tokens: 8,
            reserves_output: false,
        };
        let store = KvStore::new("m", limits.kv_blocks, BLOCK_TOKENS, ENTRY_BYTES);
        let shards = Shards::of_one(arena, BLOCK_TOKENS, ENTRY_BYTES, layer_groups);
        let core = Core::new(Scheduler::new(limits), store, shards);
        Self { core, _directory: directory, requests: 0 }
    }

    fn submit(
        &mut self,
        prompt: &[u32],
        max_tokens: u32,
        part: Option<Part>,
    ) -> UnboundedReceiver<ChoiceEvent> {
        let (events, receiver) = unbounded_channel();
        let mut hasher = BlockHasher::new("m", None);
        let full_blocks = prompt.chunks_exact(BLOCK_TOKENS as usize);
        self.requests += 1;
        self.core.submit(Submission {
            request: self.requests,
            choice: 0,
            prompt: prompt.to_vec(),
            block_hashes: full_blocks.map(|block| hasher.next(block)).collect(),
            hasher,
            sampling: Sampling { ignore_eos: true, max_tokens, ..Sampling::default() },
            handoff: part.map(|part| Handoff {
                name: name(),
                part,
                prompt_digest: prompt_digest(prompt, None),
            }),
            events,
        });
        receiver
    }

    fn said(&mut self) -> Option<FromEngine> {
        self.core.outbox.pop_front().map(|(_, message)| message)
    }

    fn step(&mut self) -> bool {
        let step = self.core.begin_step();
        self.core.end_step(&step);
        !step.work.is_empty()
    }

    fn sequence(&self) -> SequenceId {
        *self.core.sequences.keys().next().unwrap()
    }

    fn answer(&mut self, prompt: &[u32], max_tokens: u32) -> Vec<u32> {
        let mut events = self.submit(prompt, max_tokens, None);
        while self.step() {}
        tokens(&mut events)
    }
}

fn name() -> HandoffName {
    HandoffName { handoff: HandoffId::from_u128(7), generation: Generation(1) }
}

fn tokens(events: &mut UnboundedReceiver<ChoiceEvent>) -> Vec<u32> {
    std::iter::from_fn(|| events.try_recv().ok())
        .map(|event| match event.what {
            ChoiceProgress::Token { drawn, .. } => drawn.token,
            ChoiceProgress::Failed(reason) => panic!("{reason}"),
        })
        .collect()
}

fn numbers(tokens: u32) -> Vec<u32> {
    (300..300 + tokens).collect()
}

#[test]
fn the_answer_is_the_same_however_it_was_computed() {
    let alone = Rig::new(4).answer(&numbers(21), 12);
    assert_eq!(alone.len(), 12);

    let mut warm = Rig::new(4);
    warm.answer(&numbers(13), 2);
    assert_eq!(warm.answer(&numbers(21), 12), alone, "over a prefix hit");

    let mut busy = Rig::new(4);
    let others: Vec<_> =
        (0..5_u32).map(|i| busy.submit(&numbers(5)[..=i as usize % 5], 30, None)).collect();
    assert_eq!(busy.answer(&numbers(21), 12), alone, "in small chunks, among others");
    drop(others);
}

#[test]
fn a_preempted_answer_goes_on_as_if_nothing_had_been() {
    let alone = Rig::new(4).answer(&numbers(21), 60);
    let mut crowded = Rig::new(4);
    let mut first = crowded.submit(&numbers(20), 60, None);
    let mut second = crowded.submit(&numbers(21), 60, None);
    let mut preempted = 0;
    loop {
        let step = crowded.core.begin_step();
        preempted += step.preempted.len();
        if step.work.is_empty() {
            break;
        }
        crowded.core.end_step(&step);
    }
    assert!(preempted > 0, "the cache was to be too small for both");
    assert_eq!(tokens(&mut second), alone);
    assert_eq!(tokens(&mut first).len(), 60);
    assert_eq!(crowded.core.scheduler.blocks_used(), 0);
}

#[test]
fn a_block_that_changes_under_a_running_answer_changes_the_answer() {
    let right = Rig::new(4).answer(&numbers(21), 60);
    for block in 0..5 {
        let mut rig = Rig::new(4);
        let mut events = rig.submit(&numbers(21), 60, None);
        while rig.core.scheduler.sequences_waiting() > 0 || events.is_empty() {
            rig.step();
        }
        let block = rig.core.scheduler.blocks(rig.sequence())[block];
        rig.core.store.block_mut(block)[17] ^= 1;
        while rig.step() {}
        let wrong = tokens(&mut events);
        assert_eq!(wrong[0], right[0], "it was sampled before the change");
        assert_ne!(wrong, right);
    }
}

#[test]
fn a_block_that_changes_in_the_prefix_cache_changes_the_answer() {
    let right = Rig::new(4).answer(&numbers(21), 10);
    let mut rig = Rig::new(4);
    let mut events = rig.submit(&numbers(21), 10, None);
    rig.step();
    let block = rig.core.scheduler.blocks(rig.sequence())[0];
    while rig.step() {}
    assert_eq!(tokens(&mut events), right);
    rig.core.store.block_mut(block)[0] ^= 1;
    assert_ne!(rig.answer(&numbers(21), 10), right);
}

#[test]
fn exporting_waits_for_slots_and_the_engine_does_not() {
    let mut rig = Rig::new(2);
    let mut events = rig.submit(&numbers(21), 1, Some(Part::Produce));
    while rig.step() {}
    assert_eq!(tokens(&mut events).len(), 1, "its sequence has ended");
    assert_eq!(rig.core.scheduler.blocks_used(), 4, "two of six blocks lie in slots");
    assert_eq!(rig.answer(&numbers(9), 3).len(), 3, "others go on");

    let mut exported = Vec::new();
    loop {
        match rig.said() {
            Some(FromEngine::Exported { blocks, .. }) => {
                exported.extend(blocks.iter().map(|block| block.index));
                let slots = blocks.iter().map(|block| block.slot).collect();
                rig.core.handle(0, ToEngine::Release { slots });
            }
            Some(FromEngine::Sealed { prompt_tokens, cached_tokens, .. }) => {
                assert_eq!((prompt_tokens, cached_tokens), (21, 0));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(exported, [0, 1, 2, 3, 4, 5]);
    assert_eq!((rig.core.scheduler.blocks_used(), rig.core.exports.slots_used()), (0, 0));
}

#[test]
fn the_blocks_of_a_chunk_leave_before_the_next_chunk_is_computed() {
    let mut rig = Rig::new(2);
    // Three steps of eight tokens. There are slots for the blocks of one.
    let mut events = rig.submit(&numbers(24), 1, Some(Part::Produce));
    for chunk in 0..3 {
        assert!(rig.step());
        let Some(FromEngine::Exported { blocks, .. }) = rig.said() else {
            panic!("nothing left after chunk {chunk}")
        };
        let indices: Vec<u32> = blocks.iter().map(|block| block.index).collect();
        assert_eq!(indices, [2 * chunk, 2 * chunk + 1]);
        assert_eq!(tokens(&mut events).len(), usize::from(chunk == 2), "computed at the last");
        let slots = blocks.iter().map(|block| block.slot).collect();
        rig.core.handle(0, ToEngine::Release { slots });
    }
    assert!(matches!(rig.said(), Some(FromEngine::Sealed { .. })));
}

#[test]
fn the_last_block_is_exported_with_a_zeroed_tail() {
    let mut rig = Rig::new(4);
    rig.core.store.block_mut(crate::sim::BlockId(0)).fill(0xff);
    rig.core.store.block_mut(crate::sim::BlockId(1)).fill(0xff);
    let _events = rig.submit(&numbers(6), 1, Some(Part::Produce));
    while rig.step() {}
    let Some(FromEngine::Exported { blocks, .. }) = rig.said() else { panic!() };
    let view = rig.core.shards.arena().view(blocks[1].slot, 128).unwrap();
    assert!(view.as_ref()[..64].iter().any(|byte| *byte != 0));
    assert!(view.as_ref()[64..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_cancelled_or_aborted_export_holds_nothing() {
    let held = |rig: &mut Rig| {
        let events = rig.submit(&numbers(21), 1, Some(Part::Produce));
        while rig.step() {}
        assert!(rig.core.scheduler.blocks_used() > 0);
        events
    };
    let HandoffName { handoff, generation } = name();
    let mut cancelled = Rig::new(1);
    let _events = held(&mut cancelled);
    cancelled.core.handle(0, ToEngine::Cancel { handoff, generation });
    assert_eq!(cancelled.core.scheduler.blocks_used(), 0);
    assert_eq!(cancelled.core.exports.slots_used(), 1, "the worker has it still");
    cancelled.core.handle(0, ToEngine::Release { slots: vec![Slot(0)] });
    assert_eq!(cancelled.core.exports.slots_used(), 0);

    let mut aborted = Rig::new(1);
    let _events = held(&mut aborted);
    aborted.core.abort(1, None);
    assert_eq!(aborted.core.scheduler.blocks_used(), 0);
    let last = aborted.core.outbox.pop_back().map(|(_, message)| message);
    assert_eq!(last, Some(FromEngine::Aborted { handoff, generation }));
}

#[test]
fn a_layer_group_leaves_while_the_next_is_computed() {
    const GROUPS: u32 = 4;
    let mut rig = Rig::of_groups(GROUPS, 64);
    // Two blocks a step, and a last one that is not full.
    let _events = rig.submit(&numbers(9), 1, Some(Part::Produce));
    for (of_step, is_last) in [(0..2, false), (2..3, true)] {
        let step = rig.core.begin_step();
        let sequence = rig.sequence();
        let pages = rig.core.scheduler.blocks(sequence).to_vec();
        for group in 0..GROUPS {
            assert_eq!(rig.said(), None, "not before it is computed");
            if group + 1 < GROUPS {
                rig.core.end_layer_group(&step);
            } else {
                rig.core.end_step(&step);
            }
            let Some(FromEngine::Exported { blocks: exported, .. }) = rig.said() else {
                panic!("group {group} is due")
            };
            let indices: Vec<_> = exported.iter().map(|block| block.index).collect();
            let due: Vec<_> = of_step.clone().map(|block| block * GROUPS + group).collect();
            assert_eq!(indices, due);
            for BlockInSlot { index, slot } in exported {
                let cells = (ENTRY_BYTES * BLOCK_TOKENS / 4 / GROUPS) as usize;
                let bytes = rig.core.shards.arena().view(slot, (4 * cells) as u64).unwrap();
                // Of each head of each token the group's own quarter.
                let page = rig.core.store.block(pages[(index / GROUPS) as usize]);
                let tokens = if is_last { 1 } else { BLOCK_TOKENS as usize };
                let own = page.chunks_exact(8).take(4 * tokens).flat_map(|head| {
                    let from = 2 * group as usize;
                    head[from..from + 2].to_vec()
                });
                let mut own: Vec<_> = own.collect();
                own.resize(4 * cells, 0);
                assert_eq!(bytes.as_ref(), own, "block {index}");
            }
        }
    }
    assert!(matches!(rig.said(), Some(FromEngine::Sealed { .. })));
}

#[test]
fn whoever_leaves_between_two_layer_groups_leaves_nothing() {
    let HandoffName { handoff, generation } = name();
    for aborts in [true, false] {
        let mut rig = Rig::of_groups(4, 64);
        let _events = rig.submit(&numbers(20), 1, Some(Part::Produce));
        rig.step();
        let step = rig.core.begin_step();
        rig.core.end_layer_group(&step);
        let mut slots = Vec::new();
        while let Some(message) = rig.said() {
            let FromEngine::Exported { blocks, .. } = message else { panic!("{message:?}") };
            slots.extend(blocks.into_iter().map(|block| block.slot));
        }
        assert_eq!(slots.len(), 2 * 4 + 2, "a step in four layer groups, and the next in one");
        if aborts {
            rig.core.abort(1, None);
            assert_eq!(rig.said(), Some(FromEngine::Aborted { handoff, generation }));
        } else {
            // Whoever asked for it still gets the answer.
            rig.core.handle(0, ToEngine::Cancel { handoff, generation });
        }
        rig.core.end_step(&step);
        while rig.step() {}
        assert_eq!(rig.said(), None, "nothing more is exported");
        assert_eq!(rig.core.scheduler.blocks_used(), 0);
        rig.core.handle(0, ToEngine::Release { slots });
        assert_eq!(rig.core.exports.slots_used(), 0);
    }
}

#[test]
fn one_slow_consumer_leaves_slots_to_others() {
    let mut rig = Rig::new(4);
    let _slow = rig.submit(&numbers(30), 1, Some(Part::Produce));
    while rig.step() {}
    assert_eq!(rig.core.exports.slots_used(), 3, "one of four is kept back");
    let (events, _receiver) = unbounded_channel();
    rig.core.submit(Submission {
        request: 99,
        choice: 0,
        prompt: numbers(3),
        block_hashes: Vec::new(),
        hasher: BlockHasher::new("m", None),
        sampling: Sampling { max_tokens: 1, ..Sampling::default() },
        handoff: Some(Handoff {
            name: HandoffName { generation: Generation(2), ..name() },
            part: Part::Produce,
            prompt_digest: prompt_digest(&numbers(3), None),
        }),
        events,
    });
    while rig.step() {}
    let sealed = |(_, message): &(Said, FromEngine)| matches!(message, FromEngine::Sealed { .. });
    assert_eq!(rig.core.outbox.iter().filter(|message| sealed(message)).count(), 1);
}

#[test]
fn a_lost_worker_fails_what_waits_for_it_and_frees_the_rest() {
    let mut rig = Rig::new(1);
    let mut consumer = rig.submit(&numbers(9), 1, Some(Part::Consume));
    rig.step();
    assert!(matches!(rig.said(), Some(FromEngine::Subscribe { .. })));
    rig.core.lose_port();
    let event = consumer.try_recv().unwrap();
    assert!(matches!(event.what, ChoiceProgress::Failed(_)));
    assert_eq!(rig.core.scheduler.blocks_used(), 0);
    let mut late = rig.submit(&numbers(9), 1, Some(Part::Produce));
    assert!(matches!(late.try_recv().unwrap().what, ChoiceProgress::Failed(_)));
}
