use baton_types::{HandoffId, Leg, Role, StepModel};

use super::{super::tests::*, *};
use crate::{
    AdmissionSettings, DecisionReason, Event, Order, RequestShape, Settings, WorkerDescription,
    policy::{Targets, policy},
};

/// 100 ms for each thousand tokens, and decode steps of 10 ms.
const MODEL: StepModel = StepModel {
    prefill_ms: [0.0, 0.1, 0.0],
    decode_ms: [10.0, 0.0, 0.0],
    prefill_interference_factor: 1.0,
};

fn predictable(name: &str, role: Role) -> WorkerDescription {
    WorkerDescription { model: Some(MODEL), ..worker(name, role) }
}

fn prompt(prompt_tokens: u32) -> RequestShape {
    RequestShape { prompt_tokens, ..shape() }
}

fn of(tenant: &str, priority: i32, prompt_tokens: u32) -> RequestShape {
    let tenant = Tenant { name: tenant.into(), weight: 1.0 };
    RequestShape { tenant, priority, ..prompt(prompt_tokens) }
}

/// As a live coordinator is set by default.
fn adaptive() -> Settings {
    Settings {
        split: Split::PerRequest,
        order: Order::LateLast,
        admission: Some(AdmissionSettings::default()),
        keeps_decisions: true,
        ..Settings::default()
    }
}

fn fixture(
    settings: Settings,
    workers: impl IntoIterator<Item = WorkerDescription>,
) -> (Fixture, Vec<WorkerKey>) {
    let slack = (policy("slack").unwrap().make)(0);
    let mut fixture = Fixture { core: Core::with_policy(settings, slack), actions: Vec::new() };
    let keys = workers.into_iter().map(|worker| fixture.attach(worker)).collect();
    (fixture, keys)
}

#[test]
fn a_burst_between_two_reports_does_not_pile_onto_one_worker() {
    let names = ["a", "b", "c", "d"];
    for order in [Order::Arrival, Order::LateLast] {
        let workers = names.map(|name| predictable(name, Role::Decode));
        let settings = Settings { order, admission: None, ..adaptive() };
        let (mut f, _) = fixture(settings, workers);
        for _ in 0..32 {
            f.arrive(prompt(500));
        }
        let jobs = f.core.workers().map(|worker| worker.load.jobs());
        let jobs: Vec<u32> = jobs.collect();
        assert_eq!(jobs.iter().sum::<u32>(), 32, "{jobs:?}");
        assert!(jobs.iter().all(|jobs| (6..=10).contains(jobs)), "{jobs:?}");
    }
}

#[test]
fn who_is_late_everywhere_waits_where_others_wait_longest() {
    let workers = ["a", "b", "c"].map(|name| predictable(name, Role::Decode));
    let settings = Settings { order: Order::Arrival, admission: None, ..adaptive() };
    let (mut f, _) = fixture(settings, workers);
    // Half a second each; due within two, so three of them on each worker.
    (0..9).for_each(|_| drop(f.arrive(prompt(5000))));
    let jobs = |f: &Fixture| {
        let mut jobs: Vec<_> = f.core.workers().map(|worker| worker.load.jobs()).collect();
        jobs.sort_unstable();
        jobs
    };
    assert_eq!(jobs(&f), [3, 3, 3]);
    // Two seconds more are borne, three prompts and a part.
    (0..3).for_each(|_| drop(f.arrive(prompt(5000))));
    assert_eq!(jobs(&f), [3, 3, 6], "all late ones on one worker");
    (0..3).for_each(|_| drop(f.arrive(prompt(5000))));
    assert_eq!(jobs(&f), [3, 5, 7], "and no later than that");
    // Who is in time somewhere goes there, and who would be late anywhere alone goes where it is quickest.
    f.arrive(prompt(2500));
    f.arrive(prompt(30_000));
    assert_eq!(jobs(&f), [5, 5, 7]);

    // Where nothing can be predicted nobody is known to be late.
    let workers = ["a", "b"].map(|name| worker(name, Role::Decode));
    let (mut f, _) = fixture(Settings { split: Split::Never, ..settings }, workers);
    (0..60).for_each(|_| drop(f.arrive(prompt(100))));
    assert_eq!(jobs(&f), [30, 30]);
}

