//! A cluster of real processes on loopback, for the scenarios beside: `tests/*.rs`, one a file.
// A scenario says what must hold by panicking, and what it skips on the terminal.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod answers;
mod browser;
mod cluster;
mod control_plane;
mod https;
mod metrics;
mod network;
mod ports;
mod process;
mod prometheus;
mod vllm;

pub use answers::{Answer, StreamEvent, read_events, streamed_text};
pub use browser::{Browser, chromium_or_skip};
pub use cluster::{ADMIN_TOKEN, Cluster, ClusterBuilder, TlsPem};
pub use control_plane::{ControlPlane, kube_or_skip};
pub use https::HttpsClient;
pub use metrics::Metrics;
pub use network::{Host, Network, SlowWire};
pub use ports::free_port;
pub use process::{Process, baton};
pub use prometheus::{Prometheus, prometheus_or_skip};
pub use vllm::{VllmInstallation, vllm_or_skip};
