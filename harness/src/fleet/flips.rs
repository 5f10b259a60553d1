//! Pools that follow the load: the production balancer, and what its flips cost. Also what can go wrong
//! around it: reports that are late or lost, workers that are stuck, a clock that jumps.

use std::{collections::VecDeque, time::Duration};

use baton_core::{AnnouncedChange, Event, Verdict, WorkerKey, WorkerReport};
use baton_engine::FittedSteps;
use baton_types::{Epoch, Role};

use super::{
    Mode, Nanos, Setup, duration,
    world::{Happening, World, nanos_of},
};
use crate::summary::{FleetSample, WorkersSeconds};

/// A coordinator looks this often whether somebody it shall let go of is through.
const TICK: Duration = Duration::from_millis(100);
/// From an order to the worker's word that it follows, and back.
const ROUND_TRIP: Duration = Duration::from_millis(2);

/// Trouble that a simulated fleet is put to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trouble {
    /// Reports are on their way for so long.
    pub reports_late: Duration,
    /// This part of them is lost.
    pub reports_lost: f64,
    pub stuck: Vec<Stuck>,
    /// When the balancer's clock jumps, and where to: seconds, to the future or to the past.
    pub clock_jumps: Vec<(Duration, f64)>,
}

/// A worker that does nothing and says nothing for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stuck {
    /// By its number, from 0.
    pub worker: usize,
    pub from: Duration,
    pub until: Duration,
}

/// A worker that changed its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// By its number, from 0.
    pub worker: usize,
    pub to: Role,
    /// Since the start of the run: when it was ordered, and when it served in its new role.
    pub ordered: Duration,
    pub done: Duration,
}

/// How a fleet's roles stand and stood.
pub(super) struct Pools {
    roles: Vec<Role>,
    /// Of workers on their way: the number of their change, and when it was ordered.
    changing: Vec<Option<Change>>,
    flips: Vec<Flip>,
    seconds: WorkersSeconds,
    /// Until when `seconds` counts.
    counted: Nanos,
    /// Reports on their way.
    reports: VecDeque<Underway>,
    looked: Option<Nanos>,
    lots: fastrand::Rng,
}

#[derive(Clone, Copy)]
struct Underway {
    arrives: Nanos,
    worker: usize,
    report: Option<WorkerReport>,
    steps: Option<FittedSteps>,
}

#[derive(Clone, Copy)]
struct Change {
    number: u32,
    to: Role,
    ordered: Nanos,
}

impl Pools {
    pub(super) fn new(setup: &Setup) -> Self {
        let workers = setup.workers as usize;
        let roles = (0..setup.workers).map(|index| first_role(setup.mode, index));
        Self {
            roles: roles.collect(),
            changing: vec![None; workers],
            flips: Vec::new(),
            seconds: WorkersSeconds::default(),
            counted: 0,
            reports: VecDeque::new(),
            looked: None,
            lots: fastrand::Rng::with_seed(setup.seed ^ 0xf11b),
        }
    }

    pub(super) fn role(&self, worker: usize) -> Role {
        self.roles[worker]
    }

    fn sizes(&self) -> [f64; 2] {
        Role::ALL.map(|role| self.roles.iter().filter(|other| **other == role).count() as f64)
    }

    fn count_until(&mut self, now: Nanos) {
        let seconds = duration(now - self.counted).as_secs_f64();
        let [prefill, decode] = self.sizes();
        self.seconds.prefill += seconds * prefill;
        self.seconds.decode += seconds * decode;
        self.counted = now;
    }

    /// Fills in how many workers each pool has.
    pub(super) fn sample(&self, mode: Mode, sample: &mut FleetSample) {
        if mode.has_pools() {
            [sample.workers_prefill, sample.workers_decode] = self.sizes();
        } else {
            sample.workers_mixed = self.roles.len() as f64;
        }
    }

    /// The seconds that workers spent in each pool, and who changed it.
    pub(super) fn finish(mut self, mode: Mode, now: Nanos) -> (WorkersSeconds, Vec<Flip>) {
        if !mode.has_pools() {
            let mixed = duration(now).as_secs_f64() * self.roles.len() as f64;
            return (WorkersSeconds { mixed, ..WorkersSeconds::default() }, Vec::new());
        }
        self.count_until(now);
        (self.seconds, self.flips)
    }
}

fn first_role(mode: Mode, index: u32) -> Role {
    match mode {
        Mode::Static { prefill, .. } | Mode::Flip { prefill, .. } if index >= prefill => {
            Role::Decode
        }
        _ => Role::Prefill,
    }
}

impl Trouble {
    /// When a worker that is stuck now moves again.
    pub(super) fn stuck_until(&self, worker: usize, now: Nanos) -> Option<Nanos> {
        let now = duration(now);
        let stuck =
            |stuck: &&Stuck| stuck.worker == worker && (stuck.from..stuck.until).contains(&now);
        self.stuck.iter().find(stuck).map(|stuck| nanos_of(stuck.until))
    }

