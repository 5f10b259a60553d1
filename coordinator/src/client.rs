//! The clients' side: OpenAI-compatible HTTP.

mod answer;
mod auth;
mod error;
mod forward;
mod pages;
mod peek;
mod server;
mod token_budget;
mod unread;

pub(crate) use answer::{Answer, Head};
pub use auth::KeyFileError;
pub(crate) use auth::Tenants;
pub(crate) use error::{ClientError, broken_stream_event};
pub(crate) use forward::is_hop_by_hop;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use peek::{Endpoint, peek};
pub(crate) use server::{Access, serve};
pub(crate) use token_budget::TokenBudget;
