//! What was found worth keeping, and whatever a seed makes of it. `BATON_FUZZ_ITERATIONS` says how often for
//! each target, `BATON_FUZZ_SEED` which.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::{collections::BTreeSet, fs, path::Path};

use baton_fuzz::TARGETS;

fn corpus() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"))
}

fn cases(target: &str) -> Vec<Vec<u8>> {
    let files = fs::read_dir(corpus().join(target)).unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn mutated(random: &mut fastrand::Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.choice(corpus).cloned().unwrap_or_default();
    for _ in 0..random.usize(0..4) {
        let at = random.usize(..=bytes.len());
        match random.u32(..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u32(..8),
            1 if at < bytes.len() => bytes[at] = random.u8(..),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.u8(..)),
            4 => bytes.extend((0..random.usize(..20)).map(|_| random.u8(..))),
            _ => {
                let other = random.choice(corpus).cloned().unwrap_or_default();
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.usize(..=other.len())..]);
            }
        }
    }
    bytes
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn every_target_has_a_corpus_and_takes_it() {
    for target in TARGETS {
        let cases = cases(target.name);
        assert!(cases.len() >= 2, "the corpus of {} is there", target.name);
        cases.iter().for_each(|case| (target.run)(case));
    }
    let named: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    for folder in fs::read_dir(corpus()).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        assert!(named.contains(&name) || name.starts_with("connector_"), "nobody reads {name}");
    }
}

#[test]
fn what_a_seed_makes_of_the_corpus_is_taken() {
    let (seed, iterations) =
        (from_environment("BATON_FUZZ_SEED", 1), from_environment("BATON_FUZZ_ITERATIONS", 2_000));
    for target in TARGETS {
        let cases = cases(target.name);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..iterations {
            (target.run)(&mutated(&mut random, &cases));
        }
    }
}
