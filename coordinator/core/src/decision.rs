//! What was decided for a request, and what was predicted of it: for metrics, and for whoever asks why.

use std::time::Duration;

use crate::{
    fleet::WorkerKey,
    policy::{Candidate, Targets},
};

/// So many candidates are remembered of each choice, beside the one that was chosen.
const REMEMBERED: usize = 8;

/// One attempt at a request: what was chosen among what.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementDecision {
    /// When the first worker was chosen. Before that the request waited for admission.
    pub at: Duration,
    /// When the first token is due, by the SLO.
    pub due: Duration,
    pub prompt_tokens: u32,
    pub reason: DecisionReason,
    /// Of the worker that prefills, and that decodes too where there is no `decode`.
    pub first: Option<Chosen>,
    pub decode: Option<Chosen>,
}

/// Why a request was to be split, or not, before its workers were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DecisionReason {
    /// All are split that can be.
    Pools,
    /// Each is decided by itself, but a worker's step times are not known: as under `Pools`.
    NoModel,
    /// By what was predicted of each path.
    Predicted,
    /// It runs on one worker, for a reason of [`AggregatedReason`](crate::AggregatedReason).
    Aggregated(&'static str),
}

impl DecisionReason {
    /// A name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pools => "pools",
            Self::NoModel => "no_model",
            Self::Predicted => "predicted",
            Self::Aggregated(why) => why,
        }
    }
}

/// One leg's choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub worker: WorkerKey,
    pub candidates: usize,
    /// The chosen one first, then others, from the one that seemed quickest on.
    pub considered: Vec<Considered>,
}

/// One candidate for a leg.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Considered {
    pub worker: WorkerKey,
    /// Tokens of the prompt that it is believed to have cached.
    pub hit_tokens: u32,
    /// Tokens of it that are to be there before it computes, where a peer is to lend some; else 0.
    pub pulled_tokens: u32,
    /// KV of the prompt fits, as far as is known.
    pub has_kv_room: bool,
    /// Absent where its step times are not known.
    pub predicted: Option<Prediction>,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// Until its prefill begins.
    pub queue_ms: f64,
    /// From there until the prompt is computed, beside the decodes there.
    pub prefill_ms: f64,
    /// Of the KV that has to come from elsewhere.
    pub handoff_ms: f64,
    /// A decode step with this request in it: its ITL, to begin with.
    pub step_ms: f64,
}

impl Considered {
    /// `pulls` where it is to copy what a peer could lend.
    pub(crate) fn to_prefill(
        candidate: &Candidate<'_>,
        prompt_tokens: u32,
        targets: &Targets,
        pulls: bool,
    ) -> Self {
        let pulled_tokens = candidate.pull.filter(|_| pulls).map_or(0, |pull| pull.tokens);
        let cached_tokens = candidate.hit_tokens.max(pulled_tokens);
        let copied_tokens = cached_tokens - candidate.hit_tokens;
        let considered = Self::new(candidate, prompt_tokens, |load, fixed_ms| {
            let queue_ms = queue_ms(candidate);
            // The copy is made while others are computed.
            let copy_ms = if copied_tokens > 0 { targets.pull_ms(copied_tokens) } else { 0.0 };
            Prediction {
                queue_ms,
                prefill_ms: prefill_ms(candidate, cached_tokens, prompt_tokens, fixed_ms),
                handoff_ms: (copy_ms - queue_ms).max(0.0),
                step_ms: load.decode_step_ms(1, prompt_tokens),
            }
        });
        Self { pulled_tokens, ..considered }
    }

    pub(crate) fn to_decode(
        candidate: &Candidate<'_>,
        prompt_tokens: u32,
        targets: &Targets,
    ) -> Self {
        Self::new(candidate, prompt_tokens, |load, _| Prediction {
            handoff_ms: handoff_ms(candidate, prompt_tokens, targets),
            step_ms: load.decode_step_ms(1, prompt_tokens),
            ..Prediction::default()
        })
    }

    /// Until the prompt would be computed there: less than all that [`Self::to_prefill`] finds, for who is only
    /// compared.
    pub(crate) fn prefill_delay_ms(candidate: &Candidate<'_>, prompt_tokens: u32) -> f64 {
        candidate.load.model.as_ref().map_or(f64::INFINITY, |model| {
            let fixed_ms = model.prefill_ms[0];
            let cached_tokens = candidate.hit_tokens;
            queue_ms(candidate) + prefill_ms(candidate, cached_tokens, prompt_tokens, fixed_ms)
        })
    }

