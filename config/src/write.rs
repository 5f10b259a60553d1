//! The file as text: that of a given cluster, and the commented sample.

use std::fmt::Write as _;

use crate::{
    cluster::{
        AdminConfig, AdmissionConfig, ArenaConfig, BalancerConfig, ClusterConfig, EngineConfig,
        LimitsConfig, PlacementConfig, SimConfig, SloConfig, TelemetryConfig, TransferConfig,
    },
    keys::{self, Absence, EngineKeys, KIND, KIND_DOC, Key, VllmKeys},
};

impl ClusterConfig {
    /// A file that reads as this cluster. Of [`TlsConfig`](crate::TlsConfig) it keeps the cluster's
    /// own: workers of one file share it.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        write_keys(&mut text, keys::ROOT, self);
        write_table(&mut text, "[coordinator]", keys::COORDINATOR, &self.coordinator);
        write_table(&mut text, "[coordinator.limits]", keys::LIMITS, &self.coordinator.limits);
        if let Some(https) = &self.coordinator.https {
            write_table(&mut text, "[coordinator.https]", keys::HTTPS, https);
        }
        write_table(&mut text, "[slo]", keys::SLO, &self.slo);
        write_table(&mut text, "[placement]", keys::PLACEMENT, &self.placement);
        write_table(&mut text, "[admission]", keys::ADMISSION, &self.admission);
        write_table(&mut text, "[balancer]", keys::BALANCER, &self.balancer);
        if let Some(scaling) = &self.kubernetes {
            write_table(&mut text, "[balancer.kubernetes]", keys::KUBERNETES, scaling);
        }
        if let Some(admin) = &self.admin {
            write_table(&mut text, "[admin]", keys::ADMIN, admin);
            if let Some(https) = &admin.https {
                write_table(&mut text, "[admin.https]", keys::HTTPS, https);
            }
        }
        write_table(&mut text, "[telemetry]", keys::TELEMETRY, &self.telemetry);
        if let Some(tls) = &self.tls {
            write_table(&mut text, "[tls]", keys::TLS, tls);
        }
        for tenant in &self.tenants {
            write_table(&mut text, "[[tenant]]", keys::TENANT, tenant);
        }
        for worker in &self.workers {
            write_table(&mut text, "[[worker]]", keys::WORKER, worker);
            write_engine(&mut text, &worker.engine);
            write_table(&mut text, "[worker.arena]", keys::ARENA, &worker.arena);
            write_table(&mut text, "[worker.transfer]", keys::TRANSFER, &worker.transfer);
        }
        text
    }
}

fn write_engine(text: &mut String, engine: &EngineConfig) {
    push(text, "\n[worker.engine]");
    match EngineKeys::from(engine) {
        EngineKeys::Sim(sim) => {
            push(text, &format!("{KIND} = \"sim\""));
            write_keys(text, keys::SIM, &sim);
        }
        EngineKeys::Vllm(vllm) => {
            push(text, &format!("{KIND} = \"vllm\""));
            write_keys(text, keys::VLLM, &vllm);
        }
    }
}

fn write_table<T>(text: &mut String, header: &str, keys: &[Key<T>], section: &T) {
    push(text, &format!("\n{header}"));
    write_keys(text, keys, section);
}

fn write_keys<T>(text: &mut String, keys: &[Key<T>], section: &T) {
    for key in keys {
        if let Some(value) = (key.write)(section) {
            push(text, &format!("{} = {value}", key.name));
        }
    }
}

