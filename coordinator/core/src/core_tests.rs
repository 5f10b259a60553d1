use std::collections::{BTreeMap, BTreeSet};

use baton_types::{Epoch, StepModel};
use proptest::prelude::*;

use super::*;
use crate::{
    AggregatedReason, AnnouncedChange, Elsewhere, HandoffMode, HandoffPlan, OnNoPrefill, Route,
    Tenant, WorkerReport,
};

pub(super) const NOW: Duration = Duration::from_secs(1);
const FENCED: HandoffMode = HandoffMode::Fenced { compatibility: [1; 32] };

pub(super) fn worker(name: &str, role: Role) -> WorkerDescription {
    WorkerDescription {
        name: name.into(),
        epoch: Epoch::from_u128(1),
        role,
        models: vec!["m".into()],
        handoff: FENCED,
        model: None,
        kv_capacity_tokens: None,
        pulls_prefixes: false,
    }
}

pub(super) fn shape() -> RequestShape {
    RequestShape { model: Some("m".into()), ..RequestShape::default() }
}

pub(super) struct Fixture {
    pub(super) core: Core,
    pub(super) actions: Vec<Action>,
}

impl Fixture {
    fn new(workers: impl IntoIterator<Item = WorkerDescription>) -> (Self, Vec<WorkerKey>) {
        let mut fixture = Self { core: Core::new(Settings::default()), actions: Vec::new() };
        let keys = workers.into_iter().map(|worker| fixture.attach(worker)).collect();
        (fixture, keys)
    }

    pub(super) fn attach(&mut self, description: WorkerDescription) -> WorkerKey {
        self.core.attach(description, NOW, &mut self.actions)
    }

    pub(super) fn arrive(&mut self, shape: RequestShape) -> (RequestKey, Vec<Action>) {
        let key = self.core.arrive(shape, HandoffId::from_u128(7), NOW, &mut self.actions);
        (key, self.taken())
    }

    pub(super) fn handle(&mut self, event: Event) -> Vec<Action> {
        self.core.handle(event, NOW, &mut self.actions);
        self.taken()
    }

    pub(super) fn taken(&mut self) -> Vec<Action> {
        self.core.check_invariants();
        std::mem::take(&mut self.actions)
    }

    fn jobs_running(&self) -> Vec<u32> {
        self.core.workers().map(|worker| worker.jobs_running).collect()
    }
}

pub(super) fn started(actions: &[Action]) -> Vec<(WorkerKey, JobId, Leg, Option<HandoffPlan>)> {
    let start = |action: &Action| match *action {
        Action::Start { worker, job, leg, handoff, .. } => Some((worker, job, leg, handoff)),
        _ => None,
    };
    actions.iter().filter_map(start).collect()
}

fn failed(job: JobId, origin: Origin) -> Event {
    Event::LegFailed { job, fault: Fault::new(origin, FaultKind::Failed, "x") }
}

#[test]
fn both_legs_start_together_under_one_fence() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let (request, actions) = f.arrive(shape());
    let [(p, prefill, Leg::Prefill, plan_p), (d, decode, Leg::Decode, plan_d)] =
        started(&actions)[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!((p, d), (keys[0], keys[1]));
    let fenced =
        |peer| HandoffPlan::Fenced { id: HandoffId::from_u128(7), generation: Generation(0), peer };
    assert_eq!((plan_p, plan_d), (Some(fenced(d)), Some(fenced(p))));

    assert_eq!(f.handle(Event::PrefillDone { job: prefill }), []);
    assert_eq!(f.jobs_running(), [0, 1], "a prefill that is through is no load");
    let route = Route::Disaggregated { prefill: p, decode: d, by_engine: false };
    assert_eq!(
        f.handle(Event::Answered { job: decode }),
        [Action::Cancel { worker: p, job: prefill }, Action::Relay { request, job: decode, route }]
    );
    assert_eq!(f.handle(Event::Ended { job: decode }), [Action::Finish { request }]);
    assert_eq!((f.core.requests_open(), f.jobs_running()), (0, vec![0, 0]));
}

