//! An open-loop load generator: requests go out when the trace says, whatever has been answered.
//!
//! ```text
//! arrivals (a thread of its own:  ──►  one task a request  ──►  outcomes
//!   makes prompts, keeps time)          (one runtime thread)
//! ```
//!
//! Latencies count from when a request was *due*. A client that falls behind its own schedule would
//! otherwise tell the server's latencies too well; how far it fell behind is told beside them
//! ([`ClientHealth`]).

mod answer;
mod arrivals;
mod endpoint;
mod health;
mod prompts;
mod report;
mod run;

pub use answer::{Answer, End};
pub use endpoint::{Endpoint, EndpointError, Surface};
pub use health::ClientHealth;
pub use prompts::Prompts;
pub use report::Asked;
pub use run::{BenchOptions, BenchRun, Progress, run};
