//! The operators' side: a listener of its own, on which they see what this coordinator sees, drain
//! workers and switch modes. Off unless the file has `[admin]`.
//!
//! What it shows is gathered when it is asked for; nothing here is on a token's way.

mod page;
mod router;
mod state;
mod token;

pub(crate) use router::router;
pub use state::{
    ArenaState, BucketCount, ClusterState, Decision, EndedRequest, EngineState, HandoffCounters,
    HandoffPair, Handoffs, InFlightRequest, Latency, LoadState, Mode, Phases, RoleSince, SloState,
    TransferState, UnknownMode, WorkerState,
};
pub(crate) use token::AdminToken;
pub use token::{TOKEN_VARIABLE, TokenError};
