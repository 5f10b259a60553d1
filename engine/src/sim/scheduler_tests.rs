use std::collections::HashMap;

use baton_types::StepModel;
use proptest::prelude::*;

use super::*;

fn limits(kv_blocks: u32, max_seqs: u32, max_step_tokens: u32) -> SchedulerLimits {
    SchedulerLimits {
        block_size_tokens: 4,
        kv_blocks,
        max_seqs,
        max_step_tokens,
        reserves_output: false,
    }
}

/// A prompt of which each token is another, but for those of equal `family`.
fn prompt(family: u64, tokens: u32) -> NewSequence {
    NewSequence {
        prompt_tokens: tokens,
        max_tokens: tokens + 40,
        block_hashes: (0..u64::from(tokens / 4)).map(|i| BlockHash(family * 1000 + i)).collect(),
        remote_kv: false,
        goes_first: false,
    }
}

fn step(scheduler: &mut Scheduler) -> Vec<(u32, u32, bool)> {
    let step = scheduler.plan_step();
    scheduler.finish_step(&step);
    step.work.iter().map(|work| (work.first_token, work.tokens, work.samples)).collect()
}

#[test]
fn a_long_prompt_is_cut_and_decodes_go_first() {
    let mut scheduler = Scheduler::new(limits(100, 8, 6));
    let short = scheduler.add(prompt(1, 3)).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 3, true)]);
    scheduler.add(prompt(2, 9)).unwrap();
    assert_eq!(step(&mut scheduler), [(3, 1, true), (0, 5, false)]);
    assert_eq!(step(&mut scheduler), [(4, 1, true), (5, 4, true)]);
    assert_eq!(step(&mut scheduler), [(5, 1, true), (9, 1, true)]);
    assert!(scheduler.remove(short));
    assert!(!scheduler.remove(short));
    assert_eq!(step(&mut scheduler), [(10, 1, true)]);
}

#[test]
fn what_is_cached_is_lent_beside_whatever_is_computed() {
    let mut scheduler = Scheduler::new(limits(100, 8, 6));
    let held = prompt(1, 9);
    scheduler.lay_prefix(&held.block_hashes);
    scheduler.add(prompt(2, 30)).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 6, false)]);
    scheduler.add(prompt(3, 5)).unwrap();
    let first = |asked: NewSequence| NewSequence { goes_first: true, ..asked };
    let lent = scheduler.add(first(held)).unwrap();
    assert_eq!(step(&mut scheduler), [(8, 1, true), (6, 5, false)]);
    assert!(scheduler.remove(lent));
    // What is not cached after all is not computed at once.
    let gone = scheduler.add(first(prompt(4, 9))).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 1, false), (11, 5, false)]);
    assert!(scheduler.remove(gone));
    assert_eq!(step(&mut scheduler), [(16, 6, false)]);
}

/// A millisecond for each token of a prompt, and one for a step of decodes.
const MODEL: StepModel = StepModel {
    prefill_ms: [0.0, 1.0, 0.0],
    decode_ms: [1.0, 0.0, 0.0],
    prefill_interference_factor: 1.0,
};

#[test]
fn a_prompt_at_a_measured_pace_begins_where_all_of_it_fits() {
    let pace = StepPace { step_ms: 9.0, model: MODEL };
    for (pace, begins) in [(None, true), (Some(pace), false)] {
        // Room for 128 tokens.
        let mut scheduler = Scheduler::new(limits(32, 8, 64));
        scheduler.set_pace(pace);
        let first = scheduler.add(prompt(1, 60)).unwrap();
        assert_eq!(step(&mut scheduler), [(0, 60, true)]);
        scheduler.add(prompt(2, 66)).unwrap();
        assert_eq!(step(&mut scheduler).len(), if begins { 2 } else { 1 }, "16 blocks are free");
        scheduler.remove(first);
        assert!(!step(&mut scheduler).is_empty());
    }
}

#[test]
fn prompts_are_computed_together_where_nothing_decodes() {
    let pace = StepPace { step_ms: 41.0, model: MODEL };
    let mut scheduler = Scheduler::new(limits(100, 8, 128));
    scheduler.set_pace(Some(pace));
    for family in 1..=3 {
        scheduler.add(prompt(family, 60)).unwrap();
    }
    assert_eq!(step(&mut scheduler), [(0, 60, true), (0, 60, true), (0, 8, false)]);
    assert_eq!(step(&mut scheduler), [(60, 1, true), (60, 1, true), (8, 40, false)]);
}

