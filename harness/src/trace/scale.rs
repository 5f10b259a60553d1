//! More load, or less, of the same traffic.

use std::time::Duration;

use fastrand::Rng;

use super::{Trace, TraceRequest};

const JITTER_S: f64 = 1.0;
/// Odd, and without a pattern of its own: 2^64 over the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Trace {
    /// The same traffic at `factor` times the rate.
    ///
    /// A **composite** (its requests name phases) repeats each request ⌊factor + u⌋ times, u drawn
    /// anew from [0, 1) for each, so that phases keep their length. The first copy arrives when the
    /// request did; each other one within ±1 s of it, never before the trace starts or after it
    /// ends, and with a prefix of its own: copies share prefixes with the same copies of other
    /// requests only. A **single** trace runs `factor` times as fast.
    ///
    /// Equal arguments give equal traces, and of two factors with one seed the larger gives a
    /// composite's requests and some more, at the same times. `factor` is a number above 0; for any
    /// other there is no traffic.
    #[must_use]
    pub fn scaled(&self, factor: f64, seed: u64) -> Self {
        let factor = if factor.is_finite() && factor > 0.0 { factor } else { 0.0 };
        let requests = if factor == 0.0 {
            Vec::new()
        } else if self.is_composite() {
            self.replicated(factor, seed)
        } else {
            self.requests.iter().map(|request| faster(request, factor)).collect()
        };
        Self {
            name: self.name.clone(),
            requests,
            phases: self.phases.clone(),
            prefix_block_tokens: self.prefix_block_tokens,
        }
    }

    fn replicated(&self, factor: f64, seed: u64) -> Vec<TraceRequest> {
        let end_s = self.duration().as_secs_f64();
        let mut requests = Vec::new();
        for (index, request) in (0_u64..).zip(&self.requests) {
            // Its own stream for each request: how often one is repeated moves no other.
            let mut random = Rng::with_seed(seed.wrapping_add(index.wrapping_mul(SPREAD)));
            let copies = factor + random.f64();
            let mut copy = 0_u32;
            while f64::from(copy) + 1.0 <= copies {
                requests.push(if copy == 0 {
                    request.clone()
                } else {
                    let jitter_s = JITTER_S * (2.0 * random.f64() - 1.0);
                    let arrival_s = request.arrival.as_secs_f64() + jitter_s;
                    let arrival_s = arrival_s.clamp(0.0, end_s);
                    TraceRequest {
                        arrival: Duration::try_from_secs_f64(arrival_s).unwrap_or(request.arrival),
                        prefix_blocks: namespaced(&request.prefix_blocks, copy),
                        ..*request
                    }
                });
                copy += 1;
            }
        }
        requests.shrink_to_fit();
        requests.sort_by_key(|request| request.arrival);
        requests
    }
}

fn faster(request: &TraceRequest, factor: f64) -> TraceRequest {
    let arrival = Duration::try_from_secs_f64(request.arrival.as_secs_f64() / factor);
    TraceRequest { arrival: arrival.unwrap_or(Duration::MAX), ..request.clone() }
}

