#![allow(clippy::print_stdout, clippy::unwrap_used)]
use baton_engine::sim::Profile;
use baton_harness::{fleet::*, goodput::*, outcome::Slo, trace::Trace};
use std::{path::Path, time::Instant};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let trace = Trace::read(Path::new(&args[1])).unwrap();
    let profile =
        Profile::read(Path::new("engine/profiles/h100_llama31_70b_fp8_tp4.json")).unwrap();
    let n: u32 = args[2].parse().unwrap();
    let mode: Mode = args[3].parse().unwrap();
    let f = |i: usize, d: f64| args.get(i).map_or(d, |a| a.parse().unwrap());
    let (ttft, itl, k) = (f(4, 2000.0), f(5, 50.0), f(6, 0.0));
    let mut setup =
        Setup::new(profile, n, mode, Slo { ttft_ms: ttft, itl_ms: itl, ttft_prefill_factor: k });
    setup.chunk_tokens = f(7, 2048.0) as u32;
    setup.late = args.get(8).map_or(Late::Fifo, |a| a.parse().unwrap());
    let scale = f(9, 0.0);
    setup.reserves_output = std::env::var("RESERVE").is_ok();
    setup.policy = std::env::var("POLICY").ok();
    if let Ok(b) = std::env::var("SEQS") {
        setup.max_seqs = b.parse().unwrap();
    }
    if let Ok(b) = std::env::var("BLOCK") {
        setup.block_size_tokens = b.parse().unwrap();
    }
    let min_decile = std::env::var("DECILE").map_or(0.0, |d| d.parse().unwrap());
    let t = Instant::now();
    if scale > 0.0 {
        let scaled = trace.scaled(scale, 0);
        println!("scaled {} in {:?}", scaled.requests.len(), t.elapsed());
        let t = Instant::now();
        let run = simulate(&scaled, &setup).unwrap();
        println!("run {:?}", t.elapsed());
        let mut s = run.summary(&scaled, &setup);
        s.by_minute.clear();
        println!("{} {}", scaled.rate_rps(), serde_json::to_string(&s).unwrap());
    } else {
        let (scale, s) =
            highest_scale(&trace, &setup, Goal { attainment: 0.9, min_decile }, 1.0).unwrap();
        let rps = if scale > 0.0 { trace.scaled(scale, 0).rate_rps() } else { 0.0 };
        println!(
            "{} {} chunk {} goodput {:.2} scale {:.3} ttft% {:.3} tbt% {:.3} split {} {:?}",
            args[1].rsplit('/').next().unwrap(),
            mode,
            setup.chunk_tokens,
            rps,
            scale,
            s.as_ref().map_or(0.0, |s| s.attainment_ttft),
            s.as_ref().map_or(0.0, |s| s.attainment_tbt),
            s.as_ref().map_or(0, |s| s.disaggregated),
            t.elapsed()
        );
    }
}
