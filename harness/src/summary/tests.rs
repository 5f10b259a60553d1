use std::time::Duration;

use super::*;
use crate::outcome::Slo;

const SLO: Slo = Slo { ttft_ms: 100.0, ttft_prefill_factor: 1.0, itl_ms: 20.0 };

fn completed(arrival_s: u64, ttft_ms: f64, tbt_ms: f64) -> Outcome {
    let latencies =
        Latencies { ttft_ms, tbt_ms, tpot_ms: tbt_ms / 2.0, e2e_ms: ttft_ms + 9.0 * tbt_ms };
    Outcome {
        arrival: Duration::from_secs(arrival_s),
        input_tokens: 100,
        output_tokens: 10,
        phase: None,
        fate: Fate::Completed(latencies),
        cached_tokens: 25,
        kv_bytes_moved: 7,
        disaggregated: true,
    }
}

fn sum_up(outcomes: &[Outcome], phases: &[&str]) -> Summary {
    let phases: Vec<_> = phases.iter().copied().map(str::to_owned).collect();
    let run = RunFacts { duration: Duration::from_secs(100), ..RunFacts::default() };
    Tally::of(outcomes, &[], &phases, &SLO, f64::from).summary(&run)
}

/// serde_json tells a NaN as null.
fn assert_only_numbers(summary: &Summary) {
    let text = serde_json::to_string(summary).unwrap();
    assert!(!text.contains("null"), "{text}");
}

#[test]
fn a_run_is_summed_up() {
    let mut outcomes: Vec<_> = (0..8)
        .map(|n| completed(n * 10, 10.0 * f64::from(u32::try_from(n).unwrap()), 10.0))
        .collect();
    // Its limit is 100 ms and 1 ms for each of its 100 tokens.
    outcomes.push(completed(80, 200.0, 30.0));
    outcomes.push(completed(90, 201.0, 10.0));
    outcomes.push(Outcome { fate: Fate::Rejected, ..completed(90, 0.0, 0.0) });
    outcomes.push(Outcome {
        fate: Fate::Unfinished,
        disaggregated: false,
        ..completed(90, 0.0, 0.0)
    });
    let summary = sum_up(&outcomes, &[]);
    assert_eq!(
        (summary.requests, summary.completed, summary.rejected, summary.unfinished),
        (12, 10, 1, 1)
    );
    assert!((summary.attainment - 8.0 / 12.0).abs() < 1e-12);
    assert!((summary.attainment_ttft - 9.0 / 12.0).abs() < 1e-12);
    assert!((summary.attainment_tbt - 9.0 / 12.0).abs() < 1e-12);
    assert!((summary.goodput_rps - 0.08).abs() < 1e-12);
    assert!((summary.output_tokens_per_s - 1.0).abs() < 1e-12);
    assert!((summary.prefix_hit_ratio - 0.25).abs() < 1e-12);
    assert_eq!(summary.ttft_ms, Percentiles { p50: 40.0, p90: 200.0, p99: 201.0 });
    assert_eq!(summary.tbt_ms, Percentiles { p50: 10.0, p90: 10.0, p99: 30.0 });
    assert_eq!((summary.kv_bytes_moved, summary.disaggregated), (84, 11));
    let arrivals: Vec<_> = summary.by_minute.iter().map(|m| (m.minute, m.arrivals)).collect();
    assert_eq!(arrivals, [(0, 6), (1, 6)]);
    assert!((summary.by_minute[1].attainment - 2.0 / 6.0).abs() < 1e-12);
    assert_only_numbers(&summary);
}

#[test]
fn nothing_is_summed_up_to_zeros() {
    let nothing = sum_up(&[], &["a"]);
    assert_eq!(
        (nothing.attainment, nothing.goodput_rps, nothing.prefix_hit_ratio),
        (0.0, 0.0, 0.0)
    );
    assert_eq!(nothing.attainment_by_phase["a"], 0.0);
    assert_only_numbers(&nothing);
    let at_once = Tally::of(&[completed(0, 1.0, 1.0)], &[], &[], &SLO, f64::from)
        .summary(&RunFacts::default());
    assert_eq!((at_once.goodput_rps, at_once.attainment), (0.0, 1.0));
    assert_only_numbers(&at_once);
}

#[test]
fn rejections_alone_are_misses() {
    let rejected = Outcome { fate: Fate::Rejected, ..completed(0, 0.0, 0.0) };
    let summary = sum_up(&[rejected.clone(), rejected], &[]);
    assert_eq!((summary.attainment, summary.rejected), (0.0, 2));
    assert_eq!(summary.ttft_ms, Percentiles::default());
    assert_only_numbers(&summary);
}

