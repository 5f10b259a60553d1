//! One target under libFuzzer: that which `BATON_FUZZ_TARGET` names.

#![no_main]

use std::sync::LazyLock;

use baton_fuzz::{TARGETS, Target, target};
use libfuzzer_sys::fuzz_target;

static CHOSEN: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("BATON_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| {
        let known: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        panic!("BATON_FUZZ_TARGET is {name:?}: expected one of {}", known.join(", "));
    })
});

fuzz_target!(|bytes: &[u8]| (CHOSEN.run)(bytes));