#[test]
fn what_another_coordinator_gave_a_worker_counts_as_its_load() {
    let pools = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
    let (mut f, keys) =
        Fixture::new(pools.into_iter().enumerate().map(|(i, role)| worker(&i.to_string(), role)));
    let [p0, p1, d0, d1] = keys[..] else { unreachable!() };
    let busy = |worker, prefills, decodes| Event::BusyElsewhere {
        worker,
        elsewhere: Elsewhere { prefills, decodes },
    };
    f.handle(busy(p0, 2, 0));
    f.handle(busy(d1, 0, 2));
    let placed = |f: &mut Fixture| {
        let (_, actions) = f.arrive(shape());
        started(&actions).iter().map(|start| start.0).collect::<Vec<_>>()
    };
    assert_eq!([placed(&mut f), placed(&mut f)], [[p1, d0], [p1, d0]]);
    // As many there as here by now: turns are taken again.
    assert_eq!([placed(&mut f), placed(&mut f)], [[p0, d1], [p1, d0]]);
    // What is through there counts no more.
    f.handle(busy(p0, 0, 0));
    f.handle(busy(d1, 0, 0));
    assert_eq!([placed(&mut f), placed(&mut f)], [[p0, d1], [p0, d1]]);
}

#[test]
fn an_engines_own_handoff_is_one_leg_after_the_other() {
    let own = |name, role| WorkerDescription { handoff: HandoffMode::Engine, ..worker(name, role) };
    let (mut f, keys) = Fixture::new([own("p", Role::Prefill), own("d", Role::Decode)]);
    let (_, actions) = f.arrive(shape());
    let [(_, prefill, Leg::Prefill, _)] = started(&actions)[..] else { panic!("{actions:?}") };
    let actions = f.handle(Event::PrefillDone { job: prefill });
    let [(d, _, Leg::Decode, plan)] = started(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!((d, plan), (keys[1], Some(HandoffPlan::Engine { prefill: Some(prefill) })));
}

#[test]
fn what_cannot_be_split_says_why() {
    use AggregatedReason::*;
    let route = |workers: &[(&str, Role, u8)], shape: RequestShape| {
        let (mut f, keys) = Fixture::new(workers.iter().map(|(name, role, c)| WorkerDescription {
            handoff: HandoffMode::Fenced { compatibility: [*c; 32] },
            ..worker(name, *role)
        }));
        let (_, actions) = f.arrive(shape);
        let [(on, job, Leg::Aggregated, None)] = started(&actions)[..] else {
            panic!("{actions:?}")
        };
        let relay = f.handle(Event::Answered { job });
        let [Action::Relay { route: Route::Aggregated { worker, reason }, .. }] = relay[..] else {
            panic!("{relay:?}")
        };
        assert_eq!(worker, on);
        (keys.iter().position(|key| *key == on).unwrap(), reason)
    };
    let (p, d) = (("p", Role::Prefill, 0), ("d", Role::Decode, 0));
    let one_token = RequestShape { max_output_tokens: Some(1), ..shape() };
    let several = RequestShape { unsplittable: Some("n"), ..shape() };
    assert_eq!(route(&[p, d], one_token), (0, OneToken));
    assert_eq!(route(&[p, d], several), (1, Unsplittable("n")));
    assert_eq!(route(&[d], shape()), (0, NoPrefillWorker));
    assert_eq!(route(&[p], shape()), (0, NoDecodeWorker));
    assert_eq!(route(&[p, ("d", Role::Decode, 9)], shape()), (1, NoCompatiblePair));
}

#[test]
fn only_workers_that_fit_hand_over_to_each_other() {
    let other = |name, role| WorkerDescription {
        handoff: HandoffMode::Fenced { compatibility: [2; 32] },
        ..worker(name, role)
    };
    let (mut f, keys) = Fixture::new([
        worker("p1", Role::Prefill),
        other("p2", Role::Prefill),
        other("d2", Role::Decode),
    ]);
    for _ in 0..4 {
        let (_, actions) = f.arrive(shape());
        let legs = started(&actions);
        assert_eq!((legs[0].0, legs[1].0), (keys[1], keys[2]));
    }
}

#[test]
fn an_unknown_model_is_not_a_missing_worker() {
    let (mut f, _) = Fixture::new([]);
    let (request, actions) = f.arrive(shape());
    assert_eq!(actions, [Action::Reject { request, rejection: Rejection::NoWorker }]);
    f.attach(worker("p", Role::Prefill));
    let (request, actions) = f.arrive(RequestShape { model: Some("x".into()), ..shape() });
    let rejection = Rejection::UnknownModel { model: "x".into() };
    assert_eq!(actions, [Action::Reject { request, rejection }]);
}

#[test]
fn a_leg_that_fails_is_tried_once_more_elsewhere_under_a_new_fence() {
    let (mut f, keys) = Fixture::new([
        worker("p1", Role::Prefill),
        worker("p2", Role::Prefill),
        worker("d1", Role::Decode),
        worker("d2", Role::Decode),
    ]);
    let (request, actions) = f.arrive(shape());
    let first = started(&actions);
    let actions = f.handle(failed(first[0].1, Origin::Engine));
    assert!(matches!(actions[0], Action::Blame { leg: Leg::Prefill, .. }));
    assert_eq!(actions[1], Action::Cancel { worker: first[1].0, job: first[1].1 });
    let second = started(&actions);
    assert_eq!(second[0].0, keys[1], "not the worker that failed");
    let Some(HandoffPlan::Fenced { generation, .. }) = second[0].3 else { panic!() };
    assert_eq!(generation, Generation(1));

    // What the first attempt still says is not heard.
    assert_eq!(f.handle(Event::Answered { job: first[1].1 }), []);
    let fault = Fault::new(Origin::Worker, FaultKind::Failed, "y");
    let actions = f.handle(Event::LegFailed { job: second[1].1, fault: fault.clone() });
    let rejection = Rejection::LegFailed { leg: Leg::Decode, fault };
    assert_eq!(actions.last(), Some(&Action::Reject { request, rejection }));
    assert_eq!(f.jobs_running(), [0, 0, 0, 0]);
}

#[test]
fn a_handoff_that_fails_again_leaves_the_whole_request_to_decode() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let (request, mut actions) = f.arrive(shape());
    for leg in [1, 0] {
        let attempt = started(&actions);
        let fault = Fault::new(Origin::Handoff, FaultKind::Corrupt, "y");
        actions = f.handle(Event::LegFailed { job: attempt[leg].1, fault });
    }
    let in_one = started(&actions);
    assert_eq!(in_one.len(), 1);
    let (worker, job, leg, ref plan) = in_one[0];
    assert_eq!((worker, leg, plan), (keys[1], Leg::Aggregated, &None));
    let reason = AggregatedReason::HandoffFailed;
    let actions = f.handle(Event::Answered { job });
    let route = Route::Aggregated { worker, reason };
    assert_eq!(actions, [Action::Relay { request, job, route }]);

    // An engine that fails then is not tried again.
    let (request, mut actions) = f.arrive(shape());
    for leg in [1, 1, 0] {
        let attempt = started(&actions);
        let fault = Fault::new(Origin::Handoff, FaultKind::Corrupt, "y");
        actions = f.handle(Event::LegFailed { job: attempt[leg].1, fault });
    }
    assert!(matches!(actions.last(), Some(Action::Reject { request: r, .. }) if *r == request));
}

