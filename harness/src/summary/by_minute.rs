use std::{collections::BTreeMap, time::Duration};

use super::{FleetSample, Minute, Percentiles, latencies, share};
use crate::outcome::{Kept, Outcome};

/// What lies in one minute.
#[derive(Default)]
struct Bucket<'a> {
    requests: Vec<(&'a Outcome, Kept)>,
    samples: Vec<FleetSample>,
}

pub(super) fn of<'a>(
    judged: impl Iterator<Item = (&'a Outcome, &'a Kept)>,
    samples: &[(Duration, FleetSample)],
) -> Vec<Minute> {
    let mut buckets: BTreeMap<u32, Bucket<'_>> = BTreeMap::new();
    for (outcome, kept) in judged {
        buckets.entry(minute_of(outcome.arrival)).or_default().requests.push((outcome, *kept));
    }
    for (at, sample) in samples {
        buckets.entry(minute_of(*at)).or_default().samples.push(*sample);
    }
    buckets.into_iter().map(|(minute, bucket)| bucket.summed_up(minute)).collect()
}

fn minute_of(at: Duration) -> u32 {
    u32::try_from(at.as_secs() / 60).unwrap_or(u32::MAX)
}

impl Bucket<'_> {
    fn summed_up(&self, minute: u32) -> Minute {
        let completed = || self.requests.iter().filter_map(|(outcome, _)| latencies(outcome));
        let mut ttft_ms: Vec<_> = completed().map(|latencies| latencies.ttft_ms).collect();
        let with_gaps = self.requests.iter().filter(|(outcome, _)| outcome.output_tokens > 1);
        let mut tbt_ms: Vec<_> =
            with_gaps.filter_map(|(outcome, _)| Some(latencies(outcome)?.tbt_ms)).collect();
        let ttft = Percentiles::of_values(&mut ttft_ms);
        Minute {
            minute,
            arrivals: self.requests.len(),
            completed: completed().count(),
            attainment: share(self.requests.iter().map(|(_, kept)| kept.both())),
            ttft_ms_p50: ttft.p50,
            ttft_ms_p90: ttft.p90,
            tbt_ms_p90: Percentiles::of_values(&mut tbt_ms).p90,
            fleet: mean(&self.samples),
        }
    }
}

fn mean(samples: &[FleetSample]) -> FleetSample {
    let of = |field: fn(&FleetSample) -> f64| {
        let sum: f64 = samples.iter().map(field).sum();
        if samples.is_empty() { 0.0 } else { sum / samples.len() as f64 }
    };
    FleetSample {
        workers_prefill: of(|sample| sample.workers_prefill),
        workers_decode: of(|sample| sample.workers_decode),
        workers_mixed: of(|sample| sample.workers_mixed),
        requests_queued: of(|sample| sample.requests_queued),
        requests_running: of(|sample| sample.requests_running),
        kv_used_ratio: of(|sample| sample.kv_used_ratio),
    }
}
