//! Workers that are given nothing more: drained by an operator, or on their way to another role.

use std::collections::BTreeSet;

use baton_types::Epoch;

use super::{tests::*, *};
use crate::{AggregatedReason, AnnouncedChange, HandoffMode, Route};

#[test]
fn a_drained_worker_is_given_nothing_and_finishes_what_it_has() {
    for role in [Role::Prefill, Role::Decode] {
        let (mut f, keys) = Fixture::new([
            worker("p0", Role::Prefill),
            worker("p1", Role::Prefill),
            worker("d0", Role::Decode),
            worker("d1", Role::Decode),
        ]);
        let (leg, pool) = match role {
            Role::Prefill => (0, &keys[..2]),
            Role::Decode => (1, &keys[2..]),
        };
        let (_, actions) = f.arrive(shape());
        let legs = started(&actions);
        let drained = legs[leg].0;
        let other = pool[usize::from(drained == pool[0])];
        assert_eq!(f.handle(Event::Drain { worker: drained }), [], "its job goes on");
        for _ in 0..4 {
            let (_, actions) = f.arrive(shape());
            assert_eq!(started(&actions)[leg].0, other);
        }
        let view = f.core.worker(drained).unwrap();
        assert!(view.drains && view.jobs_open == 1);
        f.handle(Event::Answered { job: legs[1].1 });
        f.handle(Event::Ended { job: legs[1].1 });
        assert_eq!(f.core.worker(drained).unwrap().jobs_open, 0);
    }
}

#[test]
fn a_worker_stays_drained_for_as_long_as_it_lives() {
    let (mut f, keys) = Fixture::new([
        worker("p", Role::Prefill),
        worker("d1", Role::Decode),
        worker("d2", Role::Decode),
    ]);
    f.handle(Event::Drain { worker: keys[1] });
    // It lost its stream, and is the same; then its engine has another life.
    let again = f.attach(worker("d1", Role::Decode));
    f.taken();
    assert!(f.core.worker(again).unwrap().drains);
    let epoch = Epoch::from_u128(2);
    let restarted = f.attach(WorkerDescription { epoch, ..worker("d1", Role::Decode) });
    f.taken();
    assert!(!f.core.worker(restarted).unwrap().drains);
    f.handle(Event::Drain { worker: restarted });
    f.handle(Event::Undrain { worker: restarted });
    let mut used = BTreeSet::new();
    for _ in 0..8 {
        let (_, actions) = f.arrive(shape());
        used.insert(started(&actions)[1].0);
    }
    assert!(used.contains(&restarted));
}

#[test]
fn where_a_pool_is_drained_the_other_does_it_all_and_after_it_nobody() {
    let pools = [("p", Role::Prefill), ("d", Role::Decode)];
    let reasons = [AggregatedReason::NoPrefillWorker, AggregatedReason::NoDecodeWorker];
    for (first, reason) in reasons.into_iter().enumerate() {
        let (mut f, keys) = Fixture::new(pools.map(|(name, role)| worker(name, role)));
        let (drained, left) = (keys[first], keys[1 - first]);
        f.handle(Event::Drain { worker: drained });
        let (request, actions) = f.arrive(shape());
        assert_eq!(started(&actions)[0].2, Leg::Aggregated);
        let route = f.core.request(request).unwrap().route;
        assert_eq!(route, Some(Route::Aggregated { worker: left, reason }));
        f.handle(Event::Drain { worker: left });
        f.attach(WorkerDescription { models: vec!["n".into()], ..worker("n", Role::Decode) });
        let (request, actions) = f.arrive(shape());
        let rejection = Rejection::NoWorker;
        let rejected = [Action::Reject { request, rejection }];
        assert_eq!(actions, rejected, "the model is known, though nobody takes it now");
        f.handle(Event::Undrain { worker: drained });
        let (_, actions) = f.arrive(shape());
        assert_eq!(started(&actions)[0].0, drained);
    }
}

