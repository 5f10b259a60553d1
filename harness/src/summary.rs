//! A run in numbers.

use std::collections::BTreeMap;

use serde::Serialize;

/// The object that `--json` prints.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub requests: usize,
    pub completed: usize,
    pub rejected: usize,
    pub unfinished: usize,
    /// From the first arrival to the end of the run.
    pub duration_s: f64,
    /// Requests per second that met both SLOs.
    pub goodput_rps: f64,
    /// Share of all requests that met both SLOs.
    pub attainment: f64,
    pub attainment_ttft: f64,
    pub attainment_tbt: f64,
    pub attainment_longest_input_decile: f64,
    pub attainment_longest_output_decile: f64,
    pub attainment_by_phase: BTreeMap<String, f64>,
    pub ttft_ms: Percentiles,
    pub tbt_ms: Percentiles,
    pub tpot_ms: Percentiles,
    pub e2e_ms: Percentiles,
    pub output_tokens_per_s: f64,
    /// Of the prompt tokens, those that a prefix cache held.
    pub prefix_hit_ratio: f64,
    pub kv_bytes_moved: u64,
    pub disaggregated: usize,
    pub flips: u64,
    pub workers_seconds: WorkersSeconds,
    pub by_minute: Vec<Minute>,
}

/// Of the completed requests; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WorkersSeconds {
    pub prefill: f64,
    pub decode: f64,
    /// Workers that do both.
    pub mixed: f64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Minute {
    pub minute: u32,
    pub arrivals: usize,
    pub completed: usize,
    /// Of the requests that arrived in it.
    pub attainment: f64,
    pub ttft_ms_p50: f64,
    pub ttft_ms_p90: f64,
    pub tbt_ms_p90: f64,
    /// Means over the minute's samples of the fleet.
    pub fleet: FleetSample,
}

/// How the fleet stood at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct FleetSample {
    pub workers_prefill: f64,
    pub workers_decode: f64,
    pub workers_mixed: f64,
    /// Requests that have no first token yet.
    pub requests_queued: f64,
    pub requests_running: f64,
    /// Of all workers' KV capacity.
    pub kv_used_ratio: f64,
}