/// Whether decodes are packed where one of four workers learnt that prefilling beside decodes costs so much.
fn packs(odd_interference_factor: f64) -> bool {
    let odd = StepModel { prefill_interference_factor: odd_interference_factor, ..MODEL };
    let odd = WorkerDescription { model: Some(odd), ..worker("odd", Role::Decode) };
    let others = ["b", "c", "d"].map(|name| predictable(name, Role::Decode));
    let targets = Targets { step_ms: 100.0, ..Targets::default() };
    let workers = [odd].into_iter().chain(others);
    let (mut f, _) = fixture(Settings { targets, ..adaptive() }, workers);
    let (_, actions) = f.arrive(prompt(500));
    let [(_, job, Leg::Aggregated, None)] = started(&actions)[..] else { panic!("{actions:?}") };
    f.handle(Event::Answered { job });
    let (_, actions) = f.arrive(prompt(500));
    started(&actions).iter().any(|start| start.2 == Leg::Prefill)
}

#[test]
fn decodes_are_packed_by_what_workers_say_on_average() {
    // The efficiency is 0.9 of those who agree; 0.85 is where it begins to pay.
    assert!(!packs(1.0));
    assert!(!packs(1.2), "on average it is 0.8625");
    assert!(packs(1.5), "on average it is 0.825");
}

/// Who decodes five answers, of which a worker within the ITL takes four.
fn decoders(ttft: Duration) -> Vec<WorkerKey> {
    let model = StepModel { decode_ms: [10.0, 2.0, 0.0], ..MODEL };
    let workers = ["a", "b", "c"].map(|name| worker(name, Role::Decode));
    let workers = workers.map(|worker| WorkerDescription { model: Some(model), ..worker });
    let targets = Targets { step_ms: 20.0, ..Targets::default() };
    let settings = Settings { order: Order::Arrival, admission: None, targets, ttft, ..adaptive() };
    let (mut f, _) = fixture(settings, workers);
    (0..5)
        .map(|_| {
            let (_, actions) = f.arrive(prompt(100));
            let legs = started(&actions);
            if let [(_, job, Leg::Prefill, _), _] = legs[..] {
                f.handle(Event::PrefillDone { job });
            }
            let (worker, job, ..) = *legs.last().unwrap();
            f.handle(Event::Answered { job });
            worker
        })
        .collect()
}

#[test]
fn decodes_are_packed_beyond_the_itl_only_for_who_is_late_anyway() {
    let in_time = decoders(Duration::from_secs(2));
    assert!(in_time[1..4].iter().all(|worker| *worker == in_time[0]), "{in_time:?}");
    assert_ne!(in_time[4], in_time[0]);
    let late = decoders(Duration::from_millis(1));
    assert!(late[1..].iter().all(|worker| *worker == late[0]), "{late:?}");
}

#[test]
fn what_cannot_be_predicted_is_split_between_the_pools() {
    let workers = [worker("p", Role::Prefill), worker("d", Role::Decode)];
    let (mut f, keys) = fixture(adaptive(), workers);
    let (request, actions) = f.arrive(prompt(500));
    let legs: Vec<_> = started(&actions).iter().map(|start| (start.0, start.2)).collect();
    assert_eq!(legs, [(keys[0], Leg::Prefill), (keys[1], Leg::Decode)]);
    let decision = f.core.take_decision(request).unwrap();
    assert_eq!((decision.reason, decision.first_token_at()), (DecisionReason::NoModel, None));

    f.handle(Event::ModelChanged { worker: keys[1], model: MODEL, slowest_part: 1.0 });
    let (request, actions) = f.arrive(prompt(500));
    let [(_, _, Leg::Aggregated, None)] = started(&actions)[..] else { panic!("{actions:?}") };
    let decision = f.core.take_decision(request).unwrap();
    assert_eq!(decision.reason, DecisionReason::Predicted);
    let first = decision.first.as_ref().unwrap();
    assert_eq!((first.candidates, first.worker), (2, first.considered[0].worker));
    assert_eq!(decision.itl_ms(), Some(10.0));
    let ttft = decision.first_token_at().unwrap() - decision.at;
    assert!(ttft >= Duration::from_millis(50), "{ttft:?}");
}

