use std::time::Duration;

use baton_types::{Generation, HandoffId, Leg};

use crate::{fleet::WorkerKey, placement::Route};

/// One request, from its arrival to the last byte of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(pub(crate) u64);

/// One leg of one attempt at a request, as a worker knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What placement needs to know of a request.
#[derive(Clone, Debug, Default)]
pub struct RequestShape {
    pub model: Option<String>,
    /// Why this request cannot be split, if it cannot.
    pub unsplittable: Option<&'static str>,
    /// At most this many output tokens, where the client said so.
    pub max_output_tokens: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) shape: RequestShape,
    pub(crate) handoff: HandoffId,
    pub(crate) generation: Generation,
    pub(crate) retries_left: u32,
    pub(crate) first_token_deadline: Duration,
    pub(crate) route: Option<Route>,
    pub(crate) phase: Phase,
    /// The jobs of the current attempt that have neither ended nor been cancelled.
    pub(crate) prefill: Option<JobId>,
    pub(crate) answering: Option<JobId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing was sent to the client: a failure can be mended.
    Open,
    /// The client has the head of the answer.
    Relaying,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) request: RequestKey,
    pub(crate) worker: WorkerKey,
    pub(crate) leg: Leg,
    /// Its engine is at work. A prefill that is through only keeps its exports.
    pub(crate) computing: bool,
}