    /// What the balancer's clock says.
    fn clock(&self, now: Nanos) -> Duration {
        let now = duration(now);
        let jumped: f64 =
            self.clock_jumps.iter().filter(|(at, _)| *at <= now).map(|(_, by)| by).sum();
        Duration::try_from_secs_f64(now.as_secs_f64() + jumped).unwrap_or_default()
    }
}

impl World<'_> {
    pub(super) fn begin_balancing(&mut self) {
        if matches!(self.setup.mode, Mode::Flip { .. }) {
            self.foresee(nanos_of(TICK), Happening::Balances);
        }
    }

    /// Reports of all workers, on their way to the coordinator.
    pub(super) fn send_reports(&mut self) {
        let trouble = &self.setup.trouble;
        for worker in 0..self.workers.len() {
            let on = &self.workers[worker];
            let is_stuck = trouble.stuck_until(worker, self.now).is_some();
            let is_lost =
                trouble.reports_lost > 0.0 && self.pools.lots.f64() < trouble.reports_lost;
            if is_stuck || is_lost {
                continue;
            }
            // One that does nothing has nothing to say, but that it is there.
            let report = on.is_stepping.then(|| on.report());
            let arrives = self.now + nanos_of(trouble.reports_late);
            let steps = on.known_steps();
            self.pools.reports.push_back(Underway { arrives, worker, report, steps });
        }
        self.hear_reports();
    }

    fn hear_reports(&mut self) {
        while let Some(&Underway { arrives, worker, report, steps }) = self.pools.reports.front()
            && arrives <= self.now
        {
            self.pools.reports.pop_front();
            let worker = self.workers[worker].key;
            let event = match report {
                Some(report) => Event::Report { worker, report },
                None => Event::Heard { worker, follows: true },
            };
            self.core.handle(event, duration(self.now), &mut self.actions);
            if let Some(FittedSteps { model, slowest_part, .. }) = steps {
                let event = Event::ModelChanged { worker, model, slowest_part };
                self.core.handle(event, duration(self.now), &mut self.actions);
            }
        }
    }

    /// Looks at the pools when it is time to, and does what the balancer advises.
    pub(super) fn balances(&mut self) {
        self.hear_reports();
        self.tell_core(Event::Tick);
        let interval = nanos_of(self.setup.balancer.interval);
        if self.pools.looked.is_none_or(|looked| self.now >= looked + interval) {
            self.pools.looked = Some(self.now);
            let clock = self.setup.trouble.clock(self.now);
            for decision in self.core.balance(clock) {
                if let Verdict::Flip { worker, to, .. } = decision.verdict {
                    self.tell_core(Event::SetRole { worker, role: to });
                }
            }
        }
        self.foresee(self.now + nanos_of(TICK), Happening::Balances);
    }

    /// A worker is told its role: from here on it is on its way, or stays.
    pub(super) fn role_ordered(&mut self, worker: WorkerKey, role: Role) {
        let Some(&place) = self.by_key.get(&worker) else { return };
        let number = u32::try_from(self.pools.flips.len() + 1).unwrap_or(u32::MAX);
        let changes = role != self.pools.roles[place];
        self.pools.changing[place] =
            changes.then_some(Change { number, to: role, ordered: self.now });
        self.foresee(self.now + nanos_of(ROUND_TRIP), Happening::Announces { worker: place });
    }

    pub(super) fn announces(&mut self, place: usize) {
        let change = self.pools.changing[place];
        let change = change.map(|Change { to, number, .. }| AnnouncedChange { to, number });
        let worker = self.workers[place].key;
        self.tell_core(Event::RoleChange { worker, change });
    }

    /// The coordinator has let go of a worker: it comes back in its new role.
    pub(super) fn role_released(&mut self, worker: WorkerKey) {
        let Some(&place) = self.by_key.get(&worker) else { return };
        let time = self.now + nanos_of(self.setup.relabel);
        self.foresee(time, Happening::Relabelled { worker: place });
    }

    pub(super) fn relabelled(&mut self, place: usize) {
        let Some(Change { to, ordered, .. }) = self.pools.changing[place].take() else { return };
        self.pools.count_until(self.now);
        self.pools.roles[place] = to;
        let done = duration(self.now);
        let ordered = duration(ordered);
        self.pools.flips.push(Flip { worker: place, to, ordered, done });
        let epoch = Epoch::from_u128((self.pools.flips.len() as u128) << 64 | place as u128);
        let mut actions = std::mem::take(&mut self.actions);
        let description = self.description(place, epoch);
        let key = self.core.attach(description, duration(self.now), &mut actions);
        let former = self.workers[place].key;
        self.knowledge.worker_renamed(place, former);
        self.by_key.remove(&former);
        self.by_key.insert(key, place);
        self.workers[place].key = key;
        self.carry_out(actions);
    }
}
