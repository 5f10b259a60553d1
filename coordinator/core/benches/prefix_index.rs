//! The prefix index at the size of a large cluster: 1,000 workers that hold 10 million blocks.
//!
//! `cargo bench -p baton-core --bench prefix_index`

#![allow(clippy::print_stderr, clippy::unwrap_used, missing_debug_implementations)]

use std::{fs, hint::black_box, time::Duration};

use baton_core::PrefixIndex;
use baton_types::{BlockHash, BlockHasher, BlockScope, BlockUnit};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const WORKERS: u32 = 1_000;
const ENTRIES: usize = 10_000_000;
const PROMPT_TOKENS: u32 = 32_768;

const SCOPE: BlockScope<'_> =
    BlockScope { unit: BlockUnit::Tokens, model: "m", adapter: "", salt: "" };

/// A prompt that nobody else has.
fn prompt(number: u32, block_size_tokens: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> = std::iter::once(number).chain(0..PROMPT_TOKENS - 1).collect();
    BlockHasher::of_tokens(&SCOPE, &tokens, block_size_tokens)
}

fn resident_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A conversation each of 160 blocks; each is held by as many workers as `holders` says.
fn filled(index: &mut PrefixIndex<u32>, holders: u32) {
    for worker in 0..WORKERS {
        index.worker_joined(worker);
    }
    let tokens: Vec<u32> = (0..160 * 16).collect();
    let mut conversation = 0_u32;
    let mut entries = 0;
    while entries < ENTRIES {
        conversation += 1;
        let mut mine = tokens.clone();
        mine[0] = u32::MAX - conversation;
        let blocks = BlockHasher::of_tokens(&SCOPE, &mine, 16);
        for holder in 0..holders {
            index.stored((conversation + holder * 7) % WORKERS, &blocks);
            entries += blocks.len();
        }
    }
}

fn matches(c: &mut Criterion) {
    for (name, holders) in [("one holder a block", 1), ("three holders a block", 3)] {
        let before = resident_bytes();
        let mut index = PrefixIndex::default();
        filled(&mut index, holders);
        let entries = index.len();
        #[allow(clippy::cast_precision_loss)]
        let each = |bytes: usize| bytes as f64 / entries as f64;
        eprintln!(
            "{name}: {entries} entries, {:.1} bytes each as allocated, {:.1} resident",
            each(index.memory_bytes()),
            each(resident_bytes().saturating_sub(before)),
        );
        // Held whole by one worker, by eight, and by all; half of it by one more.
        let mut group = c.benchmark_group(format!("match of 32k tokens, {name}"));
        for block_size in [16, 64] {
            for (held_by, workers) in [("1", 1), ("8", 8), ("all", WORKERS)] {
                let prompt = prompt(workers, block_size);
                for worker in 0..workers {
                    index.stored(worker, &prompt);
                }
                index.stored(workers % WORKERS, &prompt[..prompt.len() / 2]);
                let mut held = Vec::new();
                group.bench_function(
                    format!("{block_size}-token blocks, held by {held_by}"),
                    |b| {
                        b.iter(|| {
                            held.clear();
                            index.matched(black_box(&prompt), &mut held);
                            held.len()
                        });
                    },
                );
            }
        }
        // Prompts that were not asked for lately: their entries lie in memory, not in the cache.
        let prompts: Vec<_> = (0..400).map(|number| prompt(10_000 + number, 16)).collect();
        for (worker, prompt) in (0..WORKERS).zip(&prompts) {
            index.stored(worker, prompt);
        }
        // The same where blocks of many prompts were told of in turns, as answers grow: none lies by the next.
        let mixed: Vec<_> = (0..400).map(|number| prompt(20_000 + number, 16)).collect();
        for block in 0..mixed[0].len() {
            for prompt in &mixed {
                index.stored(0, &prompt[block..=block]);
            }
        }
        for (how, prompts) in [("told at once", &prompts), ("told in turns", &mixed)] {
            let mut next = 0;
            let mut held = Vec::new();
            let name = format!("16-token blocks, held by 1, {how}, not in the processor's cache");
            group.bench_function(name, |b| {
                b.iter(|| {
                    next = (next + 1) % prompts.len();
                    held.clear();
                    index.matched(black_box(&prompts[next]), &mut held);
                    held.len()
                });
            });
        }
        group.finish();
    }
}

fn changes(c: &mut Criterion) {
    let mut index = PrefixIndex::default();
    filled(&mut index, 1);
    let mut group = c.benchmark_group("events");
    let prompt = prompt(1, 16);
    group.throughput(Throughput::Elements(2 * prompt.len() as u64));
    let mut number = 0;
    group.bench_function("stored, then removed", |b| {
        b.iter_batched(
            || {
                number += 1;
                super_prompt(&prompt, number)
            },
            |blocks| {
                index.stored(5, &blocks);
                index.removed(5, &blocks);
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

/// Names that were never seen before.
fn super_prompt(blocks: &[BlockHash], number: u32) -> Vec<BlockHash> {
    let mut hasher = BlockHasher::after(blocks[0]);
    blocks.iter().map(|_| hasher.tokens(&[number])).collect()
}

fn names(c: &mut Criterion) {
    let tokens: Vec<u32> = (0..PROMPT_TOKENS).collect();
    let mut group = c.benchmark_group("names of 32k tokens");
    for block_size in [16, 64] {
        group.bench_function(format!("{block_size}-token blocks"), |b| {
            b.iter(|| BlockHasher::of_tokens(&SCOPE, black_box(&tokens), block_size));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = matches, changes, names
}
criterion_main!(benches);
