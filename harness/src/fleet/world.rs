use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    time::Duration,
};

use baton_core::{
    Action, AdmissionSettings, Core, Event, HandoffMode, JobId, Order, PrefixPull, RequestKey,
    RequestShape, Settings, Split, WorkerDescription, WorkerKey,
    policy::{self, Targets},
};
use baton_engine::{
    Pacing,
    sim::{BlockHash, NewSequence, Scheduler, SchedulerLimits},
};
use baton_types::{Epoch, HandoffId, Leg, STEP_HEADROOM, StepModel};

use super::{
    Hope, Late, Mode, Nanos, Run, Setup, duration,
    flight::{Awaited, Flight},
    flips::Pools,
    knowledge::Knowledge,
    worker::Worker,
};
use crate::{
    outcome::Fate,
    summary::{FleetSample, RunFacts, Tally},
    trace::{Load, TraceRequest},
};

const SAMPLE_INTERVAL: Nanos = 1_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happening {
    StepEnds {
        worker: usize,
    },
    /// The KV that this job waits for has come.
    Transferred {
        worker: usize,
        job: JobId,
    },
    /// What this job was to copy from a peer's prefix cache has come.
    Pulled {
        worker: usize,
        job: JobId,
    },
    Reports,
    /// What a worker told of its prefix cache has come.
    Told {
        worker: usize,
    },
    /// The coordinator looks at its pools.
    Balances,
    /// A worker says that it changes its role, or stays.
    Announces {
        worker: usize,
    },
    /// A worker is back in another role.
    Relabelled {
        worker: usize,
    },
    Sample,
}

/// A job that waits for a peer's prefix before its engine hears of it.
struct Pull {
    new: NewSequence,
    flight: usize,
    leg: Leg,
    /// Of its prompt, from the first on.
    blocks: usize,
}

pub(super) struct World<'a> {
    /// Those that are still to come, of which the first is here.
    requests: Box<dyn Iterator<Item = TraceRequest> + 'a>,
    next_request: Option<TraceRequest>,
    arrived: u64,
    last_arrival: Nanos,
    prefix_block_tokens: u32,
    pub(super) setup: &'a Setup,
    pub(super) core: Core,
    pub(super) now: Nanos,
    pub(super) workers: Vec<Worker>,
    pub(super) pools: Pools,
    pub(super) knowledge: Knowledge,
    pub(super) by_key: HashMap<WorkerKey, usize>,
    /// Equal times go in the order in which they were foreseen.
    happenings: BinaryHeap<Reverse<(Nanos, u64, Happening)>>,
    foreseen: u64,
    flights: Vec<Option<Flight>>,
    free_flights: Vec<usize>,
    flights_open: usize,
    by_request: HashMap<RequestKey, usize>,
    jobs: HashMap<JobId, (usize, usize)>,
    pulls: HashMap<JobId, Pull>,
    tally: Tally,
    /// Workers that may have something to compute now.
    touched: Vec<usize>,
    pub(super) actions: Vec<Action>,
    hope: Option<Hope>,
}

impl<'a> World<'a> {
    pub(super) fn new(load: Load<'a>, setup: &'a Setup, hope: Option<Hope>) -> Self {
        let mut requests = Box::new(load.requests());
        let mut world = Self {
            next_request: requests.next(),
            requests,
            arrived: 0,
            last_arrival: 0,
            prefix_block_tokens: load.trace.prefix_block_tokens,
            setup,
            core: core(setup),
            now: 0,
            workers: Vec::new(),
            pools: Pools::new(setup),
            knowledge: Knowledge::new(setup, load.trace),
            by_key: HashMap::new(),
            happenings: BinaryHeap::new(),
            foreseen: 0,
            flights: Vec::new(),
            free_flights: Vec::new(),
            flights_open: 0,
            by_request: HashMap::new(),
            jobs: HashMap::new(),
            pulls: HashMap::new(),
            tally: Tally::new(&load.trace.phases),
            touched: Vec::new(),
            actions: Vec::new(),
            hope,
        };
        for index in 0..setup.workers {
            world.add_worker(index);
        }
        world.foresee(nanos_of(setup.report_interval), Happening::Reports);
        world.foresee(0, Happening::Sample);
        world.begin_balancing();
        world
    }

