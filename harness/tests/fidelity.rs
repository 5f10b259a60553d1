//! How far the simulator is from others' figures. Prints each error; see them with `--nocapture`.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use baton_engine::sim::Profile;
use baton_harness::{
    fleet::{Hope, Mode, Setup, simulate, simulate_while_hopeful},
    outcome::Slo,
    trace::{Trace, TraceRequest},
};

struct Cell {
    trace: &'static str,
    slo: Slo,
    workers: u32,
    mode: &'static str,
    /// The best of 256, 512, 1024, … for an aggregated worker.
    chunk_tokens: u32,
    /// Requests per second at 90 % attainment, ±2 %.
    goodput_rps: f64,
}

/// From an independent simulator: H100 TP4, Llama-70B FP8, KV held for input and output from admission
/// on, a transfer of 2 ms and 8 µs a token inside TTFT.
fn cells() -> Vec<Cell> {
    const CODE_CONV: &str = "phase_shift_code_conv_32min";
    const CODE_R1: &str = "phase_shift_code_r1_32min";
    const MOONCAKE: &str = "mooncake_conversation_0_30min";
    let slo = |ttft_ms, itl_ms, ttft_prefill_factor| Slo { ttft_ms, ttft_prefill_factor, itl_ms };
    let usual = slo(2000.0, 50.0, 0.0);
    let (loose, tight) = (slo(30_000.0, 100.0, 0.0), slo(2000.0, 50.0, 2.0));
    let rows = [
        (CODE_CONV, usual, 8, "aggregated", 512, 27.8),
        (CODE_CONV, usual, 8, "static:4P4D", 8192, 15.3),
        (CODE_CONV, usual, 8, "static:7P1D", 8192, 25.2),
        (CODE_CONV, usual, 16, "aggregated", 512, 55.5),
        (CODE_CONV, usual, 16, "static:8P8D", 8192, 31.3),
        (CODE_CONV, usual, 16, "static:13P3D", 8192, 52.0),
        (CODE_CONV, slo(2000.0, 25.0, 0.0), 8, "aggregated", 256, 21.2),
        (CODE_CONV, slo(2000.0, 25.0, 0.0), 8, "static:6P2D", 8192, 23.6),
        (CODE_CONV, slo(2000.0, 100.0, 0.0), 8, "aggregated", 1024, 32.7),
        (CODE_CONV, slo(2000.0, 100.0, 0.0), 8, "static:7P1D", 8192, 25.2),
        (CODE_R1, usual, 8, "aggregated", 512, 8.8),
        (CODE_R1, usual, 8, "static:4P4D", 8192, 4.8),
        (CODE_R1, usual, 8, "static:3P5D", 8192, 5.8),
        (CODE_R1, usual, 16, "aggregated", 512, 17.7),
        (CODE_R1, usual, 16, "static:8P8D", 8192, 9.9),
        (CODE_R1, usual, 16, "static:5P11D", 8192, 12.0),
        (MOONCAKE, loose, 8, "aggregated", 512, 6.7),
        (MOONCAKE, loose, 8, "static:4P4D", 8192, 3.9),
        (MOONCAKE, loose, 8, "static:6P2D", 8192, 6.1),
        (MOONCAKE, loose, 16, "aggregated", 512, 14.0),
        (MOONCAKE, loose, 16, "static:8P8D", 8192, 8.3),
        (MOONCAKE, loose, 16, "static:12P4D", 8192, 13.1),
        (MOONCAKE, tight, 8, "aggregated", 256, 4.6),
        (MOONCAKE, tight, 8, "static:4P4D", 8192, 2.6),
        (MOONCAKE, tight, 8, "static:6P2D", 8192, 4.7),
        (MOONCAKE, tight, 16, "aggregated", 256, 10.7),
        (MOONCAKE, tight, 16, "static:8P8D", 8192, 6.9),
        (MOONCAKE, tight, 16, "static:13P3D", 8192, 11.5),
    ];
    let cell = |(trace, slo, workers, mode, chunk_tokens, goodput_rps)| Cell {
        trace,
        slo,
        workers,
        mode,
        chunk_tokens,
        goodput_rps,
    };
    rows.map(cell).into_iter().collect()
}

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
}