#[test]
fn a_prompt_gets_on_where_no_time_is_left() {
    // The second says that it costs nothing, and that nothing fits.
    for (prefill_ms, prefill_interference_factor) in [([0.0, 1.0, 0.0], 1.0), ([0.0; 3], 0.0)] {
        let model = StepModel { prefill_ms, prefill_interference_factor, ..MODEL };
        let pace = StepPace { step_ms: 1.0, model };
        let mut scheduler = Scheduler::new(limits(100, 8, 100));
        scheduler.set_pace(Some(pace));
        scheduler.add(prompt(1, 5)).unwrap();
        assert_eq!(step(&mut scheduler), [(0, 5, true)]);
        scheduler.add(prompt(2, 80)).unwrap();
        assert_eq!(step(&mut scheduler), [(5, 1, true), (0, 32, false)]);
        scheduler.add(prompt(3, 16)).unwrap();
        assert_eq!(step(&mut scheduler), [(6, 1, true), (32, 32, false)]);
        assert_eq!(step(&mut scheduler), [(7, 1, true), (64, 16, true), (0, 16, true)]);
    }
}

#[test]
fn who_waits_is_served_in_the_order_of_coming() {
    let mut scheduler = Scheduler::new(limits(100, 2, 100));
    let ids = [1, 2, 3].map(|family| scheduler.add(prompt(family, 5)).unwrap());
    let first = scheduler.plan_step();
    assert_eq!(first.work.iter().map(|work| work.sequence).collect::<Vec<_>>(), ids[..2]);
    scheduler.finish_step(&first);
    assert_eq!((scheduler.sequences_running(), scheduler.sequences_waiting()), (2, 1));
    scheduler.remove(ids[0]);
    assert_eq!(scheduler.plan_step().admitted[0].sequence, ids[2]);
}

#[test]
fn a_prefix_is_computed_once_and_its_last_token_always() {
    let mut scheduler = Scheduler::new(limits(100, 8, 100));
    let first = scheduler.add(prompt(1, 12)).unwrap();
    step(&mut scheduler);
    scheduler.remove(first);
    assert_eq!(scheduler.blocks_used(), 0);

    scheduler.add(prompt(1, 14)).unwrap();
    assert_eq!(step(&mut scheduler), [(12, 2, true)]);
    scheduler.add(prompt(1, 12)).unwrap();
    assert_eq!(step(&mut scheduler), [(14, 1, true), (8, 4, true)]);
    assert_eq!(scheduler.blocks_used(), 5, "two shared, two and one of their own");
}