    fn add_worker(&mut self, index: u32) {
        let setup = self.setup;
        let description = self.description(index as usize, Epoch::from_u128(u128::from(index)));
        let key = self.core.attach(description, Duration::ZERO, &mut self.actions);
        let blocks = setup.kv_capacity_tokens / u64::from(setup.block_size_tokens);
        let mut scheduler = Scheduler::new(SchedulerLimits {
            block_size_tokens: setup.block_size_tokens,
            kv_blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            max_seqs: setup.max_seqs,
            max_step_tokens: setup.chunk_tokens,
            reserves_output: setup.reserves_output,
        });
        self.knowledge.worker_joined(&mut scheduler);
        let pacing = Pacing::new(Some(believed_model(setup)));
        if setup.mode == Mode::Adaptive {
            pacing.set_itl_target_ms(setup.slo.itl_ms);
        }
        let noise = (setup.step_noise > 0.0).then(|| {
            let seed = setup.seed.wrapping_mul(0x9e37_79b9).wrapping_add(u64::from(index));
            (setup.step_noise, fastrand::Rng::with_seed(seed))
        });
        self.by_key.insert(key, self.workers.len());
        self.workers.push(Worker::new(key, scheduler, setup.profile.model, noise, pacing));
    }

    /// What a worker says of itself.
    pub(super) fn description(&self, worker: usize, epoch: Epoch) -> WorkerDescription {
        WorkerDescription {
            name: format!("worker-{worker}"),
            epoch,
            role: self.pools.role(worker),
            models: Vec::new(),
            handoff: HandoffMode::Fenced { compatibility: [0; 32] },
            model: Some(believed_model(self.setup)),
            kv_capacity_tokens: Some(self.setup.kv_capacity_tokens),
            pulls_prefixes: true,
        }
    }

    pub(super) fn run(mut self) -> Run {
        let mut given_up = false;
        while self.next_request.is_some() || self.flights_open > 0 {
            let next = self.happenings.peek().map(|Reverse((time, ..))| *time);
            let arrival = self.next_request.as_ref();
            let arrival = match self.setup.concurrency {
                None => arrival.map(|request| nanos_of(request.arrival)),
                Some(most) => {
                    arrival.filter(|_| self.flights_open < most as usize).map(|_| self.now)
                }
            };
            let end = match (self.setup.concurrency, &self.next_request) {
                (None, None) => self.last_arrival.saturating_add(nanos_of(self.setup.patience)),
                _ => Nanos::MAX,
            };
            match (arrival, next) {
                (Some(arrival), next) if next.is_none_or(|next| arrival <= next) => {
                    self.now = arrival;
                    self.arrive();
                }
                (_, Some(next)) if next <= end => {
                    self.now = next;
                    self.happen();
                }
                _ => {
                    self.now = end;
                    break;
                }
            }
            self.begin_steps();
            if self.hope.as_ref().is_some_and(Hope::is_lost) {
                given_up = true;
                break;
            }
        }
        self.into_run(given_up)
    }

    fn into_run(mut self, given_up: bool) -> Run {
        for mut flight in std::mem::take(&mut self.flights).into_iter().flatten() {
            self.ended(&mut flight, Some(Fate::Unfinished));
        }
        let (workers_seconds, flips) = self.pools.finish(self.setup.mode, self.now);
        Run {
            tally: self.tally,
            facts: RunFacts {
                duration: duration(self.now),
                flips: flips.len() as u64,
                workers_seconds,
            },
            flips,
            given_up,
        }
    }

    pub(super) fn foresee(&mut self, time: Nanos, happening: Happening) {
        self.foreseen += 1;
        self.happenings.push(Reverse((time, self.foreseen, happening)));
    }