    /// Until its KV would be there.
    pub(crate) fn decode_delay_ms(
        candidate: &Candidate<'_>,
        prompt_tokens: u32,
        targets: &Targets,
    ) -> f64 {
        let has_model = candidate.load.model.is_some();
        if has_model { handoff_ms(candidate, prompt_tokens, targets) } else { f64::INFINITY }
    }

    fn new(
        candidate: &Candidate<'_>,
        prompt_tokens: u32,
        predict: impl FnOnce(&crate::fleet::Load, f64) -> Prediction,
    ) -> Self {
        let load = candidate.load;
        Self {
            worker: candidate.worker,
            hit_tokens: candidate.hit_tokens,
            pulled_tokens: 0,
            has_kv_room: load.has_kv_room(prompt_tokens, 1.0),
            predicted: load.model.map(|model| predict(load, model.prefill_ms[0])),
        }
    }
}

fn queue_ms(candidate: &Candidate<'_>) -> f64 {
    candidate.work_ahead_ms / candidate.prefill_rate
}

fn prefill_ms(
    candidate: &Candidate<'_>,
    cached_tokens: u32,
    prompt_tokens: u32,
    fixed_ms: f64,
) -> f64 {
    let work_ms = candidate.load.prefill_ms(cached_tokens, prompt_tokens);
    // Beside decodes it is their steps' fixed part that is paid, and the rate tells of it.
    if candidate.load.decodes == 0 { fixed_ms + work_ms } else { work_ms / candidate.prefill_rate }
}

fn handoff_ms(candidate: &Candidate<'_>, prompt_tokens: u32, targets: &Targets) -> f64 {
    if candidate.is_here {
        return 0.0;
    }
    let missing = f64::from(prompt_tokens.saturating_sub(candidate.hit_tokens));
    targets.handoff_ms + targets.handoff_ms_per_thousand_tokens * missing / 1000.0
}

impl Chosen {
    /// Of all candidates, of whom the one at `place` is chosen: it, and those with the least delay.
    pub(crate) fn new<'a>(
        candidates: &[Candidate<'a>],
        place: usize,
        delay_ms: impl Fn(&Candidate<'a>) -> f64,
        mut consider: impl FnMut(&Candidate<'a>, bool) -> Considered,
    ) -> Option<Self> {
        let chosen = consider(candidates.get(place)?, true);
        let mut others: Vec<(f64, usize)> = Vec::with_capacity(1 + REMEMBERED);
        for (at, candidate) in candidates.iter().enumerate().filter(|(at, _)| *at != place) {
            let delay_ms = delay_ms(candidate);
            let comes_before = |(other_ms, _): &(f64, usize)| *other_ms <= delay_ms;
            if others.len() == REMEMBERED && others.last().is_some_and(comes_before) {
                continue;
            }
            others.insert(others.partition_point(comes_before), (delay_ms, at));
            others.truncate(REMEMBERED);
        }
        let others = others.into_iter().map(|(_, at)| consider(&candidates[at], false));
        let considered = std::iter::once(chosen).chain(others).collect();
        Some(Self { worker: chosen.worker, candidates: candidates.len(), considered })
    }

    pub fn predicted(&self) -> Option<Prediction> {
        self.considered.first()?.predicted
    }
}

impl PlacementDecision {
    /// When the first token is predicted to come.
    pub fn first_token_at(&self) -> Option<Duration> {
        let first = self.first.as_ref()?.predicted()?;
        let mut delay_ms = first.queue_ms + first.prefill_ms + first.handoff_ms;
        if let Some(decode) = self.split_to() {
            let decode = decode.predicted()?;
            // The last token of the prompt is computed where its answer begins.
            delay_ms += decode.handoff_ms + decode.step_ms;
        }
        self.at.checked_add(Duration::try_from_secs_f64(delay_ms / 1000.0).ok()?)
    }

    /// Time between two tokens, in milliseconds, as the worker was loaded when it was chosen.
    pub fn itl_ms(&self) -> Option<f64> {
        let decode = self.decode.as_ref().or(self.first.as_ref())?;
        Some(decode.predicted()?.step_ms)
    }

    /// The choice of another worker for the decode leg.
    pub fn split_to(&self) -> Option<&Chosen> {
        let first = self.first.as_ref()?.worker;
        self.decode.as_ref().filter(|decode| decode.worker != first)
    }
}