#[test]
fn a_told_prefix_counts() {
    let workers = ["a", "b", "c"].map(|name| predictable(name, Role::Decode));
    let (mut f, keys) = fixture(adaptive(), workers);
    let held_tokens = [(keys[1], 960), (keys[2], 16)].into();
    let (request, actions) = f.arrive(RequestShape { held_tokens, ..prompt(1000) });
    assert_eq!(started(&actions)[0].0, keys[1]);
    let first = f.core.take_decision(request).unwrap().first.unwrap();
    let hits: Vec<_> = first.considered.iter().map(|one| one.hit_tokens).collect();
    assert_eq!(hits, [960, 16, 0], "the chosen one, then as they seemed quick");
}

#[test]
fn when_all_have_enough_to_do_the_others_wait_here_for_their_turn() {
    let (mut f, _) = fixture(adaptive(), [predictable("a", Role::Decode)]);
    // A second's backlog: two in the engine, and others until ten are there.
    let first: Vec<_> = (0..10).map(|_| f.arrive(of("large", 0, 1000))).collect();
    assert!(f.core.rooms.is_empty());
    let large: Vec<_> = (0..4).map(|_| f.arrive(of("large", 0, 1000)).0).collect();
    let (small, _) = f.arrive(of("small", 0, 1000));
    let (urgent, _) = f.arrive(of("large", -1, 1000));
    assert_eq!(f.core.waiting_by_priority(), [(-1, 1), (0, 4 + 1 + 8)].into());

    // Jobs end one by one.
    let mut jobs: Vec<_> = first.iter().flat_map(|(_, actions)| started(actions)).collect();
    let mut order = Vec::new();
    while let Some((_, job, ..)) = jobs.pop() {
        let mut actions = f.handle(Event::Answered { job });
        actions.extend(f.handle(Event::Ended { job }));
        for action in &actions {
            if let Action::Start { request, .. } = action {
                order.push(*request);
            }
        }
        jobs.extend(started(&actions));
    }
    assert_eq!(f.core.requests_open(), 0);
    let place = |request| order.iter().position(|one| *one == request).unwrap();
    assert!(place(urgent) < place(large[0]), "a class before the other");
    assert!(
        place(small) < place(large[1]),
        "a tenant that had nothing yet before one that had much"
    );
}

/// In one queue nobody overtakes: whom another worker might still serve in time is not kept in it.
#[test]
fn as_they_come_nobody_waits_here_who_could_be_in_time() {
    let ttft = Duration::from_secs(2);
    let placed = |order| {
        let backlog = AdmissionSettings::backlog_within(ttft, order);
        let admission = Some(AdmissionSettings { backlog, ..AdmissionSettings::default() });
        let settings = Settings { order, ttft, admission, ..adaptive() };
        let (mut f, _) = fixture(settings, [predictable("a", Role::Decode)]);
        // Of 100 ms each.
        (0..200).for_each(|_| drop(f.arrive(prompt(1000))));
        200 - f.core.rooms.values().map(|room| room.len()).sum::<usize>()
    };
    let (as_they_come, by_deadline) = (placed(Order::Arrival), placed(Order::LateLast));
    assert!((20..200).contains(&as_they_come), "{as_they_come}");
    assert!((1..20).contains(&by_deadline), "{by_deadline}");
}

/// Lets the jobs of these actions end, one by one and a second each, and says which requests were begun in which order.
fn run(f: &mut Fixture, actions: &[Action], mut now: Duration) -> Vec<RequestKey> {
    let mut jobs: std::collections::VecDeque<_> = started(actions).into();
    let mut order = Vec::new();
    while let Some((_, job, ..)) = jobs.pop_front() {
        now += Duration::from_secs(1);
        let mut actions = Vec::new();
        for event in [Event::Answered { job }, Event::Ended { job }] {
            f.core.handle(event, now, &mut actions);
            f.core.check_invariants();
        }
        for action in &actions {
            if let Action::Start { request, .. } = action {
                order.push(*request);
            }
        }
        jobs.extend(started(&actions));
    }
    order
}

