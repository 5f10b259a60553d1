//! The workers' side: one gRPC stream for each, dialled by the worker.

mod incoming;
mod link;
mod service;

pub(crate) use incoming::Workers;
pub(crate) use link::Link;
#[cfg(feature = "fuzzing")]
pub(crate) use service::introduce;
pub(crate) use service::{FleetService, PeerInfo};
