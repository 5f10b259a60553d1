use std::sync::Arc;

use baton_types::{StepFit, StepModel, StepSamples, StepTail, StepWork};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::sim::Profile;

/// Without a cold start the model is a guess until so many steps of one kind were seen: of prompts alone, of which
/// there are few, or of decodes. Of the other kind there may never be many: all that a prefill worker sees of decodes
/// are prompts' last tokens in chunks of their own.
const LEAST_SAMPLES: StepSamples = StepSamples { prompts: 4, decodes: 16 };

/// How long an engine's steps take, learnt from those that it tells of, and the pace that they shall
/// keep. The engine and its worker each hold one end.
#[derive(Clone, Debug)]
pub struct Pacing(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    cold_start: Option<StepModel>,
    fit: StepFit,
    /// How far the slowest steps with decodes exceed what was predicted of them: only these are gaps between tokens.
    tail: StepTail,
    itl_target_ms: Option<f64>,
}

/// What is known by now of how long an engine's steps take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FittedSteps {
    pub model: StepModel,
    /// Steps that it was fitted to.
    pub samples: u64,
    /// [`StepTail::part`]: steps are planned so much shorter than the ITL target.
    pub slowest_part: f64,
}

/// How much prefill a step may take in beside decodes, said in time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepPace {
    /// A step with decodes in it shall end within this time.
    pub step_ms: f64,
    /// By this model.
    pub model: StepModel,
}

impl Pacing {
    /// Begins with a model from a profile, where there is one.
    pub fn new(cold_start: Option<StepModel>) -> Self {
        let guess = cold_start.unwrap_or_else(|| Profile::demo().model);
        let fit = StepFit::new(&guess);
        Self(Arc::new(Mutex::new(State {
            cold_start,
            fit,
            tail: StepTail::default(),
            itl_target_ms: None,
        })))
    }

    /// One step took so many milliseconds.
    pub fn observe(&self, work: &StepWork, ms: f64) {
        let mut state = self.0.lock();
        if work.decode_sequences > 0
            && let Some(FittedSteps { model, .. }) = state.fitted()
        {
            state.tail.observe(ms / model.step_ms(&work.load(&model)));
        }
        state.fit.observe(work, ms);
    }

    /// What was known before the engine's first step.
    pub fn cold_start(&self) -> Option<StepModel> {
        self.0.lock().cold_start
    }

    /// `None` while it would be a guess.
    pub fn fitted(&self) -> Option<FittedSteps> {
        self.0.lock().fitted()
    }

    /// The time between two tokens that steps shall keep to. 0, or what is no time, sets them free.
    pub fn set_itl_target_ms(&self, target_ms: f64) {
        let target_ms = Some(target_ms).filter(|ms| ms.is_finite() && *ms > 0.0);
        self.0.lock().itl_target_ms = target_ms;
    }

    /// What the next steps shall keep to. `None` where nobody set a target, or nothing is known that it
    /// could be held against.
    pub fn pace(&self) -> Option<StepPace> {
        let state = self.0.lock();
        let FittedSteps { model, .. } = state.fitted()?;
        Some(StepPace { step_ms: state.tail.planned_step_ms(state.itl_target_ms?), model })
    }
}