#[test]
fn answers_of_one_token_have_no_part_in_gaps() {
    let one = Outcome { output_tokens: 1, ..completed(0, 5.0, 0.0) };
    let summary = sum_up(&[one.clone(), one.clone(), completed(0, 5.0, 8.0)], &[]);
    assert_eq!(summary.tbt_ms.p50, 8.0);
    assert_eq!(summary.attainment, 1.0);
    assert_only_numbers(&sum_up(&[one], &[]));
}

#[test]
fn the_longest_tenth_takes_in_its_equals() {
    let mut outcomes: Vec<_> = (0..19)
        .map(|n| Outcome { input_tokens: if n < 15 { 1 } else { 500 }, ..completed(0, 1.0, 1.0) })
        .collect();
    outcomes[18].fate = Fate::Rejected;
    // A tenth are two requests; four are as long.
    let summary = sum_up(&outcomes, &[]);
    assert_eq!(summary.attainment_longest_input_decile, 0.75);
    // All outputs are of one length.
    assert_eq!(summary.attainment_longest_output_decile, summary.attainment);
}

#[test]
fn phases_are_judged_apart() {
    let of = |phase, ttft_ms| Outcome { phase: Some(phase), ..completed(0, ttft_ms, 1.0) };
    let summary = sum_up(&[of(0, 1.0), of(1, 999.0), of(1, 1.0)], &["code", "chat"]);
    assert_eq!(summary.attainment_by_phase["code"], 1.0);
    assert_eq!(summary.attainment_by_phase["chat"], 0.5);
}

#[test]
fn a_minute_has_the_mean_of_its_samples() {
    let sample = |queued| FleetSample { requests_queued: queued, ..FleetSample::default() };
    let samples = vec![
        (Duration::from_secs(10), sample(1.0)),
        (Duration::from_secs(20), sample(2.0)),
        (Duration::from_secs(200), sample(7.0)),
    ];
    let run = RunFacts { duration: Duration::from_secs(240), ..RunFacts::default() };
    let summary =
        Tally::of(&[completed(0, 1.0, 1.0)], &samples, &[], &SLO, f64::from).summary(&run);
    let minutes: Vec<_> =
        summary.by_minute.iter().map(|m| (m.minute, m.arrivals, m.fleet.requests_queued)).collect();
    assert_eq!(minutes, [(0, 1, 1.5), (3, 0, 7.0)]);
    assert_only_numbers(&summary);
}

#[test]
fn percentiles_are_nearest_ranks() {
    let of = |values: &[f64]| Percentiles::of_values(&mut values.to_vec());
    assert_eq!(of(&[3.0]), Percentiles { p50: 3.0, p90: 3.0, p99: 3.0 });
    assert_eq!(of(&[2.0, 1.0]), Percentiles { p50: 1.0, p90: 2.0, p99: 2.0 });
    let hundred: Vec<_> = (1..=100).rev().map(f64::from).collect();
    assert_eq!(of(&hundred), Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 });
}

#[test]
fn a_minute_is_let_go_when_its_requests_have_ended() {
    let outcomes: Vec<_> =
        (0..300).map(|second| completed(second, second as f64, second as f64)).collect();
    let kept = |outcome: &Outcome| SLO.kept(&outcome.fate, 100.0);
    let mut as_they_end = Tally::new(&[]);
    let mut held = Vec::new();
    for (second, outcome) in outcomes.iter().enumerate() {
        as_they_end.arrived(outcome.arrival);
        // Of each minute the first stays for two more, and all others for three seconds.
        held.push((second + if second % 60 == 0 { 120 } else { 3 }, outcome));
        held.retain(|(until, outcome)| {
            let ends = *until <= second;
            if ends {
                as_they_end.ended(outcome, kept(outcome));
            }
            !ends
        });
        assert!(as_they_end.minutes_open() <= 3);
    }
    held.iter().for_each(|(_, outcome)| as_they_end.ended(outcome, kept(outcome)));
    let run = RunFacts { duration: Duration::from_secs(300), ..RunFacts::default() };
    let at_once = Tally::of(&outcomes, &[], &[], &SLO, |_| 100.0);
    assert_eq!(as_they_end.summary(&run), at_once.summary(&run));
    assert_eq!(as_they_end.summary(&run).by_minute.len(), 5);
}
