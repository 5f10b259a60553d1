//! What became of one request, simulated or live.

mod gaps;

use std::time::Duration;

pub use gaps::Gaps;
use serde::Serialize;

#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Since the start of the run.
    pub arrival: Duration,
    pub input_tokens: u32,
    /// Asked for; of a completed request also what came.
    pub output_tokens: u32,
    /// Index into the trace's phases.
    pub phase: Option<u16>,
    pub fate: Fate,
    /// Prompt tokens that were not computed, since a prefix cache held them.
    pub cached_tokens: u32,
    /// Bytes of KV that crossed from one worker to another for it.
    pub kv_bytes_moved: u64,
    pub disaggregated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    Completed(Latencies),
    /// Turned away, with an error.
    Rejected,
    /// Had no last token when the run ended.
    Unfinished,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latencies {
    /// From arrival to the first token: queueing, prefill and transfer of KV are in it.
    pub ttft_ms: f64,
    /// Mean of the longest tenth (at least one) of the gaps between tokens; 0 where there is one token.
    pub tbt_ms: f64,
    /// Mean gap: (last token − first token) / (tokens − 1); 0 where there is one token.
    pub tpot_ms: f64,
    /// From arrival to the last token.
    pub e2e_ms: f64,
}

impl Latencies {
    /// From when the request arrived and each of its tokens came, all on one clock; none where no token
    /// came. Times that run backwards count as none.
    pub fn of(arrival: Duration, tokens: &[Duration]) -> Option<Self> {
        let (first, last) = (*tokens.first()?, *tokens.last()?);
        let mut gaps = Gaps::default();
        for pair in tokens.windows(2) {
            gaps.push(ms(pair[1].saturating_sub(pair[0])));
        }
        Some(Self::of_gaps(arrival, first, last, &mut gaps))
    }

    /// From the first and the last token, and the gaps that lie between all of them.
    pub fn of_gaps(arrival: Duration, first: Duration, last: Duration, gaps: &mut Gaps) -> Self {
        let between = ms(last.saturating_sub(first));
        Self {
            ttft_ms: ms(first.saturating_sub(arrival)),
            tbt_ms: gaps.tbt_ms(),
            tpot_ms: if gaps.is_empty() { 0.0 } else { between / gaps.len() as f64 },
            e2e_ms: ms(last.saturating_sub(arrival)),
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Which of the promises a request saw kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub ttft: bool,
    pub tbt: bool,
}

impl Kept {
    pub fn both(self) -> bool {
        self.ttft && self.tbt
    }
}

/// What an operator promises. A request that was rejected or not finished misses it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    pub ttft_ms: f64,
    /// Times the unloaded prefill of the request, added to `ttft_ms`.
    pub ttft_prefill_factor: f64,
    /// Held against a request's `tbt_ms`.
    pub itl_ms: f64,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the SLO's {field} is {value}: expected {expected}")]
pub struct SloError {
    field: &'static str,
    value: f64,
    expected: &'static str,
}

impl Slo {
    /// # Errors
    /// A promise that nobody could keep, or that is not a number.
    pub fn check(&self) -> Result<(), SloError> {
        let above = "milliseconds above 0";
        for (field, value) in [("ttft_ms", self.ttft_ms), ("itl_ms", self.itl_ms)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(SloError { field, value, expected: above });
            }
        }
        let value = self.ttft_prefill_factor;
        if !(value.is_finite() && value >= 0.0) {
            let expected = "a number from 0 up";
            return Err(SloError { field: "ttft_prefill_factor", value, expected });
        }
        Ok(())
    }

    /// `unloaded_prefill_ms`: what the request's prefill takes on an idle worker with an empty cache.
    pub fn ttft_limit_ms(&self, unloaded_prefill_ms: f64) -> f64 {
        self.ttft_ms + self.ttft_prefill_factor * unloaded_prefill_ms
    }

    /// Neither, of a request that was not completed.
    pub fn kept(&self, fate: &Fate, unloaded_prefill_ms: f64) -> Kept {
        match fate {
            Fate::Completed(latencies) => Kept {
                ttft: latencies.ttft_ms <= self.ttft_limit_ms(unloaded_prefill_ms),
                tbt: latencies.tbt_ms <= self.itl_ms,
            },
            Fate::Rejected | Fate::Unfinished => Kept { ttft: false, tbt: false },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: &[u64]) -> Vec<Duration> {
        ms.iter().copied().map(Duration::from_millis).collect()
    }

    #[test]
    fn latencies_are_what_the_field_calls_so() {
        // 11 gaps: 10 ms each, but one of 100 and one of 50; the longest tenth are two.
        let mut tokens = vec![300];
        for gap in [10, 10, 100, 10, 10, 10, 50, 10, 10, 10, 10] {
            tokens.push(tokens.last().unwrap() + gap);
        }
        let latencies = Latencies::of(Duration::from_millis(200), &at(&tokens)).unwrap();
        assert!((latencies.ttft_ms - 100.0).abs() < 1e-9);
        assert!((latencies.tbt_ms - 75.0).abs() < 1e-9);
        assert!((latencies.tpot_ms - 240.0 / 11.0).abs() < 1e-9);
        assert!((latencies.e2e_ms - 340.0).abs() < 1e-9);
    }

    #[test]
    fn one_token_has_no_gaps() {
        let latencies = Latencies::of(Duration::from_millis(1), &at(&[5])).unwrap();
        assert_eq!(latencies, Latencies { ttft_ms: 4.0, tbt_ms: 0.0, tpot_ms: 0.0, e2e_ms: 4.0 });
        assert_eq!(Latencies::of(Duration::ZERO, &[]), None);
    }

    #[test]
    fn a_promise_is_kept_up_to_its_limit() {
        let slo = Slo { ttft_ms: 10.0, ttft_prefill_factor: 2.0, itl_ms: 5.0 };
        let fate = |ttft_ms, tbt_ms| {
            Fate::Completed(Latencies { ttft_ms, tbt_ms, tpot_ms: 1.0, e2e_ms: 1.0 })
        };
        assert!(slo.kept(&fate(16.0, 5.0), 3.0).both());
        assert_eq!(slo.kept(&fate(16.1, 5.0), 3.0), Kept { ttft: false, tbt: true });
        assert_eq!(slo.kept(&fate(16.0, 5.1), 3.0), Kept { ttft: true, tbt: false });
        for fate in [Fate::Rejected, Fate::Unfinished] {
            assert_eq!(slo.kept(&fate, 3.0), Kept { ttft: false, tbt: false });
        }
    }

    #[test]
    fn a_promise_must_be_one() {
        let slo = Slo { ttft_ms: 1.0, ttft_prefill_factor: 0.0, itl_ms: 1.0 };
        slo.check().unwrap();
        for (wrong, field) in [
            (Slo { ttft_ms: 0.0, ..slo }, "ttft_ms"),
            (Slo { itl_ms: f64::NAN, ..slo }, "itl_ms"),
            (Slo { ttft_prefill_factor: -1.0, ..slo }, "ttft_prefill_factor"),
        ] {
            let said = wrong.check().unwrap_err().to_string();
            assert!(said.starts_with(&format!("the SLO's {field} is ")), "{said}");
        }
    }
}