/// A worker that takes a second for each of these. The engine has two, two wait for it, and the others here.
#[test]
fn who_misses_the_deadline_is_served_behind_all_who_can_still_make_it() {
    for admission in [None, Some(AdmissionSettings::default())] {
        let ttft = Duration::from_secs(4);
        let settings = Settings { admission, ttft, ..adaptive() };
        let (mut f, _) = fixture(settings, [predictable("a", Role::Decode)]);
        let mut begun = Vec::new();
        let keys: Vec<_> = (0..8)
            .map(|_| {
                let (key, actions) = f.arrive(prompt(9000));
                begun.extend(actions);
                key
            })
            .collect();
        // Three can be in time. Whoever comes when these are known to be late goes before the rest of them.
        let [(_, first, ..), (_, second, ..)] = started(&begun)[..] else { panic!("{begun:?}") };
        let later = NOW + Duration::from_millis(3500);
        let mut actions = Vec::new();
        for job in [first, second] {
            f.core.handle(Event::Answered { job }, later, &mut actions);
            f.core.handle(Event::Ended { job }, later, &mut actions);
        }
        let one = f.core.arrive(prompt(9000), HandoffId::from_u128(1), later, &mut actions);
        f.core.check_invariants();
        let starts = |action: &Action| match action {
            Action::Start { request, .. } => Some(*request),
            _ => None,
        };
        let mut order: Vec<_> = actions.iter().filter_map(starts).collect();
        order.extend(run(&mut f, &actions, later));
        assert_eq!(f.core.requests_open(), 0, "nobody is forgotten");
        let place = |key| order.iter().position(|one| *one == key);
        let before = keys.iter().filter(|key| place(**key) < place(one)).count() - 2;
        assert!(before <= 1, "{before} of those that are late went before: {order:?}");
        let late: Vec<_> = order.iter().filter(|key| **key != one).copied().collect();
        assert_eq!(late, keys[2..], "the others in the order of their arrival");
    }
}

/// A decode takes a fifth of what a step can bear beside its fixed part.
#[test]
fn who_is_late_waits_for_decodes_to_end_while_others_are_at_stake() {
    let model = StepModel { decode_ms: [10.0, 2.0, 0.0], ..MODEL };
    let targets = Targets { step_ms: 20.0, ..Targets::default() };
    let at_stake = [(0, 1), (9, 1), (9, 0)];
    for (late, in_time) in at_stake {
        let worker = WorkerDescription { model: Some(model), ..worker("a", Role::Decode) };
        let (mut f, _) = fixture(Settings { targets, ..adaptive() }, [worker]);
        (0..late).for_each(|_| f.core.late_shares.served(20_000, true, NOW));
        (0..in_time).for_each(|_| f.core.late_shares.served(20_000, false, NOW));
        let waits = (late, in_time) == (9, 1);
        let decodes = [100; 3].map(|tokens| {
            let (_, actions) = f.arrive(prompt(tokens));
            let [(_, job, ..)] = started(&actions)[..] else { panic!("{actions:?}") };
            f.handle(Event::Answered { job });
            job
        });
        // Three seconds of prefill, due in two.
        let (_, actions) = f.arrive(prompt(30_000));
        assert_eq!(
            started(&actions).is_empty(),
            waits,
            "{late} late, {in_time} in time: {actions:?}"
        );
        let mut ended = decodes.into_iter().map(|job| f.handle(Event::Ended { job }));
        let begun = ended.position(|actions| !started(&actions).is_empty());
        assert_eq!(begun, waits.then_some(0), "two are no more than two fifths");
    }
}

