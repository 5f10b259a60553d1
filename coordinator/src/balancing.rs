//! What becomes of the balancer's advice: flips are ordered, replicas asked for, or all of it is only
//! told in log and metrics.

mod kubernetes;
mod metrics;

use std::time::Duration;

use baton_config::{BalancerActuator, BalancerConfig, KubernetesScaling};
use baton_core::{BalancerSettings, Decision, Event, OnDemand, Reason, Verdict};
use baton_kubernetes::Size;
use baton_types::Role;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tracing::{info, warn};

pub(crate) use self::{kubernetes::KubernetesPools, metrics::BalancerMetrics};
use crate::shell::Shell;

pub(crate) fn settings(
    config: &BalancerConfig,
    scaling: Option<&KubernetesScaling>,
) -> BalancerSettings {
    BalancerSettings {
        min_prefill: config.min_prefill,
        min_decode: config.min_decode,
        dwell: config.dwell,
        on_demand: scaling.map(|scaling| OnDemand { unused_after: scaling.zero_after }),
        ..BalancerSettings::default()
    }
}

/// Looks at the pools once each interval, for as long as it is polled.
pub(crate) async fn keep_balanced(
    shell: Shell,
    config: BalancerConfig,
    pools: Option<KubernetesPools>,
) {
    if config.actuator == BalancerActuator::Off {
        return;
    }
    let mut interval = tokio::time::interval(settings(&config, None).interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = Vec::new();
    let mut orders = ScaleOrders::default();
    loop {
        interval.tick().await;
        let decisions = shell.balance(config.actuator);
        let news: Vec<_> = decisions.iter().map(|it| (to_tell(it.verdict), it.reason)).collect();
        for (decision, _) in decisions.iter().zip(&news).filter(|(_, it)| !told.contains(*it)) {
            info!(%decision, "balancer");
        }
        told = news;
        let Some(pools) = pools.as_ref().filter(|_| config.actuator == BalancerActuator::Flip)
        else {
            continue;
        };
        for decision in decisions {
            orders.follow(&shell, pools, &decision, config.dwell);
        }
    }
}

/// As far as it is news when it changes: not which of several workers would go.
fn to_tell(verdict: Verdict) -> (Option<Role>, Option<(Role, u32)>) {
    match verdict {
        Verdict::Hold => (None, None),
        Verdict::Flip { to, .. } => (Some(to), None),
        Verdict::Scale { role, replicas } => (None, Some((role, replicas))),
    }
}

/// What was asked of Kubernetes for each pool.
#[derive(Debug, Default)]
struct ScaleOrders {
    last: [Option<(Size, Instant)>; 2],
    /// One for each pool at most. An API server that does not answer holds no flip up.
    under_way: [JoinSet<()>; 2],
}

impl ScaleOrders {
    fn follow(
        &mut self,
        shell: &Shell,
        pools: &KubernetesPools,
        decision: &Decision,
        dwell: Duration,
    ) {
        let Verdict::Scale { role, replicas } = decision.verdict else { return };
        let (workers, are_ours) = shell.roles();
        // Of several coordinators one scales: the one that the workers follow. Without workers there is
        // none, and whoever has a request asks for the first.
        if !are_ours && decision.reason != Reason::FirstWorker {
            return;
        }
        let is_more = replicas > decision.pool(role).workers;
        let size = if is_more { Size::AtLeast(replicas) } else { Size::AtMost(replicas) };
        if !self.is_new(role, size, dwell) {
            return;
        }
        let (shell, pools, reason) = (shell.clone(), pools.clone(), decision.reason.as_str());
        self.under_way[role as usize].spawn(async move {
            let outcome = pools.scale(role, size, &workers).await;
            shell.metrics.balancer.scaled(role, &outcome);
            match outcome {
                Ok(scaled) if scaled.before != scaled.after => {
                    let change =
                        format!("{reason}: {} to {} replicas", scaled.before, scaled.after);
                    shell.lock().journal.decided("scale", role.as_str(), change, "balancer");
                }
                Ok(_) => {}
                Err(error) => warn!(%role, wanted = replicas, %error, "the pool was not scaled"),
            }
        });
    }

    /// Whether this was not asked for within the last dwell, and nothing else is being asked for.
    fn is_new(&mut self, role: Role, size: Size, dwell: Duration) -> bool {
        let under_way = &mut self.under_way[role as usize];
        while under_way.try_join_next().is_some() {}
        let (last, now) = (&mut self.last[role as usize], Instant::now());
        let rests = last.is_some_and(|(asked, at)| asked == size && now < at + dwell);
        let is_new = under_way.is_empty() && !rests;
        if is_new {
            *last = Some((size, now));
        }
        is_new
    }
}

impl Shell {
    /// Every worker's name with the pool that it is in, and whether any of them follows this balancer.
    fn roles(&self) -> (Vec<(String, Role)>, bool) {
        let state = self.lock();
        let name =
            |it: baton_core::WorkerView<'_>| (it.description.name.clone(), it.description.role);
        let are_ours = state.core.workers().any(|worker| worker.follows);
        (state.core.workers().map(name).collect(), are_ours)
    }

    /// Asks the balancer, and orders the flips that it advises where that is its actuator.
    fn balance(&self, actuator: BalancerActuator) -> Vec<Decision> {
        let mut state = self.lock();
        let decisions = state.core.balance(self.now());
        self.metrics.balancer.decided(&decisions);
        for decision in &decisions {
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
