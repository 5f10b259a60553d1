use std::fmt;

use serde::{Deserialize, Serialize};

/// Which part of a request's way is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The engine behind a worker.
    Engine,
    /// The worker process, or the stream to it.
    Worker,
    /// The passing of KV between two workers.
    Handoff,
    /// The coordinator.
    Coordinator,
    /// The client.
    Client,
}

impl Origin {
    pub const ALL: [Self; 5] =
        [Self::Engine, Self::Worker, Self::Handoff, Self::Coordinator, Self::Client];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Worker => "worker",
            Self::Handoff => "handoff",
            Self::Coordinator => "coordinator",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What became of a leg that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Could not be reached, or went away.
    Unavailable,
    /// Answered with an error of its own (HTTP 5xx).
    Failed,
    /// Refused the work for a reason that another try would meet again.
    Refused,
    /// Took longer than allowed.
    TimedOut,
    /// Bytes that arrived were not those that were sent, or not of this handoff.
    Corrupt,
}

impl FaultKind {
    pub const ALL: [Self; 5] =
        [Self::Unavailable, Self::Failed, Self::Refused, Self::TimedOut, Self::Corrupt];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::Corrupt => "corrupt",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a leg failed. Its message is for operators: it may name machines, and never a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin} {kind}: {message}")]
pub struct Fault {
    pub origin: Origin,
    pub kind: FaultKind,
    pub message: String,
}

impl Fault {
    pub fn new(origin: Origin, kind: FaultKind, message: impl Into<String>) -> Self {
        Self { origin, kind, message: message.into() }
    }

    /// Whether the same request may fare better on another worker.
    pub fn is_retryable(&self) -> bool {
        !matches!(self.kind, FaultKind::Refused) && self.origin != Origin::Client
    }
}
