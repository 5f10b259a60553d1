//! Fleets and requests at the edge of what can be: a right result, and no number that is none.

#![allow(clippy::unwrap_used)]

use std::{path::Path, time::Duration};

use baton_engine::sim::Profile;
use baton_harness::{
    fleet::{Mode, Setup, simulate},
    goodput::{Sought, goodput},
    outcome::Slo,
    trace::{Trace, TraceRequest},
};
use serde::Serialize;

const KV_TOKENS: u32 = 6400;
const MODES: [Mode; 4] = [
    Mode::Aggregated,
    Mode::Static { prefill: 1, decode: 1 },
    Mode::Flip { prefill: 1, decode: 1 },
    Mode::Adaptive,
];

fn setup(mode: Mode, workers: u32) -> Setup {
    let profile = "../engine/profiles/h100_llama31_70b_fp8_tp4.json";
    let profile = Profile::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(profile)).unwrap();
    let slo = Slo { ttft_ms: 2000.0, itl_ms: 50.0, ttft_prefill_factor: 0.0 };
    let setup = Setup::new(profile, workers, mode, slo);
    Setup { kv_capacity_tokens: u64::from(KV_TOKENS), ..setup }
}

/// Of tokens of prompt and answer, all at once.
fn trace(requests: &[(u32, u32)]) -> Trace {
    let requests = requests.iter().map(|&(input_tokens, output_tokens)| TraceRequest {
        arrival: Duration::ZERO,
        input_tokens,
        output_tokens,
        ..TraceRequest::default()
    });
    Trace { requests: requests.collect(), ..Trace::default() }
}

/// JSON has no word for what is no number but `null`.
fn assert_numbers(found: &impl Serialize) {
    let json = serde_json::to_string(found).unwrap();
    assert!(!json.contains("null"), "{json}");
}

#[test]
fn what_never_fits_is_turned_away_and_what_just_fits_is_served() {
    let lengths = [
        ((KV_TOKENS - 1, 2), false),
        ((KV_TOKENS - 1, 1), true),
        ((1, KV_TOKENS - 1), true),
        ((u32::MAX, u32::MAX), false),
        ((100, 10), true),
    ];
    for mode in MODES {
        let setup = setup(mode, 2);
        for (length, fits) in lengths {
            let alone = simulate(&trace(&[length]), &setup).unwrap().summary();
            assert_eq!((alone.completed == 1, alone.rejected == 0), (fits, fits), "{mode}");
        }
        let run = simulate(&trace(&lengths.map(|(length, _)| length)), &setup).unwrap();
        let summary = run.summary();
        assert_eq!((summary.completed, summary.rejected, summary.unfinished), (3, 2, 0), "{mode}");
        assert!(summary.attainment <= 0.6, "{mode}: who is turned away misses");
        assert_numbers(&summary);
    }
}

#[test]
fn one_worker_serves_alone() {
    let trace = trace(&[(1000, 50); 20]);
    for mode in [Mode::Aggregated, Mode::Adaptive] {
        let summary = simulate(&trace, &setup(mode, 1)).unwrap().summary();
        assert_eq!((summary.completed, summary.disaggregated), (20, 0), "{mode}");
    }
    for mode in MODES.into_iter().filter(|mode| mode.has_pools()) {
        let said = simulate(&trace, &setup(mode, 1)).unwrap_err().to_string();
        assert!(said.contains("expected pools that add up to the 1 workers"), "{said}");
    }
}

#[test]
fn where_no_load_can_be_held_goodput_is_zero() {
    for (requests, held) in [
        (&[(KV_TOKENS, 1)][..], false),
        // Longer than the promise alone.
        (&[(KV_TOKENS - 10, 5); 40][..], false),
        (&[(10, 1)][..], true),
    ] {
        let mut setup = setup(Mode::Aggregated, 1);
        if !held {
            setup.slo.ttft_ms = 1.0;
        }
        let sought = Sought { p99: true, ..Sought::default() };
        let found = goodput(&trace(requests), &setup, sought, 2, &|_| {}).unwrap();
        let [rps, rps_p99] = [Some(found.goodput_rps), found.goodput_rps_p99];
        assert!(rps.zip(rps_p99).is_some_and(|(a, b)| a.is_finite() && b.is_finite()), "{found:?}");
        assert_eq!(found.summary.is_some(), held, "{found:?}");
        assert_numbers(&found.points);
    }
}
