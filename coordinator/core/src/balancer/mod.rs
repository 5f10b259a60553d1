//! Which worker should change its pool, and whether there should be more or fewer of them: nothing
//! but an advice, from figures that it is shown. Its rules and what always holds of them stand in
//! `README.md`, beside this file.

mod clock;
mod decision;
mod demand;
mod pool;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use baton_types::{Role, StepModel};

use self::{clock::SteadyClock, demand::Demand, pool::Pool};
pub use self::{
    decision::{Decision, Missing, PoolFigures, Reason, Verdict},
    demand::{Answer, Arrival},
};
use crate::{fleet::WorkerKey, policy::Targets};

/// What an operator may say of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BalancerSettings {
    /// No flip leaves fewer workers in a pool; one at least.
    pub min_prefill: u32,
    pub min_decode: u32,
    /// A worker that changed its pool stays there for so long, and so long after a flip in one
    /// direction there is none in the other.
    pub dwell: Duration,
    /// How often it looks.
    pub interval: Duration,
    /// How fast old arrivals are forgotten. A second view, over a dwell, guards what is given away.
    pub window: Duration,
    /// Whoever runs the workers starts the first of a pool when it is asked for, and may end the last.
    pub on_demand: Option<OnDemand>,
}

/// Pools that may have no worker at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnDemand {
    /// So long without a request they need none.
    pub unused_after: Option<Duration>,
}

impl Default for BalancerSettings {
    fn default() -> Self {
        Self {
            min_prefill: 1,
            min_decode: 1,
            dwell: Duration::from_secs(30),
            interval: Duration::from_secs(1),
            window: Duration::from_secs(10),
            on_demand: None,
        }
    }
}

impl BalancerSettings {
    fn min(&self, role: Role) -> usize {
        let min = match role {
            Role::Prefill => self.min_prefill,
            Role::Decode => self.min_decode,
        };
        min.max(1) as usize
    }
}

/// What the requests are promised. Every threshold is a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Promise {
    pub ttft_ms: f64,
    /// So many times a prompt's own prefill is added to `ttft_ms`.
    pub ttft_prefill_factor: f64,
    pub targets: Targets,
}

/// One worker at one moment.
#[derive(Clone, Copy, Debug)]
pub struct WorkerSight<'a> {
    pub worker: WorkerKey,
    pub name: &'a str,
    pub role: Role,
    /// It is on its way to this role.
    pub changes_to: Option<Role>,
    /// It may be given work.
    pub is_routable: bool,
    /// It takes orders from here.
    pub is_ours: bool,
    pub model: Option<StepModel>,
    /// Since when nothing was heard of it.
    pub silent_for: Duration,
    /// What its prompts wait (prefill), or answers wait whose prompts are computed (decode): the
    /// longest so far, or what the next one is predicted to.
    pub queue_wait_ms: f64,
    /// Of prompts that it has not computed yet.
    pub prefill_work_ms: f64,
    pub decodes: u32,
    pub decode_context_tokens: u64,
    /// Used, and of how many.
    pub kv_tokens: Option<(u64, u64)>,
    /// Between tokens of its answers, since the last look.
    pub observed_itl_ms: Option<f64>,
}

/// Of whom nothing was heard for so many looks data is missing,
const SILENT_LOOKS: u32 = 3;
/// and who is silent for so many is as good as gone.
const GONE_LOOKS: u32 = 30;
/// A pool is pressed when it was so at so many looks in a row.
const PATIENCE_LOOKS: u32 = 2;
/// A pool gives a worker away only where the others are predicted to be this full at most.
const FULL_WITHOUT_ONE: f64 = 0.8;
/// A worker that was on its way to another role and is not seen is waited for, for so many looks.
const RETURN_LOOKS: u32 = 60;

/// The pools of workers that can stand in for each other.
#[derive(Debug)]
pub struct Balancer {
    settings: BalancerSettings,
    promise: Promise,
    clock: SteadyClock,
    demand: Demand,
    /// Until then the figures are of two times.
    distrust_until: Duration,
    workers: BTreeMap<String, Known>,
    /// When a worker last came to a pool by a flip.
    came: [Option<Duration>; 2],
    /// Looks in a row at which a pool was pressed.
    pressed: [u32; 2],
    /// Since when it could do with fewer.
    spare_since: [Option<Duration>; 2],
}

/// What is remembered of a worker, by its name.
#[derive(Debug)]
struct Known {
    role: Role,
    /// It was last seen on its way.
    leaves: bool,
    changed: Option<Duration>,
    seen: Duration,
}

