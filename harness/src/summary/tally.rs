use std::{collections::BTreeMap, time::Duration};

use super::{
    FleetSample, RunFacts, Share, Spread, Summary, Timeline, by_minute::Minutes, latencies, ratio,
};
use crate::outcome::{Fate, Kept, Outcome, Slo};

/// What requests came to, counted as they end. It keeps none of them: its room grows with the length of a run, the
/// lengths of its requests and the span of their latencies, and not with how many there were.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Names that outcomes' phases refer to.
    phases: Vec<String>,
    by_phase: Vec<Share>,
    both: Share,
    in_ttft: Share,
    in_tbt: Share,
    by_input_tokens: BTreeMap<u32, Share>,
    by_output_tokens: BTreeMap<u32, Share>,
    minutes: Minutes,
    timeline: Timeline,
    completed: usize,
    rejected: usize,
    unfinished: usize,
    disaggregated: usize,
    kv_bytes_moved: u64,
    /// These three of completed requests.
    input_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    /// Completed requests whose answers have no gaps; their `tbt_ms` and `tpot_ms` are 0.
    of_one_token: usize,
    ttft_ms: Spread,
    tbt_ms: Spread,
    tpot_ms: Spread,
    e2e_ms: Spread,
}

impl Tally {
    pub fn new(phases: &[String]) -> Self {
        let by_phase = vec![Share::default(); phases.len()];
        Self { phases: phases.to_owned(), by_phase, ..Self::default() }
    }

    /// Of a run that is over, with samples in the order of time. `unloaded_prefill_ms` tells what the prefill of so many tokens takes on an idle worker
    /// with an empty cache.
    pub fn of(
        outcomes: &[Outcome],
        samples: &[(Duration, FleetSample)],
        phases: &[String],
        slo: &Slo,
        unloaded_prefill_ms: impl Fn(u32) -> f64,
    ) -> Self {
        let mut tally = Self::new(phases);
        outcomes.iter().for_each(|outcome| tally.arrived(outcome.arrival));
        samples.iter().for_each(|(at, sample)| tally.sampled(*at, sample));
        for outcome in outcomes {
            let kept = slo.kept(&outcome.fate, unloaded_prefill_ms(outcome.input_tokens));
            tally.ended(outcome, kept);
        }
        tally
    }

    /// A request came, which will [end](Self::ended). Once one of a later minute has ended those of a former come no
    /// more.
    pub fn arrived(&mut self, at: Duration) {
        self.minutes.arrived(at);
        self.timeline.arrived(at);
    }

    /// How the fleet stood then; in the order of time.
    pub fn sampled(&mut self, at: Duration, sample: &FleetSample) {
        self.minutes.sampled(at, sample);
        self.timeline.sampled(at, sample);
    }

    pub fn ended(&mut self, outcome: &Outcome, kept: Kept) {
        self.minutes.ended(outcome, kept);
        self.both.count(kept.both());
        self.in_ttft.count(kept.ttft);
        self.in_tbt.count(kept.tbt);
        self.by_input_tokens.entry(outcome.input_tokens).or_default().count(kept.both());
        self.by_output_tokens.entry(outcome.output_tokens).or_default().count(kept.both());
        let of_phase = outcome.phase.and_then(|phase| self.by_phase.get_mut(usize::from(phase)));
        if let Some(of_phase) = of_phase {
            of_phase.count(kept.both());
        }
        self.disaggregated += usize::from(outcome.disaggregated);
        self.kv_bytes_moved += outcome.kv_bytes_moved;
        match outcome.fate {
            Fate::Completed(_) => self.completed += 1,
            Fate::Rejected => self.rejected += 1,
            Fate::Unfinished => self.unfinished += 1,
        }
        let Some(latencies) = latencies(outcome) else { return };
        self.input_tokens += u64::from(outcome.input_tokens);
        self.cached_tokens += u64::from(outcome.cached_tokens);
        self.output_tokens += u64::from(outcome.output_tokens);
        self.ttft_ms.push(latencies.ttft_ms);
        self.e2e_ms.push(latencies.e2e_ms);
        self.of_one_token += usize::from(outcome.output_tokens <= 1);
        self.tbt_ms.push(latencies.tbt_ms);
        self.tpot_ms.push(latencies.tpot_ms);
    }

    #[cfg(test)]
    pub(super) fn minutes_open(&self) -> usize {
        self.minutes.open()
    }

    pub fn requests(&self) -> usize {
        self.both.all
    }

    /// Of the completed requests.
    pub fn ttft_ms(&self) -> &Spread {
        &self.ttft_ms
    }

    /// Of the completed requests; 0 where there is one token.
    pub fn tbt_ms(&self) -> &Spread {
        &self.tbt_ms
    }

    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    pub fn summary(&self, run: &RunFacts) -> Summary {
        let duration_s = run.duration.as_secs_f64();
        let per_second = |count: f64| if duration_s > 0.0 { count / duration_s } else { 0.0 };
        let by_phase = self.phases.iter().zip(&self.by_phase);
        Summary {
            requests: self.requests(),
            completed: self.completed,
            rejected: self.rejected,
            unfinished: self.unfinished,
            duration_s,
            goodput_rps: per_second(self.both.kept as f64),
            attainment: self.both.ratio(),
            attainment_ttft: self.in_ttft.ratio(),
            attainment_tbt: self.in_tbt.ratio(),
            attainment_longest_input_decile: of_longest_decile(&self.by_input_tokens),
            attainment_longest_output_decile: of_longest_decile(&self.by_output_tokens),
            attainment_by_phase: by_phase.map(|(name, of)| (name.clone(), of.ratio())).collect(),
            ttft_ms: self.ttft_ms.ranks().percentiles_above(0),
            tbt_ms: self.tbt_ms.ranks().percentiles_above(self.of_one_token),
            tpot_ms: self.tpot_ms.ranks().percentiles_above(self.of_one_token),
            e2e_ms: self.e2e_ms.ranks().percentiles_above(0),
            output_tokens_per_s: per_second(self.output_tokens as f64),
            prefix_hit_ratio: ratio(self.cached_tokens as f64, self.input_tokens as f64),
            kv_bytes_moved: self.kv_bytes_moved,
            disaggregated: self.disaggregated,
            flips: run.flips,
            workers_seconds: run.workers_seconds,
            by_minute: self.minutes.summed_up(),
        }
    }
}

fn of_longest_decile(by_length: &BTreeMap<u32, Share>) -> f64 {
    let tenth = by_length.values().map(|share| share.all).sum::<usize>().div_ceil(10);
    let mut longest = Share::default();
    for share in by_length.values().rev() {
        if longest.all >= tenth {
            break;
        }
        longest.kept += share.kept;
        longest.all += share.all;
    }
    longest.ratio()
}