#[test]
fn long_prompts_leave_workers_to_the_others_while_those_are_late() {
    let begins = |f: &mut Fixture, tokens| {
        let (_, actions) = f.arrive(prompt(tokens));
        f.core.check_invariants();
        started(&actions).first().map(|start| start.1)
    };
    // Four seconds each, due in ten, or in two, when they are late.
    for ttft_prefill_factor in [2.0, 0.0] {
        for (late, at_once) in [(0, 4), (7, 2), (14, 1), (1000, 1)] {
            let workers = ["a", "b", "c", "d"].map(|name| predictable(name, Role::Decode));
            let (mut f, _) = fixture(Settings { ttft_prefill_factor, ..adaptive() }, workers);
            (0..late).for_each(|_| f.core.long_prompts.other_served(true));
            let long = [(); 4].map(|()| begins(&mut f, 40_000));
            assert_eq!(long.iter().flatten().count(), at_once, "{late} late");
            let passes = begins(&mut f, 20_000).is_some();
            assert_eq!(passes, at_once < 4, "others do not wait for those who wait");
            let job = long[0].unwrap();
            let actions = f.handle(Event::Answered { job });
            assert!(!started(&actions).is_empty(), "whoever waits, once one is computed");
        }
    }
}

#[test]
fn what_a_long_prompt_takes_is_by_what_is_cached_of_it() {
    let (mut f, keys) = fixture(adaptive(), [predictable("a", Role::Decode)]);
    let busy: Vec<_> = (0..10).map(|_| f.arrive(prompt(1000))).collect();
    (0..4).for_each(|_| drop(f.arrive(prompt(40_000))));
    let held_tokens = [(keys[0], 39_000)].into();
    let (cached, _) = f.arrive(RequestShape { held_tokens, ..prompt(40_000) });
    let keys: Vec<_> = busy.iter().map(|(key, _)| *key).collect();
    let mut jobs: Vec<_> = busy.iter().flat_map(|(_, actions)| started(actions)).collect();
    let mut next = None;
    while let Some((_, job, ..)) = jobs.pop() {
        let actions = f.handle(Event::Answered { job });
        let mut others = actions.iter().filter_map(|action| match action {
            Action::Start { request, .. } if !keys.contains(request) => Some(*request),
            _ => None,
        });
        next = next.or_else(|| others.next());
        jobs.extend(started(&actions));
    }
    assert_eq!(next, Some(cached), "the others are late");
}

#[test]
fn whoever_is_shed_is_told_when_to_come_again() {
    let admission = AdmissionSettings { max_waiting: 2, ..AdmissionSettings::default() };
    let settings = Settings { admission: Some(admission), ..adaptive() };
    let (mut f, _) = fixture(settings, [predictable("a", Role::Decode)]);
    for _ in 0..10 {
        f.arrive(of("t", 0, 1000));
    }
    let (first, _) = f.arrive(of("t", 1, 1000));
    let (second, _) = f.arrive(of("t", 1, 1000));
    let rejected = |actions: &[Action]| match actions {
        [Action::Reject { request, rejection: Rejection::Overloaded { reason, retry_after } }] => {
            (*request, *reason, *retry_after)
        }
        other => panic!("{other:?}"),
    };
    let (third, actions) = f.arrive(of("t", 1, 1000));
    let (request, reason, retry_after) = rejected(&actions);
    assert_eq!((request, reason), (third, ShedReason::QueueFull));
    // 1.2 s of work, of a worker that has 95 % of its time for it.
    assert!((1.2..1.4).contains(&retry_after.as_secs_f64()), "{retry_after:?}");
    let (_, actions) = f.arrive(of("t", 0, 1000));
    assert_eq!(rejected(&actions).0, second, "the last of the lowest class");
    let mut actions = Vec::new();
    f.core.handle(Event::Tick, NOW + admission.max_wait, &mut actions);
    let shed = actions.iter().find_map(|action| match action {
        Action::Reject { request, rejection: Rejection::Overloaded { reason, .. } } => {
            Some((*request, *reason))
        }
        _ => None,
    });
    // By the clock its engine is through, but it was not heard of.
    assert_eq!(shed, Some((first, ShedReason::WaitedTooLong)), "{actions:?}");
}

