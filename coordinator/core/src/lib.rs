//! The decisions of the coordinator: where a request's legs run, what becomes of them, when to try
//! again. No I/O, no runtime and no clock: what happened goes in with its time, what to do comes out.
//!
//! ```text
//! Core::handle(event, now, &mut actions)
//! ```
//!
//! Whatever drives it (the coordinator on tokio, a simulator in virtual time, a property test) carries
//! the actions out in their order. See [`Core`] for the invariants that hold in between.

mod admission;
pub mod balancer;
mod caches;
mod core;
mod decision;
mod event;
mod fleet;
mod keyed;
mod late_shares;
mod long_prompts;
mod placement;
pub mod policy;
mod prefix_index;
mod queue;
mod request;

pub use crate::{
    admission::{AdmissionSettings, OLDEST_EVERY, OUTPUT_TOKEN_WEIGHT, ShedReason, Tenant},
    balancer::{BalancerSettings, Decision, OnDemand, PoolFigures, Reason, Verdict},
    core::{AnnouncedChange, Core, OnNoPrefill, Settings},
    decision::{Chosen, Considered, DecisionReason, PlacementDecision, Prediction},
    event::{Action, Event, HandoffPlan, Rejection},
    fleet::{Elsewhere, HandoffMode, Load, WorkerDescription, WorkerKey, WorkerReport, WorkerView},
    placement::{AggregatedReason, PrefixPull, Route, Split},
    prefix_index::{Heard, KvUpdate, PrefixIndex, RoutedIndex, RoutedLimits},
    queue::Order,
    request::{JobId, PromptBlocks, RequestKey, RequestShape, RequestView},
};
