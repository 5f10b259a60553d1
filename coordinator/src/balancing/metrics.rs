use std::sync::atomic::AtomicU64;

use baton_core::{Decision, Verdict};
use baton_kubernetes::{ScaleError, Scaled};
use baton_types::Role;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use crate::metrics::Catalogue;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlipLabels {
    to: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabels {
    verdict: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ScaleLabels {
    role: &'static str,
    outcome: &'static str,
}

type Ratio = Gauge<f64, AtomicU64>;

/// How the pools stand, and what was done about it.
#[derive(Debug, Default)]
pub(crate) struct BalancerMetrics {
    /// Of a pool's least pressed worker, or what arrivals predict for all of them; pressed from 1 on.
    pressure: Family<PoolLabels, Ratio>,
    /// What arrivals ask of a pool, as a part of what it can do within the SLO.
    demand: Family<PoolLabels, Ratio>,
    /// Workers of a pool that may be given work.
    size: Family<PoolLabels, Gauge>,
    /// Workers that a pool shall have, where the balancer asks for more or fewer; else what it has.
    wanted: Family<PoolLabels, Gauge>,
    /// Workers that were told to change their role, by what for.
    flips: Family<FlipLabels, Counter>,
    /// Workers that are on their way from one role to the other.
    in_flight: Gauge,
    /// Orders to Kubernetes, by what became of them.
    scale_orders: Family<ScaleLabels, Counter>,
    /// What the balancer advised, once each time that it looked, by why.
    decisions: Family<DecisionLabels, Counter>,
}

impl BalancerMetrics {
    pub(crate) fn register(&self, registry: &mut Catalogue) {
        registry.register(
            "pool_pressure",
            "Of a pool's least pressed worker, or as arrivals predict, where step times are known: pressed from 1 on",
            self.pressure.clone(),
        );
        registry.register(
            "pool_demand",
            "What arrivals ask of a pool, as a part of what it can do within the SLO",
            self.demand.clone(),
        );
        registry.register(
            "pool_workers",
            "Workers of a pool that may be given work",
            self.size.clone(),
        );
        registry.register(
            "pool_workers_wanted",
            "Workers that a pool shall have, as the balancer sees it",
            self.wanted.clone(),
        );
        registry.register(
            "flips",
            "Workers told to change their role, by the new one and why",
            self.flips.clone(),
        );
        registry.register(
            "flips_in_flight",
            "Workers on their way from one role to the other",
            self.in_flight.clone(),
        );
        registry.register(
            "scale_orders",
            "Times that Kubernetes was asked for more or fewer workers of a pool",
            self.scale_orders.clone(),
        );
        registry.register(
            "balancer_decisions",
            "What the balancer advised, once each look, and why",
            self.decisions.clone(),
        );
    }

    /// What was decided at one look, for each kind of workers.
    pub(crate) fn decided(&self, decisions: &[Decision]) {
        for role in Role::ALL {
            self.set_pool(role, decisions);
        }
        for decision in decisions {
            let verdict = match decision.verdict {
                Verdict::Hold => "hold",
                Verdict::Flip { .. } => "flip",
                Verdict::Scale { role, replicas } if replicas > decision.pool(role).workers => {
                    "more"
                }
                Verdict::Scale { .. } => "fewer",
            };
            let reason = decision.reason.as_str();
            self.decisions.get_or_create(&DecisionLabels { verdict, reason }).inc();
        }
    }

    /// All kinds' workers, and the figures of the kind that is pressed most. Of a pool without workers, or
    /// without step models, nothing is known: no figure is shown.
    fn set_pool(&self, role: Role, decisions: &[Decision]) {
        let labels = PoolLabels { role: role.as_str() };
        let pools = || decisions.iter().map(|decision| (decision, decision.pool(role)));
        let known =
            pools().map(|(_, figures)| figures).filter(|figures| figures.demand.is_finite());
        match known.max_by(|a, b| a.pressure.total_cmp(&b.pressure)) {
            Some(figures) => {
                self.pressure.get_or_create(&labels).set(figures.pressure);
                self.demand.get_or_create(&labels).set(figures.demand);
            }
            None => {
                self.pressure.remove(&labels);
                self.demand.remove(&labels);
            }
        }
        let wanted = pools().map(|(decision, figures)| match decision.verdict {
            Verdict::Scale { role: scaled, replicas } if scaled == role => replicas,
            _ => figures.workers,
        });
        self.wanted.get_or_create(&labels).set(wanted.sum::<u32>().into());
        let workers = pools().map(|(_, figures)| figures.workers);
        self.size.get_or_create(&labels).set(workers.sum::<u32>().into());
    }

    pub(crate) fn flip(&self, to: Role, reason: &'static str) {
        self.flips.get_or_create(&FlipLabels { to: to.as_str(), reason }).inc();
    }

    pub(crate) fn scaled(&self, role: Role, outcome: &Result<Scaled, ScaleError>) {
        let outcome = match outcome {
            Ok(Scaled { before, after }) if after > before => "more",
            Ok(Scaled { before, after }) if after < before => "fewer",
            Ok(_) => "unchanged",
            Err(_) => "failed",
        };
        self.scale_orders.get_or_create(&ScaleLabels { role: role.as_str(), outcome }).inc();
    }

    pub(crate) fn in_flight(&self, flips: usize) {
        self.in_flight.set(i64::try_from(flips).unwrap_or(i64::MAX));
    }
}
