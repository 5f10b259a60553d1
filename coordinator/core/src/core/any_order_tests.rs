//! Whatever happens, in whatever order: requests end once, and every count returns to zero.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use baton_types::{BlockHash, StepModel};
use proptest::prelude::*;

use super::{tests::*, *};
use crate::{
    AnnouncedChange, HandoffMode, HandoffPlan, OnNoPrefill, PromptBlocks, Tenant, WorkerReport,
};

/// A step of the world, drawn at random and applied to whatever is there.
#[derive(Clone, Debug)]
enum Step {
    Attach(u8, Role, u8),
    Lose(u8),
    Arrive(bool, bool),
    PrefillDone(u8),
    Answer(u8),
    End(u8),
    Fail(u8, bool),
    PullOver(u8),
    ClientGone(u8),
    Report(u8, u16),
    Tell(u8, u8),
    Learn(u8, u8),
    Drain(u8, bool),
    SetRole(u8, Role),
    Announce(u8, Option<Role>),
    Split(Split),
    Advance(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let role = || prop_oneof![Just(Role::Prefill), Just(Role::Decode)];
    let step = prop_oneof![
        2 => (0..6u8, role(), 0..4u8).prop_map(|(name, role, fit)| Step::Attach(name, role, fit)),
        1 => any::<u8>().prop_map(Step::Lose),
        6 => (prop::bool::weighted(0.1), prop::bool::weighted(0.1)).prop_map(|(a, b)| Step::Arrive(a, b)),
        4 => any::<u8>().prop_map(Step::PrefillDone),
        5 => any::<u8>().prop_map(Step::Answer),
        5 => any::<u8>().prop_map(Step::End),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(job, retryable)| Step::Fail(job, retryable)),
        2 => any::<u8>().prop_map(Step::PullOver),
        2 => any::<u8>().prop_map(Step::ClientGone),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(worker, tokens)| Step::Report(worker, tokens)),
        2 => (any::<u8>(), 0..8u8).prop_map(|(worker, prompt)| Step::Tell(worker, prompt)),
        1 => (any::<u8>(), 1..9u8).prop_map(|(worker, slower)| Step::Learn(worker, slower)),
        1 => any::<(u8, bool)>().prop_map(|(worker, drains)| Step::Drain(worker, drains)),
        1 => (any::<u8>(), role()).prop_map(|(worker, role)| Step::SetRole(worker, role)),
        1 => (any::<u8>(), prop::option::of(role())).prop_map(|(worker, to)| Step::Announce(worker, to)),
        1 => splits().prop_map(Step::Split),
        1 => (0..400u16).prop_map(Step::Advance),
    ];
    prop::collection::vec(step, 1..200)
}

/// A core of any kind.
fn cores() -> impl Strategy<Value = (Split, Order, usize)> {
    let order = prop_oneof![Just(Order::Arrival), Just(Order::LateLast)];
    (splits(), order, 0..POLICIES.len())
}

fn splits() -> impl Strategy<Value = Split> {
    prop_oneof![Just(Split::Always), Just(Split::Never), Just(Split::PerRequest)]
}

/// Little room to wait in, and little that goes on to workers.
fn admissions() -> impl Strategy<Value = (Option<AdmissionSettings>, OnNoPrefill, u64)> {
    let admission = (1..6usize, 0..3000u64, prop::option::of(-2..2i32)).prop_map(
        |(max_waiting, backlog_ms, early_rejection)| AdmissionSettings {
            max_waiting,
            max_wait: Duration::from_secs(60),
            backlog: Duration::from_millis(backlog_ms),
            early_rejection,
        },
    );
    let on_no_prefill = prop_oneof![Just(OnNoPrefill::Local), Just(OnNoPrefill::Reject)];
    (prop::option::weighted(0.7, admission), on_no_prefill, 0..100u64)
}

/// Of a prompt of one of four kinds, all of which begin alike.
fn blocks(prompt: u128) -> Arc<[BlockHash]> {
    let names = [1, 2, 3 + u64::try_from(prompt % 4).unwrap()];
    names.map(|name| BlockHash::new(name).unwrap()).into()
}

