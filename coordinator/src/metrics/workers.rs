use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Unit,
};

use super::Catalogue;
use crate::shell::WorkerStatus;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
    role: &'static str,
}

/// What a worker counts under a name of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabels {
    worker: String,
    role: &'static str,
    name: String,
}

/// The half of a worker's arena for what it sends, or for what it receives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ArenaLabels {
    worker: String,
    role: &'static str,
    half: &'static str,
}

/// By what a worker's KV may pass.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerTransportLabels {
    worker: String,
    role: &'static str,
    transport: String,
}

/// Of the transfer channels' names for what goes wrong and how exports end, those that alerts ask for.
const FAULTS: [&str; 2] = ["corrupt", "rotten"];
const ENDS: [&str; 4] = ["acked", "aborted", "expired", "broken"];

/// A worker makes no more lines than this, whatever it reports.
const MAX_NAMES: usize = 64;

/// Gauges set from the workers' reports when somebody looks.
#[derive(Debug, Default)]
pub(super) struct WorkerMetrics {
    requests_open: Gauge,
    workers: Family<RoleLabels, Gauge>,
    jobs: Family<WorkerLabels, Gauge>,
    jobs_elsewhere: Family<WorkerLabels, Gauge>,
    engine_running: Family<WorkerLabels, Gauge>,
    engine_waiting: Family<WorkerLabels, Gauge>,
    kv_used: Family<WorkerLabels, Gauge<f64, AtomicU64>>,
    blocks_sent: Family<WorkerLabels, Counter>,
    bytes_sent: Family<WorkerLabels, Counter>,
    blocks_received: Family<WorkerLabels, Counter>,
    bytes_received: Family<WorkerLabels, Counter>,
    blocks_mapped: Family<WorkerLabels, Counter>,
    blocks_reused: Family<WorkerLabels, Counter>,
    handoffs_open: Family<WorkerLabels, Gauge>,
    handoff_errors: Family<NameLabels, Counter>,
    handoffs_ended: Family<NameLabels, Counter>,
    transfer_info: Family<WorkerTransportLabels, Gauge>,
    arena_slots_used: Family<ArenaLabels, Gauge>,
    arena_slots: Family<ArenaLabels, Gauge>,
    kv_blocks_cached: Family<WorkerLabels, Gauge>,
    prefix_blocks: Family<WorkerLabels, Gauge>,
}

impl WorkerMetrics {
    pub(super) fn register(&self, r: &mut Catalogue) {
        r.register("requests_open", "Requests that have not ended", self.requests_open.clone());
        r.register("workers", "Workers attached", self.workers.clone());
        r.register(
            "worker_jobs",
            "Legs that a worker has been given and has not ended",
            self.jobs.clone(),
        );
        r.register(
            "worker_jobs_elsewhere",
            "Legs that a worker has of other coordinators, as it says itself",
            self.jobs_elsewhere.clone(),
        );
        r.register(
            "worker_engine_requests_running",
            "Requests running inside the engine, as it says itself",
            self.engine_running.clone(),
        );
        r.register(
            "worker_engine_requests_waiting",
            "Requests waiting inside the engine, as it says itself",
            self.engine_waiting.clone(),
        );
        r.register(
            "worker_engine_kv_used_ratio",
            "Share of the engine's KV cache in use",
            self.kv_used.clone(),
        );
        r.register(
            "worker_handoff_blocks_sent",
            "KV blocks that a worker has sent since it started, those of each tensor parallel rank for themselves",
            self.blocks_sent.clone(),
        );
        r.register_with_unit(
            "worker_handoff_sent",
            "KV that a worker has sent since it started",
            Unit::Bytes,
            self.bytes_sent.clone(),
        );
        r.register(
            "worker_handoff_blocks_received",
            "KV blocks that a worker has received and verified since it started",
            self.blocks_received.clone(),
        );
        r.register_with_unit(
            "worker_handoff_received",
            "KV that a worker has received and verified since it started",
            Unit::Bytes,
            self.bytes_received.clone(),
        );
        r.register(
            "worker_handoff_blocks_mapped",
            "Of the KV blocks received, those that its engine loaded where they lay, in another worker's arena",
            self.blocks_mapped.clone(),
        );
        r.register(
            "worker_handoff_blocks_reused",
            "Prompt blocks that a worker held already since it started",
            self.blocks_reused.clone(),
        );
        r.register(
            "worker_handoff_errors",
            "Handoffs to a worker that failed since it started, by why",
            self.handoff_errors.clone(),
        );
        r.register(
            "worker_handoffs_ended",
            "Handoffs from a worker that ended since it started, by how, once for each tensor parallel rank",
            self.handoffs_ended.clone(),
        );
        r.register(
            "transfer_info",
            "What may carry a worker's KV blocks, and what UCX has picked underneath so far: always 1",
            self.transfer_info.clone(),
        );
        r.register(
            "worker_handoffs_open",
            "Handoffs that a worker has not ended",
            self.handoffs_open.clone(),
        );
        r.register(
            "worker_arena_slots_used",
            "Slots of a worker's staging arena in use",
            self.arena_slots_used.clone(),
        );
        r.register(
            "worker_arena_slots",
            "Slots of a worker's staging arena",
            self.arena_slots.clone(),
        );
        r.register(
            "worker_engine_kv_blocks_cached",
            "Blocks of the engine's prefix cache, as it says itself",
            self.kv_blocks_cached.clone(),
        );
        r.register(
            "worker_prefix_blocks",
            "Blocks of the engine's prefix cache that this coordinator knows of",
            self.prefix_blocks.clone(),
        );
    }

