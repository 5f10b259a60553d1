//! The index is held against a model of it that is too simple to be wrong: each worker's set of blocks
//! as its engine had it when the last message that arrived was sent.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use baton_types::BlockHash;
use proptest::{prelude::*, sample::Index};

use super::{table::SHARDS, *};

fn block(number: u64) -> BlockHash {
    // Few shards and many collisions of homes: every way through the table is taken.
    BlockHash::new(((number % 7) << 61) | (number % 3) | ((number + 1) << 8)).unwrap()
}

fn blocks(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    numbers.into_iter().map(block).collect()
}

fn matched(index: &PrefixIndex<u32>, prompt: &[BlockHash]) -> BTreeMap<u32, u32> {
    let mut held = Vec::new();
    index.matched(prompt, &mut held);
    let count = held.len();
    let held: BTreeMap<_, _> = held.into_iter().collect();
    assert_eq!(held.len(), count, "each worker once");
    held
}

/// A message as it was sent, with what its engine held then.
#[derive(Clone, Debug)]
struct Sent {
    sequence: u64,
    restart: bool,
    removed: Vec<BlockHash>,
    stored: Vec<BlockHash>,
    truth: BTreeSet<BlockHash>,
}

/// An engine, its words on the way, and what the index may know of it.
#[derive(Debug, Default)]
struct Model {
    held: BTreeSet<BlockHash>,
    sequence: u64,
    on_the_way: VecDeque<Sent>,
    /// What the engine held when it sent the last message that arrived.
    last_arrived: BTreeSet<BlockHash>,
}

impl Model {
    fn say(&mut self, restart: bool, removed: Vec<BlockHash>, stored: Vec<BlockHash>) {
        self.sequence += 1;
        let truth = self.held.clone();
        let sequence = self.sequence;
        self.on_the_way.push_back(Sent { sequence, restart, removed, stored, truth });
    }

