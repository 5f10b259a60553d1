//! What becomes of the balancer's advice: flips are ordered, replicas asked for, or all of it is only
//! told in log and metrics.

mod metrics;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_config::{BalancerActuator, BalancerConfig};
use baton_core::{BalancerSettings, Decision, Event, Verdict};
use baton_types::Role;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

pub(crate) use self::metrics::BalancerMetrics;
use crate::shell::Shell;

/// Gives the pools more or fewer workers.
#[async_trait]
pub trait Replicas: Send + Sync {
    /// Asks that a pool have so many workers; they come and go later. Asked again whenever the wanted
    /// number changes.
    ///
    /// # Errors
    /// Whoever runs the workers did not take it. It is told in the log, and asked again should the
    /// balancer still want it a dwell later.
    async fn scale(&self, role: Role, replicas: u32) -> Result<(), ScaleError>;
}

/// Why a pool was not given the replicas that were asked for.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ScaleError(#[from] Box<dyn std::error::Error + Send + Sync>);

pub(crate) fn settings(config: &BalancerConfig) -> BalancerSettings {
    BalancerSettings {
        min_prefill: config.min_prefill,
        min_decode: config.min_decode,
        dwell: config.dwell,
        ..BalancerSettings::default()
    }
}

/// Looks at the pools once each interval, for as long as it is polled.
pub(crate) async fn keep_balanced(
    shell: Shell,
    config: BalancerConfig,
    replicas: Option<Arc<dyn Replicas>>,
) {
    if config.actuator == BalancerActuator::Off {
        return;
    }
    let mut interval = tokio::time::interval(settings(&config).interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = Vec::new();
    let mut asked = Asked::default();
    loop {
        interval.tick().await;
        let decisions = shell.balance(config.actuator);
        let news: Vec<_> = decisions.iter().map(|it| (it.verdict, it.reason)).collect();
        for decision in decisions.iter().filter(|it| !told.contains(&(it.verdict, it.reason))) {
            info!(%decision, "balancer");
        }
        told = news;
        if config.actuator != BalancerActuator::Flip {
            continue;
        }
        for decision in decisions {
            if let (Verdict::Scale { role, replicas: wanted }, Some(replicas)) =
                (decision.verdict, &replicas)
                && asked.is_new(role, wanted, config.dwell)
                && let Err(error) = replicas.scale(role, wanted).await
            {
                warn!(%role, replicas = wanted, %error, "the pool was not scaled");
            }
        }
    }
}

/// What was asked for last of each pool.
#[derive(Debug, Default)]
struct Asked {
    last: [Option<(u32, tokio::time::Instant)>; 2],
}

impl Asked {
    /// Whether this was not asked for within the last dwell.
    fn is_new(&mut self, role: Role, replicas: u32, dwell: Duration) -> bool {
        let last = &mut self.last[role as usize];
        let now = tokio::time::Instant::now();
        let is_new =
            last.is_none_or(|(asked, at)| asked != replicas || now.duration_since(at) >= dwell);
        if is_new {
            *last = Some((replicas, now));
        }
        is_new
    }
}

impl Shell {
    /// Asks the balancer, and orders the flips that it advises where that is its actuator.
    fn balance(&self, actuator: BalancerActuator) -> Vec<Decision> {
        let mut state = self.lock();
        let decisions = state.core.balance(self.now());
        for decision in &decisions {
            self.metrics.balancer.decided(decision);
            if let (Verdict::Flip { worker, to, .. }, BalancerActuator::Flip) =
                (decision.verdict, actuator)
            {
                self.metrics.balancer.flip(to, decision.reason.as_str());
                let view = state.core.worker(worker);
                let name = view.map(|view| view.description.name.clone()).unwrap_or_default();
                state.journal.decided("flip", name, decision.to_string(), "balancer");
                self.tell_core(&mut state, Event::SetRole { worker, role: to }, None);
            }
        }
        let changing = state.core.workers().filter(|worker| worker.changes_to.is_some()).count();
        self.metrics.balancer.in_flight(changing);
        decisions
    }
}