    fn happen(&mut self) {
        let Some(Reverse((_, _, happening))) = self.happenings.pop() else { return };
        match happening {
            Happening::StepEnds { worker } => self.step_ends(worker),
            Happening::Transferred { worker, job } => {
                let on = &mut self.workers[worker];
                if let Some(task) = on.task_of(job) {
                    on.scheduler.complete_remote(task.sequence);
                    self.touched.push(worker);
                }
            }
            Happening::Pulled { worker, job } => self.pulled(worker, job),
            Happening::Reports => self.reports(),
            Happening::Told { worker } => self.told(worker),
            Happening::Balances => self.balances(),
            Happening::Announces { worker } => self.announces(worker),
            Happening::Relabelled { worker } => self.relabelled(worker),
            Happening::Sample => self.sample(),
        }
    }

    fn arrive(&mut self) {
        let Some(asked) = std::mem::replace(&mut self.next_request, self.requests.next()) else {
            return;
        };
        let handoff = HandoffId::from_u128(u128::from(self.arrived));
        self.arrived += 1;
        self.last_arrival = self.now;
        self.tally.arrived(duration(self.now));
        let tokens = u64::from(asked.input_tokens) + u64::from(asked.output_tokens);
        let block_size = u64::from(self.setup.block_size_tokens);
        let capacity = self.setup.kv_capacity_tokens / block_size * block_size;
        let fits = tokens <= capacity && asked.input_tokens > 0 && asked.output_tokens > 0;
        let mut flight = Flight { arrived: self.now, asked, ..Flight::default() };
        if !fits {
            return self.ended(&mut flight, Some(Fate::Rejected));
        }
        let asked = &flight.asked;
        let mut shape = RequestShape {
            max_output_tokens: (asked.output_tokens == 1).then_some(1),
            prompt_tokens: asked.input_tokens,
            ..RequestShape::default()
        };
        self.knowledge.of_prompt(asked, duration(self.now), &mut shape);
        let mut actions = std::mem::take(&mut self.actions);
        let key = self.core.arrive(shape, handoff, duration(self.now), &mut actions);
        flight.key = Some(key);
        let place = self.free_flights.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        self.flights[place] = Some(flight);
        self.flights_open += 1;
        self.by_request.insert(key, place);
        self.carry_out(actions);
    }

    pub(super) fn tell_core(&mut self, event: Event) {
        let mut actions = std::mem::take(&mut self.actions);
        self.core.handle(event, duration(self.now), &mut actions);
        self.carry_out(actions);
    }

    pub(super) fn carry_out(&mut self, mut actions: Vec<Action>) {
        for action in actions.drain(..) {
            match action {
                Action::Start { worker, job, request, leg, pull, .. } => {
                    self.start(worker, job, request, leg, pull);
                }
                Action::Cancel { job, .. } => self.cancel(job),
                Action::Reject { request, .. } => self.close(request, Some(Fate::Rejected)),
                Action::BreakOff { request, .. } => self.close(request, Some(Fate::Unfinished)),
                Action::Finish { request } => self.close(request, None),
                Action::SetRole { worker, role } => self.role_ordered(worker, role),
                Action::Release { worker, .. } => self.role_released(worker),
                // The peer's engine is not asked: `start` copies what it holds.
                Action::Lend { .. }
                | Action::Relay { .. }
                | Action::Blame { .. }
                | Action::Disconnect { .. } => {}
            }
        }
        self.actions = actions;
    }

