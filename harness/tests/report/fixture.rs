//! Input that looks real, made by a small deterministic queue.

use std::time::Duration;

use baton_harness::{
    outcome::{Fate, Latencies, Outcome, Slo},
    report::{
        Contender, GoodputFindings, Input, Load, LoadPoint, Origin, Report, RunFindings, Scenario,
        Searched,
    },
    summary::{FleetSample, Percentiles, RunFacts, Summary, Tally, WorkersSeconds},
};

/// Knuth's MMIX generator.
struct Dice(u64);

impl Dice {
    /// From 0 to 1.
    fn roll(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f64::from(u32::try_from(self.0 >> 32).unwrap()) / f64::from(u32::MAX)
    }
}

/// What distinguishes a mode, roughly.
struct Character {
    mode: &'static str,
    setup: &'static str,
    goodput_rps: f64,
    /// Time that a request holds the one server of this queue.
    service_ms: f64,
    gap_ms: f64,
    pools: fn(f64) -> (f64, f64, f64),
    searched: &'static [(&'static str, f64)],
}

const CHARACTERS: [Character; 4] = [
    Character {
        mode: "aggregated",
        setup: "512 tokens a step",
        goodput_rps: 21.2,
        service_ms: 41.0,
        gap_ms: 17.0,
        pools: |_| (0.0, 0.0, 8.0),
        searched: &[
            ("256 tokens a step", 19.4),
            ("512 tokens a step", 21.2),
            ("1,024 tokens a step", 20.1),
            ("2,048 tokens a step", 14.9),
        ],
    },
    Character {
        mode: "static:4P4D",
        setup: "8,192 tokens a step",
        goodput_rps: 15.3,
        service_ms: 52.0,
        gap_ms: 9.0,
        pools: |_| (4.0, 4.0, 0.0),
        searched: &[],
    },
    Character {
        mode: "best-static",
        setup: "7P1D, 8,192 tokens a step",
        goodput_rps: 23.6,
        service_ms: 38.0,
        gap_ms: 13.0,
        pools: |_| (7.0, 1.0, 0.0),
        searched: &[("static:5P3D", 19.2), ("static:6P2D", 22.0), ("static:7P1D", 23.6)],
    },
    Character {
        mode: "adaptive",
        setup: "8,192 tokens a step",
        goodput_rps: 24.4,
        service_ms: 36.0,
        gap_ms: 12.0,
        pools: |at_s| if at_s % 480.0 < 210.0 { (6.0, 2.0, 0.0) } else { (3.0, 4.0, 1.0) },
        searched: &[],
    },
];

pub(crate) fn report() -> Report {
    let scenario = |itl_ms: f64, skill: f64| Scenario {
        name: format!("phase_shift_code_conv, 8 workers, TTFT 2 s, ITL {itl_ms} ms"),
        trace: Input {
            file: "harness/samples/phase_shift_code_conv.jsonl".to_owned(),
            sha256: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08".to_owned(),
            about: "26,118 requests in 32 minutes, on average 2,081 tokens in and 87 out"
                .to_owned(),
        },
        workers: Some(8),
        slo: Slo { ttft_ms: 2_000.0, ttft_prefill_factor: 0.0, itl_ms },
        late: Some("fifo".to_owned()),
        min_decile: Some(0.8),
        load: Some(Load {
            scale: 1.56,
            offered_rps: 21.2,
            reason: "the most that aggregated holds".to_owned(),
        }),
        contenders: CHARACTERS
            .iter()
            .enumerate()
            .map(|(i, character)| contender(character, skill, u64::try_from(i).unwrap()))
            .collect(),
    };
    Report {
        title: "Crossover: does splitting pay on code ↔ conversation?".to_owned(),
        origin: Origin {
            command: "baton compare --config harness/experiments/crossover.toml --out \"out\""
                .to_owned(),
            version: "0.1.0".to_owned(),
            seeds: vec![1, 2, 3],
            endpoint: None,
            profile: Some(Input {
                file: "harness/samples/h100_tp4_llama70b_fp8.json".to_owned(),
                sha256: "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
                    .to_owned(),
                about: "prefill 11.2 ms + 0.061 ms a token; decode 9.8 ms + 0.11 ms a request"
                    .to_owned(),
            }),
            experiment: Some("what = \"goodput\"\nworkers = [8]\n".to_owned()),
        },
        scenarios: vec![scenario(25.0, 1.0), scenario(100.0, 0.75)],
    }
}

fn contender(character: &Character, skill: f64, seed: u64) -> Contender {
    let is_split = character.mode != "aggregated";
    let goodput_rps =
        if is_split { character.goodput_rps * skill } else { character.goodput_rps / skill };
    let points = [0.25, 0.5, 0.75, 0.9, 0.97, 1.0, 1.03, 1.12, 1.5, 3.0];
    let point = |load: f64| LoadPoint {
        offered_rps: goodput_rps * load,
        attainment: 1.0 / (1.0 + (load / 1.2).powi(12)),
    };
    Contender {
        mode: character.mode.to_owned(),
        setup: character.setup.to_owned(),
        searched: character
            .searched
            .iter()
            .map(|(setup, rps)| Searched { setup: (*setup).to_owned(), goodput_rps: *rps })
            .collect(),
        goodput: Some(GoodputFindings {
            rps: goodput_rps,
            rps_p99: Some(goodput_rps * 0.82),
            range: [goodput_rps * 0.97, goodput_rps * 1.02],
            points: points.map(point).into(),
        }),
        run: Some(run(character, skill, seed)),
    }
}

