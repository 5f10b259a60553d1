//! What is asked of the pools: rates of arrival, which no saturation hides, and the lengths of
//! answers, which are known only of those that are complete.

use std::time::Duration;

use baton_types::StepModel;

/// A rate is known after this part of its window,
const KNOWN_AFTER: f64 = 0.5;
/// from so many arrivals.
const KNOWN_FROM: f64 = 5.0;

/// A request came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    pub prompt_tokens: u32,
    /// Of these, what its worker is believed to have cached.
    pub hit_tokens: u32,
}

/// An answer is complete.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    pub prompt_tokens: u32,
    pub output_tokens: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    requests: f64,
    /// Tokens that are computed, and what of their squares: the two parts of a prefill's cost.
    tokens: f64,
    squares: f64,
    prompt_tokens: f64,
    answers: f64,
    output_tokens: f64,
    /// Over all output tokens, the tokens that lie before each.
    output_context: f64,
}

impl Sums {
    fn fade(&mut self, keep: f64, fresh: &Self) {
        let add = |sum: &mut f64, fresh: f64| *sum = *sum * keep + fresh;
        add(&mut self.requests, fresh.requests);
        add(&mut self.tokens, fresh.tokens);
        add(&mut self.squares, fresh.squares);
        add(&mut self.prompt_tokens, fresh.prompt_tokens);
        add(&mut self.answers, fresh.answers);
        add(&mut self.output_tokens, fresh.output_tokens);
        add(&mut self.output_context, fresh.output_context);
    }
}

/// Sums that fade exponentially, and the seconds that they stand for.
#[derive(Debug)]
pub(super) struct View {
    window_s: f64,
    sums: Sums,
    seconds: f64,
}

impl View {
    fn new(window: Duration) -> Self {
        Self { window_s: window.as_secs_f64().max(1e-3), sums: Sums::default(), seconds: 0.0 }
    }

    fn fold(&mut self, passed: Duration, fresh: &Sums) {
        let passed_s = passed.as_secs_f64();
        let keep = (-passed_s / self.window_s).exp();
        self.sums.fade(keep, fresh);
        self.seconds = self.seconds * keep + passed_s;
    }

    fn per_s(&self, sum: f64) -> f64 {
        if self.seconds > 0.0 { sum / self.seconds } else { 0.0 }
    }

    /// Milliseconds of prefill that come each second, for a worker of this model.
    pub(super) fn prefill_ms_per_s(&self, model: &StepModel) -> f64 {
        let [_, per_token, per_square] = model.prefill_ms;
        self.per_s(per_token * self.sums.tokens + per_square * self.sums.squares)
    }

    /// Output tokens that will be asked for each second.
    pub(super) fn output_tokens_per_s(&self) -> f64 {
        if self.sums.answers <= 0.0 {
            return 0.0;
        }
        self.per_s(self.sums.requests) * self.sums.output_tokens / self.sums.answers
    }

    /// Tokens before one of an answer, in the mean over all output tokens.
    pub(super) fn decode_context_tokens(&self) -> f64 {
        if self.sums.output_tokens > 0.0 {
            self.sums.output_context / self.sums.output_tokens
        } else {
            0.0
        }
    }

    /// What the mean prompt costs alone: all of its TTFT that it does not wait.
    pub(super) fn prefill_alone_ms(&self, model: &StepModel) -> f64 {
        let [fixed, per_token, per_square] = model.prefill_ms;
        let Sums { requests, tokens, squares, .. } = self.sums;
        if requests > 0.0 {
            fixed + (per_token * tokens + per_square * squares) / requests
        } else {
            fixed
        }
    }

    pub(super) fn prompt_tokens(&self) -> f64 {
        if self.sums.requests > 0.0 { self.sums.prompt_tokens / self.sums.requests } else { 0.0 }
    }
}

#[derive(Debug)]
pub(super) struct Demand {
    pub(super) short: View,
    /// Over a dwell: what is given away does not come back sooner.
    pub(super) long: View,
    /// Since the last look.
    fresh: Sums,
    arrivals: f64,
}

impl Demand {
    pub(super) fn new(window: Duration, dwell: Duration) -> Self {
        Self {
            short: View::new(window),
            long: View::new(dwell.max(window)),
            fresh: Sums::default(),
            arrivals: 0.0,
        }
    }

    pub(super) fn arrived(&mut self, arrival: &Arrival) {
        let (all, hit) = (f64::from(arrival.prompt_tokens), f64::from(arrival.hit_tokens));
        self.fresh.requests += 1.0;
        self.fresh.tokens += (all - hit).max(0.0);
        self.fresh.squares += (all * all - hit * hit).max(0.0);
        self.fresh.prompt_tokens += all;
        self.arrivals += 1.0;
    }

    pub(super) fn answered(&mut self, answer: &Answer) {
        let (prompt, output) = (f64::from(answer.prompt_tokens), f64::from(answer.output_tokens));
        self.fresh.answers += 1.0;
        self.fresh.output_tokens += output;
        self.fresh.output_context += output * (prompt + output / 2.0);
    }

    pub(super) fn fold(&mut self, passed: Duration) {
        let fresh = std::mem::take(&mut self.fresh);
        self.short.fold(passed, &fresh);
        self.long.fold(passed, &fresh);
    }

    /// It was watched for long enough, and if anything came some of it was answered.
    pub(super) fn is_known(&self) -> bool {
        let watched = self.short.seconds >= KNOWN_AFTER * self.short.window_s;
        let is_idle = self.arrivals == 0.0;
        watched && (is_idle || (self.arrivals >= KNOWN_FROM && self.long.sums.answers > 0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_right_from_the_start_and_forget() {
        let mut demand = Demand::new(Duration::from_secs(10), Duration::from_secs(60));
        let second = |demand: &mut Demand, requests: u32| {
            for _ in 0..requests {
                demand.arrived(&Arrival { prompt_tokens: 100, hit_tokens: 20 });
                demand.answered(&Answer { prompt_tokens: 100, output_tokens: 50 });
            }
            demand.fold(Duration::from_secs(1));
        };
        let model = StepModel {
            prefill_ms: [5.0, 0.1, 0.0],
            decode_ms: [1.0, 1.0, 0.0],
            prefill_interference_factor: 1.0,
        };
        for _ in 0..8 {
            second(&mut demand, 3);
        }
        assert!(demand.is_known());
        for view in [&demand.short, &demand.long] {
            assert!((view.prefill_ms_per_s(&model) - 3.0 * 8.0).abs() < 2.0);
            assert!((view.output_tokens_per_s() - 150.0).abs() < 12.0);
            assert!((view.decode_context_tokens() - 125.0).abs() < 1e-9);
            assert!((view.prefill_alone_ms(&model) - 13.0).abs() < 1e-9);
            assert!((view.prompt_tokens() - 100.0).abs() < 1e-9);
        }
        for _ in 0..30 {
            second(&mut demand, 0);
        }
        assert!(demand.short.prefill_ms_per_s(&model) < 24.0 * 0.06);
        assert!(demand.long.prefill_ms_per_s(&model) > 24.0 * 0.1);
        assert!((demand.short.decode_context_tokens() - 125.0).abs() < 1e-9, "no rate");
    }
}
