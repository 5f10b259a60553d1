//! A prompt of 100,000 tokens of which nine tenths were seen before, and the same afresh.
//!
//! `BATON_MODEL=DIR cargo bench -p baton-tokens`, with the directory of any model.

#![allow(clippy::print_stderr, clippy::unwrap_used, missing_debug_implementations)]

use std::{hint::black_box, path::Path, time::Duration};

use baton_tokens::PromptTokenizer;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const TOKENS: usize = 100_000;

/// Words of no meaning, never the same twice in a row.
fn words(seed: u32, bytes: usize) -> String {
    let mut state = seed;
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let syllables =
            ["ra", "ton", "el", "ing", "sp", "er", "mo", "un", "ther", "is", "ca", "de"];
        for shift in [8, 13, 18].iter().take(1 + (state >> 30) as usize) {
            text.push_str(syllables[(state >> shift) as usize % syllables.len()]);
        }
        text.push_str(if state % 19 == 0 { ".\n" } else { " " });
    }
    text
}

fn grow(c: &mut Criterion) {
    let Some(model) = std::env::var_os("BATON_MODEL") else {
        eprintln!("skipped: BATON_MODEL names no model's directory");
        return;
    };
    let tokenizer = PromptTokenizer::open(Path::new(&model)).unwrap();
    let sample = words(1, 40_000);
    let bytes = sample.len() * TOKENS / tokenizer.text(&sample, false).unwrap().len();
    let mut seed = 100;
    let mut group = c.benchmark_group("100k tokens");
    group.sample_size(10).warm_up_time(Duration::from_millis(500));
    group.bench_function("afresh", |b| {
        b.iter_batched(
            || {
                seed += 1;
                words(seed, bytes)
            },
            |text| tokenizer.text(black_box(&text), false).unwrap(),
            BatchSize::LargeInput,
        );
    });
    let stem = words(7, bytes / 10 * 9);
    tokenizer.text(&stem, false).unwrap();
    group.bench_function("nine tenths seen before", |b| {
        b.iter_batched(
            || {
                seed += 1;
                format!("{stem}{}", words(seed, bytes / 10))
            },
            |text| tokenizer.text(black_box(&text), false).unwrap(),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, grow);
criterion_main!(benches);
