use std::{sync::Arc, time::Duration};

use baton_types::{BlockHash, Generation, HandoffId, Leg};

use crate::{
    admission::{Tenant, Turn},
    caches::Found,
    decision::PlacementDecision,
    fleet::WorkerKey,
    placement::{Plan, Route, Split},
    queue::Place,
};

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
    /// As far as it is known.
    pub prompt_tokens: u32,
    /// The prompt's full blocks, as the workers tell of them: once for each kind of worker.
    pub blocks: Arc<[PromptBlocks]>,
    /// Tokens from the prompt's first on that workers are taken to hold which do not tell.
    pub held_tokens: Arc<[(WorkerKey, u32)]>,
    /// Its token ids are not known here: no peer could be asked for its start.
    pub prompt_unknown: bool,
    /// The answer comes in one piece: nobody sees when its first token is there.
    pub answers_whole: bool,
    /// Smaller numbers are served first.
    pub priority: i32,
    pub tenant: Tenant,
}

/// A prompt's full blocks, of so many tokens each.
#[derive(Clone, Debug)]
pub struct PromptBlocks {
    pub tokens: u32,
    /// In their order. Each stands for all tokens up to its end.
    pub names: Arc<[BlockHash]>,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) shape: RequestShape,
    pub(crate) handoff: HandoffId,
    pub(crate) generation: Generation,
    pub(crate) retries_left: u32,
    pub(crate) first_token_deadline: Duration,
    /// When the first token is due, by the SLO.
    pub(crate) due: Duration,
    /// Its place among those of its class: the smallest is served first.
    pub(crate) turn: Duration,
    pub(crate) turn_by: Turn,
    pub(crate) arrived: Duration,
    /// What its prefill takes alone where the most of it is cached, predicted when its attempt began.
    pub(crate) alone_ms: f64,
    /// It gives way to those that are not, see [`LongPrompts`](crate::long_prompts::LongPrompts).
    pub(crate) is_long: bool,
    /// The balancer knows of it.
    pub(crate) is_counted: bool,
    /// Workers that failed it.
    pub(crate) avoid: Vec<WorkerKey>,
    /// Which requests were split when this attempt began.
    pub(crate) split: Split,
    pub(crate) plan: Plan,
    /// It had its turn.
    pub(crate) admitted: bool,
    /// Until then it waits for its turn, or for a worker.
    pub(crate) waits_until: Option<Duration>,
    pub(crate) decision: Option<Box<PlacementDecision>>,
    /// The worker in whose queue it waits.
    pub(crate) waits_for: Option<WorkerKey>,
    /// What the workers hold of its prompt, when that was last looked up.
    pub(crate) found: Found,
    /// The worker that is expected to hold its prompt, once it has computed it.
    pub(crate) expected_on: Option<WorkerKey>,
    pub(crate) route: Option<Route>,
    pub(crate) phase: Phase,
    /// The jobs of the current attempt that have neither ended nor been cancelled.
    pub(crate) prefill: Option<JobId>,
    pub(crate) answering: Option<JobId>,
    /// Gives the worker that prefills what a peer has cached of the prompt.
    pub(crate) lending: Option<JobId>,
}

/// A request as others may see it.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    pub key: RequestKey,
    pub shape: &'a RequestShape,
    /// Absent while it waits in a queue.
    pub route: Option<Route>,
}

impl Request {
    /// In a worker's queue. Who has its turn for being late, or old, keeps it.
    pub(crate) fn place(&self) -> Place {
        let is_on_time = self.turn_by == Turn::OnTime;
        let priority = if is_on_time { self.shape.priority } else { i32::MIN };
        Place { priority, turn: self.turn }
    }

    pub(crate) fn view(&self, key: RequestKey) -> RequestView<'_> {
        RequestView { key, shape: &self.shape, route: self.route }
    }
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
    pub(crate) stage: Stage,
    /// Since when it is in this stage.
    pub(crate) since: Duration,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    /// What its prefill costs, predicted.
    pub(crate) work_ms: f64,
    pub(crate) is_long: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Prefilling,
    /// Or waiting for the KV to do so.
    Decoding,
    /// A prefill that is through only keeps its exports.
    Holding,
}

impl Stage {
    pub(crate) fn is_running(self) -> bool {
        self != Self::Holding
    }
}
