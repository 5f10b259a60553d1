use baton_core::{JobId, RequestKey};

use super::{Nanos, duration};
use crate::{
    outcome::{Fate, Gaps, Latencies, Outcome},
    trace::TraceRequest,
};

/// One request under way.
#[derive(Debug, Default)]
pub(super) struct Flight {
    pub(super) asked: TraceRequest,
    pub(super) key: Option<RequestKey>,
    pub(super) arrived: Nanos,
    pub(super) generated_tokens: u32,
    pub(super) first_token: Option<Nanos>,
    pub(super) last_token: Nanos,
    pub(super) cached_tokens: Option<u32>,
    pub(super) kv_bytes_moved: u64,
    pub(super) disaggregated: bool,
    pub(super) gaps: Gaps,
    /// An SLO is missed for certain, and that was counted.
    pub(super) missed: bool,
    /// Until both are there, the transfer cannot begin.
    pub(super) prefilled_by: Option<usize>,
    pub(super) awaited: Option<Awaited>,
}

/// A decode that holds room for the prompt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Awaited {
    pub(super) job: JobId,
    pub(super) worker: usize,
    pub(super) cached_tokens: u32,
}

impl Flight {
    /// One more token came. True if it was the last.
    pub(super) fn token(&mut self, now: Nanos) -> bool {
        if self.first_token.is_none() {
            self.first_token = Some(now);
        } else {
            self.gaps.push(super::milliseconds(now - self.last_token));
        }
        self.last_token = now;
        self.generated_tokens += 1;
        self.generated_tokens >= self.asked.output_tokens
    }

    pub(super) fn outcome(&mut self, fate: Option<Fate>) -> Outcome {
        let fate = fate.unwrap_or_else(|| match self.first_token {
            Some(first) => Fate::Completed(Latencies::of_gaps(
                duration(self.arrived),
                duration(first),
                duration(self.last_token),
                &mut self.gaps,
            )),
            None => Fate::Unfinished,
        });
        Outcome {
            arrival: duration(self.arrived),
            input_tokens: self.asked.input_tokens,
            output_tokens: self.asked.output_tokens,
            phase: self.asked.phase,
            fate,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            kv_bytes_moved: self.kv_bytes_moved,
            disaggregated: self.disaggregated,
        }
    }
}