#[test]
fn what_waits_for_a_worker_that_drains_waits_elsewhere() {
    let settings = Settings { order: Order::LateLast, ..Settings::default() };
    let mut f = Fixture { core: Core::new(settings), actions: Vec::new() };
    let predictable = |name, role| WorkerDescription { model: Some(MODEL), ..worker(name, role) };
    let keys = ["p0", "p1"].map(|name| f.attach(predictable(name, Role::Prefill)));
    f.attach(predictable("d", Role::Decode));
    let long = || RequestShape { prompt_tokens: 5000, ..shape() };
    for _ in 0..12 {
        f.arrive(long());
    }
    let queued = |f: &Fixture| keys.map(|key| f.core.worker(key).map(|w| w.load.queued).unwrap());
    let [first, second] = queued(&f);
    assert!(first > 0 && second > 0, "{first} {second}");
    f.handle(Event::Drain { worker: keys[0] });
    assert_eq!(queued(&f), [0, first + second]);
}

#[test]
fn what_an_engine_hands_over_goes_to_another_where_its_decode_worker_drains() {
    let by_engine =
        |name, role| WorkerDescription { handoff: HandoffMode::Engine, ..worker(name, role) };
    let (mut f, keys) = Fixture::new([
        by_engine("p", Role::Prefill),
        by_engine("d1", Role::Decode),
        by_engine("d2", Role::Decode),
    ]);
    let (_, actions) = f.arrive(shape());
    let [(_, prefill, Leg::Prefill, _)] = started(&actions)[..] else { panic!("{actions:?}") };
    f.handle(Event::Drain { worker: keys[1] });
    let actions = f.handle(Event::PrefillDone { job: prefill });
    assert_eq!(started(&actions)[0].0, keys[2]);
    let (_, actions) = f.arrive(shape());
    let prefill = started(&actions)[0].1;
    f.handle(Event::Drain { worker: keys[2] });
    let actions = f.handle(Event::PrefillDone { job: prefill });
    assert_eq!(started(&actions)[0].0, keys[2], "nobody else can");
}

#[test]
fn a_worker_changes_its_role_once_nothing_of_it_is_left() {
    let (mut f, keys) = Fixture::new([
        worker("p", Role::Prefill),
        worker("d1", Role::Decode),
        worker("d2", Role::Decode),
    ]);
    let (_, actions) = f.arrive(shape());
    let legs = started(&actions);
    let (leaves, to) = (legs[1].0, Role::Prefill);
    let other = keys[if leaves == keys[1] { 2 } else { 1 }];
    let ordered = f.handle(Event::SetRole { worker: leaves, role: to });
    assert_eq!(ordered, [Action::SetRole { worker: leaves, role: to }]);
    assert_eq!(f.handle(Event::SetRole { worker: leaves, role: to }), [], "it knows");
    assert_eq!(f.handle(Event::RoleChange { worker: leaves, change: None }), [], "not yet");
    let change = Some(AnnouncedChange { to, number: 3 });
    assert_eq!(f.handle(Event::RoleChange { worker: leaves, change }), [], "it has a job");
    let (_, actions) = f.arrive(shape());
    assert_eq!(started(&actions)[1].0, other);
    f.handle(Event::Answered { job: legs[1].1 });
    assert_eq!(f.handle(Event::Tick), []);
    f.handle(Event::Ended { job: legs[1].1 });
    assert_eq!(f.handle(Event::Tick), [Action::Release { worker: leaves, change: 3 }]);
    assert_eq!(f.handle(Event::Tick), [], "once");
    let name = f.core.worker(leaves).unwrap().description.name.clone();
    let again = WorkerDescription { epoch: Epoch::from_u128(2), ..worker(&name, to) };
    f.handle(Event::WorkerLost { worker: leaves });
    let back = f.attach(again);
    let view = f.core.worker(back).unwrap();
    assert_eq!((view.description.role, view.changes_to), (to, None));
}

#[test]
fn a_change_that_takes_too_long_is_given_up() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let worker = keys[1];
    f.handle(Event::SetRole { worker, role: Role::Prefill });
    let (_, actions) = f.arrive(shape());
    assert_eq!(started(&actions)[0].0, keys[0], "the other pool does it all meanwhile");
    let mut actions = Vec::new();
    let late = NOW + Settings::default().role_change_timeout;
    f.core.handle(Event::Tick, late, &mut actions);
    assert_eq!(actions, [Action::SetRole { worker, role: Role::Decode }]);
    assert_eq!(f.core.worker(worker).unwrap().changes_to, None);
}
