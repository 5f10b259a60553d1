//! The balancer in trouble: noise, bursts, workers that are stuck, reports that are late or lost, a clock
//! that jumps. Each seed is another fleet with another mixture of them, and some rules hold in all.
//!
//! `BATON_STABILITY_SEEDS=1000 cargo test -p baton-harness --test stability` tries more seeds than the
//! usual few; `BATON_STABILITY_FIRST_SEED=17` begins there. What fails names its seed.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used
)]

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use baton_core::BalancerSettings;
use baton_engine::sim::Profile;
use baton_harness::{
    fleet::{Flip, Mode, Run, Setup, Stuck, Trouble, simulate},
    outcome::Slo,
    trace::{Trace, TraceRequest},
};
use baton_types::Role;
use fastrand::Rng;

const FEW_SEEDS: u64 = 24;
const DWELL: Duration = Duration::from_secs(30);

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

fn h100() -> Profile {
    let file =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/profiles/h100_llama31_70b_fp8_tp4.json");
    Profile::read(file.as_ref()).unwrap()
}

/// Gaps of a gamma-like mixture whose coefficient of variation is about 13: most are nothing, few are long.
fn bursty_gap_s(lots: &mut Rng, mean_s: f64) -> f64 {
    // With probability p an exponential of mean m/p, else none: CV² = 2/p − 1.
    let p = 2.0 / (13.0 * 13.0 + 1.0);
    if lots.f64() < p { -(1.0 - lots.f64()).ln() * mean_s / p } else { 0.0 }
}

fn even_gap_s(lots: &mut Rng, mean_s: f64) -> f64 {
    -(1.0 - lots.f64()).ln() * mean_s
}

/// Two kinds of traffic that take turns: long prompts with short answers, and the reverse.
fn trace(lots: &mut Rng, workers: u32, seconds: f64) -> Trace {
    let is_bursty = lots.bool();
    let rate_rps = f64::from(workers) * (0.5 + 2.0 * lots.f64());
    let phase_s = 20.0 + 60.0 * lots.f64();
    let mut at_s = 0.0;
    let mut requests = Vec::new();
    while at_s < seconds {
        let is_code = ((at_s / phase_s) as u64).is_multiple_of(2);
        let length = |lots: &mut Rng, mean: f64| (mean * (0.25 + 1.5 * lots.f64())).max(2.0) as u32;
        let (input, output) = if is_code { (3000.0, 20.0) } else { (700.0, 300.0) };
        requests.push(TraceRequest {
            arrival: Duration::from_secs_f64(at_s),
            input_tokens: length(lots, input),
            output_tokens: length(lots, output),
            ..TraceRequest::default()
        });
        let mean_s = 1.0 / rate_rps;
        at_s += if is_bursty { bursty_gap_s(lots, mean_s) } else { even_gap_s(lots, mean_s) };
    }
    Trace { name: "turns".to_owned(), requests, phases: Vec::new(), prefix_block_tokens: 512 }
}

fn fleet(seed: u64) -> (Trace, Setup) {
    let mut lots = Rng::with_seed(seed);
    let (prefill, decode) = (lots.u32(1..5), lots.u32(1..5));
    let workers = prefill + decode;
    let seconds = 240.0;
    let trace = trace(&mut lots, workers, seconds);
    let slo = Slo { ttft_ms: 2000.0, itl_ms: 50.0, ttft_prefill_factor: 0.0 };
    let mut setup = Setup::new(h100(), workers, Mode::Flip { prefill, decode }, slo);
    setup.seed = seed;
    setup.patience = Duration::from_secs(60);
    setup.balancer = BalancerSettings { dwell: DWELL, ..BalancerSettings::default() };
    setup.relabel = Duration::from_millis(lots.u64(50..5000));
    setup.step_noise = if lots.bool() { 0.2 } else { 0.0 };
    setup.predicted_part = [1.0, 0.85, 1.3][lots.usize(0..3)];
    let some_time = |lots: &mut Rng| Duration::from_secs_f64(seconds * lots.f64());
    let mut trouble = Trouble::default();
    if lots.u8(0..3) == 0 {
        trouble.reports_late = Duration::from_secs(5);
    }
    if lots.u8(0..3) == 0 {
        trouble.reports_lost = lots.f64();
    }
    for _ in 0..lots.u8(0..3) {
        let from = some_time(&mut lots);
        let until = from + Duration::from_secs_f64(60.0 * lots.f64());
        trouble.stuck.push(Stuck { worker: lots.usize(0..workers as usize), from, until });
    }
    for _ in 0..lots.u8(0..4) {
        let at = some_time(&mut lots);
        let by_s = [3600.0, -3600.0, 40.0, -40.0, 2.5][lots.usize(0..5)];
        trouble.clock_jumps.push((at, by_s));
    }
    setup.trouble = trouble;
    (trace, setup)
}

/// A worker rests for a dwell between its flips.
fn at_most_one_flip_per_worker_per_dwell(run: &Run) {
    for worker in 0..16 {
        let of_worker: Vec<&Flip> = run.flips.iter().filter(|flip| flip.worker == worker).collect();
        for pair in of_worker.windows(2) {
            assert!(pair[1].ordered >= pair[0].done + DWELL, "at most one flip a dwell: {pair:?}");
        }
    }
}

