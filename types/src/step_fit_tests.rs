use proptest::prelude::*;

use super::*;

const COLD: StepModel = StepModel {
    prefill_ms: [16.0, 0.12, 2.5e-6],
    decode_ms: [11.0, 0.06, 2.6e-5],
    prefill_interference_factor: 0.8,
};

fn scaled(by: [f64; 7]) -> StepModel {
    let ([p0, p1, p2], [d0, d1, d2]) = (COLD.prefill_ms, COLD.decode_ms);
    StepModel {
        prefill_ms: [p0 * by[0], p1 * by[1], p2 * by[2]],
        decode_ms: [d0 * by[3], d1 * by[4], d2 * by[5]],
        prefill_interference_factor: COLD.prefill_interference_factor * by[6],
    }
}

fn slower(model: &StepModel, by: f64) -> StepModel {
    StepModel {
        prefill_ms: model.prefill_ms.map(|c| c * by),
        decode_ms: model.decode_ms.map(|c| c * by),
        ..*model
    }
}

/// Steps of a worker that prefills, decodes, and does both.
struct Traffic(fastrand::Rng);

impl Traffic {
    fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    fn work(&mut self) -> StepWork {
        let mut work = StepWork::default();
        let kind = self.0.u32(0..4);
        if kind != 0 {
            for _ in 0..self.0.u32(1..120) {
                work.add_decode(self.0.u32(16..8000));
            }
        }
        if kind < 2 {
            let from = if self.0.bool() { 0 } else { self.0.u32(1..16_000) };
            work.add_chunk(from, from + self.0.u32(2..8192), from == 0);
        }
        work
    }

    /// ±20 %, and one step in twenty that something else held up.
    fn noise(&mut self) -> f64 {
        let outlier = if self.0.u32(0..20) == 0 { 2.0 + 18.0 * self.0.f64() } else { 1.0 };
        outlier * (0.8 + 0.4 * self.0.f64())
    }

    fn teach(&mut self, fit: &mut StepFit, truth: &StepModel, steps: u32) {
        for _ in 0..steps {
            let work = self.work();
            let ms = truth.step_ms(&work.load(truth)) * self.noise();
            fit.observe(&work, ms);
        }
    }

    /// The mean of what the model is off by, as a part of the truth.
    fn error(&mut self, model: &StepModel, truth: &StepModel) -> f64 {
        let errors = (0..200).map(|_| {
            let work = self.work();
            let (said, true_ms) =
                (model.step_ms(&work.load(model)), truth.step_ms(&work.load(truth)));
            (said - true_ms).abs() / true_ms
        });
        errors.sum::<f64>() / 200.0
    }
}

fn truths() -> impl Strategy<Value = StepModel> {
    proptest::array::uniform7(0.3..3.0f64).prop_map(scaled)
}

/// Of a thousand engines and what each is seen to do, at most one is told further off than that: outliers may come
/// in such a bunch that they pass for a change. Always the same thousand.
fn nearly_all_within(most: f64, error_of: impl Fn(StepModel, Traffic) -> f64) {
    let mut rng = fastrand::Rng::with_seed(2026);
    let errors = (0..1000).map(|_| {
        let truth = scaled(std::array::from_fn(|_| 0.3 + 2.7 * rng.f64()));
        error_of(truth, Traffic::new(rng.u64(..)))
    });
    let off: Vec<f64> = errors.filter(|error| *error >= most).collect();
    assert!(off.len() <= 1, "{off:?}");
}

#[test]
fn a_model_is_recovered_through_noise_and_outliers() {
    nearly_all_within(0.1, |truth, mut traffic| {
        let mut fit = StepFit::new(&COLD);
        traffic.teach(&mut fit, &truth, 1500);
        traffic.error(&fit.model(), &truth)
    });
}

/// The furthest off that it is after six hundred steps of any of these, one after the other.
fn worst_error(truth: &StepModel, mut traffic: Traffic, then: [StepModel; 4]) -> f64 {
    let mut fit = StepFit::new(truth);
    let errors = then.map(|now| {
        traffic.teach(&mut fit, &now, 600);
        traffic.error(&fit.model(), &now)
    });
    errors.into_iter().fold(0.0, f64::max)
}

#[test]
fn a_throttled_card_is_followed_there_and_back() {
    nearly_all_within(0.2, |truth, traffic| {
        let then = [1.0, 1.5, 1.0, 3.0].map(|by| slower(&truth, by));
        worst_error(&truth, traffic, then)
    });
}

#[test]
fn a_cold_start_that_is_far_off_is_unlearnt() {
    nearly_all_within(0.2, |_, mut traffic| {
        let far = 20f64.powf(2.0 * traffic.0.f64() - 1.0);
        let mut fit = StepFit::new(&slower(&COLD, far));
        traffic.teach(&mut fit, &COLD, 600);
        traffic.error(&fit.model(), &COLD)
    });
}

