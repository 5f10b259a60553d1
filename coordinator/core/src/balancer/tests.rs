use proptest::prelude::*;

use super::*;
use crate::{Core, HandoffMode, Settings, WorkerDescription};

const MODEL: StepModel = StepModel {
    prefill_ms: [20.0, 0.05, 0.0],
    decode_ms: [10.0, 0.05, 0.0],
    prefill_interference_factor: 0.8,
};

fn promise() -> Promise {
    Promise { ttft_ms: 2000.0, ttft_prefill_factor: 0.0, targets: Targets::default() }
}

/// Keys of workers, of which a core makes as many as are asked for.
fn keys(count: usize) -> Vec<WorkerKey> {
    let mut core = Core::new(Settings::default());
    let worker = |name: usize| WorkerDescription {
        name: name.to_string(),
        epoch: baton_types::Epoch::from_u128(1),
        role: Role::Prefill,
        models: Vec::new(),
        handoff: HandoffMode::None,
        model: None,
        kv_capacity_tokens: None,
        pulls_prefixes: false,
    };
    (0..count).map(|name| core.attach(worker(name), Duration::ZERO, &mut Vec::new())).collect()
}

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A balancer before workers that do what a test says.
struct Scene {
    balancer: Balancer,
    now: Duration,
    workers: Vec<WorkerSight<'static>>,
    requests_per_s: u32,
    prompt_tokens: u32,
    output_tokens: u32,
}

impl Scene {
    fn new(prefill: usize, decode: usize) -> Self {
        Self::with(BalancerSettings::default(), promise(), MODEL, prefill, decode)
    }

    fn with(
        settings: BalancerSettings,
        promise: Promise,
        model: StepModel,
        prefill: usize,
        decode: usize,
    ) -> Self {
        let keys = keys(prefill + decode);
        let worker = |(place, key): (usize, &WorkerKey)| WorkerSight {
            worker: *key,
            name: NAMES[place],
            role: if place < prefill { Role::Prefill } else { Role::Decode },
            changes_to: None,
            is_routable: true,
            is_ours: true,
            model: Some(model),
            silent_for: Duration::ZERO,
            queue_wait_ms: 0.0,
            prefill_work_ms: 0.0,
            decodes: 0,
            decode_context_tokens: 0,
            kv_tokens: Some((0, 100_000)),
            observed_itl_ms: None,
        };
        Self {
            balancer: Balancer::new(settings, promise),
            now: Duration::from_secs(100),
            workers: keys.iter().enumerate().map(worker).collect(),
            requests_per_s: 2,
            prompt_tokens: 1000,
            output_tokens: 100,
        }
    }

    fn look(&mut self) -> Decision {
        for _ in 0..self.requests_per_s {
            let Self { prompt_tokens, output_tokens, .. } = *self;
            self.balancer.arrived(&Arrival { prompt_tokens, hit_tokens: 0 });
            self.balancer.answered(&Answer { prompt_tokens, output_tokens });
        }
        self.now += Duration::from_secs(1);
        self.balancer.look(self.now, &self.workers, false)
    }

    fn looks(&mut self, times: u32) -> Decision {
        for _ in 1..times {
            self.look();
        }
        self.look()
    }

    fn each(&mut self, role: Role, change: impl Fn(&mut WorkerSight<'static>)) {
        self.workers.iter_mut().filter(|worker| worker.role == role).for_each(change);
    }

    /// What the fleet does about a flip, and how long it takes.
    fn flip(&mut self, verdict: Verdict, looks: u32) -> usize {
        let Verdict::Flip { worker, to, .. } = verdict else { panic!("{verdict}") };
        let place = self.workers.iter().position(|other| other.worker == worker).unwrap();
        self.workers[place].changes_to = Some(to);
        self.workers[place].is_routable = false;
        for _ in 0..looks {
            let decision = self.look();
            assert_eq!((decision.verdict, decision.reason), (Verdict::Hold, Reason::FlipInFlight));
        }
        self.workers[place] = WorkerSight {
            role: to,
            changes_to: None,
            is_routable: true,
            queue_wait_ms: 0.0,
            decodes: 0,
            ..self.workers[place]
        };
        place
    }
}

#[test]
fn a_queue_that_waits_draws_a_worker_from_the_pool_that_has_slack() {
    let mut scene = Scene::new(2, 3);
    assert_eq!(scene.looks(10).reason, Reason::Balanced);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    scene.workers[3].decode_context_tokens = 1;
    scene.workers[2].decode_context_tokens = 2;
    assert_eq!(scene.look().reason, Reason::Patience);
    let decision = scene.look();
    let to = Role::Prefill;
    let expected = Verdict::Flip { worker: scene.workers[4].worker, from: Role::Decode, to };
    assert_eq!((decision.verdict, decision.reason), (expected, Reason::PrefillPressed));
    assert!(decision.prefill.is_pressed() && decision.prefill.queue_wait_ms == 1500.0);
    // Nothing is done about an advice: it stands.
    assert_eq!(scene.look().verdict, expected);
}

#[test]
fn one_worker_that_has_room_is_room_enough() {
    let mut scene = Scene::new(3, 3);
    scene.looks(10);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 5000.0);
    scene.workers[1].queue_wait_ms = 10.0;
    assert_eq!(scene.looks(5).reason, Reason::Balanced);
}