/// 32 minutes of a queue with one server, fed in two alternating phases.
fn run(character: &Character, skill: f64, seed: u64) -> RunFindings {
    const RUN_S: f64 = 1_920.0;
    let service_ms = if character.mode == "aggregated" {
        character.service_ms * skill
    } else {
        character.service_ms
    };
    let mut dice = Dice(seed);
    let (mut now_ms, mut free_at_ms) = (0.0_f64, 0.0_f64);
    let mut outcomes = Vec::new();
    let mut waiting = Vec::new();
    while now_ms < RUN_S * 1e3 {
        let is_code = (now_ms / 1e3) % 480.0 < 210.0;
        let rate = if is_code { 25.0 } else { 18.0 };
        now_ms += -dice.roll().max(1e-6).ln() / rate * 1e3;
        let length = (dice.roll() * 4.0 - 2.0).exp();
        let starts_ms = free_at_ms.max(now_ms);
        free_at_ms = starts_ms + service_ms * length * if is_code { 0.75 } else { 0.62 };
        let ttft_ms = free_at_ms - now_ms + 60.0 + 300.0 * length * dice.roll();
        let tbt_ms = character.gap_ms * (0.8 + 0.5 * dice.roll() + 0.9 * dice.roll().powi(12));
        let is_lost = ttft_ms > 60_000.0 || dice.roll() < 0.004;
        let latencies =
            Latencies { ttft_ms, tbt_ms, tpot_ms: tbt_ms * 0.8, e2e_ms: ttft_ms + 90.0 * tbt_ms };
        waiting.push((now_ms, free_at_ms));
        outcomes.push(Outcome {
            arrival: Duration::from_secs_f64(now_ms / 1e3),
            input_tokens: 2_000,
            output_tokens: 90,
            phase: None,
            fate: if is_lost { Fate::Unfinished } else { Fate::Completed(latencies) },
            cached_tokens: 0,
            kv_bytes_moved: 655_360_000,
            disaggregated: character.mode != "aggregated",
        });
    }
    let sample = |second: u32| {
        let at_s = f64::from(second);
        // First come, first served: both times are in order.
        let arrived = waiting.partition_point(|(from, _)| *from <= at_s * 1e3);
        let answered = waiting.partition_point(|(_, to)| *to <= at_s * 1e3);
        let queued = arrived - answered;
        let queued = f64::from(u32::try_from(queued).unwrap());
        let (workers_prefill, workers_decode, workers_mixed) = (character.pools)(at_s);
        let sample = FleetSample {
            workers_prefill,
            workers_decode,
            workers_mixed,
            requests_queued: queued,
            requests_running: 3.0 * queued,
            kv_used_ratio: (0.3 + queued / 900.0).min(0.97),
        };
        (Duration::from_secs(second.into()), sample)
    };
    let samples: Vec<_> = (0..1_920).step_by(2).map(sample).collect();
    let spread = |base: f64| Percentiles { p50: base, p90: base * 2.4, p99: base * 6.0 };
    let summary = Summary {
        requests: outcomes.len(),
        completed: outcomes.len() - 71,
        unfinished: 71,
        duration_s: 1_951.0,
        goodput_rps: 19.4,
        attainment: 0.914 + 0.01 * skill,
        attainment_ttft: 0.93,
        attainment_tbt: 0.981,
        attainment_longest_input_decile: 0.83,
        attainment_longest_output_decile: 0.88,
        ttft_ms: spread(service_ms * 9.0),
        tbt_ms: spread(character.gap_ms),
        tpot_ms: spread(character.gap_ms * 0.8),
        e2e_ms: spread(character.gap_ms * 90.0),
        output_tokens_per_s: 1_843.0,
        prefix_hit_ratio: 0.12,
        kv_bytes_moved: 13_512_000_000_000,
        disaggregated: 20_000,
        flips: 7,
        workers_seconds: WorkersSeconds { prefill: 13_440.0, decode: 1_920.0, mixed: 0.0 },
        ..Summary::default()
    };
    RunFindings { summary, ..findings(&outcomes, &samples) }
}

/// A fleet that answers nobody.
pub(crate) fn lost_run() -> RunFindings {
    let outcomes: Vec<_> = (0..50)
        .map(|i| Outcome {
            arrival: Duration::from_millis(200 * i),
            input_tokens: 2_000,
            output_tokens: 90,
            phase: None,
            fate: if i % 2 == 0 { Fate::Rejected } else { Fate::Unfinished },
            cached_tokens: 0,
            kv_bytes_moved: 0,
            disaggregated: false,
        })
        .collect();
    let summary = Summary { requests: 50, rejected: 25, unfinished: 25, ..Summary::default() };
    RunFindings { summary, ..findings(&outcomes, &[]) }
}

fn findings(outcomes: &[Outcome], samples: &[(Duration, FleetSample)]) -> RunFindings {
    let slo = Slo { ttft_ms: 2_000.0, ttft_prefill_factor: 0.0, itl_ms: 50.0 };
    RunFindings::new(&Tally::of(outcomes, samples, &[], &slo, |_| 0.0), &RunFacts::default())
}