/// Of one kind of steps alone, while all others stay as they were.
#[test]
fn what_a_prefill_costs_beside_decodes_is_followed_there_and_back() {
    nearly_all_within(0.2, |truth, traffic| {
        let then = [0.02, 1.0, 0.02, 3.0]
            .map(|prefill_interference_factor| StepModel { prefill_interference_factor, ..truth });
        worst_error(&truth, traffic, then)
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However far off a guess of prompts is, and however many steps of decodes came before: the first prompts tell.
    #[test]
    fn the_first_of_a_kind_are_believed(
        truth in truths(),
        off in prop_oneof![0.02..1.0f64, 1.0..20.0f64],
        decodes in 0..2000u32,
        lengths in proptest::array::uniform4(256..8192u32),
        seed: u64,
    ) {
        let guess = StepModel { prefill_ms: COLD.prefill_ms.map(|c| c * off), ..truth };
        let (mut traffic, mut fit) = (Traffic::new(seed), StepFit::new(&guess));
        let mut work = StepWork::default();
        work.add_decode(1000);
        for _ in 0..decodes {
            fit.observe(&work, truth.decode_step_ms(1, 1000) * traffic.noise());
        }
        let decodes = fit.samples().decodes;
        for tokens in lengths {
            let mut work = StepWork::default();
            work.add_chunk(0, tokens, true);
            let ms = truth.step_ms(&work.load(&truth)) * (0.9 + 0.2 * traffic.0.f64());
            prop_assert!(fit.observe(&work, ms));
        }
        prop_assert_eq!(fit.samples(), StepSamples { prompts: 4, decodes });
        let [said, true_ms] = [fit.model(), truth].map(|model| model.prefill_alone_ms(0, lengths[3]));
        prop_assert!((0.6..1.6).contains(&(said / true_ms)), "{said} of {true_ms}: {:?}", fit.model());
    }

    /// Whatever an engine tells, and in whatever units it tells it.
    #[test]
    fn what_it_foresees_is_a_time(
        steps in proptest::collection::vec(
            (any::<[u32; 6]>(), prop_oneof![any::<f64>(), 0.0..1e6f64]), 1..200),
        cold in proptest::array::uniform7(prop_oneof![Just(0.0), 0.0..1e3f64]),
    ) {
        let mut fit = StepFit::new(&scaled(cold));
        for (parts, ms) in steps {
            let mut work = StepWork::default();
            if parts[0] % 2 == 0 {
                let (from, to) = (parts[1].min(parts[2]), parts[1].max(parts[2]));
                work.add_chunk(from, to, parts[3] % 2 == 0);
            }
            if parts[0] % 3 == 0 {
                work.decode_sequences = parts[4];
                work.decode_context_tokens = u64::from(parts[5]) * u64::from(parts[4]);
            }
            fit.observe(&work, ms);
            let model = fit.model();
            let coefficients = model.prefill_ms.into_iter().chain(model.decode_ms);
            for c in coefficients.chain([model.prefill_interference_factor]) {
                prop_assert!(c.is_finite() && c >= 0.0, "{model:?}");
            }
            prop_assert!(model.prefill_interference_factor <= DEAREST_MIXTURE, "{model:?}");
            let foreseen = model.step_ms(&work.load(&model));
            prop_assert!(foreseen.is_finite() && foreseen >= 0.0, "{model:?} {work:?}");
        }
    }

    #[test]
    fn the_same_steps_teach_the_same(truth in truths(), seed: u64) {
        let learn = || {
            let (mut traffic, mut fit) = (Traffic::new(seed), StepFit::new(&COLD));
            traffic.teach(&mut fit, &truth, 300);
            fit
        };
        prop_assert_eq!(learn(), learn());
    }
}

/// A worker that only decodes keeps what it knew of prefills, and the other way round.
#[test]
fn what_is_not_seen_is_not_forgotten() {
    let (mut fit, mut traffic) = (StepFit::new(&COLD), Traffic::new(7));
    for _ in 0..100_000 {
        let mut work = StepWork::default();
        for _ in 0..32 {
            work.add_decode(1000);
        }
        fit.observe(&work, COLD.step_ms(&work.load(&COLD)) * traffic.noise());
    }
    let model = fit.model();
    assert_eq!(model.prefill_ms, COLD.prefill_ms);
    assert!(fit.decodes.refused < CHANGE_STEPS * USUAL_STEPS);
    let (said, true_ms) = (model.decode_step_ms(32, 32_000), COLD.decode_step_ms(32, 32_000));
    assert!((said / true_ms - 1.0).abs() < 0.1, "{said} {true_ms}");
    let other = model.decode_step_ms(64, 64_000) / COLD.decode_step_ms(64, 64_000);
    assert!((0.5..2.0).contains(&other), "{model:?}");
}

#[test]
fn outliers_teach_nothing() {
    let mut fit = StepFit::new(&COLD);
    let mut work = StepWork::default();
    work.add_decode(1000);
    let ms = COLD.decode_step_ms(1, 1000);
    for _ in 0..100 {
        assert!(fit.observe(&work, ms));
    }
    let before = fit.model();
    assert!(!fit.observe(&work, 10.0 * ms));
    assert!(!fit.observe(&work, f64::NAN));
    assert!(!fit.observe(&StepWork::default(), ms));
    assert_eq!((fit.model(), fit.samples()), (before, StepSamples { prompts: 0, decodes: 100 }));
}

#[test]
fn a_mixture_that_is_dearer_than_can_be_is_the_decodes_own() {
    let truth = StepModel { prefill_interference_factor: 80.0, ..COLD };
    let (mut fit, mut traffic) = (StepFit::new(&COLD), Traffic::new(3));
    traffic.teach(&mut fit, &truth, 2000);
    assert!(fit.model().prefill_interference_factor <= DEAREST_MIXTURE);
    let far_off = StepModel { prefill_interference_factor: 1e9, ..COLD };
    assert_eq!(StepFit::new(&far_off).model().prefill_interference_factor, DEAREST_MIXTURE);
}
