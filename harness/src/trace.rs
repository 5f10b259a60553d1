//! What clients ask, and when.
//!
//! A [`Trace`] is read from a file in one of these formats, told apart by their content:
//!
//! | Format | Looks like | Notes |
//! |---|---|---|
//! | Mooncake JSONL | `{"timestamp":0,"input_length":6758,"output_length":500,"hash_ids":[0,1]}` | stamps are rounded to 3 s: equal ones are spread evenly up to the next |
//! | our JSONL | the same with `phase` or `client`, or without `hash_ids` | stamps are taken as they are |
//! | Azure CSV | `TIMESTAMP,ContextTokens,GeneratedTokens` | date and time of day |
//! | BurstGPT CSV | `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type` | seconds; whole ones are spread too |
//!
//! Time starts at the first request, whatever its stamp. JSONL stamps are milliseconds. Mooncake JSONL is
//! what has `hash_ids` on every line, and neither `phase` nor `client`. Stamps are spread only where the
//! distinct ones lie a second or more apart.

mod csv_formats;
mod error;
mod generate;
mod jsonl;
mod read;
#[cfg(test)]
mod read_tests;
mod scale;
mod spread;

use std::time::Duration;

pub use error::{TraceError, TraceErrors};
pub use scale::{Load, LoadExtent};

/// What Mooncake's `hash_ids` stand for, and ours.
pub const PREFIX_BLOCK_TOKENS: u32 = 512;

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

impl Trace {
    /// From the first arrival to the last.
    pub fn duration(&self) -> Duration {
        self.requests.last().map_or(Duration::ZERO, |last| last.arrival)
    }

    /// Whether phases of different traffic follow each other.
    pub fn is_composite(&self) -> bool {
        !self.phases.is_empty()
    }

    /// Arrivals per second between the first and the last; 0 where no time lies between them.
    pub fn rate_rps(&self) -> f64 {
        Load::from(self).rate_rps()
    }
}