    fn start(
        &mut self,
        worker: WorkerKey,
        job: JobId,
        request: RequestKey,
        leg: Leg,
        pull: Option<PrefixPull>,
    ) {
        let (Some(&worker), Some(&place)) =
            (self.by_key.get(&worker), self.by_request.get(&request))
        else {
            return;
        };
        let Some(flight) = &mut self.flights[place] else { return };
        flight.disaggregated |= leg == Leg::Decode;
        let asked = &flight.asked;
        self.knowledge.routed(self.workers[worker].key, asked, duration(self.now));
        let output_tokens = if leg == Leg::Prefill { 1 } else { asked.output_tokens };
        let new = NewSequence {
            prompt_tokens: asked.input_tokens,
            max_tokens: asked.input_tokens + output_tokens,
            block_hashes: block_hashes(
                asked,
                self.prefix_block_tokens,
                self.setup.block_size_tokens,
            ),
            remote_kv: leg == Leg::Decode,
            goes_first: false,
        };
        self.jobs.insert(job, (place, worker));
        let peer = pull.and_then(|pull| Some((*self.by_key.get(&pull.from)?, pull.tokens)));
        if let Some((from, tokens)) = peer
            && let Some((time, blocks)) = self.begin_pull(from, worker, &new, tokens)
        {
            self.pulls.insert(job, Pull { new, flight: place, leg, blocks });
            return self.foresee(time, Happening::Pulled { worker, job });
        }
        self.add(new, job, place, worker, leg);
    }

    fn add(&mut self, new: NewSequence, job: JobId, place: usize, worker: usize, leg: Leg) {
        let added = self.workers[worker].add(new, job, place, leg);
        debug_assert!(added.is_ok(), "what does not fit was turned away when it came");
        self.touched.push(worker);
    }

    /// When the blocks will have come, and up to which; none if the peer holds no more than is here, as
    /// may be: the core only believes.
    fn begin_pull(
        &mut self,
        from: usize,
        to: usize,
        new: &NewSequence,
        tokens: u32,
    ) -> Option<(Nanos, usize)> {
        let block_tokens = self.setup.block_size_tokens;
        let wanted = new.block_hashes.len().min((tokens / block_tokens) as usize);
        let wanted = &new.block_hashes[..wanted];
        let here = self.workers[to].scheduler.lend_prefix(wanted);
        let there = self.workers[from].scheduler.lend_prefix(wanted);
        let copied_blocks = there.checked_sub(here).filter(|blocks| *blocks > 0)?;
        let copied_tokens = u32::try_from(copied_blocks).unwrap_or(u32::MAX) * block_tokens;
        let mut sender = self.workers[from].link;
        let receiver = &mut self.workers[to].link;
        let time = self.setup.link.transfer(self.now, copied_tokens, &mut sender, receiver);
        self.workers[from].link = sender;
        Some((time, there))
    }

    fn pulled(&mut self, worker: usize, job: JobId) {
        let Some(Pull { new, flight: place, leg, blocks }) = self.pulls.remove(&job) else {
            return;
        };
        self.workers[worker].scheduler.lay_prefix(&new.block_hashes[..blocks]);
        if let Some(flight) = &mut self.flights[place] {
            let tokens = u64::from(self.setup.block_size_tokens) * blocks as u64;
            flight.kv_bytes_moved += tokens * self.setup.kv_bytes_per_token;
        }
        self.add(new, job, place, worker, leg);
        self.tell_core(Event::PullOver { job });
    }

    fn cancel(&mut self, job: JobId) {
        let Some((_, worker)) = self.jobs.remove(&job) else { return };
        self.pulls.remove(&job);
        if let Some(task) = self.workers[worker].task_of(job) {
            self.workers[worker].remove(task.sequence);
            self.touched.push(worker);
        }
    }

    fn close(&mut self, request: RequestKey, fate: Option<Fate>) {
        let Some(place) = self.by_request.remove(&request) else { return };
        let Some(mut flight) = self.flights[place].take() else { return };
        self.free_flights.push(place);
        self.flights_open -= 1;
        self.ended(&mut flight, fate);
    }

    fn ended(&mut self, flight: &mut Flight, fate: Option<Fate>) {
        let outcome = flight.outcome(fate);
        let kept = self.setup.slo.kept(&outcome.fate, self.alone_ms(outcome.input_tokens));
        if !kept.both() {
            missed(&mut self.hope, flight);
        }
        self.tally.ended(&outcome, kept);
    }

