//! Every decoder, over what was found worth keeping and whatever a seed makes of it.
//! `BATON_FUZZ_ITERATIONS` says how often, `BATON_FUZZ_SEED` which. A file in `fuzz/corpus` is a case.

use std::{fs, path::Path};

use crate::{
    frame::{
        Asked, ConsumerWord, FrameError, PRELUDE_BYTES, ProducerFrame, decode_prelude,
        decode_subscription, encode_subscription,
    },
    shm::fuzz_hello,
    ucx::fuzz_wire,
};

/// None of the decoders panics, or takes what its encoder does not give.
fn decode_everything(bytes: &[u8]) {
    let prelude = decode_prelude(bytes);
    if bytes.len() != PRELUDE_BYTES {
        assert!(prelude.is_err());
    }
    if let Ok(Asked { subscription, key }) = decode_subscription(bytes) {
        assert_eq!(&encode_subscription(&subscription, key.as_ref())[PRELUDE_BYTES..], bytes);
    }
    if let Some((&kind, body)) = bytes.split_first() {
        if let Ok(word) = ConsumerWord::decode(kind) {
            assert_eq!(&word.encode()[..], &[kind]);
        }
        let body_bytes = ProducerFrame::body_bytes(kind);
        match ProducerFrame::decode(kind, body) {
            Ok(frame) => {
                assert_eq!(body_bytes, Ok(body.len()));
                assert_eq!(frame.encode(), bytes);
            }
            Err(error) => assert!(
                body_bytes != Ok(body.len()) || matches!(error, FrameError::RefusalCode(_)),
                "{error} of {bytes:?}"
            ),
        }
    }
    fuzz_hello(bytes);
    fuzz_wire(bytes);
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
fn decoders_take_what_comes() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let files = fs::read_dir(directory).unwrap();
    let mut corpus: Vec<_> = files.map(|file| fs::read(file.unwrap().path()).unwrap()).collect();
    corpus.sort();
    assert!(corpus.len() >= 10, "the corpus is there");
    corpus.iter().for_each(|case| decode_everything(case));
    let mut random = fastrand::Rng::with_seed(from_environment("BATON_FUZZ_SEED", 1));
    for _ in 0..from_environment("BATON_FUZZ_ITERATIONS", 50_000) {
        decode_everything(&mutated(&mut random, &corpus));
    }
}