    fn restart(&mut self) {
        let held: Vec<_> = self.held.iter().copied().collect();
        // Told in two parts, as a large cache is.
        let (first, second) = held.split_at(held.len() / 2);
        let whole = self.held.clone();
        self.held = first.iter().copied().collect();
        self.say(true, Vec::new(), first.to_vec());
        self.held = whole;
        self.say(false, Vec::new(), second.to_vec());
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// The engine caches a stretch of a chain.
    Store {
        worker: u32,
        chain: u64,
        from: u64,
        len: u64,
    },
    /// It evicts some of what it holds, from anywhere.
    Evict {
        worker: u32,
        which: Vec<Index>,
    },
    Clear {
        worker: u32,
    },
    /// The next message arrives.
    Deliver {
        worker: u32,
    },
    Lose {
        worker: u32,
    },
    /// The worker comes back with an empty engine; what was on the way is void.
    Restart {
        worker: u32,
    },
    Leave {
        worker: u32,
    },
    Tidy,
}

const WORKERS: u32 = 80;
const CHAIN_BLOCKS: u64 = 12;

fn chain_blocks(chain: u64, from: u64, len: u64) -> Vec<BlockHash> {
    // All chains share their first blocks.
    blocks(
        (from..CHAIN_BLOCKS.min(from + len)).map(|at| if at < 4 { at } else { chain * 100 + at }),
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Most of it happens to few workers; the others make crowds.
    let worker = || prop_oneof![3 => 0..3_u32, 1 => 0..WORKERS];
    let step = prop_oneof![
        6 => (worker(), 0..3_u64, 0..CHAIN_BLOCKS, 1..CHAIN_BLOCKS)
            .prop_map(|(worker, chain, from, len)| Step::Store { worker, chain, from, len }),
        4 => (worker(), prop::collection::vec(any::<Index>(), 1..4))
            .prop_map(|(worker, which)| Step::Evict { worker, which }),
        1 => worker().prop_map(|worker| Step::Clear { worker }),
        12 => worker().prop_map(|worker| Step::Deliver { worker }),
        1 => worker().prop_map(|worker| Step::Lose { worker }),
        1 => worker().prop_map(|worker| Step::Restart { worker }),
        1 => worker().prop_map(|worker| Step::Leave { worker }),
        4 => Just(Step::Tidy),
    ];
    prop::collection::vec(step, 0..200)
}

#[derive(Debug, Default)]
struct World {
    index: PrefixIndex<u32>,
    models: BTreeMap<u32, Model>,
}

impl World {
    fn model(&mut self, worker: u32) -> &mut Model {
        let Self { index, models } = self;
        models.entry(worker).or_insert_with(|| {
            index.worker_joined(worker);
            let mut model = Model::default();
            model.restart();
            model
        })
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Store { worker, chain, from, len } => {
                let model = self.model(worker);
                let stored = chain_blocks(chain, from, len);
                model.held.extend(&stored);
                model.say(false, Vec::new(), stored);
            }
            Step::Evict { worker, which } => {
                let model = self.model(worker);
                let held: Vec<_> = model.held.iter().copied().collect();
                if !held.is_empty() {
                    let gone: Vec<_> = which.iter().map(|at| *at.get(&held)).collect();
                    model.held.retain(|block| !gone.contains(block));
                    model.say(false, gone, Vec::new());
                }
            }
            Step::Clear { worker } => {
                let model = self.model(worker);
                model.held.clear();
                model.say(true, Vec::new(), Vec::new());
            }
            Step::Deliver { worker } => self.deliver(worker),
            Step::Lose { worker } => drop(self.model(worker).on_the_way.pop_front()),
            Step::Restart { worker } => {
                self.models.remove(&worker);
                self.model(worker);
            }
            Step::Leave { worker } => {
                self.models.remove(&worker);
                self.index.worker_gone(worker);
            }
            Step::Tidy => self.index.tidy(),
        }
    }

    fn deliver(&mut self, worker: u32) {
        let Some(sent) = self.model(worker).on_the_way.pop_front() else { return };
        let update = KvUpdate {
            sequence: sent.sequence,
            restart: sent.restart,
            removed: &sent.removed,
            stored: &sent.stored,
        };
        let heard = self.index.apply(worker, &update);
        let model = self.model(worker);
        model.last_arrived = sent.truth;
        if heard == Heard::NeedsRestart {
            model.restart();
        }
    }

    fn deliver_all(&mut self, worker: u32) {
        while !self.model(worker).on_the_way.is_empty() {
            self.deliver(worker);
        }
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for chain in 0..3 {
            let prompt = chain_blocks(chain, 0, CHAIN_BLOCKS);
            let found = matched(&self.index, &prompt);
            for worker in 0..WORKERS {
                let Some(model) = self.models.get(&worker) else {
                    prop_assert!(!found.contains_key(&worker), "one that left");
                    continue;
                };
                let held = prompt.iter().take_while(|block| model.last_arrived.contains(block));
                let held = u32::try_from(held.count()).unwrap();
                let said = found.get(&worker).copied().unwrap_or(0);
                prop_assert!(said <= held, "worker {worker} holds {held}, not {said}");
                if self.index.is_heard(worker) {
                    prop_assert_eq!(said, held, "all was heard of worker {}", worker);
                    prop_assert_eq!(self.index.blocks_of(worker), model.last_arrived.len());
                } else {
                    prop_assert_eq!(self.index.blocks_of(worker), 0);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_said_is_what_was_told(steps in steps()) {
        let mut world = World::default();
        for step in steps {
            world.step(step);
            world.check()?;
        }
        // Everything arrives, and what was lost is asked for: then all is known.
        let workers: Vec<_> = world.models.keys().copied().collect();
        for worker in workers {
            // A message at the end shows the loss of those before it.
            world.model(worker).say(false, Vec::new(), Vec::new());
            world.deliver_all(worker);
            // A restart may have been lost: it is asked for again.
            if !world.index.is_heard(worker) {
                world.model(worker).restart();
                world.deliver_all(worker);
            }
            prop_assert!(world.index.is_heard(worker));
        }
        world.check()?;
        let truth: usize = world.models.values().map(|model| model.held.len()).sum();
        prop_assert_eq!(world.index.len(), truth);
    }

    #[test]
    fn crowds_of_any_size_are_kept(
        changes in prop::collection::vec((0..200_u32, 0..3_u64, prop::bool::weighted(0.7)), 0..900)
    ) {
        let mut index = PrefixIndex::default();
        let mut held: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
        for worker in 0..200 {
            index.worker_joined(worker);
        }
        for (worker, number, stored) in changes {
            let holders = held.entry(number).or_default();
            if stored {
                holders.insert(worker);
                index.stored(worker, &[block(number)]);
            } else {
                holders.remove(&worker);
                index.removed(worker, &[block(number)]);
            }
        }
        for (number, holders) in held {
            let found: BTreeSet<_> = matched(&index, &[block(number)]).into_keys().collect();
            prop_assert_eq!(found, holders);
        }
    }
}

#[test]
fn a_prefix_ends_where_a_block_is_missing() {
    let mut index = PrefixIndex::default();
    let prompt = blocks(1..=5);
    for worker in 0..4 {
        index.worker_joined(worker);
    }
    index.stored(0, &prompt);
    index.stored(1, &prompt[..3]);
    index.stored(2, &prompt);
    index.removed(2, &prompt[1..2]);
    index.stored(3, &prompt[1..]);
    assert_eq!(matched(&index, &prompt), [(0, 5), (1, 3), (2, 1)].into());
    index.stored(2, &prompt[1..2]);
    assert_eq!(matched(&index, &prompt), [(0, 5), (1, 3), (2, 5)].into());
    assert_eq!(matched(&index, &[]), [].into());
}

#[test]
fn what_a_worker_left_behind_is_given_back() {
    let mut index = PrefixIndex::default();
    index.worker_joined(0);
    let empty = index.memory_bytes();
    let many = scattered(0..200_000);
    index.stored(0, &many);
    let full = index.memory_bytes();
    assert!(full > empty + 16 * many.len());
    index.cleared(0);
    assert_eq!((index.len(), matched(&index, &many)), (0, [].into()));
    for _ in 0..SHARDS {
        index.tidy();
    }
    // The parts keep their smallest size, and of each page its number.
    assert!(index.memory_bytes() < empty + full / 4, "{} of {full}", index.memory_bytes());
}

#[test]
fn numbers_of_workers_are_used_again_without_what_they_stood_for() {
    let mut index = PrefixIndex::default();
    index.worker_joined(0);
    // More lives than there are numbers.
    for life in 0..70_000_u64 {
        let (old, new) = (block(life), block(life + 1));
        index.stored(0, &[new]);
        assert_eq!(matched(&index, &[old]), [].into());
        assert_eq!(matched(&index, &[new]), [(0, 1)].into());
        index.cleared(0);
    }
}

#[test]
fn crowds_of_two_blocks_are_told_apart() {
    let mut index = PrefixIndex::default();
    for worker in 0..20 {
        index.worker_joined(worker);
    }
    // In two parts of the table, each of which numbers its own.
    let prompt = blocks([1, 2]);
    for worker in 0..10 {
        index.stored(worker, &prompt[..1]);
        index.stored(worker + 5, &prompt[1..]);
    }
    let reach = |worker| (worker, if worker < 5 { 1 } else { 2 });
    assert_eq!(matched(&index, &prompt), (0..10).map(reach).collect());
}

/// Blocks that are named as those of a real prompt are: without any order.
fn scattered(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
    let name = |number: u64| BlockHash::new((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    numbers.into_iter().map(|number| name(number).unwrap()).collect()
}

#[test]
fn what_is_left_of_many_pages_moves_together() {
    let mut index = PrefixIndex::default();
    for worker in 0..2 {
        index.worker_joined(worker);
    }
    let all = scattered(0..100_000);
    index.stored(0, &all);
    let kept: Vec<_> = all.iter().copied().step_by(10).collect();
    index.stored(1, &kept);
    let full = index.memory_bytes();
    index.removed(0, &all);
    for _ in 0..SHARDS {
        index.tidy();
    }
    assert!(index.memory_bytes() < full / 2, "{} of {full}", index.memory_bytes());
    assert_eq!(matched(&index, &kept), [(1, 10_000)].into());
    assert_eq!(matched(&index, &all), [(1, 1)].into());
    // What is left can still be told of.
    index.removed(1, &kept[5_000..]);
    assert_eq!(matched(&index, &kept), [(1, 5_000)].into());
    assert_eq!(index.len(), 5_000);
}

fn routed_to(index: &mut RoutedIndex<u32>, prompt: &[BlockHash], now: u64) -> Vec<(u32, u32)> {
    let mut held = Vec::new();
    index.matched(prompt, Duration::from_secs(now), &mut held);
    held.sort_unstable();
    held
}

#[test]
fn what_was_routed_is_remembered_for_a_while() {
    let seconds = Duration::from_secs;
    let limits = RoutedLimits { blocks_per_worker: 12, expires_after: seconds(10) };
    let mut index = RoutedIndex::new(limits);
    let (first, second) = (blocks([1, 2, 3]), blocks([1, 2, 4, 5]));
    index.routed(0, &first, |n| n, seconds(0));
    index.routed(0, &second, |n| n, seconds(6));
    index.routed(1, &first, |n| n, seconds(6));
    assert_eq!(routed_to(&mut index, &first, 9), [(0, 3), (1, 3)]);
    // The first prompt has expired; what it shared with the second has not.
    assert_eq!(routed_to(&mut index, &first, 11), [(0, 2), (1, 3)]);
    assert_eq!(routed_to(&mut index, &second, 12), [(0, 4), (1, 2)]);
    assert_eq!(routed_to(&mut index, &second, 22), []);

    index.routed(0, &blocks(10..14), |n| n, seconds(30));
    index.routed(0, &blocks(20..24), |n| n, seconds(31));
    assert_eq!(routed_to(&mut index, &blocks(10..14), 31), [(0, 4)]);
    index.routed(0, &blocks(30..50), |n| n, seconds(32));
    assert_eq!(routed_to(&mut index, &blocks(10..14), 32), [], "there was no room for all");
    assert_eq!(routed_to(&mut index, &blocks(20..24), 32), [(0, 4)]);
    assert_eq!(routed_to(&mut index, &blocks(30..50), 32), [(0, 6)]);
    index.worker_gone(0);
    assert_eq!(routed_to(&mut index, &blocks(30..50), 32), []);
    index.tidy(seconds(60));
    assert_eq!(index.names_of(1), 0);
}

proptest! {
    #[test]
    fn a_guess_is_of_what_was_routed_lately(
        steps in prop::collection::vec((0..2_u32, 0..6_u64, 1..9_u64, 0..5_u64), 1..80)
    ) {
        let limits = RoutedLimits { blocks_per_worker: 16, expires_after: Duration::from_secs(8) };
        let mut index = RoutedIndex::new(limits);
        let mut now = 0;
        let mut all: Vec<(u32, u64, Vec<BlockHash>)> = Vec::new();
        for (worker, conversation, turns, pause) in steps {
            now += pause;
            let prompt = blocks(conversation * 100..conversation * 100 + turns);
            for (worker, held) in routed_to(&mut index, &prompt, now) {
                let lately = all.iter().filter(|(of, at, _)| *of == worker && now - at < 8);
                let longest = lately
                    .map(|(.., other)| other.iter().zip(&prompt).take_while(|(a, b)| a == b).count())
                    .max();
                prop_assert!(held as usize <= longest.unwrap_or(0));
            }
            index.routed(worker, &prompt, |n| n, Duration::from_secs(now));
            prop_assert!(index.names_of(worker) <= limits.blocks_per_worker);
            all.push((worker, now, prompt));
            for worker in 0..2 {
                if let Some((_, at, last)) = all.iter().rev().find(|(of, ..)| *of == worker)
                    && now - at < 4
                {
                    let held = routed_to(&mut index, last, now);
                    prop_assert!(held.contains(&(worker, u32::try_from(last.len()).unwrap())));
                }
            }
        }
    }
}

#[test]
fn names_count_for_the_blocks_that_they_stand_for() {
    let limits = RoutedLimits { blocks_per_worker: 40, expires_after: Duration::from_secs(9) };
    let mut index = RoutedIndex::new(limits);
    let tens = |n| 10 * n;
    let (one, longer, other) = (blocks([1]), blocks([1, 2, 3]), blocks([4, 5]));
    index.routed(0, &one, tens, Duration::ZERO);
    // What is there already takes no more room, and what has none is left out.
    index.routed(0, &one, tens, Duration::ZERO);
    index.routed(0, &longer, tens, Duration::ZERO);
    assert_eq!(routed_to(&mut index, &longer, 0), [(0, 2)]);
    index.routed(0, &other, tens, Duration::ZERO);
    assert_eq!(routed_to(&mut index, &longer, 0), [(0, 2)]);
    index.routed(0, &one, tens, Duration::ZERO);
    assert_eq!(routed_to(&mut index, &longer, 0), [(0, 1)], "the older half is gone");
    assert_eq!(routed_to(&mut index, &other, 0), [(0, 2)]);
}