    pub(super) fn set(&self, requests_open: usize, workers: &[WorkerStatus]) {
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.requests_open.set(gauge(requests_open as u64));
        for role in baton_types::Role::ALL {
            let count = workers.iter().filter(|worker| worker.role == role).count();
            self.workers
                .get_or_create(&RoleLabels { role: role.as_str() })
                .set(gauge(count as u64));
        }
        // A worker that left, or changed its role, leaves no line behind.
        let per_worker = [
            &self.jobs,
            &self.jobs_elsewhere,
            &self.engine_running,
            &self.engine_waiting,
            &self.handoffs_open,
            &self.kv_blocks_cached,
            &self.prefix_blocks,
        ];
        let counted = [
            &self.blocks_sent,
            &self.bytes_sent,
            &self.blocks_received,
            &self.bytes_received,
            &self.blocks_mapped,
            &self.blocks_reused,
        ];
        per_worker.iter().for_each(|family| family.clear());
        counted.iter().for_each(|family| family.clear());
        self.kv_used.clear();
        [&self.arena_slots_used, &self.arena_slots].iter().for_each(|family| family.clear());
        let by_name = [&self.handoff_errors, &self.handoffs_ended];
        by_name.iter().for_each(|family| family.clear());
        self.transfer_info.clear();
        for worker in workers {
            let labels = WorkerLabels { worker: worker.name.clone(), role: worker.role.as_str() };
            let report = &worker.report;
            let values = [
                worker.jobs_running.into(),
                report.prefills_elsewhere.saturating_add(report.decodes_elsewhere).into(),
                report.engine_requests_running.into(),
                report.engine_requests_waiting.into(),
                report.handoffs_open.into(),
                report.engine_kv_blocks_cached,
                worker.prefix_blocks as u64,
            ];
            for (family, value) in per_worker.iter().zip(values) {
                family.get_or_create(&labels).set(gauge(value));
            }
            let counts = [
                report.handoff_blocks_sent,
                report.handoff_bytes_sent,
                report.handoff_blocks_received,
                report.handoff_bytes_received,
                report.handoff_blocks_mapped,
                report.handoff_blocks_reused,
            ];
            for (family, count) in counted.iter().zip(counts) {
                family.get_or_create(&labels).inc_by(count);
            }
            let (imports_used, imports) =
                (report.arena_import_slots_used, report.arena_import_slots);
            for (half, used, slots) in [
                (
                    "export",
                    report.arena_slots_used.saturating_sub(imports_used),
                    report.arena_slots.saturating_sub(imports),
                ),
                ("import", imports_used, imports),
            ] {
                let WorkerLabels { worker, role } = labels.clone();
                let labels = ArenaLabels { worker, role, half };
                self.arena_slots_used.get_or_create(&labels).set(gauge(used.into()));
                self.arena_slots.get_or_create(&labels).set(gauge(slots.into()));
            }
            for (family, names) in by_name.iter().zip([&FAULTS[..], &ENDS[..]]) {
                for name in names {
                    let WorkerLabels { worker, role } = labels.clone();
                    let name = (*name).to_owned();
                    // What can be alerted on is there before it happens.
                    family.get_or_create(&NameLabels { worker, role, name }).inc_by(0);
                }
            }
            for (family, counts) in
                by_name.iter().zip([&report.handoff_errors, &report.handoffs_ended])
            {
                for (name, count) in counts.iter().take(MAX_NAMES) {
                    let WorkerLabels { worker, role } = labels.clone();
                    let labels = NameLabels { worker, role, name: name.clone() };
                    family.get_or_create(&labels).inc_by(*count);
                }
            }
            for transport in report.transports.iter().take(MAX_NAMES) {
                let WorkerLabels { worker, role } = labels.clone();
                let labels = WorkerTransportLabels { worker, role, transport: transport.clone() };
                self.transfer_info.get_or_create(&labels).set(1);
            }
            self.kv_used.get_or_create(&labels).set(report.engine_kv_used_ratio.into());
        }
    }
}
