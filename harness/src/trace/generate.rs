//! Traffic without a file.

use std::time::Duration;

use fastrand::Rng;

use super::{PREFIX_BLOCK_TOKENS, Trace, TraceRequest};

impl Trace {
    /// `requests` arrivals of a Poisson process at `rate_rps` per second, all of one shape and without
    /// a shared prefix. The first comes at the start; no other comes where the rate is not above 0.
    pub fn poisson(
        rate_rps: f64,
        requests: usize,
        input_tokens: u32,
        output_tokens: u32,
        seed: u64,
    ) -> Self {
        let mut random = Rng::with_seed(seed);
        let mut next_s = 0.0_f64;
        let arrivals = std::iter::from_fn(|| {
            let arrival = Duration::try_from_secs_f64(next_s).ok()?;
            // 1 − u lies in (0, 1], so that its logarithm is a number.
            next_s += -(1.0 - random.f64()).ln() / rate_rps;
            Some(TraceRequest { arrival, input_tokens, output_tokens, ..TraceRequest::default() })
        });
        Self {
            name: "poisson".to_owned(),
            requests: arrivals.take(requests).collect(),
            phases: Vec::new(),
            prefix_block_tokens: PREFIX_BLOCK_TOKENS,
        }
    }
}