impl State {
    fn fitted(&self) -> Option<FittedSteps> {
        let StepSamples { prompts, decodes } = self.fit.samples();
        let is_known = self.cold_start.is_some()
            || prompts >= LEAST_SAMPLES.prompts
            || decodes >= LEAST_SAMPLES.decodes;
        is_known.then(|| FittedSteps {
            model: self.fit.model(),
            samples: prompts + decodes,
            slowest_part: self.tail.part(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_needs_a_target_and_a_model() {
        let pacing = Pacing::new(None);
        pacing.set_itl_target_ms(40.0);
        assert_eq!(pacing.pace(), None);
        let mut work = StepWork::default();
        work.add_decode(100);
        for _ in 0..LEAST_SAMPLES.decodes {
            assert_eq!(pacing.pace(), None);
            pacing.observe(&work, 12.0);
        }
        let pace = pacing.pace().unwrap();
        assert_eq!(pace.step_ms, 39.2);
        assert!((pace.model.decode_step_ms(1, 100) - 12.0).abs() < 1.0, "{pace:?}");
        for none in [0.0, -1.0, f64::NAN] {
            pacing.set_itl_target_ms(none);
            assert_eq!(pacing.pace(), None);
        }
        let known = Profile::demo().model;
        let cold = Pacing::new(Some(known));
        let nothing_seen = FittedSteps { model: known, samples: 0, slowest_part: 1.0 };
        assert_eq!(cold.fitted(), Some(nothing_seen));
    }

    /// Many steps of one kind say nothing of the other.
    #[test]
    fn each_kind_of_step_is_a_guess_until_it_was_seen() {
        let pacing = Pacing::new(None);
        let (mut decode, mut prompt) = (StepWork::default(), StepWork::default());
        decode.add_decode(100);
        (0..1000).for_each(|_| pacing.observe(&decode, 12.0));
        assert!(pacing.fitted().is_some());
        // Thirty times what is guessed of an engine that nobody described.
        prompt.add_chunk(0, 1000, true);
        for _ in 0..LEAST_SAMPLES.prompts {
            pacing.observe(&prompt, 4000.0);
        }
        let FittedSteps { model, samples, .. } = pacing.fitted().unwrap();
        assert_eq!(samples, 1000 + LEAST_SAMPLES.prompts);
        let said_ms = model.prefill_alone_ms(0, 1000);
        assert!((said_ms / 4000.0 - 1.0).abs() < 0.1, "{said_ms} ms by {model:?}");
        // As the guess had it: as much beside decodes as alone.
        assert_eq!(model.prefill_interference_factor, 1.0);

        let begun = Pacing::new(None);
        begun.observe(&prompt, 4000.0);
        assert_eq!(begun.fitted(), None);
    }

    #[test]
    fn a_few_steps_of_the_other_kind_do_not_take_back_what_is_known() {
        let pacing = Pacing::new(None);
        let (mut prompt, mut last_token) = (StepWork::default(), StepWork::default());
        prompt.add_chunk(0, 512, true);
        last_token.add_decode(512);
        for _ in 0..LEAST_SAMPLES.prompts {
            pacing.observe(&prompt, 500.0);
        }
        pacing.observe(&last_token, 60.0);
        let FittedSteps { model, .. } = pacing.fitted().unwrap();
        assert!((model.prefill_alone_ms(0, 512) / 500.0 - 1.0).abs() < 0.1, "{model:?}");
    }

    /// Steps of one decode, of 10 ms give or take `spread` of it.
    fn paced(spread: f64) -> (StepPace, f64) {
        let pacing = Pacing::new(None);
        pacing.set_itl_target_ms(40.0);
        let mut work = StepWork::default();
        work.add_decode(100);
        let mut took_ms = Vec::new();
        for step in 0..4000_u32 {
            // Without a pattern.
            let place = f64::from(step.wrapping_mul(0x9e37_79b9) >> 8) / f64::from(1_u32 << 24);
            took_ms.push(10.0 * (1.0 + spread * (2.0 * place - 1.0)));
            pacing.observe(&work, took_ms[took_ms.len() - 1]);
        }
        took_ms.sort_by(f64::total_cmp);
        let slowest = &took_ms[took_ms.len() * 9 / 10..];
        (pacing.pace().unwrap(), slowest.iter().sum::<f64>() / slowest.len() as f64 / 10.0)
    }

    #[test]
    fn of_noisy_steps_the_slowest_tenth_is_planned_to_keep_the_target() {
        let (steady, _) = paced(0.0);
        // But for the fit's own rounding.
        assert!((steady.step_ms - 39.2).abs() < 1e-6, "{steady:?}");
        let (noisy, slowest) = paced(0.2);
        let tail_ms = noisy.step_ms * slowest;
        assert!((37.0..=40.5).contains(&tail_ms), "{tail_ms} of {noisy:?}");
        assert!(noisy.step_ms < 35.0, "{noisy:?}");
    }

    #[test]
    fn prompts_alone_are_no_gaps_between_tokens() {
        let pacing = Pacing::new(Some(Profile::demo().model));
        pacing.set_itl_target_ms(40.0);
        let mut work = StepWork::default();
        work.add_chunk(0, 512, true);
        for ms in [5.0, 500.0].repeat(100) {
            pacing.observe(&work, ms);
        }
        assert_eq!(pacing.pace().unwrap().step_ms, 39.2);
    }
}