    fn begin_steps(&mut self) {
        while let Some(worker) = self.touched.pop() {
            if self.workers[worker].is_stepping {
                continue;
            }
            let step = self.workers[worker].begin_step();
            self.admitted(worker);
            if let Some(time) = step {
                let starts = self.setup.trouble.stuck_until(worker, self.now).unwrap_or(self.now);
                self.foresee(starts + time, Happening::StepEnds { worker });
            }
            self.tell(worker);
        }
    }

    /// Notes what the worker's prefix cache held, and lets transfers begin.
    fn admitted(&mut self, worker: usize) {
        for place in 0..self.workers[worker].step().admitted.len() {
            let admission = self.workers[worker].step().admitted[place];
            let Some(task) = self.workers[worker].task(admission.sequence) else { continue };
            let Some(flight) = &mut self.flights[task.flight] else { continue };
            if task.leg != Leg::Decode {
                flight.cached_tokens.get_or_insert(admission.cached_tokens);
            } else if admission.waits_for_remote {
                flight.awaited =
                    Some(Awaited { job: task.job, worker, cached_tokens: admission.cached_tokens });
                self.transfer_if_both_are_there(task.flight);
            }
        }
    }

    fn transfer_if_both_are_there(&mut self, place: usize) {
        let Some(flight) = &mut self.flights[place] else { return };
        let (Some(from), Some(awaited)) = (flight.prefilled_by, flight.awaited) else { return };
        flight.awaited = None;
        let tokens = flight.asked.input_tokens - awaited.cached_tokens;
        flight.kv_bytes_moved += u64::from(tokens) * self.setup.kv_bytes_per_token;
        let mut sender = self.workers[from].link;
        let receiver = &mut self.workers[awaited.worker].link;
        let time = self.setup.link.transfer(self.now, tokens, &mut sender, receiver);
        self.workers[from].link = sender;
        let Awaited { worker, job, .. } = awaited;
        self.foresee(time, Happening::Transferred { worker, job });
    }

    fn step_ends(&mut self, worker: usize) {
        let step = self.workers[worker].end_step();
        for work in step.work.iter().filter(|work| work.samples) {
            let Some(task) = self.workers[worker].task(work.sequence) else { continue };
            let Some(flight) = &mut self.flights[task.flight] else { continue };
            if task.leg == Leg::Prefill {
                flight.prefilled_by = Some(worker);
                self.workers[worker].remove(task.sequence);
                self.jobs.remove(&task.job);
                self.transfer_if_both_are_there(task.flight);
                self.tell_core(Event::PrefillDone { job: task.job });
                continue;
            }
            let is_first = flight.first_token.is_none();
            let gap = (!is_first).then(|| duration(self.now - flight.last_token));
            let is_last = flight.token(self.now);
            if is_first && is_overdue(self.setup, flight, self.now) {
                missed(&mut self.hope, flight);
            }
            if is_last {
                self.workers[worker].remove(task.sequence);
            }
            if is_first {
                self.tell_core(Event::Answered { job: task.job });
            }
            self.core.tokens(task.job, 1, gap);
            if is_last {
                self.jobs.remove(&task.job);
                self.tell_core(Event::Ended { job: task.job });
            }
        }
        self.workers[worker].give_back(step);
        self.touched.push(worker);
    }

    fn reports(&mut self) {
        self.send_reports();
        self.ask_who_is_unheard();
        let next = self.now + nanos_of(self.setup.report_interval);
        self.foresee(next, Happening::Reports);
    }

    fn sample(&mut self) {
        let open = self.flights.iter().flatten();
        let queued = open.filter(|flight| flight.first_token.is_none()).count();
        let used: u64 = self.workers.iter().map(Worker::kv_used_tokens).sum();
        let capacity = self.setup.kv_capacity_tokens as f64 * self.workers.len() as f64;
        let mut sample = FleetSample {
            requests_queued: queued as f64,
            requests_running: (self.flights_open - queued) as f64,
            kv_used_ratio: used as f64 / capacity,
            ..FleetSample::default()
        };
        self.pools.sample(self.setup.mode, &mut sample);
        if self.hope.is_some() {
            for flight in self.flights.iter_mut().flatten() {
                if flight.first_token.is_none() && is_overdue(self.setup, flight, self.now) {
                    missed(&mut self.hope, flight);
                }
            }
        }
        self.tally.sampled(duration(self.now), &sample);
        self.foresee(self.now + SAMPLE_INTERVAL, Happening::Sample);
    }

