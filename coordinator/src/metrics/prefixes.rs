use baton_types::Leg;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

use super::Catalogue;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LegLabels {
    leg: &'static str,
}

/// What the index of the workers' prefix caches was worth.
#[derive(Debug)]
pub(crate) struct PrefixMetrics {
    prompt_tokens: Family<LegLabels, Counter>,
    hit_tokens: Family<LegLabels, Counter>,
    gaps: Counter,
}

impl PrefixMetrics {
    pub(super) fn register(catalogue: &mut Catalogue) -> Self {
        let prompt_tokens = Family::<LegLabels, Counter>::default();
        catalogue.register(
            "prompt_tokens",
            "Tokens of the prompts that legs were started with, where they are known here",
            prompt_tokens.clone(),
        );
        let hit_tokens = Family::<LegLabels, Counter>::default();
        catalogue.register(
            "prefix_hit_tokens",
            "Those of them that the leg's worker was predicted to have cached",
            hit_tokens.clone(),
        );
        let gaps = Counter::default();
        catalogue.register(
            "kv_events_gaps",
            "Times that news of a worker's prefix cache were missed and asked for anew",
            gaps.clone(),
        );
        Self { prompt_tokens, hit_tokens, gaps }
    }

    /// A leg was started whose worker was predicted to hold some of its prompt.
    pub(crate) fn prompt(&self, leg: Leg, prompt_tokens: u32, hit_tokens: u32) {
        let labels = LegLabels { leg: leg.as_str() };
        self.prompt_tokens.get_or_create(&labels).inc_by(prompt_tokens.into());
        self.hit_tokens.get_or_create(&labels).inc_by(hit_tokens.into());
    }

    pub(crate) fn gap(&self) {
        self.gaps.inc();
    }
}
