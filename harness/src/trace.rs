//! What clients ask, and when.

use std::time::Duration;

/// Requests in the order of their arrival.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    pub name: String,
    pub requests: Vec<TraceRequest>,
    /// Names of the phases that requests refer to.
    pub phases: Vec<String>,
    /// Tokens that each of a request's `prefix_blocks` stands for.
    pub prefix_block_tokens: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceRequest {
    /// Since the start of the trace.
    pub arrival: Duration,
    pub input_tokens: u32,
    pub output_tokens: u32,
    /// Names of the prompt's blocks, in order: requests whose first n are equal share n blocks of
    /// prefix. Empty where the trace does not tell.
    pub prefix_blocks: Box<[u64]>,
    /// Index into [`Trace::phases`].
    pub phase: Option<u16>,
}