    fn alone_ms(&self, tokens: u32) -> f64 {
        self.setup.profile.model.prefill_alone_ms(0, tokens)
    }
}

/// The request misses an SLO for certain; it counts once.
fn missed(hope: &mut Option<Hope>, flight: &mut Flight) {
    if let Some(hope) = hope
        && !std::mem::replace(&mut flight.missed, true)
    {
        hope.miss(flight.asked.input_tokens, flight.asked.output_tokens);
    }
}

/// A first token now would be too late.
fn is_overdue(setup: &Setup, flight: &Flight, now: Nanos) -> bool {
    let alone_ms = setup.profile.model.prefill_alone_ms(0, flight.asked.input_tokens);
    super::milliseconds(now - flight.arrived) > setup.slo.ttft_limit_ms(alone_ms)
}

fn core(setup: &Setup) -> Core {
    let ttft = Duration::from_nanos(super::nanos(setup.slo.ttft_ms));
    let order = match setup.late {
        Late::Fifo => Order::Arrival,
        Late::Last => Order::LateLast,
    };
    let settings = Settings {
        split: match setup.mode {
            Mode::Aggregated => Split::Never,
            Mode::Static { .. } | Mode::Flip { .. } => Split::Always,
            Mode::Adaptive => Split::PerRequest,
        },
        order,
        ttft,
        ttft_prefill_factor: setup.slo.ttft_prefill_factor,
        targets: Targets {
            step_ms: STEP_HEADROOM * setup.slo.itl_ms,
            handoff_ms: setup.link.latency_ms,
            handoff_ms_per_thousand_tokens: setup.link.us_per_token,
            // Of these engines neither is in the midst of a step when a prefix is copied.
            pull_ms: 0.0,
        },
        first_token_timeout: Duration::MAX / 4,
        // As a live coordinator has it, but that nobody is turned away.
        admission: Some(AdmissionSettings {
            max_waiting: usize::MAX,
            max_wait: Duration::MAX / 4,
            backlog: AdmissionSettings::backlog_within(ttft, order),
            early_rejection: None,
        }),
        ..Settings::default()
    };
    let entry = policy::policy(setup.policy_name()).unwrap_or(&policy::POLICIES[0]);
    let core = Core::with_policy(settings, (entry.make)(setup.seed));
    match setup.mode {
        Mode::Flip { .. } => core.balanced(setup.balancer),
        Mode::Aggregated | Mode::Static { .. } | Mode::Adaptive => core,
    }
}

fn believed_model(setup: &Setup) -> StepModel {
    let part = setup.predicted_part;
    let model = setup.profile.model;
    StepModel {
        prefill_ms: model.prefill_ms.map(|value| value * part),
        decode_ms: model.decode_ms.map(|value| value * part),
        ..model
    }
}

pub(super) fn nanos_of(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}

/// Names the engine's blocks by those of the trace, each of which covers several.
pub(super) fn block_hashes(
    request: &TraceRequest,
    prefix_block_tokens: u32,
    block_size_tokens: u32,
) -> Vec<BlockHash> {
    if request.prefix_blocks.is_empty() || prefix_block_tokens == 0 {
        return Vec::new();
    }
    let name = |block: u32| {
        // By the trace's block in which it ends.
        let end = (block + 1) * block_size_tokens;
        let of = request.prefix_blocks.get(((end - 1) / prefix_block_tokens) as usize)?;
        let within = u64::from(end % prefix_block_tokens);
        Some(BlockHash((of.rotate_left(16) ^ within).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    };
    (0..request.input_tokens / block_size_tokens).map_while(name).collect()
}