#[test]
fn generated_blocks_are_found_too() {
    let mut scheduler = Scheduler::new(limits(100, 8, 100));
    let id = scheduler.add(prompt(1, 6)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    scheduler.push_block_hash(id, BlockHash(1001));
    step(&mut scheduler);
    scheduler.remove(id);
    scheduler.add(prompt(1, 9)).unwrap();
    assert_eq!(step(&mut scheduler), [(8, 1, true)]);
}

#[test]
fn the_last_to_come_gives_way_and_is_computed_again() {
    let mut scheduler = Scheduler::new(limits(4, 8, 100));
    let new = |family| NewSequence { max_tokens: 16, ..prompt(family, 7) };
    let first = scheduler.add(new(1)).unwrap();
    let last = scheduler.add(new(2)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    let squeezed = scheduler.plan_step();
    assert_eq!(squeezed.preempted, [last]);
    assert_eq!(squeezed.work.len(), 1);
    scheduler.finish_step(&squeezed);
    scheduler.remove(first);
    let again = scheduler.plan_step();
    assert_eq!(again.admitted[0].sequence, last);
    let work = again.work[0];
    assert_eq!(
        (work.first_token + work.tokens, work.samples),
        (9, true),
        "two were sampled before"
    );
}

#[test]
fn remote_kv_holds_its_blocks_and_leaves_one_token_to_compute() {
    let mut scheduler = Scheduler::new(limits(100, 1, 100));
    let remote = |tokens| NewSequence { remote_kv: true, ..prompt(1, tokens) };
    let id = scheduler.add(remote(10)).unwrap();
    let planned = scheduler.plan_step();
    assert!(planned.work.is_empty());
    let admission = Admission { sequence: id, cached_tokens: 0, waits_for_remote: true };
    assert_eq!(planned.admitted, [admission]);
    assert_eq!((scheduler.blocks(id).len(), scheduler.blocks_used()), (3, 3));
    assert_eq!((scheduler.sequences_running(), scheduler.sequences_waiting()), (0, 1));
    scheduler.finish_step(&planned);

    let other = scheduler.add(prompt(1, 8)).unwrap();
    assert_eq!(step(&mut scheduler), [(0, 8, true)], "what did not come cannot be found");
    assert!(scheduler.complete_remote(id));
    assert!(!scheduler.complete_remote(id));
    assert_eq!(step(&mut scheduler), [(8, 1, true)], "the only seat is taken");
    scheduler.remove(other);
    assert_eq!(step(&mut scheduler), [(9, 1, true)]);
    scheduler.remove(id);

    let next_turn = scheduler.add(remote(14)).unwrap();
    assert_eq!(scheduler.plan_step().admitted[0].cached_tokens, 8);
    scheduler.remove(next_turn);
    scheduler.add(remote(9)).unwrap();
    let planned = scheduler.plan_step();
    assert!(!planned.admitted[0].waits_for_remote, "all but the last token is here");
    assert_eq!(planned.work.len(), 1);
}

#[test]
fn a_held_block_outlives_its_sequence() {
    let mut scheduler = Scheduler::new(limits(2, 8, 100));
    let id = scheduler.add(NewSequence { max_tokens: 8, ..prompt(1, 8) }).unwrap();
    step(&mut scheduler);
    let block = scheduler.blocks(id)[0];
    scheduler.retain(block);
    scheduler.remove(id);
    let next = scheduler.add(NewSequence { max_tokens: 8, ..prompt(2, 8) }).unwrap();
    assert_eq!(step(&mut scheduler), [], "one block of two is free");
    scheduler.release(block);
    assert_eq!(step(&mut scheduler), [(0, 8, true)]);
    assert!(scheduler.blocks(next).contains(&block));
}

#[test]
fn what_can_never_fit_is_refused() {
    let mut scheduler = Scheduler::new(limits(4, 8, 100));
    let error = scheduler.add(NewSequence { max_tokens: 17, ..prompt(1, 7) }).unwrap_err();
    assert_eq!(error, NeverFits { max_tokens: 17, kv_tokens: 16 });
}

#[derive(Clone, Debug)]
struct Arrival {
    family: u64,
    prompt_tokens: u32,
    output_tokens: u32,
    remote: bool,
    goes_first: bool,
    /// The client leaves after so many steps.
    patience: Option<u32>,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let patience = prop_oneof![3 => Just(None), 1 => (0..20_u32).prop_map(Some)];
    (0..3_u64, 1..30_u32, 1..12_u32, 0..5_u8, patience).prop_map(
        |(family, prompt_tokens, output_tokens, kind, patience)| Arrival {
            family,
            prompt_tokens,
            output_tokens,
            remote: kind < 2,
            goes_first: kind == 2,
            patience,
        },
    )
}

/// What a driver knows of a sequence.
struct Driven {
    arrival: Arrival,
    outputs: u32,
    age: u32,
}

/// No block that is written to is anybody else's, and each piece of work has its blocks.
fn writers_are_alone(scheduler: &Scheduler, step: &Step, all: &HashMap<SequenceId, Driven>) {
    let mut users: HashMap<BlockId, u32> = HashMap::new();
    for id in all.keys() {
        for block in scheduler.blocks(*id) {
            *users.entry(*block).or_default() += 1;
        }
    }
    for work in &step.work {
        let end = work.first_token + work.tokens;
        let blocks = scheduler.blocks(work.sequence);
        assert_eq!(blocks.len(), end.div_ceil(4) as usize);
        for block in &blocks[(work.first_token / 4) as usize..] {
            assert_eq!(users[block], 1, "written while shared");
        }
    }
}

proptest! {
    #[test]
    fn everybody_is_served_and_everything_given_back(
        arrivals in proptest::collection::vec(arrival(), 1..25),
        kv_blocks in 11..30_u32,
        max_seqs in 1..6_u32,
        max_step_tokens in 1..40_u32,
    ) {
        let mut scheduler = Scheduler::new(limits(kv_blocks, max_seqs, max_step_tokens));
        let mut all: HashMap<SequenceId, Driven> = HashMap::new();
        let mut arrivals = arrivals.into_iter();
        for round in 0.. {
            prop_assert!(round < 20_000, "{} sequences are stuck", all.len());
            if round % 2 == 0 && let Some(arrival) = arrivals.next() {
                let new = NewSequence {
                    max_tokens: arrival.prompt_tokens + arrival.output_tokens,
                    remote_kv: arrival.remote,
                    goes_first: arrival.goes_first,
                    ..prompt(arrival.family, arrival.prompt_tokens)
                };
                let id = scheduler.add(new).unwrap();
                all.insert(id, Driven { arrival, outputs: 0, age: 0 });
            }
            let step = scheduler.plan_step();
            let tokens: u32 = step.work.iter().map(|work| work.tokens).sum();
            prop_assert!(tokens <= max_step_tokens);
            prop_assert!(scheduler.sequences_running() <= max_seqs);
            writers_are_alone(&scheduler, &step, &all);
            scheduler.finish_step(&step);
            for id in step.admitted.iter().filter(|new| new.waits_for_remote).map(|new| new.sequence) {
                prop_assert!(scheduler.complete_remote(id));
            }
            for work in step.work.iter().filter(|work| work.samples) {
                let driven = all.get_mut(&work.sequence).unwrap();
                driven.outputs += 1;
                prop_assert_eq!(work.first_token + work.tokens, driven.arrival.prompt_tokens + driven.outputs - 1);
            }
            let ended: Vec<_> = all
                .iter_mut()
                .filter_map(|(id, driven)| {
                    driven.age += 1;
                    let left = driven.arrival.patience.is_some_and(|patience| driven.age > patience);
                    (left || driven.outputs == driven.arrival.output_tokens).then_some(*id)
                })
                .collect();
            for id in ended {
                prop_assert!(scheduler.remove(id));
                all.remove(&id);
            }
            if all.is_empty() && arrivals.len() == 0 {
                break;
            }
        }
        prop_assert_eq!(scheduler.blocks_used(), 0);
        prop_assert_eq!((scheduler.sequences_running(), scheduler.sequences_waiting()), (0, 0));
    }
}

#[test]
fn blocks_that_came_from_elsewhere_are_found_like_its_own() {
    let mut scheduler = Scheduler::new(limits(4, 8, 100));
    let asked = prompt(1, 16);
    assert_eq!(scheduler.lend_prefix(&asked.block_hashes), 0);
    scheduler.lay_prefix(&asked.block_hashes[..3]);
    assert_eq!(scheduler.blocks_used(), 0, "they are nobody's yet");
    assert_eq!(scheduler.lend_prefix(&asked.block_hashes), 3);
    let id = scheduler.add(NewSequence { max_tokens: 16, ..asked.clone() }).unwrap();
    let admitted = scheduler.plan_step().admitted;
    let expected = Admission { sequence: id, cached_tokens: 12, waits_for_remote: false };
    assert_eq!(admitted, [expected]);

    // All blocks are in use now: nothing more is taken in, and nothing of it is lost.
    scheduler.lay_prefix(&prompt(2, 16).block_hashes);
    assert_eq!(scheduler.lend_prefix(&asked.block_hashes), 3);
    assert_eq!(scheduler.lend_prefix(&prompt(2, 16).block_hashes), 0);
}

#[test]
fn taking_a_prefix_in_does_not_evict_its_own_beginning() {
    let mut scheduler = Scheduler::new(limits(4, 8, 100));
    let long = prompt(1, 24);
    scheduler.lay_prefix(&long.block_hashes[..2]);
    scheduler.lay_prefix(&long.block_hashes);
    assert_eq!(scheduler.lend_prefix(&long.block_hashes), 4, "as many as there is room for");
}