#[test]
fn who_cannot_be_served_in_time_is_told_at_once_where_its_class_is_to_be() {
    let early_rejection = Some(1);
    let admission = AdmissionSettings { early_rejection, ..AdmissionSettings::default() };
    let settings = Settings { admission: Some(admission), ..adaptive() };
    let (mut f, _) = fixture(settings, [predictable("a", Role::Decode)]);
    let (request, actions) = f.arrive(of("t", 1, 30_000));
    let Rejection::Overloaded { reason, retry_after } = (match &actions[..] {
        [Action::Reject { request: rejected, rejection }] if *rejected == request => {
            rejection.clone()
        }
        other => panic!("{other:?}"),
    }) else {
        panic!("{actions:?}")
    };
    assert_eq!((reason, retry_after), (ShedReason::CannotMeetSlo, Duration::from_secs(1)));
    assert_eq!(started(&f.arrive(of("t", 0, 30_000)).1).len(), 1, "other classes are served");
    assert_eq!(started(&f.arrive(of("t", 1, 100)).1).len(), 0, "three seconds are before it");
}

#[test]
fn a_request_waits_for_the_first_worker_and_not_for_ever() {
    let wait_for_worker = Duration::from_secs(30);
    let (mut f, _) = fixture(Settings { wait_for_worker, ..adaptive() }, []);
    let (_, actions) = f.arrive(prompt(100));
    assert_eq!(actions, []);
    f.attach(worker("d", Role::Decode));
    let actions = f.taken();
    let [(_, job, Leg::Aggregated, None)] = started(&actions)[..] else { panic!("{actions:?}") };
    let worker = f.core.job(job).unwrap().2;
    f.handle(Event::Answered { job });
    f.handle(Event::Ended { job });

    f.handle(Event::WorkerLost { worker });
    let (request, _) = f.arrive(prompt(100));
    let mut actions = Vec::new();
    f.core.handle(Event::Tick, NOW + wait_for_worker, &mut actions);
    assert_eq!(actions, [Action::Reject { request, rejection: Rejection::NoWorker }]);
}

#[test]
fn decode_workers_do_not_prefill_where_that_is_not_wanted() {
    let on_no_prefill = OnNoPrefill::Reject;
    let settings = Settings { split: Split::Always, on_no_prefill, ..Settings::default() };
    let (mut f, _) = fixture(settings, [worker("d", Role::Decode)]);
    let (request, actions) = f.arrive(prompt(100));
    assert_eq!(actions, [Action::Reject { request, rejection: Rejection::NoPrefillWorker }]);

    let wait_for_worker = Duration::from_secs(30);
    let (mut f, _) = fixture(Settings { wait_for_worker, ..settings }, [worker("d", Role::Decode)]);
    assert_eq!(f.arrive(prompt(100)).1, []);
    f.attach(worker("p", Role::Prefill));
    assert_eq!(started(&f.taken()).len(), 2);
}

#[test]
fn an_engine_that_decodes_nothing_is_given_prompts_by_the_batch() {
    let model = baton_types::StepModel { prefill_ms: [20.0, 0.1, 0.0], ..MODEL };
    let engine = WorkerDescription { model: Some(model), ..worker("a", Role::Decode) };
    // 24 times 20 ms for 60 ms each; a quarter of 800 ms. Where one decodes it is 2,048 tokens, and what was given
    // stays.
    for (ttft_ms, together, more) in [(2000, 8, 0), (800, 3, 1)] {
        let settings = Settings { ttft: Duration::from_millis(ttft_ms), ..adaptive() };
        let (mut f, _) = fixture(settings, [engine.clone()]);
        let begun = |f: &mut Fixture| started(&f.arrive(prompt(600)).1);
        let jobs: Vec<_> = (0..12).flat_map(|_| begun(&mut f)).collect();
        assert_eq!(jobs.len(), together);
        let actions = f.handle(Event::Answered { job: jobs[0].1 });
        assert_eq!(started(&actions).len(), more);
    }
}

#[test]
fn answers_that_come_whole_do_not_hold_the_next_prompts_back() {
    let (mut f, _) = fixture(adaptive(), [predictable("a", Role::Decode)]);
    let whole = || RequestShape { answers_whole: true, ..prompt(5000) };
    let begun: Vec<_> = (0..3).map(|_| started(&f.arrive(whole()).1).len()).collect();
    assert_eq!(begun, [1, 1, 0], "the third waits behind two prompts");
    let mut actions = Vec::new();
    f.core.handle(Event::Tick, NOW + Duration::from_millis(600), &mut actions);
    assert_eq!(started(&actions).len(), 1, "the first of them is computed by now: {actions:?}");
}
