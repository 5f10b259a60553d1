//! The clients' side: OpenAI-compatible HTTP.

mod answer;
mod error;
mod forward;
mod pages;
mod peek;
mod server;

pub(crate) use answer::{Answer, Head};
pub(crate) use error::{ClientError, broken_stream_event};
pub(crate) use forward::is_hop_by_hop;
pub(crate) use server::serve;