impl Balancer {
    pub fn new(settings: BalancerSettings, promise: Promise) -> Self {
        Self {
            settings,
            promise,
            clock: SteadyClock::new(settings.interval),
            demand: Demand::new(settings.window, settings.dwell),
            distrust_until: Duration::ZERO,
            workers: BTreeMap::new(),
            came: [None; 2],
            pressed: [0; 2],
            spare_since: [None; 2],
        }
    }

    /// A request came.
    pub fn arrived(&mut self, arrival: &Arrival) {
        self.demand.arrived(arrival);
    }

    /// An answer is complete.
    pub fn answered(&mut self, answer: &Answer) {
        self.demand.answered(answer);
    }

    /// Advises. To be called once each interval. `flip_elsewhere`: a worker that is not among these
    /// changes its role.
    pub fn look(
        &mut self,
        now: Duration,
        workers: &[WorkerSight<'_>],
        flip_elsewhere: bool,
    ) -> Decision {
        let beat = self.clock.beat(now);
        self.demand.fold(beat.passed);
        if beat.jumped {
            self.distrust_until = self.clock.elapsed() + self.settings.window;
        }
        let is_flipping = self.remember(workers) || flip_elsewhere;
        let gone = GONE_LOOKS * self.settings.interval;
        let present = |worker: &&WorkerSight<'_>| worker.is_routable && worker.silent_for < gone;
        let pools = Role::ALL.map(|role| {
            let members = workers.iter().filter(present).filter(|worker| worker.role == role);
            Pool::new(role, members.collect(), &self.demand, &self.promise)
        });
        for (pool, looks) in pools.iter().zip(&mut self.pressed) {
            *looks = if pool.figures.is_pressed() { *looks + 1 } else { 0 };
        }
        let missing = self.missing(workers, &pools);
        let spare_since = self.spare_since(&pools, missing.is_none());
        let (verdict, reason) = self.advise(&pools, &spare_since, missing, is_flipping);
        let [prefill, decode] = pools.map(|pool| pool.figures);
        self.spare_since = spare_since;
        Decision { verdict, reason, prefill, decode }
    }

    fn advise(
        &self,
        pools: &[Pool<'_>; 2],
        spare_since: &[Option<Duration>; 2],
        missing: Option<Missing>,
        is_flipping: bool,
    ) -> (Verdict, Reason) {
        let hold = |reason| (Verdict::Hold, reason);
        if self.clock.elapsed() < self.distrust_until {
            return hold(Reason::ClockJumped);
        }
        if let Some(missing) = missing {
            return hold(Reason::Missing(missing));
        }
        if is_flipping {
            return hold(Reason::FlipInFlight);
        }
        let mut by_pressure = [0, 1];
        by_pressure
            .sort_by(|a, b| pools[*b].figures.pressure.total_cmp(&pools[*a].figures.pressure));
        for place in by_pressure {
            if self.pressed[place] >= PATIENCE_LOOKS {
                return self.relieve(&pools[place], &pools[1 - place]);
            }
        }
        if self.pressed != [0; 2] {
            return hold(Reason::Patience);
        }
        self.spare(pools, spare_since)
    }

    /// What there is to do for a pool that is pressed.
    fn relieve(&self, pressed: &Pool<'_>, other: &Pool<'_>) -> (Verdict, Reason) {
        let role = pressed.role;
        let more = |reason| {
            let replicas = pressed.wanted(FULL_WITHOUT_ONE);
            (Verdict::Scale { role, replicas }, reason)
        };
        if other.figures.is_pressed() {
            return more(Reason::BothPressed);
        }
        if other.members.len() <= self.settings.min(other.role) {
            return more(Reason::AtMinimum);
        }
        let elapsed = self.clock.elapsed();
        let rests = |since: Option<Duration>| {
            since.is_none_or(|since| elapsed.saturating_sub(since) >= self.settings.dwell)
        };
        if !rests(self.came[other.role as usize]) {
            return (Verdict::Hold, Reason::Dwell);
        }
        let may_go = |worker: &&&WorkerSight<'_>| {
            let changed = self.workers.get(worker.name).and_then(|known| known.changed);
            worker.is_ours && rests(changed)
        };
        // The one that has least to finish.
        let least = other.members.iter().filter(may_go).min_by(|a, b| {
            let left = |w: &WorkerSight<'_>| (w.decode_context_tokens, w.prefill_work_ms);
            let ((a_tokens, a_ms), (b_tokens, b_ms)) = (left(a), left(b));
            a_tokens.cmp(&b_tokens).then(a_ms.total_cmp(&b_ms)).then(a.name.cmp(b.name))
        });
        let Some(worker) = least else {
            let any_ours = other.members.iter().any(|worker| worker.is_ours);
            return (Verdict::Hold, if any_ours { Reason::Dwell } else { Reason::NotOurs });
        };
        if other.fullness_without(worker.worker) > FULL_WITHOUT_ONE {
            return more(Reason::NoSlackElsewhere);
        }
        let verdict = Verdict::Flip { worker: worker.worker, from: other.role, to: role };
        (verdict, Reason::pressed(role))
    }

    /// Since when each pool could do with one worker less. `is_known`: nothing is missing.
    fn spare_since(&self, pools: &[Pool<'_>; 2], is_known: bool) -> [Option<Duration>; 2] {
        let is_calm = is_known && self.pressed == [0; 2];
        [0, 1].map(|place| {
            let pool = &pools[place];
            let is_spare = is_calm
                && pool.members.len() > self.settings.min(pool.role)
                && pool.figures.fullness_without_one <= FULL_WITHOUT_ONE;
            is_spare.then(|| self.spare_since[place].unwrap_or(self.clock.elapsed()))
        })
    }

    /// Asks for fewer of a pool that has been able to do with fewer for a dwell.
    fn spare(
        &self,
        pools: &[Pool<'_>; 2],
        spare_since: &[Option<Duration>; 2],
    ) -> (Verdict, Reason) {
        let elapsed = self.clock.elapsed();
        let lasts = |place: &usize| {
            spare_since[*place]
                .is_some_and(|since| elapsed.saturating_sub(since) >= self.settings.dwell)
        };
        let emptiest = [0, 1].into_iter().filter(lasts).min_by(|a, b| {
            let fullness = |place: &usize| pools[*place].figures.fullness_without_one;
            fullness(a).total_cmp(&fullness(b))
        });
        let Some(place) = emptiest else { return (Verdict::Hold, Reason::Balanced) };
        let role = pools[place].role;
        let replicas = u32::try_from(pools[place].members.len() - 1).unwrap_or(u32::MAX);
        (Verdict::Scale { role, replicas }, Reason::idle(role))
    }

    fn missing(&self, workers: &[WorkerSight<'_>], pools: &[Pool<'_>; 2]) -> Option<Missing> {
        let interval = self.settings.interval;
        let is_silent = |worker: &WorkerSight<'_>| {
            let silence = SILENT_LOOKS * interval..GONE_LOOKS * interval;
            worker.is_routable && silence.contains(&worker.silent_for)
        };
        let members = || pools.iter().flat_map(|pool| &pool.members);
        if pools.iter().any(|pool| pool.members.is_empty()) {
            Some(Missing::Worker)
        } else if workers.iter().any(is_silent) {
            Some(Missing::Reports)
        } else if members().any(|worker| worker.model.is_none()) {
            Some(Missing::StepModel)
        } else if !self.demand.is_known() {
            Some(Missing::Arrivals)
        } else {
            None
        }
    }

    /// Takes note of who is in which pool. Whether one of them is on its way to the other.
    fn remember(&mut self, workers: &[WorkerSight<'_>]) -> bool {
        let elapsed = self.clock.elapsed();
        for worker in workers {
            let leaves = worker.changes_to.is_some();
            let Some(known) = self.workers.get_mut(worker.name) else {
                let known = Known { role: worker.role, leaves, changed: None, seen: elapsed };
                self.workers.insert(worker.name.to_owned(), known);
                continue;
            };
            if known.role != worker.role {
                self.came[worker.role as usize] = Some(elapsed);
                known.changed = Some(elapsed);
            } else if known.leaves && !leaves {
                // It was to change, and did not: it is not asked again at once.
                known.changed = Some(elapsed);
            }
            (known.role, known.leaves, known.seen) = (worker.role, leaves, elapsed);
        }
        let patience = RETURN_LOOKS * self.settings.interval;
        let forgotten = self.settings.dwell.max(patience);
        self.workers.retain(|_, known| elapsed.saturating_sub(known.seen) <= forgotten);
        self.workers
            .values()
            .any(|known| known.leaves && elapsed.saturating_sub(known.seen) <= patience)
    }
}