/// What went over to a pool is not taken back, by whichever worker, within a dwell: 2, 1, 2.
fn no_pool_swings_back_within_a_dwell(run: &Run) {
    for pair in run.flips.windows(2) {
        let turns = pair[0].to != pair[1].to;
        assert!(!turns || pair[1].ordered >= pair[0].done + DWELL, "no 2-1-2 cycles: {pair:?}");
    }
}

fn never_an_empty_pool(run: &Run, setup: &Setup) {
    let Some((prefill, decode)) = setup.mode.pools() else { panic!() };
    // The one that is on its way is in neither.
    let mut sizes = [prefill, decode];
    for flip in &run.flips {
        let (to, from) = (flip.to as usize, 1 - flip.to as usize);
        sizes[from] -= 1;
        assert!(sizes[from] > 0, "never an empty pool: {:?}", run.flips);
        sizes[to] += 1;
    }
}

fn one_flip_in_flight(run: &Run) {
    for pair in run.flips.windows(2) {
        assert!(pair[1].ordered >= pair[0].done, "one flip in flight: {pair:?}");
    }
}

/// Flips cost no request: what is not finished had no time to be, or sat on a worker that was stuck.
fn no_request_is_lost(run: &Run, trace: &Trace) {
    let summary = run.summary();
    assert_eq!(summary.requests, trace.requests.len());
    assert_eq!(summary.rejected, 0, "no request is turned away");
}

fn equal_seeds_give_equal_flips(run: &Run, trace: &Trace, setup: &Setup) {
    assert_eq!(simulate(trace, setup).unwrap().flips, run.flips);
}

fn check(seed: u64) -> usize {
    let (trace, setup) = fleet(seed);
    let run = simulate(&trace, &setup).unwrap();
    at_most_one_flip_per_worker_per_dwell(&run);
    no_pool_swings_back_within_a_dwell(&run);
    never_an_empty_pool(&run, &setup);
    one_flip_in_flight(&run);
    no_request_is_lost(&run, &trace);
    if seed.is_multiple_of(16) {
        equal_seeds_give_equal_flips(&run, &trace, &setup);
    }
    run.flips.len()
}

#[test]
fn the_rules_hold_in_all_trouble() {
    let first = number("BATON_STABILITY_FIRST_SEED", 0);
    let seeds = number("BATON_STABILITY_SEEDS", FEW_SEEDS);
    let next = AtomicU64::new(first);
    let flips = AtomicU64::new(0);
    let flipping = AtomicU64::new(0);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                break;
            }
            let checked = std::panic::catch_unwind(|| check(seed));
            let found = checked.unwrap_or_else(|_| {
                panic!("seed {seed}: run again with BATON_STABILITY_FIRST_SEED={seed}")
            });
            flips.fetch_add(found as u64, Ordering::Relaxed);
            flipping.fetch_add(u64::from(found > 0), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let (flips, flipping) = (flips.into_inner(), flipping.into_inner());
    println!("{seeds} seeds from {first}: {flips} flips in {flipping} of them");
    // Rules that hold because nothing happens would show nothing.
    assert!(flipping * 4 >= seeds, "{flipping} of {seeds} fleets flipped at all");
}

/// Where the traffic turns, the pools turn with it.
#[test]
fn pools_follow_the_load_there_and_back() {
    let phase_s = 120;
    let request = |at_ms: u64, input, output| TraceRequest {
        arrival: Duration::from_millis(at_ms),
        input_tokens: input,
        output_tokens: output,
        ..TraceRequest::default()
    };
    let mut requests = Vec::new();
    for phase in 0..4_u64 {
        let (rps, input, output) = if phase % 2 == 0 { (30, 2500, 20) } else { (30, 400, 350) };
        for index in 0..rps * phase_s {
            requests.push(request(phase * phase_s * 1000 + index * 1000 / rps, input, output));
        }
    }
    let trace =
        Trace { name: "turns".to_owned(), requests, phases: Vec::new(), prefix_block_tokens: 512 };
    let slo = Slo { ttft_ms: 2000.0, itl_ms: 50.0, ttft_prefill_factor: 0.0 };
    let mode = Mode::Flip { prefill: 3, decode: 3 };
    let setup = Setup::new(h100(), 6, mode, slo);
    let run = simulate(&trace, &setup).unwrap();
    let summary = run.summary();
    let to = |role| run.flips.iter().filter(|flip| flip.to == role).count();
    assert!(to(Role::Prefill) > 1 && to(Role::Decode) > 1, "{:?}", run.flips);
    assert_eq!(summary.flips, run.flips.len() as u64);
    let pools = summary.workers_seconds;
    let all = pools.prefill + pools.decode + pools.mixed;
    assert!((all - 6.0 * summary.duration_s).abs() < 1.0, "{pools:?}");
    let fixed = Setup { mode: Mode::Static { prefill: 3, decode: 3 }, ..setup };
    let fixed = simulate(&trace, &fixed).unwrap().summary();
    println!("within both SLOs: {} with flips, {} without", summary.attainment, fixed.attainment);
    assert!(summary.attainment > fixed.attainment + 0.05);
    assert_eq!(summary.completed, summary.requests);
}