fn profile(tensor_parallel: u32) -> Profile {
    let name = format!("../engine/profiles/h100_llama31_70b_fp8_tp{tensor_parallel}.json");
    Profile::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// Whether 90 % of the requests are within both SLOs at this rate.
fn holds(cell: &Cell, rps: f64) -> bool {
    let trace = Trace::read(&reference(&format!("{}.jsonl.gz", cell.trace))).unwrap();
    let mode: Mode = cell.mode.parse().unwrap();
    let mut setup = Setup::new(profile(4), cell.workers, mode, cell.slo);
    setup.chunk_tokens = cell.chunk_tokens;
    setup.reserves_output = true;
    let load = trace.at(rps / trace.rate_rps(), setup.seed);
    let hope = Hope::of(&load.extent(), 0.9, 0.0);
    let run = simulate_while_hopeful(load, &setup, hope).unwrap();
    !run.given_up && run.summary().attainment >= 0.9
}

#[test]
fn goodput_is_that_of_an_independent_simulator() {
    let cells = cells();
    let (next, close) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let low = holds(cell, 0.95 * cell.goodput_rps);
                    let high = low && holds(cell, 1.05 * cell.goodput_rps);
                    close.fetch_add(usize::from(low && !high), Ordering::Relaxed);
                    println!(
                        "{:<30} {:>5.0} ms + {}×, {:>3.0} ms {:>2} workers {:<13} reference {:>5.1} requests/s: {}",
                        cell.trace,
                        cell.slo.ttft_ms,
                        cell.slo.ttft_prefill_factor,
                        cell.slo.itl_ms,
                        cell.workers,
                        cell.mode,
                        cell.goodput_rps,
                        match (low, high) {
                            (false, _) => "less than 95 % of it",
                            (true, false) => "within 5 % of it",
                            (true, true) => "more than 105 % of it",
                        }
                    );
                }
            });
        }
    });
    let close = close.into_inner();
    println!("{close} of {} within 5 %", cells.len());
    assert!(close * 10 >= cells.len() * 8, "{close} of {} cells are within 5 %", cells.len());
}

#[test]
fn splitting_pays_where_the_independent_simulator_has_it_pay() {
    let cells = cells();
    let best = |itl_ms: f64, splits: bool| {
        let of_code_and_chat = cells.iter().filter(move |cell| {
            cell.trace.contains("code_conv") && cell.workers == 8 && cell.slo.itl_ms == itl_ms
        });
        let of_mode = of_code_and_chat.filter(|cell| splits == (cell.mode != "aggregated"));
        of_mode.max_by(|one, other| one.goodput_rps.total_cmp(&other.goodput_rps)).unwrap()
    };
    // At a rate between the two, the one is good enough and the other is not.
    for (itl_ms, splitting_wins) in [(25.0, true), (100.0, false)] {
        let (split, aggregated) = (best(itl_ms, true), best(itl_ms, false));
        let between = (split.goodput_rps * aggregated.goodput_rps).sqrt();
        assert_eq!(
            holds(split, between),
            splitting_wins,
            "split, {itl_ms} ms, {between} requests/s"
        );
        assert_eq!(holds(aggregated, between), !splitting_wins, "aggregated, {itl_ms} ms");
    }
}

#[test]
fn time_per_output_token_is_that_of_a_real_vllm() {
    let points =
        std::fs::read_to_string(reference("h100_llama31_70b_fp8_vllm_points.csv")).unwrap();
    let (mut tpot_errors, mut ttft_errors) = (Vec::new(), Vec::new());
    for line in points.lines().skip(1) {
        let fields: Vec<f64> = line.split(',').map(|field| field.parse().unwrap()).collect();
        let [tensor_parallel, concurrency, input, output, ttft_ms, tpot_ms] = fields[..] else {
            panic!("{line}")
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let [tensor_parallel, concurrency, input, output] =
            [tensor_parallel, concurrency, input, output].map(|value| value as u32);
        let request = TraceRequest {
            arrival: Duration::ZERO,
            input_tokens: input,
            output_tokens: output,
            ..TraceRequest::default()
        };
        let requests = vec![request; 4 * concurrency as usize];
        let trace = Trace { requests, ..Trace::default() };
        let slo = Slo { ttft_ms: 1e9, ttft_prefill_factor: 0.0, itl_ms: 1e9 };
        let mut setup = Setup::new(profile(tensor_parallel), 1, Mode::Aggregated, slo);
        setup.concurrency = Some(concurrency);
        // What vLLM takes on such a machine if it is not told.
        setup.chunk_tokens = 8192;
        let summary = simulate(&trace, &setup).unwrap().summary();
        let (tpot, ttft) = (summary.tpot_ms.p50, summary.ttft_ms.p50);
        tpot_errors.push((tpot / tpot_ms - 1.0).abs());
        ttft_errors.push((ttft / ttft_ms - 1.0).abs());
        println!(
            "TP{tensor_parallel} {input:>5} + {output:>4} tokens × {concurrency:>2}: TPOT {tpot:>6.2} ms, \
             measured {tpot_ms:>6.2}: {:+5.1} %; TTFT {ttft:>8.1} ms, measured {ttft_ms:>8.1}",
            100.0 * (tpot / tpot_ms - 1.0)
        );
    }
    let mean = |errors: &[f64]| 100.0 * errors.iter().sum::<f64>() / errors.len() as f64;
    println!(
        "mean absolute error of {} points: TPOT {:.1} %, TTFT {:.1} %",
        tpot_errors.len(),
        mean(&tpot_errors),
        mean(&ttft_errors)
    );
    assert!(mean(&tpot_errors) <= 10.0, "TPOT is {:.1} % off", mean(&tpot_errors));
}
