use baton_types::{Epoch, StepModel};

use super::*;
use crate::{AggregatedReason, Elsewhere, HandoffMode, HandoffPlan, Route};

pub(super) const NOW: Duration = Duration::from_secs(1);
const FENCED: HandoffMode = HandoffMode::Fenced { compatibility: [1; 32] };

pub(super) const MODEL: StepModel = StepModel {
    prefill_ms: [20.0, 0.05, 1e-6],
    decode_ms: [10.0, 0.05, 1e-5],
    prefill_interference_factor: 0.8,
};

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
    pub(super) fn new(
        workers: impl IntoIterator<Item = WorkerDescription>,
    ) -> (Self, Vec<WorkerKey>) {
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
    f.handle(Event::ModelChanged { worker: keys[1], model: slower, slowest_part: 1.0 });
    assert_eq!([0, 1].map(|at| model(&f, at)), [Some(slower), Some(slower)]);
    f.handle(Event::ModelChanged { worker: keys[0], model: MODEL, slowest_part: 1.0 });
    assert_eq!([0, 1].map(|at| model(&f, at)), [Some(MODEL), Some(slower)]);
}
