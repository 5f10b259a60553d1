//! The workers' side: one gRPC stream for each, dialled by the worker.

mod link;
mod service;

pub(crate) use link::Link;
pub(crate) use service::{FleetService, PeerInfo};