#[test]
fn what_more_workers_do_not_shorten_presses_nobody() {
    // Of 2 s, the prompts take 1.9 s for themselves: what they wait is held against the tenth that is
    // left to every TTFT.
    let mut scene = Scene::new(4, 3);
    (scene.requests_per_s, scene.prompt_tokens) = (1, 37_600);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 90.0);
    let decision = scene.looks(10);
    assert!((decision.prefill.queue_budget_ms - 200.0).abs() < 1e-9, "{decision}");
    assert_eq!(decision.reason, Reason::Balanced, "{decision}");

    // A step that is too long with one sequence is so on any number of workers.
    let promise = Promise {
        targets: Targets { step_ms: 10.0, ..Targets::default() },
        ..super::tests::promise()
    };
    let mut scene = Scene::with(BalancerSettings::default(), promise, MODEL, 3, 2);
    scene.each(Role::Decode, |worker| worker.decodes = 4);
    let decision = scene.looks(10);
    assert_eq!(decision.reason, Reason::Balanced, "{decision}");
}

#[test]
fn a_pool_gives_nobody_away_that_it_will_miss() {
    let mut scene = Scene::new(2, 2);
    scene.looks(10);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    // Each at 22 of 40 ms that decodes may add to a step: without one the other would be at 44.
    scene.each(Role::Decode, |worker| worker.decodes = 440);
    let decision = scene.looks(3);
    assert_eq!(decision.reason, Reason::NoSlackElsewhere, "{decision}");
    let Verdict::Scale { role: Role::Prefill, replicas } = decision.verdict else { panic!() };
    assert!(replicas > 2);
    // Or by what arrives, though nothing of it decodes yet.
    scene.each(Role::Decode, |worker| worker.decodes = 0);
    (scene.requests_per_s, scene.output_tokens) = (6, 1000);
    let decision = scene.looks(30);
    assert!(decision.decode.demand > 0.5, "{decision}");
    assert_eq!(decision.reason, Reason::NoSlackElsewhere, "{decision}");
}

#[test]
fn kv_that_fills_up_presses_decode() {
    let mut scene = Scene::new(3, 2);
    scene.looks(10);
    scene.each(Role::Decode, |worker| worker.kv_tokens = Some((95_000, 100_000)));
    let decision = scene.looks(2);
    assert_eq!(decision.reason, Reason::DecodePressed, "{decision}");
}

#[test]
fn the_smallest_pool_keeps_its_worker() {
    let mut scene = Scene::new(1, 1);
    scene.looks(10);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    let decision = scene.looks(3);
    let expected = Verdict::Scale { role: Role::Prefill, replicas: 2 };
    assert_eq!((decision.verdict, decision.reason), (expected, Reason::AtMinimum));
}

#[test]
fn one_flip_at_a_time_and_none_back_before_its_dwell() {
    let mut scene = Scene::new(2, 4);
    scene.looks(10);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    let first = scene.looks(2).verdict;
    let first = scene.flip(first, 5);
    // In the same direction another may follow.
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    let second = scene.look().verdict;
    let second = scene.flip(second, 1);
    assert_ne!(first, second);
    // Back only once it has rested, and never the same ones sooner.
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 0.0);
    scene.each(Role::Decode, |worker| worker.decodes = 900);
    for _ in 0..30 {
        let decision = scene.look();
        assert!(matches!(decision.reason, Reason::Dwell | Reason::Patience), "{decision}");
    }
    let Verdict::Flip { to: Role::Decode, .. } = scene.look().verdict else { panic!() };
}

