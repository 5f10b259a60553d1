//! What the policy of `adaptive` holds where the world is not as it is believed to be.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;

use baton_engine::sim::Profile;
use baton_harness::{
    fleet::{Late, Mode, Setup, simulate},
    goodput::{Goal, best_of, highest_scale},
    outcome::Slo,
    summary::Summary,
    trace::Trace,
};

fn trace(file: &str) -> Trace {
    let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples");
    Trace::read(&samples.join(file)).unwrap()
}

fn setup(mode: Mode, workers: u32) -> Setup {
    let profile = "../engine/profiles/h100_llama31_70b_fp8_tp4.json";
    let profile = Profile::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(profile)).unwrap();
    let slo = Slo { ttft_ms: 2000.0, itl_ms: 50.0, ttft_prefill_factor: 0.0 };
    Setup::new(profile, workers, mode, slo)
}

fn run(trace: &Trace, setup: &Setup) -> Summary {
    simulate(trace, setup).unwrap().summary()
}

#[test]
fn noisy_steps_and_an_optimistic_model_break_no_itl() {
    let trace = trace("azure_conv.csv").scaled(2.0, 0);
    let exact = setup(Mode::Adaptive, 2);
    assert!(run(&trace, &exact).attainment > 0.95, "the load is held");
    for (step_noise, predicted_part) in [(0.2, 1.0), (0.0, 0.85), (0.2, 0.85)] {
        for seed in 0..3 {
            let wrong = Setup { step_noise, predicted_part, seed, ..exact.clone() };
            let summary = run(&trace, &wrong);
            let kept = summary.attainment_tbt;
            println!("noise {step_noise}, believed {predicted_part}, seed {seed}: {kept:.3}");
            assert!(kept > 0.97, "ITL is kept by {kept}");
        }
    }
}

/// Its workers learn how long their steps take, and the coordinator from them.
#[test]
fn a_model_that_is_wrong_at_first_costs_nothing() {
    let trace = trace("azure_code_conv_phases.jsonl");
    let exact = setup(Mode::Adaptive, 4);
    let goal = Goal { attainment: 0.9, min_decile: 0.0 };
    let (holds, _) = highest_scale(&trace, &exact, goal, None).unwrap();
    let exactly = run(&trace.scaled(holds, 0), &exact).attainment;
    for predicted_part in [0.5, 0.85, 2.0] {
        let wrong = Setup { predicted_part, ..exact.clone() };
        let kept = run(&trace.scaled(holds, 0), &wrong).attainment;
        println!("believed {predicted_part}: {kept:.4}, exact {exactly:.4}");
        assert!(kept > exactly - 0.01, "{kept}");
    }
}

/// Packed decodes have steps as long as they may be, whose noise no prompt beside them evens out.
#[test]
fn noisy_steps_break_no_itl_where_decodes_are_packed() {
    let trace = trace("azure_conv.csv").scaled(6.0, 0);
    let mut setup = setup(Mode::Adaptive, 4);
    setup.slo.itl_ms = 25.0;
    setup.step_noise = 0.2;
    for seed in 0..3 {
        let summary = run(&trace, &Setup { seed, ..setup.clone() });
        let kept = summary.attainment_tbt;
        println!("seed {seed}: {kept:.3}, {} of {} moved", summary.disaggregated, summary.requests);
        assert!(2 * summary.disaggregated > summary.requests, "decodes are packed");
        assert!(kept > 0.97, "ITL is kept by {kept}");
    }
}

#[test]
fn a_prefix_is_copied_where_the_link_makes_it_pay() {
    let trace = trace("mooncake_conversation.jsonl").scaled(2.0, 0);
    let mut setup = setup(Mode::Adaptive, 8);
    setup.slo.ttft_ms = 30_000.0;
    setup.slo.itl_ms = 100.0;
    let quick = run(&trace, &setup);
    // So slow that nothing is ever worth copying.
    setup.link.us_per_token = 1e6;
    let slow = run(&trace, &setup);
    println!("hits {:.3} and {:.3}", quick.prefix_hit_ratio, slow.prefix_hit_ratio);
    assert!(quick.prefix_hit_ratio > slow.prefix_hit_ratio);
    assert!(quick.kv_bytes_moved > 0);
    assert_eq!(slow.kv_bytes_moved, 0);
}

#[test]
fn overload_is_not_paid_for_by_the_long_ones() {
    let trace = trace("azure_conv.csv");
    let setup = Setup { late: Late::Last, ..setup(Mode::Adaptive, 1) };
    let summary = run(&trace.scaled(2.5, 0), &setup);
    let (all, longest) = (summary.attainment, summary.attainment_longest_input_decile);
    println!("{all:.3} of all, {longest:.3} of the tenth with the longest inputs");
    assert!(all < 0.97, "there is overload");
    assert!(longest > all - 0.2, "{longest} of the longest, {all} of all");
}

#[test]
fn giving_up_those_who_lose_finds_the_same_winner() {
    let trace = trace("azure_conv.csv");
    let goal = Goal { attainment: 0.9, min_decile: 0.0 };
    let aggregated = setup(Mode::Aggregated, 2);
    let setups = [512, 768, 2048].map(|chunk_tokens| Setup { chunk_tokens, ..aggregated.clone() });
    let tuned = best_of(&trace, &setups, goal, None, 2).unwrap();
    let scales: Vec<f64> =
        setups.iter().map(|setup| highest_scale(&trace, setup, goal, None).unwrap().0).collect();
    let best = scales.iter().copied().fold(0.0, f64::max);
    assert!(scales[tuned.best] > 0.97 * best, "{:?} of {scales:?}", tuned.best);
    for (held, scale) in tuned.held.iter().zip(&scales) {
        assert!(*held <= scale * 1.02, "{:?} of {scales:?}", tuned.held);
    }
    assert_eq!(best_of(&trace, &setups, goal, None, 1).unwrap(), tuned, "on any number of threads");
}