fn push(text: &mut String, line: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

/// `baton.sample.toml`: every key with its documentation, and the smallest cluster that runs.
///
/// A line `#key = value` shows the default, or, where it says so, an example.
pub fn sample() -> String {
    let mut text = String::new();
    push(&mut text, INTRODUCTION);
    describe_keys(&mut text, keys::ROOT, &keys::blank_cluster(), Shown::AsNeeded);

    push(&mut text, "\n[coordinator]");
    describe_keys(&mut text, keys::COORDINATOR, &keys::blank_coordinator(), Shown::AsNeeded);
    push(&mut text, "\n[coordinator.limits]");
    describe_keys(&mut text, keys::LIMITS, &LimitsConfig::default(), Shown::AsNeeded);

    push(&mut text, HTTPS);
    describe_keys(&mut text, keys::HTTPS, &keys::blank_https(), Shown::Commented);
    push(&mut text, SLO);
    describe_keys(&mut text, keys::SLO, &SloConfig::default(), Shown::AsNeeded);
    push(&mut text, PLACEMENT);
    describe_keys(&mut text, keys::PLACEMENT, &PlacementConfig::default(), Shown::AsNeeded);
    push(&mut text, ADMISSION);
    describe_keys(&mut text, keys::ADMISSION, &AdmissionConfig::default(), Shown::AsNeeded);
    push(&mut text, BALANCER);
    describe_keys(&mut text, keys::BALANCER, &BalancerConfig::default(), Shown::AsNeeded);
    push(&mut text, KUBERNETES);
    describe_keys(&mut text, keys::KUBERNETES, &keys::blank_kubernetes(), Shown::Commented);
    push(&mut text, ADMIN);
    describe_keys(&mut text, keys::ADMIN, &AdminConfig::default(), Shown::Commented);
    push(&mut text, ADMIN_HTTPS);
    describe_keys(&mut text, keys::HTTPS, &keys::blank_https(), Shown::Commented);
    push(&mut text, TELEMETRY);
    describe_keys(&mut text, keys::TELEMETRY, &TelemetryConfig::default(), Shown::AsNeeded);
    push(&mut text, TLS);
    describe_keys(&mut text, keys::TLS, &keys::blank_tls(), Shown::Commented);

    push(&mut text, TENANT);
    describe_keys(&mut text, keys::TENANT, &keys::blank_tenant(), Shown::Commented);

    push(&mut text, ENGINE);
    push(&mut text, &format!("# {KIND_DOC}\n{KIND} = \"sim\""));
    push(&mut text, "\n# The keys of kind = \"sim\":");
    describe_keys(&mut text, keys::SIM, &SimConfig::default(), Shown::AsNeeded);
    push(&mut text, VLLM_KEYS);
    describe_keys(&mut text, keys::VLLM, &VllmKeys::default(), Shown::Commented);

    push(&mut text, ARENA);
    describe_keys(&mut text, keys::ARENA, &ArenaConfig::default(), Shown::AsNeeded);
    push(&mut text, TRANSFER);
    describe_keys(&mut text, keys::TRANSFER, &TransferConfig::default(), Shown::AsNeeded);

    push(&mut text, WORKERS);
    describe_keys(&mut text, keys::WORKER, &keys::blank_worker(), Shown::AsNeeded);
    push(&mut text, LAST_WORKER);
    text
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    /// Required keys stand, others are commented out.
    AsNeeded,
    /// The table is not there.
    Commented,
}

fn describe_keys<T>(text: &mut String, keys: &[Key<T>], defaults: &T, shown: Shown) {
    for (index, key) in keys.iter().enumerate() {
        if index > 0 {
            push(text, "");
        }
        for line in key.doc {
            push(text, &format!("#{line}"));
        }
        let line = match key.absence {
            Absence::Required(value) if shown == Shown::AsNeeded => {
                format!("{} = {value}", key.name)
            }
            Absence::Required(value) | Absence::Optional(value) => {
                format!("# Example:\n#{} = {value}", key.name)
            }
            Absence::Default => match (key.write)(defaults) {
                Some(value) => format!("#{} = {value}", key.name),
                None => format!("#{} =", key.name),
            },
        };
        push(text, &line);
    }
}

const INTRODUCTION: &str = "\
# Baton: one file for a whole cluster. Every host has the same file and runs its part of it:
#
#     baton coordinator    --config baton.toml
#     baton prefill-worker --config baton.toml --name prefill-0
#     baton decode-worker  --config baton.toml --name decode-0
#
# `baton check baton.toml` lists everything that is wrong with a file. Unknown keys are refused.
# A line `#key = value` shows the default, or, below `# Example:`, what could stand there.
# Sizes (`_bytes`) are whole numbers, or text such as \"256 MiB\". Relative paths are taken from
# this file's directory.
";

const SLO: &str = "
# What you promise your users: what requests are placed by, and shown beside what is observed.
[slo]";

const HTTPS: &str = "
# HTTPS towards clients, in place of HTTP: PEM files, read anew when they change.
#[coordinator.https]";

const TENANT: &str = "
# Who may send requests, each known by an API key (`Authorization: Bearer KEY`). Without any, everybody
# who reaches coordinator.listen may.
#[[tenant]]";

const PLACEMENT: &str = "
# Where the legs of a request run.
[placement]";

const ADMISSION: &str = "
# Who waits, how long, and who is turned away. A request's priority is a whole number, in its JSON or in
# the header x-baton-priority: smaller ones come first.
[admission]";

const KUBERNETES: &str = "
# Where flips do not help, or a pool has long had more than it needs, the balancer asks Kubernetes for more
# or fewer workers. Needs placement.mode = \"always\", and the right to get and patch deployments/scale of
# these two.
#[balancer.kubernetes]";

const BALANCER: &str = "
# Pools that follow the load: a worker goes over to the pool whose workers are all pressed, if the
# others of its own can do without it. It finishes what it has first; its engine runs on.
[balancer]";

const ADMIN: &str = "
# A listener of its own for operators: `baton status`, `baton drain`, `baton mode`, and the page /ui.
# Off where this table is absent.
#[admin]";

const ADMIN_HTTPS: &str = "
# HTTPS towards operators, in place of HTTP: PEM files, read anew when they change.
#[admin.https]";

const TELEMETRY: &str = "
# Where traces of requests go. Nothing is sent without an endpoint.
[telemetry]";

const TLS: &str = "
# Mutual TLS between coordinator and workers: PEM files, such as `baton certs` makes, read anew when
# they change. Needed as soon as an address below is not loopback.
#[tls]";

const ENGINE: &str = "
# What computes, for all workers. A [worker.engine] changes it key by key for one worker; with a
# kind of its own it starts anew.
[engine]";

const VLLM_KEYS: &str = "
# The keys of kind = \"vllm\":";

const ARENA: &str = "
# Staging memory for KV on its way, for all workers. A [worker.arena] changes it key by key.
[arena]";

const TRANSFER: &str = "
# The channel on which KV blocks pass between workers, for all workers. A [worker.transfer] changes
# it key by key.
[transfer]";

const WORKERS: &str = "
# One for each engine of the cluster.
[[worker]]";

const LAST_WORKER: &str = "
[[worker]]
name = \"decode-0\"
role = \"decode\"

# Any of the keys of [engine], [arena] and [transfer], for this worker alone.
[worker.engine]

[worker.arena]

[worker.transfer]";
