//! `baton.toml`: what a cluster is made of.
//!
//! [`ClusterConfig::read`] answers either the whole cluster, with every default filled in, or every
//! mistake in the file at once ([`ConfigErrors`]). [`ClusterConfig::to_toml`] writes a file that reads
//! as the same cluster; [`sample`] is the documentation of every key.

mod choose;
mod cluster;
mod document;
mod error;
mod followed;
mod keys;
mod read;
mod rules;
mod value;
mod write;

pub use choose::NoSuchWorker;
pub use cluster::{
    AdminConfig, AdmissionConfig, ArenaConfig, BalancerActuator, BalancerConfig, CheckChoice,
    ClusterConfig, CoordinatorConfig, EngineConfig, HttpsConfig, KubernetesScaling, LateRequests,
    LimitsConfig, MAX_PRIORITY, OnNoPrefill, PlacementConfig, PlacementMode, Requirement,
    SimConfig, SloConfig, TelemetryConfig, TenantConfig, TlsConfig, TransferConfig,
    TransportChoice, VllmConfig, VllmSource, WorkerConfig,
};
pub use document::{nearest, unknown as unknown_key};
pub use error::{ConfigError, ConfigErrors};
pub use followed::{Followed, Refreshed};
pub use write::sample;