#[test]
fn the_only_worker_of_its_pool_is_tried_again() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let (_, actions) = f.arrive(shape());
    let actions = f.handle(failed(started(&actions)[0].1, Origin::Engine));
    assert_eq!(started(&actions)[0].0, keys[0]);
}

#[test]
fn an_engines_refusal_on_either_leg_is_the_answer() {
    for leg in [0, 1] {
        let (mut f, _) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
        let (request, actions) = f.arrive(shape());
        let legs = started(&actions);
        let (job, other) = (legs[leg].1, legs[1 - leg]);
        let actions = f.handle(Event::Answered { job });
        assert_eq!(actions[0], Action::Cancel { worker: other.0, job: other.1 });
        assert!(matches!(actions[1], Action::Relay { job: relayed, .. } if relayed == job));
        assert_eq!(f.handle(Event::Ended { job }), [Action::Finish { request }]);
    }
}

#[test]
fn a_worker_that_goes_fails_its_legs_and_an_answer_that_has_begun_breaks_off() {
    let (mut f, keys) = Fixture::new([
        worker("p", Role::Prefill),
        worker("d1", Role::Decode),
        worker("d2", Role::Decode),
    ]);
    let (begun, actions) = f.arrive(shape());
    let begun_legs = started(&actions);
    f.handle(Event::Answered { job: begun_legs[1].1 });
    let (waiting, actions) = f.arrive(shape());
    let waiting_legs = started(&actions);
    assert_ne!(begun_legs[1].0, waiting_legs[1].0);

    let actions = f.handle(Event::WorkerLost { worker: keys[1] });
    assert!(
        matches!(&actions[..], [Action::Blame { .. }, Action::BreakOff { request, .. }] if *request == begun)
    );
    let actions = f.handle(Event::WorkerLost { worker: keys[2] });
    let again = started(&actions);
    let [(on, job, Leg::Aggregated, None)] = again[..] else { panic!("{actions:?}") };
    assert_eq!(on, keys[0], "no decode worker is left: prefill does it all");
    assert!(matches!(
        f.handle(Event::Answered { job })[0],
        Action::Relay { request, .. } if request == waiting
    ));
}