/// Names that no other copy has, but for a chance of 2⁻⁶⁴ each.
fn namespaced(blocks: &[u64], copy: u32) -> Box<[u64]> {
    let namespace = u64::from(copy).wrapping_mul(SPREAD);
    blocks.iter().map(|block| Rng::with_seed(block ^ namespace).u64(..)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn traces(phases: usize) -> impl Strategy<Value = Trace> {
        let request =
            (0_u64..600_000, 1_u32..4000, 1_u32..500, prop::collection::vec(0_u64..50, 0..4));
        prop::collection::vec(request, 1..80).prop_map(move |mut requests| {
            requests.sort_by_key(|request| request.0);
            let start = requests[0].0;
            let requests = requests.into_iter().enumerate().map(|(index, request)| TraceRequest {
                arrival: Duration::from_millis(request.0 - start),
                input_tokens: request.1,
                output_tokens: request.2,
                prefix_blocks: request.3.into(),
                phase: (phases > 0).then(|| u16::try_from(index % phases.max(1)).unwrap()),
            });
            Trace {
                name: "any".into(),
                requests: requests.collect(),
                phases: (0..phases).map(|phase| phase.to_string()).collect(),
                prefix_block_tokens: 512,
            }
        })
    }

    fn is_in_order(trace: &Trace) -> bool {
        trace.requests.is_sorted_by_key(|request| request.arrival)
    }

    proptest! {
        #[test]
        fn one_times_a_trace_is_the_trace(trace in prop_oneof![traces(0), traces(3)], seed: u64) {
            prop_assert_eq!(trace.scaled(1.0, seed), trace);
        }

        #[test]
        fn a_single_trace_runs_faster(trace in traces(0), factor in 0.1_f64..20.0, seed: u64) {
            let scaled = trace.scaled(factor, seed);
            prop_assert!(is_in_order(&scaled));
            prop_assert_eq!(scaled.requests.len(), trace.requests.len());
            let expected = trace.duration().as_secs_f64() / factor;
            prop_assert!((scaled.duration().as_secs_f64() - expected).abs() < 1e-6);
        }

        #[test]
        fn a_composite_keeps_its_time(trace in traces(3), factor in 0.1_f64..20.0, seed: u64) {
            let scaled = trace.scaled(factor, seed);
            prop_assert_eq!(&scaled, &trace.scaled(factor, seed));
            prop_assert!(is_in_order(&scaled));
            prop_assert!(scaled.duration() <= trace.duration());
            // Each request has ⌊factor⌋ copies, or one more.
            let (least, len) = (factor.floor(), trace.requests.len() as f64);
            prop_assert!(scaled.requests.len() as f64 >= least * len);
            prop_assert!(scaled.requests.len() as f64 <= (least + 1.0) * len);
            let phases = |trace: &Trace| {
                let of = |phase| trace.requests.iter().filter(move |r| r.phase == Some(phase)).count();
                [of(0), of(1), of(2)]
            };
            for (scaled, once) in phases(&scaled).into_iter().zip(phases(&trace)) {
                prop_assert!((scaled as f64) >= least * once as f64);
                prop_assert!((scaled as f64) <= (least + 1.0) * once as f64);
            }
        }

        #[test]
        fn a_heavier_load_holds_the_lighter(
            trace in traces(2), lighter in 0.1_f64..6.0, more in 0.0_f64..4.0, seed: u64,
        ) {
            let heavier = trace.scaled(lighter + more, seed).requests;
            let mut left = heavier.iter();
            let mut missing = trace.scaled(lighter, seed).requests;
            missing.retain(|request| !left.any(|other| other == request));
            // Requests of one instant may stand in another order.
            prop_assert!(missing.iter().all(|request| heavier.contains(request)));
        }
    }

    #[test]
    fn copies_share_prefixes_with_their_like_only() {
        let request = |ms, blocks: &[u64]| TraceRequest {
            arrival: Duration::from_millis(ms),
            input_tokens: 1024,
            output_tokens: 1,
            prefix_blocks: blocks.into(),
            phase: Some(0),
        };
        let trace = Trace {
            requests: vec![request(0, &[7, 8]), request(60_000, &[7, 9])],
            phases: vec!["a".into()],
            ..Trace::default()
        };
        let scaled = trace.scaled(3.0, 5);
        let (first, second) = scaled.requests.split_at(3);
        let heads = |requests: &[TraceRequest]| {
            let mut heads: Vec<_> = requests.iter().map(|r| r.prefix_blocks[0]).collect();
            heads.sort_unstable();
            heads
        };
        assert_eq!(heads(first), heads(second));
        let mut all = heads(first);
        all.dedup();
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn no_factor_no_traffic() {
        let trace = Trace { requests: vec![TraceRequest::default()], ..Trace::default() };
        for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(trace.scaled(factor, 0).requests.is_empty());
        }
    }
}
