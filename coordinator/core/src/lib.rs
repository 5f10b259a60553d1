//! The decisions of the coordinator: where a request's legs run, what becomes of them, when to try
//! again. No I/O, no runtime and no clock: what happened goes in with its time, what to do comes out.
//!
//! ```text
//! Core::handle(event, now, &mut actions)
//! ```
//!
//! Whatever drives it (the coordinator on tokio, a simulator in virtual time, a property test) carries
//! the actions out in their order. See [`Core`] for the invariants that hold in between.

mod core;
mod event;
mod fleet;
mod keyed;
mod placement;
mod prefix_index;
mod request;

pub use crate::{
    core::{Core, Settings},
    event::{Action, Event, HandoffPlan, Rejection},
    fleet::{HandoffMode, WorkerDescription, WorkerKey, WorkerView},
    placement::{AggregatedReason, Route},
    prefix_index::{Heard, KvUpdate, PrefixIndex, RoutedIndex, RoutedLimits},
    request::{JobId, RequestKey, RequestShape},
};
