use std::collections::BTreeMap;

use crate::trace::LoadExtent;

/// That enough requests still meet their SLOs: of all, and of the tenths with the longest inputs and outputs.
#[derive(Clone, Debug)]
pub struct Hope {
    all: Allowance,
    longest_inputs: Allowance,
    longest_outputs: Allowance,
}

/// Of requests of so many tokens at least, so many may still miss.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    from_tokens: u32,
    left: Option<usize>,
}

impl Hope {
    /// `attainment` is asked of all requests, `min_decile` of the longest ones; as
    /// [`Summary`](crate::summary::Summary) counts them.
    pub fn of(load: &LoadExtent, attainment: f64, min_decile: f64) -> Self {
        Self {
            all: Allowance { from_tokens: 0, left: Some(may_miss(load.requests, attainment)) },
            longest_inputs: Allowance::of_longest_decile(&load.input_tokens, min_decile),
            longest_outputs: Allowance::of_longest_decile(&load.output_tokens, min_decile),
        }
    }

    /// A request misses an SLO for certain.
    pub(super) fn miss(&mut self, input_tokens: u32, output_tokens: u32) {
        self.all.miss(input_tokens);
        self.longest_inputs.miss(input_tokens);
        self.longest_outputs.miss(output_tokens);
    }

    pub(super) fn is_lost(&self) -> bool {
        let kinds = [self.all, self.longest_inputs, self.longest_outputs];
        kinds.iter().any(|kind| kind.left.is_none())
    }
}

impl Allowance {
    fn of_longest_decile(lengths: &BTreeMap<u32, usize>, share: f64) -> Self {
        let tenth = lengths.values().sum::<usize>().div_ceil(10);
        let (mut from_tokens, mut of) = (0, 0);
        for (tokens, requests) in lengths.iter().rev() {
            if of >= tenth {
                break;
            }
            (from_tokens, of) = (*tokens, of + requests);
        }
        Self { from_tokens, left: Some(may_miss(of, share)) }
    }

    fn miss(&mut self, tokens: u32) {
        if tokens >= self.from_tokens {
            self.left = self.left.and_then(|left| left.checked_sub(1));
        }
    }
}

/// The most that leave this share of `of`.
fn may_miss(of: usize, share: f64) -> usize {
    let is_met = |missed: usize| (of - missed) as f64 >= share * of as f64;
    // Rounded either way.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let about = ((1.0 - share) * of as f64).ceil() as usize;
    (0..=about.min(of)).rev().find(|missed| is_met(*missed)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{Load, Trace, TraceRequest};

    fn extent(lengths: impl Iterator<Item = (u32, u32)>) -> LoadExtent {
        let requests = lengths.map(|(input_tokens, output_tokens)| TraceRequest {
            input_tokens,
            output_tokens,
            ..TraceRequest::default()
        });
        let trace = Trace { requests: requests.collect(), ..Trace::default() };
        Load::from(&trace).extent()
    }

    #[test]
    fn a_tenth_of_all_may_miss_and_no_more() {
        let mut hope = Hope::of(&extent((0..30).map(|_| (1, 1))), 0.9, 0.0);
        for _ in 0..3 {
            hope.miss(1, 1);
        }
        assert!(!hope.is_lost());
        hope.miss(1, 1);
        assert!(hope.is_lost());
    }

    #[test]
    fn the_longest_have_an_allowance_of_their_own() {
        let lengths = || (0..100).map(|i| (i, 100 - i));
        for (missed, (input, output)) in [((0..2), (99, 1)), ((0..2), (1, 99))] {
            let mut hope = Hope::of(&extent(lengths()), 0.9, 0.8);
            for _ in missed {
                hope.miss(input, output);
            }
            assert!(!hope.is_lost(), "two of ten");
            hope.miss(89, 10);
            assert!(!hope.is_lost(), "neither of the longest inputs nor outputs");
            hope.miss(input, output);
            assert!(hope.is_lost());
        }
    }

    #[test]
    fn an_allowance_is_what_the_share_leaves() {
        for of in 0..500 {
            for share in [0.0, 0.8, 0.9, 0.99, 1.0] {
                let most = may_miss(of, share);
                let met = |missed: usize| (of - missed) as f64 / of.max(1) as f64 >= share;
                assert!(most == 0 || met(most), "{most} of {of} for {share}");
                assert!(most >= of || !met(most + 1), "{most} of {of} for {share}");
            }
        }
    }
}
