use std::{collections::BTreeMap, time::Duration};

use super::{FleetSample, Minute, Percentiles, Share, Slot, latencies};
use crate::outcome::{Kept, Outcome};

/// Requests by the minute in which they arrived. A minute that is over, and whose requests have all ended, is summed
/// up and let go.
#[derive(Clone, Debug, Default)]
pub(super) struct Minutes {
    latest: u32,
    open: BTreeMap<u32, OpenMinute>,
    over: BTreeMap<u32, Minute>,
    sampled: BTreeMap<u32, Slot>,
}

#[derive(Clone, Debug, Default)]
struct OpenMinute {
    arrivals: usize,
    ended: Share,
    completed: usize,
    ttft_ms: Vec<f64>,
    tbt_ms: Vec<f64>,
}

impl Minutes {
    pub(super) fn arrived(&mut self, at: Duration) {
        let minute = minute_of(at);
        self.open.entry(minute).or_default().arrivals += 1;
        if minute > self.latest {
            self.latest = minute;
            let before: Vec<u32> = self.open.range(..minute).map(|(minute, _)| *minute).collect();
            before.into_iter().for_each(|minute| self.let_go(minute));
        }
    }

    pub(super) fn ended(&mut self, outcome: &Outcome, kept: Kept) {
        let minute = minute_of(outcome.arrival);
        let Some(open) = self.open.get_mut(&minute) else { return };
        open.ended.count(kept.both());
        if let Some(latencies) = latencies(outcome) {
            open.completed += 1;
            open.ttft_ms.push(latencies.ttft_ms);
            if outcome.output_tokens > 1 {
                open.tbt_ms.push(latencies.tbt_ms);
            }
        }
        if minute < self.latest {
            self.let_go(minute);
        }
    }

    pub(super) fn sampled(&mut self, at: Duration, sample: &FleetSample) {
        self.sampled.entry(minute_of(at)).or_default().sampled(sample);
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    fn let_go(&mut self, minute: u32) {
        if let Some(open) = self.open.get(&minute)
            && open.ended.all == open.arrivals
        {
            self.over.insert(minute, open.summed_up(minute));
            self.open.remove(&minute);
        }
    }

    pub(super) fn summed_up(&self) -> Vec<Minute> {
        let mut minutes = self.over.clone();
        minutes.extend(self.open.iter().map(|(minute, open)| (*minute, open.summed_up(*minute))));
        for (minute, sampled) in &self.sampled {
            let empty = Minute { minute: *minute, ..Minute::default() };
            minutes.entry(*minute).or_insert(empty).fleet = sampled.fleet().unwrap_or_default();
        }
        minutes.into_values().collect()
    }
}

fn minute_of(at: Duration) -> u32 {
    u32::try_from(at.as_secs() / 60).unwrap_or(u32::MAX)
}

impl OpenMinute {
    fn summed_up(&self, minute: u32) -> Minute {
        let ttft = Percentiles::of_values(&mut self.ttft_ms.clone());
        Minute {
            minute,
            arrivals: self.arrivals,
            completed: self.completed,
            attainment: self.ended.ratio(),
            ttft_ms_p50: ttft.p50,
            ttft_ms_p90: ttft.p90,
            tbt_ms_p90: Percentiles::of_values(&mut self.tbt_ms.clone()).p90,
            fleet: FleetSample::default(),
        }
    }
}