#[test]
fn a_worker_that_goes_missing_on_its_way_is_waited_for() {
    let mut scene = Scene::new(2, 3);
    scene.looks(10);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    let verdict = scene.looks(2).verdict;
    let Verdict::Flip { worker, .. } = verdict else { panic!("{verdict}") };
    let place = scene.workers.iter().position(|other| other.worker == worker).unwrap();
    scene.workers[place].changes_to = Some(Role::Prefill);
    scene.look();
    scene.workers.remove(place);
    assert_eq!(scene.looks(50).reason, Reason::FlipInFlight);
    assert!(matches!(scene.looks(20).verdict, Verdict::Flip { .. }), "it will not come back");
}

#[test]
fn it_holds_still_on_what_it_does_not_know() {
    type Spoil = fn(&mut Scene);
    let cases: [(Spoil, Missing); 4] = [
        (|scene| scene.workers[0].silent_for = Duration::from_secs(5), Missing::Reports),
        (|scene| scene.workers[1].model = None, Missing::StepModel),
        (|scene| scene.each(Role::Decode, |worker| worker.is_routable = false), Missing::Worker),
        (
            |scene| scene.balancer.demand = Demand::new(Duration::from_secs(10), Duration::ZERO),
            Missing::Arrivals,
        ),
    ];
    for (spoil, missing) in cases {
        let mut scene = Scene::new(2, 2);
        scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
        assert!(matches!(scene.looks(10).verdict, Verdict::Flip { .. }));
        spoil(&mut scene);
        let decision = scene.look();
        assert_eq!((decision.verdict, decision.reason), (Verdict::Hold, Reason::Missing(missing)));
    }
    // Whoever is silent for good is no worker any more, and is neither counted nor moved.
    let mut scene = Scene::new(2, 3);
    scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 1500.0);
    scene.workers[2].silent_for = Duration::from_secs(40);
    let decision = scene.looks(10);
    assert_eq!(decision.decode.workers, 2);
    let Verdict::Flip { worker, .. } = decision.verdict else { panic!("{decision}") };
    assert_ne!(worker, scene.workers[2].worker);
}

#[test]
fn a_clock_that_jumps_is_not_believed_for_a_while() {
    let mut scene = Scene::new(2, 3);
    scene.looks(10);
    for jump in [3600, -1800] {
        let by = Duration::from_secs(i32::unsigned_abs(jump).into());
        scene.now = if jump > 0 { scene.now + by } else { scene.now - by };
        // Everything seems to have waited since before the jump.
        scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 3.6e6);
        for _ in 0..10 {
            assert_eq!(scene.look().reason, Reason::ClockJumped);
        }
        scene.each(Role::Prefill, |worker| worker.queue_wait_ms = 0.0);
        assert_eq!(scene.look().reason, Reason::Balanced);
    }
}

#[test]
fn a_pool_that_could_do_with_less_says_so_after_a_dwell() {
    let mut scene = Scene::new(3, 2);
    assert_eq!(scene.looks(35).reason, Reason::Balanced);
    let decision = scene.looks(5);
    let Verdict::Scale { role, replicas } = decision.verdict else { panic!("{decision}") };
    let now = scene.workers.iter().filter(|worker| worker.role == role).count();
    assert_eq!(replicas as usize, now - 1);
    // Not below its minimum.
    let settings = BalancerSettings { min_prefill: 3, min_decode: 2, ..Default::default() };
    let mut scene = Scene::with(settings, promise(), MODEL, 3, 2);
    assert_eq!(scene.looks(100).reason, Reason::Balanced);
}

/// What happens to a worker between two looks.
#[derive(Clone, Debug)]
struct Trouble {
    worker: usize,
    wait_ms: f64,
    decodes: u32,
    silent_s: u64,
    jump_s: i64,
}

