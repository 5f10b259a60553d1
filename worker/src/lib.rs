//! What a prefill and a decode worker share, which is everything: a worker drives the engine beside
//! it, attaches to each coordinator by a stream that it dials, runs the jobs that come down it, and
//! passes KV blocks between its engine and the other workers.

mod answer_text;
mod attach;
mod counters;
mod discover;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod handoff;
mod health;
mod jobs;
mod kv_telling;
mod legs;
mod life;
mod outbox;
mod prefix;
mod relay;
mod role;
mod run;
pub mod transport;

pub use attach::TlsError;
pub use run::{WorkerError, run, run_here, run_through};
