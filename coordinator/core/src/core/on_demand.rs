//! Pools that may have no worker at all: the first one is asked for when a request is there, and none
//! are needed once nobody has asked for anything for long.

use std::time::Duration;

use baton_types::Role;

use super::Core;
use crate::{
    balancer::{Decision, PoolFigures, Reason, Verdict},
    placement::Split,
};

/// Since when the workers have nothing to do.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Use {
    idle_since: Option<Duration>,
    /// As many as there were then: whoever came since is not taken away at once.
    workers: usize,
}

impl Core {
    /// What to do about pools that are empty, or could be.
    pub(super) fn balance_on_demand(&mut self, now: Duration) -> Vec<Decision> {
        let Some(on_demand) = self.balancing.as_ref().and_then(|it| it.settings.on_demand) else {
            return Vec::new();
        };
        if self.requests.len() > 0 {
            self.used();
            let without = |role: &Role| self.routable(*role) == 0 && self.uses(*role);
            let empty = Role::ALL.into_iter().filter(without);
            return empty.map(|role| self.scaled(role, 1, Reason::FirstWorker)).collect();
        }
        match on_demand.unused_after {
            Some(unused_after) if self.idle_for(now) >= unused_after => {
                Role::ALL.map(|role| self.scaled(role, 0, Reason::Unused)).into()
            }
            _ => Vec::new(),
        }
    }

    /// Whether requests are given to workers of this role at all.
    fn uses(&self, role: Role) -> bool {
        role == Role::Decode || self.settings.split != Split::Never
    }

    /// How long nobody, of whichever coordinator, has had anything of these workers.
    fn idle_for(&mut self, now: Duration) -> Duration {
        let workers = self.fleet.iter().count();
        let is_busy = self.fleet.iter().any(|(_, worker)| worker.load.jobs() > 0);
        let Some(balancing) = &mut self.balancing else { return Duration::ZERO };
        let last_use = &mut balancing.last_use;
        if is_busy || workers == 0 || workers != last_use.workers {
            *last_use = Use { idle_since: None, workers };
        }
        now.saturating_sub(*last_use.idle_since.get_or_insert(now))
    }

    fn used(&mut self) {
        if let Some(balancing) = &mut self.balancing {
            balancing.last_use = Use::default();
        }
    }

    fn routable(&self, role: Role) -> u32 {
        let of_role = self.fleet.iter().filter(|(_, worker)| worker.description.role == role);
        let count = of_role.filter(|(_, worker)| worker.is_routable()).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    fn scaled(&self, role: Role, replicas: u32, reason: Reason) -> Decision {
        let figures = |role| PoolFigures { workers: self.routable(role), ..PoolFigures::default() };
        let [prefill, decode] = Role::ALL.map(figures);
        Decision { verdict: Verdict::Scale { role, replicas }, reason, prefill, decode }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};
    use crate::{BalancerSettings, Elsewhere, Event, OnDemand, Settings};

    const UNUSED_AFTER: Duration = Duration::from_secs(600);

    fn fixture(split: Split, unused_after: Option<Duration>) -> Fixture {
        let wait_for_worker = Duration::from_secs(300);
        let settings = Settings { split, wait_for_worker, ..Settings::default() };
        let on_demand = Some(OnDemand { unused_after });
        let balancing = BalancerSettings { on_demand, ..BalancerSettings::default() };
        Fixture { core: Core::new(settings).balanced(balancing), actions: Vec::new() }
    }

    fn asked(f: &mut Fixture, after: Duration) -> Vec<(Role, u32, Reason)> {
        let scale = |decision: Decision| match decision.verdict {
            Verdict::Scale { role, replicas } => Some((role, replicas, decision.reason)),
            _ => None,
        };
        f.core.balance(NOW + after).into_iter().filter_map(scale).collect()
    }

    #[test]
    fn the_first_request_asks_for_the_first_workers() {
        let first = |role| (role, 1, Reason::FirstWorker);
        let now = Duration::ZERO;
        for split in [Split::Always, Split::PerRequest] {
            let mut f = fixture(split, None);
            assert_eq!(asked(&mut f, now), []);
            f.arrive(shape());
            assert_eq!(asked(&mut f, now), [first(Role::Prefill), first(Role::Decode)]);
            f.attach(worker("d", Role::Decode));
            assert_eq!(asked(&mut f, now), [first(Role::Prefill)], "decode does it all meanwhile");
            f.attach(worker("p", Role::Prefill));
            assert_eq!(asked(&mut f, now), []);
        }
        let mut f = fixture(Split::Never, None);
        f.arrive(shape());
        assert_eq!(asked(&mut f, now), [first(Role::Decode)]);
    }

    #[test]
    fn pools_that_nobody_uses_are_given_up_and_no_others() {
        let mut f = fixture(Split::Always, Some(UNUSED_AFTER));
        let none = [(Role::Prefill, 0, Reason::Unused), (Role::Decode, 0, Reason::Unused)];
        assert_eq!(asked(&mut f, Duration::ZERO), []);
        assert_eq!(asked(&mut f, UNUSED_AFTER), [], "there is nobody to give up");
        let workers = [worker("p", Role::Prefill), worker("d", Role::Decode)];
        let [p, _] = workers.map(|worker| f.attach(worker));
        let mut now = 2 * UNUSED_AFTER;
        let mut idle = |f: &mut Fixture, for_: Duration| {
            now += for_;
            asked(f, now)
        };
        let second = Duration::from_secs(1);
        assert_eq!(idle(&mut f, second), [], "they only just came");
        assert_eq!(idle(&mut f, UNUSED_AFTER - second), []);
        assert_eq!(idle(&mut f, second), none);

        // Another coordinator's requests are requests.
        let busy = |prefills| Event::BusyElsewhere {
            worker: p,
            elsewhere: Elsewhere { prefills, decodes: 0 },
        };
        f.handle(busy(1));
        assert_eq!(idle(&mut f, UNUSED_AFTER), []);
        f.handle(busy(0));
        assert_eq!(idle(&mut f, UNUSED_AFTER - second), []);
        assert_eq!(idle(&mut f, second), none);

        // And so are our own.
        let (request, _) = f.arrive(shape());
        assert_eq!(idle(&mut f, UNUSED_AFTER), []);
        f.handle(Event::ClientGone { request });
        assert_eq!(idle(&mut f, second), []);
        assert_eq!(idle(&mut f, UNUSED_AFTER), none);
    }

    #[test]
    fn without_somebody_who_starts_workers_none_are_asked_for() {
        let mut f = fixture(Split::Always, Some(UNUSED_AFTER));
        f.core = Core::new(Settings::default()).balanced(BalancerSettings::default());
        f.arrive(shape());
        assert_eq!(asked(&mut f, UNUSED_AFTER), []);
    }
}
