use std::sync::Arc;

use baton_types::{StepFit, StepModel, StepWork};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::sim::Profile;

/// Steps are planned to end within this part of the target, so that those which take longer than
/// foreseen still keep it.
const TARGET_SHARE: f64 = 0.95;
/// Without a cold start the model is a guess until this many steps were seen.
const LEAST_SAMPLES: u64 = 16;

/// How long an engine's steps take, learnt from those that it tells of, and the pace that they shall
/// keep. The engine and its worker each hold one end.
#[derive(Clone, Debug)]
pub struct Pacing(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    cold_start: Option<StepModel>,
    fit: StepFit,
    itl_target_ms: Option<f64>,
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
        Self(Arc::new(Mutex::new(State { cold_start, fit, itl_target_ms: None })))
    }

    /// One step took so many milliseconds.
    pub fn observe(&self, work: &StepWork, ms: f64) {
        self.0.lock().fit.observe(work, ms);
    }

    /// What was known before the engine's first step.
    pub fn cold_start(&self) -> Option<StepModel> {
        self.0.lock().cold_start
    }

    /// What is known by now, and of how many steps. `None` while it would be a guess.
    pub fn fitted(&self) -> Option<(StepModel, u64)> {
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
        let (model, _) = state.fitted()?;
        Some(StepPace { step_ms: TARGET_SHARE * state.itl_target_ms?, model })
    }
}

impl State {
    fn fitted(&self) -> Option<(StepModel, u64)> {
        let samples = self.fit.samples();
        let known = samples >= LEAST_SAMPLES || self.cold_start.is_some();
        known.then(|| (self.fit.model(), samples))
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
        for _ in 0..LEAST_SAMPLES {
            pacing.observe(&work, 12.0);
        }
        let pace = pacing.pace().unwrap();
        assert_eq!(pace.step_ms, 38.0);
        assert!((pace.model.decode_step_ms(1, 100) - 12.0).abs() < 1.0, "{pace:?}");
        for none in [0.0, -1.0, f64::NAN] {
            pacing.set_itl_target_ms(none);
            assert_eq!(pacing.pace(), None);
        }
        let known = Profile::demo().model;
        let cold = Pacing::new(Some(known));
        assert_eq!(cold.fitted(), Some((known, 0)));
    }
}
