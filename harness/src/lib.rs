//! The research harness: what does splitting prefill from decode gain or cost, on this traffic, this
//! model, these SLOs?
//!
//! ```text
//! trace  ──►  fleet (virtual time, the production core)  ──►  outcomes  ──►  summary, report
//!        └─►  bench (a live endpoint)                    ──►
//! ```
//!
//! One [`Outcome`](outcome::Outcome) a request is all that the two ways of running share, so that a
//! simulated and a live run are summed up by the same code.

pub mod bench;
pub mod compare;
pub mod fleet;
pub mod goodput;
pub mod outcome;
pub mod profile;
pub mod report;
pub mod summary;
pub mod trace;
