//! A fleet in virtual time: the production core over engines that plan their steps with the embedded
//! engine's own scheduler, and take the time that a profile says.
//!
//! `world` is the loop over events; `worker` one engine; `flight` one request; `knowledge` what is known of their
//! caches; `link` what a transfer of KV costs; `hope` says when to go on is of no use. Nothing here decides: the core places, the scheduler batches.

mod flight;
mod flips;
mod hope;
mod knowledge;
mod link;
mod mode;
mod setup;
mod worker;
mod world;

use std::time::Duration;

pub use self::{
    flips::{Flip, Stuck, Trouble},
    hope::Hope,
    link::Link,
    mode::{Mode, ParseModeError},
    setup::{Late, ParseLateError, Setup, SetupError},
};
use crate::{
    summary::{RunFacts, Summary, Tally},
    trace::Load,
};

/// What one simulation gave.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Of the requests that arrived; not of all where the run was given up.
    pub tally: Tally,
    pub facts: RunFacts,
    /// In the order in which they were done.
    pub flips: Vec<Flip>,
    /// Ended early, since too many requests had missed already.
    pub given_up: bool,
}

impl Run {
    pub fn summary(&self) -> Summary {
        self.tally.summary(&self.facts)
    }
}

/// Runs a load to its end, or until `setup.patience` after its last arrival. Of its requests those are in memory that
/// are under way.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn simulate<'a>(load: impl Into<Load<'a>>, setup: &Setup) -> Result<Run, SetupError> {
    setup.check()?;
    Ok(world::World::new(load.into(), setup, None).run())
}

/// [`simulate`], given up as soon as there is no hope left.
///
/// # Errors
/// A setup that cannot be; the field is named.
pub fn simulate_while_hopeful<'a>(
    load: impl Into<Load<'a>>,
    setup: &Setup,
    hope: Hope,
) -> Result<Run, SetupError> {
    setup.check()?;
    Ok(world::World::new(load.into(), setup, Some(hope)).run())
}

/// Virtual time, in nanoseconds since the start of the run.
type Nanos = u64;

fn nanos(milliseconds: f64) -> Nanos {
    // Saturates; never negative, since profiles are checked.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let nanos = (milliseconds * 1e6).round() as Nanos;
    nanos
}

fn milliseconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e6
}

fn duration(nanos: Nanos) -> Duration {
    Duration::from_nanos(nanos)
}