proptest! {
    #[test]
    fn every_request_ends_once_and_every_count_returns_to_zero(
        (split, order, policy) in cores(),
        (admission, on_no_prefill, patience) in admissions(),
        steps in steps(),
    ) {
        let settings = Settings {
            split,
            order,
            admission,
            on_no_prefill,
            wait_for_worker: Duration::from_secs(patience),
            keeps_decisions: patience % 2 == 0,
            ..Settings::default()
        };
        let mut core = Core::with_policy(settings, (POLICIES[policy].make)(1));
        let mut now = NOW;
        let mut workers: Vec<WorkerKey> = Vec::new();
        // All jobs ever, so that late words of closed ones are tried too.
        let mut jobs: Vec<JobId> = Vec::new();
        let mut open: BTreeSet<RequestKey> = BTreeSet::new();
        let mut fences: BTreeMap<(RequestKey, Generation), u32> = BTreeMap::new();
        let mut settle = vec![Step::Advance(301)];
        settle.splice(0..0, steps);
        let mut arrivals = 0;

        for step in settle {
            let mut actions = Vec::new();
            let pick = |at: u8, len: usize| (len > 0).then(|| usize::from(at) % len.max(1));
            match step {
                Step::Attach(name, role, fit) => {
                    let handoff = match fit {
                        0 => HandoffMode::None,
                        1 => HandoffMode::Engine,
                        fit => HandoffMode::Fenced { compatibility: [fit; 32] },
                    };
                    let description = WorkerDescription {
                        handoff,
                        // Of some it is not known.
                        model: (fit > 1).then_some(MODEL),
                        kv_capacity_tokens: (fit > 2).then_some(20_000),
                        pulls_prefixes: fit > 1,
                        ..worker(&name.to_string(), role)
                    };
                    workers.push(core.attach(description, now, &mut actions));
                }
                Step::Lose(at) => if let Some(at) = pick(at, workers.len()) {
                    let worker = workers.swap_remove(at);
                    core.handle(Event::WorkerLost { worker }, now, &mut actions);
                    prop_assert!(core.worker(worker).is_none());
                },
                Step::Arrive(unknown, one_token) => {
                    let shape = RequestShape {
                        model: Some(if unknown { "x" } else { "m" }.into()),
                        max_output_tokens: one_token.then_some(1),
                        prompt_tokens: 1 + u32::try_from(arrivals * 977 % 9000).unwrap(),
                        blocks: [PromptBlocks { tokens: 512, names: blocks(arrivals) }].into(),
                        answers_whole: arrivals % 3 == 0,
                        priority: i32::try_from(arrivals % 4).unwrap() - 2,
                        tenant: Tenant {
                            name: if arrivals % 5 == 0 { "a" } else { "b" }.into(),
                            weight: 1.0,
                        },
                        ..RequestShape::default()
                    };
                    arrivals += 1;
                    let key = core.arrive(shape, HandoffId::from_u128(arrivals), now, &mut actions);
                    prop_assert!(open.insert(key), "keys are not used twice");
                }
                Step::PrefillDone(at) => if let Some(at) = pick(at, jobs.len()) {
                    core.handle(Event::PrefillDone { job: jobs[at] }, now, &mut actions);
                },
                Step::Answer(at) => if let Some(at) = pick(at, jobs.len()) {
                    core.handle(Event::Answered { job: jobs[at] }, now, &mut actions);
                },
                Step::End(at) => if let Some(at) = pick(at, jobs.len()) {
                    core.handle(Event::Ended { job: jobs[at] }, now, &mut actions);
                },
                Step::Fail(at, retryable) => if let Some(at) = pick(at, jobs.len()) {
                    let kind = if retryable { FaultKind::Failed } else { FaultKind::Refused };
                    let origin = if at % 2 == 0 { Origin::Engine } else { Origin::Handoff };
                    let fault = Fault::new(origin, kind, "x");
                    core.handle(Event::LegFailed { job: jobs[at], fault }, now, &mut actions);
                },
                Step::PullOver(at) => if let Some(at) = pick(at, jobs.len()) {
                    core.handle(Event::PullOver { job: jobs[at] }, now, &mut actions);
                },
                Step::ClientGone(at) => if let Some(at) = pick(at, open.len()) {
                    let request = *open.iter().nth(at).unwrap();
                    open.remove(&request);
                    core.handle(Event::ClientGone { request }, now, &mut actions);
                },
                Step::Report(at, tokens) => if let Some(at) = pick(at, workers.len()) {
                    let tokens = u64::from(tokens);
                    let report =
                        WorkerReport { decode_context_tokens: tokens, kv_used_tokens: tokens };
                    core.handle(Event::Report { worker: workers[at], report }, now, &mut actions);
                },
                Step::Tell(at, prompt) => if let Some(at) = pick(at, workers.len()) {
                    // It begins anew, goes on, or goes on after a gap.
                    let (sequence, restart) = (u64::from(prompt / 2 % 2), prompt < 4);
                    let stored = &blocks(prompt.into());
                    let update = KvUpdate { sequence, restart, removed: &[], stored };
                    core.kv_told(workers[at], &update);
                },
                Step::Learn(at, slower) => if let Some(at) = pick(at, workers.len()) {
                    let decode_ms = MODEL.decode_ms.map(|value| value * f64::from(slower));
                    let model = StepModel { decode_ms, ..MODEL };
                    let slowest_part = f64::from(slower);
                    let event = Event::ModelChanged { worker: workers[at], model, slowest_part };
                    core.handle(event, now, &mut actions);
                },
                Step::Drain(at, drains) => if let Some(at) = pick(at, workers.len()) {
                    let worker = workers[at];
                    let event =
                        if drains { Event::Drain { worker } } else { Event::Undrain { worker } };
                    core.handle(event, now, &mut actions);
                },
                Step::SetRole(at, role) => if let Some(at) = pick(at, workers.len()) {
                    core.handle(Event::SetRole { worker: workers[at], role }, now, &mut actions);
                },
                Step::Announce(at, to) => if let Some(at) = pick(at, workers.len()) {
                    let change = to.map(|to| AnnouncedChange { to, number: 1 });
                    core.handle(Event::RoleChange { worker: workers[at], change }, now, &mut actions);
                },
                Step::Split(split) => core.set_split(split),
                Step::Advance(seconds) => {
                    now += Duration::from_secs(seconds.into());
                    core.handle(Event::Tick, now, &mut actions);
                }
            }
            for action in actions {
                match action {
                    Action::Start { worker, job, request, handoff, leg, .. } => {
                        prop_assert!(open.contains(&request));
                        prop_assert!(core.worker(worker).is_some() || core.job(job).is_none());
                        if let (Some(HandoffPlan::Fenced { generation, .. }), Leg::Decode) = (handoff, leg) {
                            let uses = fences.entry((request, generation)).or_default();
                            *uses += 1;
                            prop_assert_eq!(*uses, 1, "one fence, one attempt");
                        }
                        let drains = core.worker(worker).is_some_and(|worker| worker.drains);
                        prop_assert!(!drains || leg != Leg::Prefill, "who drains begins nothing");
                        jobs.push(job);
                    }
                    Action::Lend { job, request, to, pull, .. } => {
                        prop_assert!(open.contains(&request));
                        prop_assert!(pull.from != to, "nobody lends to itself");
                        let lends = core.worker(pull.from).is_none_or(|worker| !worker.drains);
                        prop_assert!(lends, "who drains begins nothing");
                        jobs.push(job);
                    }
                    Action::Cancel { job, .. } => prop_assert!(core.job(job).is_none()),
                    Action::Relay { request, .. } => prop_assert!(open.contains(&request)),
                    Action::Finish { request }
                    | Action::BreakOff { request, .. }
                    | Action::Reject { request, .. } => {
                        prop_assert!(open.remove(&request), "a request ends once");
                    }
                    Action::Blame { .. } => {}
                    Action::SetRole { worker, .. } => {
                        prop_assert!(core.worker(worker).is_some());
                    }
                    Action::Release { worker, .. } => {
                        let view = core.worker(worker).unwrap();
                        prop_assert!(view.jobs_open == 0, "who is let go has nothing of ours");
                    }
                    Action::Disconnect { worker } => workers.retain(|key| *key != worker),
                }
            }
            core.check_invariants();
            prop_assert_eq!(core.requests_open(), open.len());
        }
        let mut actions = Vec::new();
        for request in open {
            core.handle(Event::ClientGone { request }, now, &mut actions);
        }
        prop_assert_eq!(core.requests_open(), 0);
        prop_assert!(core.workers().all(|worker| worker.jobs_running == 0));
        core.check_invariants();
    }
}
