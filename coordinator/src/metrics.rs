mod catalogue;

use std::{
    collections::BTreeMap,
    sync::{Mutex, atomic::AtomicU64},
    time::Duration,
};

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use baton_config::SloConfig;
use baton_core::{AggregatedReason, ShedReason};
use baton_proto as wire;
use baton_types::{Fault, Leg};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

pub(crate) use self::catalogue::Catalogue;
use crate::{
    admin::{BucketCount, Latency},
    balancing::BalancerMetrics,
    shell::{Shell, WorkerStatus},
};

/// In Prometheus' text format.
pub(crate) fn page(shell: &Shell) -> Response {
    let text =
        shell.metrics.render(shell.requests_open(), &shell.waiting_by_priority(), &shell.workers());
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

/// The way that a request took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Disaggregated,
    Aggregated,
    /// It ended before any worker answered.
    None,
}

impl Path {
    const ALL: [Self; 3] = [Self::Disaggregated, Self::Aggregated, Self::None];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Disaggregated => "disaggregated",
            Self::Aggregated => "aggregated",
            Self::None => "none",
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    /// Answered with 4xx.
    ClientError,
    /// Answered with 5xx.
    ServerError,
    /// The answer had begun and could not be finished.
    BrokenOff,
    /// The client went away.
    Cancelled,
    /// The client left too much unread.
    TooSlow,
}

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Ok,
        Self::ClientError,
        Self::ServerError,
        Self::BrokenOff,
        Self::Cancelled,
        Self::TooSlow,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::BrokenOff => "broken_off",
            Self::Cancelled => "cancelled",
            Self::TooSlow => "too_slow",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    path: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    path: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PriorityLabels {
    priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShedLabels {
    reason: &'static str,
    priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

/// What came later than predicted, and what came earlier: a histogram has no negative side.
#[derive(Clone, Debug)]
struct PredictionError {
    late: Histogram,
    early: Histogram,
}

impl PredictionError {
    fn register(r: &mut Catalogue, name: &str, help: &str) -> Self {
        let family = Family::<DirectionLabels, Histogram, _>::new_with_constructor(
            (|| Histogram::new(PREDICTION_ERROR_BUCKETS)) as fn() -> Histogram,
        );
        r.register_with_unit(name, help, Unit::Seconds, family.clone());
        let of = |direction| family.get_or_create(&DirectionLabels { direction }).clone();
        Self { late: of("late"), early: of("early") }
    }

    fn observe(&self, predicted_seconds: f64, observed_seconds: f64) {
        let error = observed_seconds - predicted_seconds;
        let side = if error >= 0.0 { &self.late } else { &self.early };
        side.observe(error.abs());
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FaultLabels {
    leg: &'static str,
    origin: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
    role: &'static str,
}

/// Of the transfer channels' names for what goes wrong and how exports end, those that alerts ask for.
const FAULTS: [&str; 2] = ["corrupt", "rotten"];
const ENDS: [&str; 4] = ["acked", "aborted", "expired", "broken"];

/// A worker makes no more lines than this, whatever it reports.
const MAX_NAMES: usize = 64;

/// What a worker counts under a name of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NameLabels {
    worker: String,
    role: &'static str,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LegLabels {
    leg: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabels {
    tenant: String,
    outcome: &'static str,
}

/// What is observed at each token, looked up once.
#[derive(Clone, Debug)]
struct PathMetrics {
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    output_tokens: Counter,
}

/// The coordinator's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    catalogue: Mutex<Catalogue>,
    paths: [PathMetrics; 3],
    requests: Family<RequestLabels, Counter>,
    aggregated: Family<ReasonLabels, Counter>,
    leg_failures: Family<FaultLabels, Counter>,
    handoff_seconds: Histogram,
    handoff_bytes: Counter,
    handoff_blocks: Counter,
    handoff_blocks_reused: Counter,
    prompt_tokens: Family<LegLabels, Counter>,
    prefix_hit_tokens: Family<LegLabels, Counter>,
    kv_events_gaps: Counter,
    tenant_requests: Family<TenantLabels, Counter>,
    decisions: Family<DecisionLabels, Counter>,
    prediction_error_ttft: PredictionError,
    prediction_error_itl: PredictionError,
    wait: Family<PriorityLabels, Histogram, fn() -> Histogram>,
    waiting: Family<PriorityLabels, Gauge>,
    shed: Family<ShedLabels, Counter>,
    pub(crate) balancer: BalancerMetrics,
    fleet: FleetMetrics,
}

/// Gauges set from the workers' reports when somebody looks.
#[derive(Debug, Default)]
struct FleetMetrics {
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
    blocks_reused: Family<WorkerLabels, Counter>,
    handoffs_open: Family<WorkerLabels, Gauge>,
    handoff_errors: Family<NameLabels, Counter>,
    handoffs_ended: Family<NameLabels, Counter>,
    arena_slots_used: Family<WorkerLabels, Gauge>,
    arena_slots: Family<WorkerLabels, Gauge>,
    kv_blocks_cached: Family<WorkerLabels, Gauge>,
    prefix_blocks: Family<WorkerLabels, Gauge>,
}

const TTFT_BUCKETS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const ITL_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];
const E2E_BUCKETS: [f64; 14] =
    [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0];
const PREDICTION_ERROR_BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const HANDOFF_BUCKETS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

impl Metrics {
    pub(crate) fn new(slo: SloConfig) -> Self {
        let mut catalogue = Catalogue::new();
        let by_path = |buckets: &'static [f64]| {
            Family::<PathLabels, Histogram, _>::new_with_constructor(move || {
                Histogram::new(buckets.iter().copied())
            })
        };
        let ttft = by_path(&TTFT_BUCKETS);
        let itl = by_path(&ITL_BUCKETS);
        let e2e = by_path(&E2E_BUCKETS);
        let output_tokens = Family::<PathLabels, Counter>::default();
        let handoff_seconds = Histogram::new(HANDOFF_BUCKETS);
        let (handoff_bytes, handoff_blocks, handoff_blocks_reused) =
            (Counter::default(), Counter::default(), Counter::default());
        let requests = Family::<RequestLabels, Counter>::default();
        // What can be alerted on is there before it happens.
        for path in Path::ALL {
            for outcome in Outcome::ALL {
                let labels = RequestLabels { path: path.as_str(), outcome: outcome.as_str() };
                requests.get_or_create(&labels).inc_by(0);
            }
        }
        let aggregated = Family::<ReasonLabels, Counter>::default();
        for reason in [
            AggregatedReason::NoPrefillWorker,
            AggregatedReason::NoDecodeWorker,
            AggregatedReason::NoCompatiblePair,
            AggregatedReason::HandoffFailed,
        ] {
            aggregated.get_or_create(&ReasonLabels { reason: reason.as_str() }).inc_by(0);
        }
        let leg_failures = Family::default();
        let (prompt_tokens, prefix_hit_tokens) =
            (Family::<LegLabels, Counter>::default(), Family::<LegLabels, Counter>::default());
        let kv_events_gaps = Counter::default();
        let tenant_requests = Family::default();
        let balancer = BalancerMetrics::default();
        let fleet = FleetMetrics::default();

        let r = &mut catalogue;
        r.register_with_unit(
            "ttft",
            "From a request's arrival to its first token, queueing and handoff included",
            Unit::Seconds,
            ttft.clone(),
        );
        r.register_with_unit("itl", "Between tokens of one answer", Unit::Seconds, itl.clone());
        r.register_with_unit(
            "e2e",
            "From a request's arrival to the end of its answer",
            Unit::Seconds,
            e2e.clone(),
        );
        r.register("output_tokens", "Tokens sent to clients", output_tokens.clone());
        r.register(
            "requests",
            "Requests ended, by the way they took and how they ended",
            Family::clone(&requests),
        );
        r.register(
            "aggregated_requests",
            "Requests that were not split, by reason",
            Family::clone(&aggregated),
        );
        r.register(
            "leg_failures",
            "Legs that failed, by who is to blame",
            Family::clone(&leg_failures),
        );
        r.register_with_unit(
            "handoff",
            "From decode's subscription to its last verified block",
            Unit::Seconds,
            handoff_seconds.clone(),
        );
        r.register_with_unit(
            "handoff",
            "KV handed over for requests answered here",
            Unit::Bytes,
            handoff_bytes.clone(),
        );
        r.register(
            "handoff_blocks",
            "KV blocks handed over for requests answered here",
            handoff_blocks.clone(),
        );
        r.register(
            "handoff_blocks_reused",
            "Prompt blocks that decode held already",
            handoff_blocks_reused.clone(),
        );
        r.register(
            "prompt_tokens",
            "Tokens of the prompts that legs were started with, where they are known here",
            prompt_tokens.clone(),
        );
        r.register(
            "prefix_hit_tokens",
            "Those of them that the leg's worker was predicted to have cached",
            prefix_hit_tokens.clone(),
        );
        r.register(
            "kv_events_gaps",
            "Times that news of a worker's prefix cache were missed and asked for anew",
            kv_events_gaps.clone(),
        );
        r.register(
            "tenant_requests",
            "Requests that came to be let in, where API keys are asked for",
            Family::clone(&tenant_requests),
        );
        let decisions = Family::<DecisionLabels, Counter>::default();
        r.register(
            "placement_decisions",
            "Attempts at requests, by the path that was chosen and why",
            decisions.clone(),
        );
        let prediction_error_ttft = PredictionError::register(
            r,
            "prediction_error_ttft",
            "How much later, or earlier, first tokens came than was predicted when they were placed",
        );
        let prediction_error_itl = PredictionError::register(
            r,
            "prediction_error_itl",
            "How much longer, or shorter, a streamed answer's mean ITL was than predicted",
        );
        let wait = Family::<PriorityLabels, Histogram, _>::new_with_constructor(
            (|| Histogram::new(TTFT_BUCKETS)) as fn() -> Histogram,
        );
        r.register_with_unit(
            "wait",
            "From a request's arrival until its first leg was given to a worker",
            Unit::Seconds,
            wait.clone(),
        );
        let waiting = Family::<PriorityLabels, Gauge>::default();
        r.register(
            "requests_waiting",
            "Requests that wait here for their turn, or for a worker",
            waiting.clone(),
        );
        let shed = Family::<ShedLabels, Counter>::default();
        r.register("requests_shed", "Requests that were answered with 429", shed.clone());
        balancer.register(r);
        fleet.register(r);
        for (name, help, milliseconds) in [
            ("slo_ttft", "Target for TTFT, as configured", slo.ttft_ms),
            ("slo_itl", "Target for ITL, as configured", slo.itl_ms),
        ] {
            let gauge = Gauge::<f64, AtomicU64>::default();
            gauge.set(milliseconds / 1000.0);
            r.register_with_unit(name, help, Unit::Seconds, gauge);
        }

        let paths = Path::ALL.map(|path| {
            let labels = PathLabels { path: path.as_str() };
            PathMetrics {
                ttft: ttft.get_or_create(&labels).clone(),
                itl: itl.get_or_create(&labels).clone(),
                e2e: e2e.get_or_create(&labels).clone(),
                output_tokens: output_tokens.get_or_create(&labels).clone(),
            }
        });
        Self {
            catalogue: Mutex::new(catalogue),
            paths,
            requests,
            aggregated,
            leg_failures,
            handoff_seconds,
            handoff_bytes,
            handoff_blocks,
            handoff_blocks_reused,
            prompt_tokens,
            prefix_hit_tokens,
            kv_events_gaps,
            tenant_requests,
            decisions,
            prediction_error_ttft,
            prediction_error_itl,
            wait,
            waiting,
            shed,
            balancer,
            fleet,
        }
    }

    pub(crate) fn tokens(&self, path: Path, tokens: u32) {
        self.paths[path as usize].output_tokens.inc_by(tokens.into());
    }

    pub(crate) fn first_token(&self, path: Path, ttft: Duration) {
        self.paths[path as usize].ttft.observe(ttft.as_secs_f64());
    }

    /// Tokens that came together share the time since the ones before them.
    pub(crate) fn gaps(&self, path: Path, gap: Duration, tokens: u32) {
        let metrics = &self.paths[path as usize];
        let each = gap.as_secs_f64() / f64::from(tokens.max(1));
        for _ in 0..tokens {
            metrics.itl.observe(each);
        }
    }

    pub(crate) fn request_ended(&self, path: Path, outcome: Outcome, e2e: Duration) {
        let labels = RequestLabels { path: path.as_str(), outcome: outcome.as_str() };
        self.requests.get_or_create(&labels).inc();
        if outcome == Outcome::Ok {
            self.paths[path as usize].e2e.observe(e2e.as_secs_f64());
        }
    }

    /// `tenant` is empty where nobody's key was given.
    pub(crate) fn tenant_request(&self, tenant: &str, outcome: &'static str) {
        let labels = TenantLabels { tenant: tenant.to_owned(), outcome };
        self.tenant_requests.get_or_create(&labels).inc();
    }

    pub(crate) fn aggregated(&self, reason: AggregatedReason) {
        self.aggregated.get_or_create(&ReasonLabels { reason: reason.as_str() }).inc();
    }

    pub(crate) fn leg_failed(&self, leg: Leg, fault: &Fault) {
        let labels = FaultLabels {
            leg: leg.as_str(),
            origin: fault.origin.as_str(),
            kind: fault.kind.as_str(),
        };
        self.leg_failures.get_or_create(&labels).inc();
    }

    pub(crate) fn handoff(&self, moved: &wire::HandoffResult) {
        self.handoff_seconds.observe(Duration::from_micros(moved.micros).as_secs_f64());
        self.handoff_bytes.inc_by(moved.bytes);
        self.handoff_blocks.inc_by(moved.blocks.into());
        self.handoff_blocks_reused.inc_by(moved.blocks_reused.into());
    }

    /// A leg was started whose worker was predicted to hold some of its prompt.
    pub(crate) fn prompt(&self, leg: Leg, prompt_tokens: u32, hit_tokens: u32) {
        let labels = LegLabels { leg: leg.as_str() };
        self.prompt_tokens.get_or_create(&labels).inc_by(prompt_tokens.into());
        self.prefix_hit_tokens.get_or_create(&labels).inc_by(hit_tokens.into());
    }

    pub(crate) fn kv_events_gap(&self) {
        self.kv_events_gaps.inc();
    }

    pub(crate) fn decided(&self, path: Path, reason: &'static str) {
        let labels = DecisionLabels { path: path.as_str(), reason };
        self.decisions.get_or_create(&labels).inc();
    }

    /// What was predicted, and what came of it: TTFT, and ITL in milliseconds.
    pub(crate) fn prediction(
        &self,
        ttft: Option<(Duration, Duration)>,
        itl_ms: Option<(f64, f64)>,
    ) {
        if let Some((predicted, observed)) = ttft {
            let [predicted, observed] = [predicted, observed].map(|time| time.as_secs_f64());
            self.prediction_error_ttft.observe(predicted, observed);
        }
        if let Some((predicted_ms, observed_ms)) = itl_ms {
            self.prediction_error_itl.observe(predicted_ms / 1000.0, observed_ms / 1000.0);
        }
    }

    pub(crate) fn waited(&self, priority: i32, wait: Duration) {
        self.wait.get_or_create(&PriorityLabels { priority }).observe(wait.as_secs_f64());
    }

    pub(crate) fn shed(&self, reason: ShedReason, priority: i32) {
        self.shed.get_or_create(&ShedLabels { reason: reason.as_str(), priority }).inc();
    }

    pub(crate) fn output_tokens(&self) -> u64 {
        self.paths.iter().map(|path| path.output_tokens.get()).sum()
    }

    pub(crate) fn handoff_bytes(&self) -> u64 {
        self.handoff_bytes.get()
    }

    /// Over all ways that requests took.
    pub(crate) fn latency(&self) -> Latency {
        let over_all = |of: fn(&PathMetrics) -> &Histogram| cumulative(self.paths.iter().map(of));
        Latency { ttft: over_all(|path| &path.ttft), itl: over_all(|path| &path.itl) }
    }

    /// In Prometheus' text format.
    pub(crate) fn render(
        &self,
        requests_open: usize,
        waiting: &BTreeMap<i32, usize>,
        workers: &[WorkerStatus],
    ) -> String {
        self.fleet.set(requests_open, workers);
        self.waiting.clear();
        for (&priority, &count) in waiting {
            let gauge = self.waiting.get_or_create(&PriorityLabels { priority });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        let catalogue = self.catalogue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Writing into a string does not fail.
        let _ = encode(&mut text, catalogue.registry());
        text
    }
}

/// A histogram tells its counts in no other way than by being encoded.
fn cumulative<'a>(histograms: impl Iterator<Item = &'a Histogram>) -> Vec<BucketCount> {
    let mut registry = Registry::default();
    for histogram in histograms {
        registry.register("x", "x", histogram.clone());
    }
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = encode(&mut text, &registry);
    let mut counts: Vec<BucketCount> = Vec::new();
    for line in text.lines() {
        let Some((le, count)) =
            line.strip_prefix("x_bucket{le=\"").and_then(|rest| rest.split_once("\"} "))
        else {
            continue;
        };
        let le_seconds = le.parse().ok().filter(|le: &f64| le.is_finite());
        let count: u64 = count.parse().unwrap_or_default();
        match counts.iter_mut().find(|known| known.le_seconds == le_seconds) {
            Some(known) => known.count += count,
            None => counts.push(BucketCount { le_seconds, count }),
        }
    }
    counts
}

impl FleetMetrics {
    fn register(&self, r: &mut Catalogue) {
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
            "KV blocks that a worker has sent since it started",
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
            "Handoffs from a worker that ended since it started, by how",
            self.handoffs_ended.clone(),
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

    fn set(&self, requests_open: usize, workers: &[WorkerStatus]) {
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
            &self.arena_slots_used,
            &self.arena_slots,
            &self.kv_blocks_cached,
            &self.prefix_blocks,
        ];
        let counted = [
            &self.blocks_sent,
            &self.bytes_sent,
            &self.blocks_received,
            &self.bytes_received,
            &self.blocks_reused,
        ];
        per_worker.iter().for_each(|family| family.clear());
        counted.iter().for_each(|family| family.clear());
        self.kv_used.clear();
        let by_name = [&self.handoff_errors, &self.handoffs_ended];
        by_name.iter().for_each(|family| family.clear());
        for worker in workers {
            let labels = WorkerLabels { worker: worker.name.clone(), role: worker.role.as_str() };
            let report = &worker.report;
            let values = [
                worker.jobs_running.into(),
                report.prefills_elsewhere.saturating_add(report.decodes_elsewhere).into(),
                report.engine_requests_running.into(),
                report.engine_requests_waiting.into(),
                report.handoffs_open.into(),
                report.arena_slots_used.into(),
                report.arena_slots.into(),
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
                report.handoff_blocks_reused,
            ];
            for (family, count) in counted.iter().zip(counts) {
                family.get_or_create(&labels).inc_by(count);
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
            self.kv_used.get_or_create(&labels).set(report.engine_kv_used_ratio.into());
        }
    }
}

#[cfg(test)]
#[path = "metrics/tests.rs"]
mod tests;
