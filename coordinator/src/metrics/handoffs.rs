use std::time::Duration;

use baton_proto as wire;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Unit,
};

use super::Catalogue;

/// By what KV passes between workers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TransportLabels {
    transport: &'static str,
}

/// The names that workers give to what carried a handoff.
const TRANSPORTS: [&str; 3] = ["shm", "ucx", "quic"];

const HANDOFF_BUCKETS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// The handoffs of requests that were answered here.
#[derive(Debug)]
pub(crate) struct HandoffMetrics {
    by_transport: Family<TransportLabels, Counter>,
    seconds: Histogram,
    bytes: Counter,
    blocks: Counter,
    blocks_reused: Counter,
}

impl HandoffMetrics {
    pub(super) fn register(catalogue: &mut Catalogue) -> Self {
        let by_transport = Family::<TransportLabels, Counter>::default();
        catalogue.register(
            "handoffs",
            "Handoffs of requests answered here, by what carried their blocks: none where decode had them",
            by_transport.clone(),
        );
        let seconds = Histogram::new(HANDOFF_BUCKETS);
        catalogue.register_with_unit(
            "handoff",
            "From decode's subscription to its last verified block",
            Unit::Seconds,
            seconds.clone(),
        );
        let bytes = Counter::default();
        catalogue.register_with_unit(
            "handoff",
            "KV handed over for requests answered here",
            Unit::Bytes,
            bytes.clone(),
        );
        let blocks = Counter::default();
        catalogue.register(
            "handoff_blocks",
            "KV blocks handed over for requests answered here",
            blocks.clone(),
        );
        let blocks_reused = Counter::default();
        catalogue.register(
            "handoff_blocks_reused",
            "Prompt blocks that decode held already",
            blocks_reused.clone(),
        );
        Self { by_transport, seconds, bytes, blocks, blocks_reused }
    }

    pub(crate) fn ended(&self, moved: &wire::HandoffResult) {
        // A worker's word: what is not known must not make lines without end.
        let known = TRANSPORTS.into_iter().find(|known| *known == moved.transport);
        let transport = known.unwrap_or(if moved.transport.is_empty() { "none" } else { "other" });
        self.by_transport.get_or_create(&TransportLabels { transport }).inc();
        self.seconds.observe(Duration::from_micros(moved.micros).as_secs_f64());
        self.bytes.inc_by(moved.bytes);
        self.blocks.inc_by(moved.blocks.into());
        self.blocks_reused.inc_by(moved.blocks_reused.into());
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }
}
