//! More load, or less, of the same traffic.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use fastrand::Rng;

use super::{Trace, TraceRequest};

const JITTER: Duration = Duration::from_secs(1);
/// Odd, and without a pattern of its own: 2^64 over the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// A trace at some other rate, made request by request: of a composite's copies only those of the next
/// second are there at a time, whatever the factor.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    pub trace: &'a Trace,
    /// Of the trace's own rate.
    pub factor: f64,
    pub seed: u64,
}

/// What a load comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadExtent {
    pub requests: usize,
    pub last_arrival: Duration,
    /// How many requests there are of each length.
    pub input_tokens: BTreeMap<u32, usize>,
    pub output_tokens: BTreeMap<u32, usize>,
}

impl Trace {
    /// The same traffic at `factor` times the rate.
    ///
    /// A **composite** (its requests name phases) repeats each request ⌊factor + u⌋ times, u drawn
    /// anew from [0, 1) for each, so that phases keep their length. The first copy arrives when the
    /// request did; each other one within ±1 s of it, never before the trace starts or after it
    /// ends, and with a prefix of its own: copies share prefixes with the same copies of other
    /// requests only. A **single** trace runs `factor` times as fast.
    ///
    /// Equal arguments give equal loads, and of two factors with one seed the larger gives a
    /// composite's requests and some more, at the same times. `factor` is a number above 0; for any
    /// other there is no traffic.
    #[must_use]
    pub fn at(&self, factor: f64, seed: u64) -> Load<'_> {
        let factor = if factor.is_finite() && factor > 0.0 { factor } else { 0.0 };
        Load { trace: self, factor, seed }
    }

    /// [`Trace::at`], all requests at once.
    #[must_use]
    pub fn scaled(&self, factor: f64, seed: u64) -> Self {
        Self {
            name: self.name.clone(),
            requests: self.at(factor, seed).requests().collect(),
            phases: self.phases.clone(),
            prefix_block_tokens: self.prefix_block_tokens,
        }
    }
}

impl<'a> From<&'a Trace> for Load<'a> {
    /// The trace as it is.
    fn from(trace: &'a Trace) -> Self {
        trace.at(1.0, 0)
    }
}

impl<'a> Load<'a> {
    /// In the order of their arrival.
    pub fn requests(&self) -> impl Iterator<Item = TraceRequest> + use<'a> {
        let trace = self.trace;
        self.arrivals().map(move |Arrival { at, request, copy }| {
            let request = &trace.requests[request];
            let prefix_blocks = match copy {
                0 => request.prefix_blocks.clone(),
                _ => namespaced(&request.prefix_blocks, copy),
            };
            TraceRequest { arrival: at, prefix_blocks, ..*request }
        })
    }

    pub fn extent(&self) -> LoadExtent {
        let mut extent = LoadExtent::default();
        for Arrival { at, request, .. } in self.arrivals() {
            let request = &self.trace.requests[request];
            extent.requests += 1;
            extent.last_arrival = at;
            *extent.input_tokens.entry(request.input_tokens).or_default() += 1;
            *extent.output_tokens.entry(request.output_tokens).or_default() += 1;
        }
        extent
    }

    /// Arrivals per second between the first and the last; 0 where no time lies between them.
    pub fn rate_rps(&self) -> f64 {
        let (requests, last) =
            self.arrivals().fold((0_usize, Duration::ZERO), |(n, _), next| (n + 1, next.at));
        let seconds = last.as_secs_f64();
        if seconds > 0.0 { requests.saturating_sub(1) as f64 / seconds } else { 0.0 }
    }

    fn arrivals(&self) -> Arrivals<'a> {
        Arrivals {
            load: *self,
            end_s: self.trace.duration().as_secs_f64(),
            next: 0,
            drawn: BinaryHeap::new(),
        }
    }
}

/// One request of a load; equal times go in the order of the trace, and of the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    at: Duration,
    /// Place in the trace.
    request: usize,
    copy: u32,
}

struct Arrivals<'a> {
    load: Load<'a>,
    end_s: f64,
    /// Place in the trace of the first request that is not drawn.
    next: usize,
    drawn: BinaryHeap<Reverse<Arrival>>,
}

impl Iterator for Arrivals<'_> {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        let Load { trace, factor, .. } = self.load;
        if factor == 0.0 {
            return None;
        }
        while let Some(request) = trace.requests.get(self.next) {
            // No copy of those that follow comes before the one that is first here. A millisecond for rounding.
            let earliest = request.arrival.saturating_sub(JITTER + Duration::from_millis(1));
            if self.drawn.peek().is_some_and(|Reverse(first)| first.at < earliest) {
                break;
            }
            if !trace.is_composite() {
                let at = Duration::try_from_secs_f64(request.arrival.as_secs_f64() / factor);
                self.next += 1;
                let at = at.unwrap_or(Duration::MAX);
                return Some(Arrival { at, request: self.next - 1, copy: 0 });
            }
            self.draw(request.arrival);
            self.next += 1;
        }
        self.drawn.pop().map(|Reverse(first)| first)
    }
}

impl Arrivals<'_> {
    /// All copies of the next request.
    fn draw(&mut self, arrival: Duration) {
        // Its own stream for each request: how often one is repeated moves no other.
        let stream = (self.next as u64).wrapping_mul(SPREAD);
        let mut random = Rng::with_seed(self.load.seed.wrapping_add(stream));
        let copies = self.load.factor + random.f64();
        let mut copy = 0_u32;
        while f64::from(copy) + 1.0 <= copies {
            let at = if copy == 0 {
                arrival
            } else {
                let jitter_s = JITTER.as_secs_f64() * (2.0 * random.f64() - 1.0);
                let at_s = (arrival.as_secs_f64() + jitter_s).clamp(0.0, self.end_s);
                Duration::try_from_secs_f64(at_s).unwrap_or(arrival)
            };
            self.drawn.push(Reverse(Arrival { at, request: self.next, copy }));
            copy += 1;
        }
    }
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
        fn a_load_is_counted_as_it_comes(
            trace in prop_oneof![traces(0), traces(3)], factor in 0.1_f64..20.0, seed: u64,
        ) {
            let (load, scaled) = (trace.at(factor, seed), trace.scaled(factor, seed));
            let extent = load.extent();
            prop_assert_eq!(extent.requests, scaled.requests.len());
            prop_assert_eq!(extent.last_arrival, scaled.duration());
            prop_assert_eq!(extent.input_tokens.values().sum::<usize>(), extent.requests);
            prop_assert_eq!(extent.output_tokens.values().sum::<usize>(), extent.requests);
            prop_assert_eq!(load.rate_rps().to_bits(), scaled.rate_rps().to_bits());
        }

        #[test]
        fn copies_are_drawn_when_they_are_due(trace in traces(3), seed: u64) {
            let mut arrivals = trace.at(4.0, seed).arrivals();
            while let Some(arrival) = arrivals.next() {
                let due = arrival.at + 2 * JITTER + Duration::from_secs(1);
                let early = |Reverse(drawn): &Reverse<Arrival>| trace.requests[drawn.request].arrival > due;
                prop_assert!(!arrivals.drawn.iter().any(early));
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