#[test]
fn a_worker_of_the_same_name_takes_the_others_place() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let (_, actions) = f.arrive(shape());
    let old = started(&actions)[1].1;
    let new = f.attach(worker("d", Role::Decode));
    let actions = f.taken();
    assert_eq!(actions[0], Action::Disconnect { worker: keys[1] });
    assert_ne!(new, keys[1]);
    assert_eq!(f.handle(Event::Answered { job: old }), [], "the former self is not heard");
}

#[test]
fn a_request_without_a_first_token_is_given_up_in_time() {
    let (mut f, _) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    let (slow, _) = f.arrive(shape());
    let (_, actions) = f.arrive(shape());
    f.handle(Event::Answered { job: started(&actions)[1].1 });
    let mut actions = Vec::new();
    f.core.handle(Event::Tick, NOW + Settings::default().first_token_timeout, &mut actions);
    let rejection = Rejection::FirstTokenTimeout;
    assert_eq!(actions.last(), Some(&Action::Reject { request: slow, rejection }));
    assert_eq!(f.core.requests_open(), 1, "the one that answers goes on");
}

#[test]
fn a_drained_worker_is_given_nothing_and_finishes_what_it_has() {
    let (mut f, keys) = Fixture::new([
        worker("p", Role::Prefill),
        worker("d1", Role::Decode),
        worker("d2", Role::Decode),
    ]);
    let (_, actions) = f.arrive(shape());
    let legs = started(&actions);
    let (drained, other) = (legs[1].0, keys[if legs[1].0 == keys[1] { 2 } else { 1 }]);
    assert_eq!(f.handle(Event::Drain { worker: drained }), []);
    for _ in 0..4 {
        let (_, actions) = f.arrive(shape());
        assert_eq!(started(&actions)[1].0, other);
    }
    let view = f.core.worker(drained).unwrap();
    assert!(view.drains && view.jobs_open == 1);
    f.handle(Event::Answered { job: legs[1].1 });
    f.handle(Event::Ended { job: legs[1].1 });
    assert_eq!(f.core.worker(drained).unwrap().jobs_open, 0);

    // It lost its stream, and is the same; then its engine has another life.
    let name = f.core.worker(drained).unwrap().description.name.clone();
    let mut description = worker(&name, Role::Decode);
    let again = f.attach(description.clone());
    f.taken();
    assert!(f.core.worker(again).unwrap().drains);
    description.epoch = Epoch::from_u128(2);
    let restarted = f.attach(description);
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
fn where_all_are_drained_there_is_no_worker_and_the_model_is_known() {
    let (mut f, keys) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    f.handle(Event::Drain { worker: keys[1] });
    let (_, actions) = f.arrive(shape());
    let [(on, _, Leg::Aggregated, None)] = started(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!(on, keys[0], "the other pool does it all");
    f.handle(Event::Drain { worker: keys[0] });
    f.attach(WorkerDescription { models: vec!["n".into()], ..worker("n", Role::Decode) });
    let (request, actions) = f.arrive(shape());
    assert_eq!(actions, [Action::Reject { request, rejection: Rejection::NoWorker }]);
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

#[test]
fn a_worker_that_drains_ends_what_it_has_and_gets_nothing_new() {
    let (mut f, keys) = Fixture::new([
        worker("p0", Role::Prefill),
        worker("p1", Role::Prefill),
        worker("d", Role::Decode),
    ]);
    let (_, before) = f.arrive(shape());
    let drained = started(&before)[0].0;
    let other = if drained == keys[0] { keys[1] } else { keys[0] };
    assert_eq!(f.handle(Event::Drain { worker: drained }), [], "its job goes on");
    for _ in 0..3 {
        let (_, actions) = f.arrive(shape());
        assert_eq!(started(&actions)[0].0, other);
    }
    f.handle(Event::Drain { worker: other });
    let (request, actions) = f.arrive(shape());
    assert_eq!(started(&actions)[0].2, Leg::Aggregated, "decode does both");
    let view = f.core.request(request).unwrap();
    let reason = AggregatedReason::NoPrefillWorker;
    assert_eq!(view.route, Some(Route::Aggregated { worker: keys[2], reason }));

    f.handle(Event::Drain { worker: keys[2] });
    let (_, actions) = f.arrive(shape());
    assert!(
        matches!(actions[..], [Action::Reject { rejection: Rejection::NoWorker, .. }]),
        "the model is known, though nobody takes it now: {actions:?}"
    );
    f.handle(Event::Undrain { worker: drained });
    f.handle(Event::Undrain { worker: keys[2] });
    let (_, actions) = f.arrive(shape());
    assert_eq!(started(&actions)[0].0, drained);
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
fn a_mode_counts_for_the_requests_that_come_after_it() {
    let (mut f, _) = Fixture::new([worker("p", Role::Prefill), worker("d", Role::Decode)]);
    f.core.set_split(Split::Never);
    let (request, actions) = f.arrive(shape());
    assert_eq!(started(&actions)[0].2, Leg::Aggregated);
    f.core.set_split(Split::Always);
    let is_split = |f: &Fixture, key| {
        matches!(f.core.request(key).unwrap().route, Some(Route::Disaggregated { .. }))
    };
    assert!(!is_split(&f, request));
    let (request, _) = f.arrive(shape());
    assert!(is_split(&f, request));
    assert_eq!(f.core.requests().count(), 2);
}

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
    ClientGone(u8),
    Report(u8, u16),
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
        2 => any::<u8>().prop_map(Step::ClientGone),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(worker, tokens)| Step::Report(worker, tokens)),
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

const MODEL: StepModel = StepModel {
    prefill_ms: [20.0, 0.05, 1e-6],
    decode_ms: [10.0, 0.05, 1e-5],
    prefill_interference_factor: 0.8,
};

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
                        prefix_blocks: [1, 2, 3 + u64::try_from(arrivals % 4).unwrap()].into(),
                        prefix_block_tokens: 512,
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
                Step::Learn(at, slower) => if let Some(at) = pick(at, workers.len()) {
                    let decode_ms = MODEL.decode_ms.map(|value| value * f64::from(slower));
                    let model = StepModel { decode_ms, ..MODEL };
                    core.handle(Event::ModelChanged { worker: workers[at], model }, now, &mut actions);
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

#[test]
fn a_worker_without_a_model_takes_its_peers_until_it_has_its_own() {
    let known = WorkerDescription { model: Some(MODEL), ..worker("p", Role::Prefill) };
    let stranger = WorkerDescription {
        handoff: HandoffMode::Fenced { compatibility: [9; 32] },
        ..worker("x", Role::Decode)
    };
    let (mut f, keys) = Fixture::new([worker("d", Role::Decode), known, stranger]);
    let model = |f: &Fixture, at: usize| f.core.worker(keys[at]).unwrap().load.model;
    assert_eq!([0, 1, 2].map(|at| model(&f, at)), [Some(MODEL), Some(MODEL), None]);

    let slower = StepModel { decode_ms: [30.0, 0.1, 1e-5], ..MODEL };
    f.handle(Event::ModelChanged { worker: keys[1], model: slower });
    assert_eq!([0, 1].map(|at| model(&f, at)), [Some(slower), Some(slower)]);
    f.handle(Event::ModelChanged { worker: keys[0], model: MODEL });
    assert_eq!([0, 1].map(|at| model(&f, at)), [Some(MODEL), Some(slower)]);
}
