use std::fmt;

use baton_types::Role;

use crate::fleet::WorkerKey;

/// What the balancer advises, why, and the figures behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub verdict: Verdict,
    pub reason: Reason,
    pub prefill: PoolFigures,
    pub decode: PoolFigures,
}

impl Decision {
    pub fn pool(&self, role: Role) -> &PoolFigures {
        match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: ", self.verdict, self.reason)?;
        write!(f, "prefill {}; decode {}", self.prefill, self.decode)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Hold,
    /// The worker shall go over to the other pool.
    Flip {
        worker: WorkerKey,
        from: Role,
        to: Role,
    },
    /// The pool shall have so many workers, more or fewer than it has.
    Scale {
        role: Role,
        replicas: u32,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hold => f.write_str("hold"),
            Self::Flip { from, to, .. } => write!(f, "flip {from} to {to}"),
            Self::Scale { role, replicas } => write!(f, "want {replicas} {role} workers"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Neither pool is pressed, and neither can spare a worker for certain.
    Balanced,
    /// All prefill workers are pressed.
    PrefillPressed,
    /// All decode workers are pressed.
    DecodePressed,
    /// The pool was found to do with one worker less for a whole dwell.
    PrefillIdle,
    DecodeIdle,
    /// A pool is pressed, and so is the other.
    BothPressed,
    /// A pool is pressed, and the other has not the slack to give a worker away.
    NoSlackElsewhere,
    /// A pool is pressed, and the other is as small as it may be.
    AtMinimum,
    /// A pool is pressed, but not for long enough yet.
    Patience,
    /// A pool is pressed, and the last flip is too recent for another.
    Dwell,
    /// A pool is pressed, and the workers that could help take orders from another coordinator.
    NotOurs,
    /// A worker is on its way from one pool to the other.
    FlipInFlight,
    /// A request is there, and of a pool that it could use no worker is.
    FirstWorker,
    /// Nobody has asked anything of the workers for long.
    Unused,
    /// What a decision needs is not known.
    Missing(Missing),
    /// The clock jumped: for a while nothing that it measured is believed.
    ClockJumped,
}

/// What is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Missing {
    /// A pool has none.
    Worker,
    /// A worker has not reported for a while.
    Reports,
    /// How long a worker's steps take.
    StepModel,
    /// Too few have come, or been answered, to tell what comes.
    Arrivals,
}

impl Reason {
    pub(super) fn pressed(role: Role) -> Self {
        match role {
            Role::Prefill => Self::PrefillPressed,
            Role::Decode => Self::DecodePressed,
        }
    }

    pub(super) fn idle(role: Role) -> Self {
        match role {
            Role::Prefill => Self::PrefillIdle,
            Role::Decode => Self::DecodeIdle,
        }
    }

    /// A name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::PrefillPressed => "prefill_pressed",
            Self::DecodePressed => "decode_pressed",
            Self::PrefillIdle => "prefill_idle",
            Self::DecodeIdle => "decode_idle",
            Self::BothPressed => "both_pressed",
            Self::NoSlackElsewhere => "no_slack_elsewhere",
            Self::AtMinimum => "at_minimum",
            Self::Patience => "patience",
            Self::Dwell => "dwell",
            Self::NotOurs => "not_ours",
            Self::FlipInFlight => "flip_in_flight",
            Self::FirstWorker => "first_worker",
            Self::Unused => "unused",
            Self::Missing(Missing::Worker) => "missing_worker",
            Self::Missing(Missing::Reports) => "missing_reports",
            Self::Missing(Missing::StepModel) => "missing_step_model",
            Self::Missing(Missing::Arrivals) => "missing_arrivals",
            Self::ClockJumped => "clock_jumped",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a pool stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolFigures {
    /// Those that may be given work.
    pub workers: u32,
    /// Of the least pressed worker, or what arrivals predict for all: pressed from 1 on.
    pub pressure: f64,
    /// What arrivals ask for, as a part of what the pool can do within the promise.
    pub demand: f64,
    /// How full the pool would be with one worker less, by the worst of all measures.
    pub fullness_without_one: f64,
    /// What the least pressed worker's requests wait.
    pub queue_wait_ms: f64,
    /// What of the TTFT is left to wait in, once all is taken off that more workers do not shorten.
    pub queue_budget_ms: f64,
}

impl PoolFigures {
    pub fn is_pressed(&self) -> bool {
        self.workers > 0 && self.pressure >= 1.0
    }
}

impl fmt::Display for PoolFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} workers, pressure {:.2}, demand {:.2}, {:.2} full with one less, waiting {:.0} of \
             {:.0} ms",
            self.workers,
            self.pressure,
            self.demand,
            self.fullness_without_one,
            self.queue_wait_ms,
            self.queue_budget_ms
        )
    }
}
