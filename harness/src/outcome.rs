//! What became of one request, simulated or live.

use std::time::Duration;

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

/// What an operator promises. A request that was rejected or not finished misses it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    pub ttft_ms: f64,
    /// Times the unloaded prefill of the request, added to `ttft_ms`.
    pub ttft_prefill_factor: f64,
    /// Held against a request's `tbt_ms`.
    pub itl_ms: f64,
}

impl Slo {
    /// `unloaded_prefill_ms`: what the request's prefill takes on an idle worker with an empty cache.
    pub fn ttft_limit_ms(&self, unloaded_prefill_ms: f64) -> f64 {
        self.ttft_ms + self.ttft_prefill_factor * unloaded_prefill_ms
    }
}
