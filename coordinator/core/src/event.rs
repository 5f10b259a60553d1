use std::time::Duration;

use baton_types::{Fault, Generation, HandoffId, Leg, Role, StepModel};

use crate::{
    admission::ShedReason,
    core::AnnouncedChange,
    fleet::{Elsewhere, WorkerKey, WorkerReport},
    placement::{PrefixPull, Route},
    request::{JobId, RequestKey},
};

/// What happened.
#[derive(Debug)]
pub enum Event {
    WorkerLost {
        worker: WorkerKey,
    },
    /// It shall be given nothing more, and finish what it has. Holds until [`Self::Undrain`], or until
    /// the worker comes back with another epoch.
    Drain {
        worker: WorkerKey,
    },
    Undrain {
        worker: WorkerKey,
    },
    /// It shall go over to this role, or, on its way to another, stay in its own. It is given
    /// nothing more until it has, or until that took too long.
    SetRole {
        worker: WorkerKey,
        role: Role,
    },
    /// What a worker says of its role: on its way to another one, or none.
    RoleChange {
        worker: WorkerKey,
        change: Option<AnnouncedChange>,
    },
    /// A worker is alive, and whether it takes orders from here: one that serves several
    /// coordinators takes them from the first that it can reach.
    Heard {
        worker: WorkerKey,
        follows: bool,
    },
    /// What a worker says of its engine.
    Report {
        worker: WorkerKey,
        report: WorkerReport,
    },
    /// What a worker says of its other coordinators.
    BusyElsewhere {
        worker: WorkerKey,
        elsewhere: Elsewhere,
    },
    /// What is known of how long a worker's steps take is better known now.
    ModelChanged {
        worker: WorkerKey,
        model: StepModel,
        /// How many times what the model says the slowest steps beside decodes take, so that it plans its steps
        /// so much shorter.
        slowest_part: f64,
    },
    /// The prefill leg is through: its engine has computed the prompt.
    PrefillDone {
        job: JobId,
    },
    /// A leg's answer begins. On the prefill leg this is a refusal by the engine (4xx), which the
    /// client shall see.
    Answered {
        job: JobId,
    },
    /// A leg that had answered is through.
    Ended {
        job: JobId,
    },
    LegFailed {
        job: JobId,
        fault: Fault,
    },
    /// What this job was to copy from a peer is there, or will not come: its engine is asked now.
    PullOver {
        job: JobId,
    },
    /// The client went away, or was too slow to keep.
    ClientGone {
        request: RequestKey,
    },
    /// Time passed.
    Tick,
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Give a worker one leg of a request.
    Start {
        worker: WorkerKey,
        job: JobId,
        request: RequestKey,
        leg: Leg,
        handoff: Option<HandoffPlan>,
        /// What to copy from a peer's cache first. Only workers that can are asked to.
        pull: Option<PrefixPull>,
    },
    /// Have a worker give a peer what it has cached of a prompt's start. Comes before the peer's own
    /// [`Self::Start`], and no request fails with it.
    Lend {
        job: JobId,
        request: RequestKey,
        to: WorkerKey,
        pull: PrefixPull,
        id: HandoffId,
        generation: Generation,
        /// Until then the peer would have computed it.
        worth: Duration,
    },
    /// Tell a worker to drop a job. Nothing that it still says of that job counts.
    Cancel { worker: WorkerKey, job: JobId },
    /// From here on, what this job says goes to the client.
    Relay { request: RequestKey, job: JobId, route: Route },
    /// Answer the client with an error; nothing was sent to it before.
    Reject { request: RequestKey, rejection: Rejection },
    /// The answer, begun, cannot be finished: say so in the stream.
    BreakOff { request: RequestKey, fault: Fault },
    /// The answer is complete.
    Finish { request: RequestKey },
    /// A leg failed at this worker: for the record.
    Blame { request: RequestKey, leg: Leg, worker: WorkerKey, fault: Fault },
    /// Tell a worker which role it shall have.
    SetRole { worker: WorkerKey, role: Role },
    /// Tell a worker that on account of this coordinator it can change its role: nothing of ours is
    /// there any more, and nothing will come.
    Release { worker: WorkerKey, change: u32 },
    /// A worker of this name attached anew: end the stream of its former self.
    Disconnect { worker: WorkerKey },
}

/// The fence of one attempt, as one leg is told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoffPlan {
    Fenced {
        id: HandoffId,
        generation: Generation,
        peer: WorkerKey,
    },
    /// The decode leg starts with what this prefill job answered.
    Engine {
        prefill: Option<JobId>,
    },
}

/// Why a client gets an error instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    UnknownModel {
        model: String,
    },
    NoWorker,
    /// No worker of the prefill pool is there, and decode workers are not to prefill.
    NoPrefillWorker,
    /// Not now: there is more to do than can be done.
    Overloaded {
        reason: ShedReason,
        /// When the work that is here now is predicted to be done.
        retry_after: Duration,
    },
    /// Every try failed; the last one like this.
    LegFailed {
        leg: Leg,
        fault: Fault,
    },
    FirstTokenTimeout,
}
