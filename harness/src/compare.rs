//! Ways to use the same workers, on the same traffic, under the same SLOs: which serves most?
//!
//! An [`Experiment`] is read from a file, [`run`] simulates all its cells on all cores, and the
//! [`Report`](crate::report::Report) says what was found. The same experiment gives the same report on
//! any number of threads. [`run_live`] asks a running Baton in place of simulated ones, and switches its
//! mode between the runs.

mod experiment;
mod live;
mod run;
mod way;

pub use experiment::{Asked, Conditions, Experiment, TraceFile, What};
pub use live::{Coordinator, Live, LiveError, LiveProgress, OperatorError, Standing, run_live};
pub use run::{CompareError, Progress, Single, inspect_trace, run};
pub use way::{ParseWayError, Way, WayKind};