fn troubles() -> impl Strategy<Value = Vec<Trouble>> {
    let silent = prop_oneof![8 => Just(0), 1 => 0..50_u64];
    let jump = prop_oneof![30 => Just(0), 1 => -100..4000_i64];
    let one = (0..8_usize, 0.0..4000.0, 0..1200_u32, silent, jump);
    let one = one.prop_map(|(worker, wait_ms, decodes, silent_s, jump_s)| Trouble {
        worker,
        wait_ms,
        decodes,
        silent_s,
        jump_s,
    });
    prop::collection::vec(one, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Times mean nothing but as parts of the promise: twice the times, twice as slow engines and half
    /// the arrivals, and every decision is the same.
    #[test]
    fn thresholds_scale_with_the_promise(troubles in troubles()) {
        let slow = |model: StepModel| StepModel {
            prefill_ms: model.prefill_ms.map(|ms| 2.0 * ms),
            decode_ms: model.decode_ms.map(|ms| 2.0 * ms),
            ..model
        };
        let fast = promise();
        let twice = Promise {
            ttft_ms: 2.0 * fast.ttft_ms,
            targets: Targets {
                step_ms: 2.0 * fast.targets.step_ms,
                handoff_ms: 2.0 * fast.targets.handoff_ms,
                handoff_ms_per_thousand_tokens: 2.0 * fast.targets.handoff_ms_per_thousand_tokens,
                ..fast.targets
            },
            ..fast
        };
        let settings = BalancerSettings::default();
        let mut scenes = [
            Scene::with(settings, fast, MODEL, 3, 4),
            Scene::with(settings, twice, slow(MODEL), 3, 4),
        ];
        scenes[0].requests_per_s = 4;
        scenes[1].requests_per_s = 2;
        for trouble in troubles {
            let decisions = [0, 1].map(|place| {
                let scene = &mut scenes[place];
                let worker = &mut scene.workers[trouble.worker % 7];
                worker.queue_wait_ms = trouble.wait_ms * if place == 0 { 1.0 } else { 2.0 };
                worker.decodes = trouble.decodes;
                let decision = scene.look();
                (decision.verdict, decision.reason)
            });
            // Half the rate is known from as many arrivals in twice the time.
            if decisions.iter().all(|(_, reason)| *reason != Reason::Missing(Missing::Arrivals)) {
                prop_assert_eq!(decisions[0], decisions[1]);
            }
        }
    }

    /// Whatever it is shown: never an empty pool, one flip in flight, no worker twice within its dwell,
    /// and no direction turned within one.
    #[test]
    fn the_rules_hold_whatever_happens(
        troubles in troubles(),
        prefill in 1..5_usize,
        decode in 1..4_usize,
        takes in 0..6_u32,
    ) {
        let mut scene = Scene::new(prefill, decode);
        let mut flipping: Option<(usize, Role, u32)> = None;
        let mut flips: Vec<(Duration, &str, Role)> = Vec::new();
        // By a clock that does not jump.
        let mut time = Duration::ZERO;
        for trouble in troubles {
            let count = scene.workers.len();
            let worker = &mut scene.workers[trouble.worker % count];
            worker.queue_wait_ms = trouble.wait_ms;
            worker.decodes = trouble.decodes;
            worker.silent_for = Duration::from_secs(trouble.silent_s);
            let jumped = scene.now.as_secs().saturating_add_signed(trouble.jump_s);
            scene.now = Duration::from_secs(jumped);
            if let Some((place, to, left)) = flipping {
                flipping = (left > 0).then(|| (place, to, left - 1));
                if flipping.is_none() {
                    let worker = &mut scene.workers[place];
                    (worker.role, worker.changes_to, worker.is_routable) = (to, None, true);
                }
            }
            let decision = scene.look();
            time += Duration::from_secs(1);
            let Verdict::Flip { worker, from, to } = decision.verdict else { continue };
            prop_assert!(flipping.is_none(), "one flip in flight");
            let place = scene.workers.iter().position(|other| other.worker == worker).unwrap();
            let mut left = scene.workers.iter().filter(|other| other.role == from);
            prop_assert!(left.any(|other| other.worker != worker), "never an empty pool");
            let dwell = scene.balancer.settings.dwell;
            let recent = |at: &Duration| time.saturating_sub(*at) < dwell;
            let name = scene.workers[place].name;
            for (_, flipped, went) in flips.iter().filter(|(at, ..)| recent(at)) {
                prop_assert_ne!(*flipped, name, "at most one flip a dwell");
                prop_assert_eq!(*went, to, "no 2-1-2 cycles");
            }
            flips.push((time, name, to));
            scene.workers[place].changes_to = Some(to);
            scene.workers[place].is_routable = false;
            flipping = Some((place, to, takes));
        }
    }
}
