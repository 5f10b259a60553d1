use std::{cell::Cell, time::Duration};

use baton_types::Leg;

use super::{Candidate, Choice, Policy, least};

/// A decode is put only where its steps stay below this part of what the worker plans, so that they can grow.
const DECODE_HEADROOM: f64 = 0.9;
/// Below this efficiency of prefilling beside decodes it pays to keep the two apart.
const PACK_BELOW: f64 = 0.85;
/// So many workers are asked whether it does.
const ASKED: usize = 16;
/// KV may be used up to this part.
const KV_HIGH: f64 = 0.97;

/// Packing takes links that move a token's KV in this part of the time that computing it takes: one worker
/// receives what several others prefill.
const LINK_SHARE: f64 = 0.5;
/// A prompt waits up to so many milliseconds longer for each that is not computed twice: what one worker computes
/// that another holds is lost to all who wait, and so is the room in which it is held twice.
const LOST_WORK_COUNTS: f64 = 3.0;
/// To copy less is not worth the trouble.
const MIN_PULL_TOKENS: u32 = 512;

/// Prefill goes where the first token is predicted soonest: work ahead and its own, over the part of
/// time that the decodes there leave to prefill; somewhat later is borne where less is computed. A decode stays where its prompt was prefilled, or
/// decodes are packed on few workers, by which of the two the ITL target makes cheaper.
///
/// Of each `T` milliseconds (the target of a step) a worker with decodes loses the fixed part of the
/// decode step, and what it prefills costs `f` of what it costs alone: its efficiency is
/// `e = (1 − fixed/T) / f`. With a tight target the fixed part weighs: pack. With a loose one staying
/// is cheaper, and nothing is moved.
#[derive(Debug)]
pub(super) struct Slack;

impl Policy for Slack {
    fn choose(&mut self, choice: &Choice<'_>) -> usize {
        match choice.leg {
            Leg::Decode => decode(choice),
            Leg::Prefill | Leg::Aggregated | Leg::Lend => prefill(choice),
        }
    }

    fn pulls(&self, choice: &Choice<'_>, candidate: &Candidate<'_>) -> bool {
        pulled_ms(choice, candidate)
            .is_some_and(|pulled_ms| pulled_ms < computed_ms(choice, candidate))
    }
}

fn prefill(choice: &Choice<'_>) -> usize {
    let most_tokens = choice.candidates.iter().map(|candidate| candidate.hit_tokens).max();
    let most_tokens = most_tokens.unwrap_or_default();
    let lost =
        |candidate: &Candidate<'_>| LOST_WORK_COUNTS * lost_ms(choice, candidate, most_tokens);
    let (soonest_ms, least_ms) = (Cell::new(f64::INFINITY), Cell::new(f64::INFINITY));
    let best = least(choice, |candidate| {
        let first_token_ms = first_token_ms(choice, candidate);
        soonest_ms.set(soonest_ms.get().min(first_token_ms));
        if first_token_ms > least_ms.get() {
            // Whatever is lost there.
            return f64::INFINITY;
        }
        let cost_ms = first_token_ms + lost(candidate);
        least_ms.set(least_ms.get().min(cost_ms));
        cost_ms
    });
    late_by_others(choice, soonest_ms.get(), lost).unwrap_or(best)
}

/// A prompt that is late everywhere, because of what others have queued before it, is queued behind those who wait
/// longest already, though at most a TTFT's target later than need be: it is late anyway, and whoever comes next may
/// find a shorter queue and be in time.
fn late_by_others(
    choice: &Choice<'_>,
    soonest_ms: f64,
    lost: impl Fn(&Candidate<'_>) -> f64,
) -> Option<usize> {
    let left_ms = in_ms(choice.due.saturating_sub(choice.now));
    // Who has no model is not known to be late.
    if soonest_ms <= left_ms || choice.candidates.iter().any(|one| one.load.model.is_none()) {
        return None;
    }
    let queue_ms = |candidate: &Candidate<'_>| candidate.work_ahead_ms / candidate.prefill_rate;
    let delay_ms = |candidate: &Candidate<'_>| first_token_ms(choice, candidate);
    let mut alone = choice.candidates.iter().map(|one| delay_ms(one) - queue_ms(one));
    if !alone.any(|alone_ms| alone_ms <= left_ms) {
        return None;
    }
    let latest_ms = soonest_ms + in_ms(choice.ttft);
    let mut longest: Option<(f64, usize)> = None;
    for (place, candidate) in choice.candidates.iter().enumerate() {
        let wait_ms = queue_ms(candidate);
        // Most have less before them than one that was seen, and are not looked at any closer.
        let is_longer = |wait_ms: f64| longest.is_none_or(|(longest_ms, _)| wait_ms > longest_ms);
        if is_longer(wait_ms) && delay_ms(candidate) <= latest_ms {
            let wait_ms = wait_ms - lost(candidate);
            if is_longer(wait_ms) {
                longest = Some((wait_ms, place));
            }
        }
    }
    longest.map(|(_, place)| place)
}

fn is_late(choice: &Choice<'_>, candidate: &Candidate<'_>) -> bool {
    first_token_ms(choice, candidate) > in_ms(choice.due.saturating_sub(choice.now))
}

fn in_ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Until the prompt is computed there, by the quicker way.
fn first_token_ms(choice: &Choice<'_>, candidate: &Candidate<'_>) -> f64 {
    let computed_ms = computed_ms(choice, candidate);
    pulled_ms(choice, candidate).map_or(computed_ms, |pulled_ms| pulled_ms.min(computed_ms))
}

/// Milliseconds of prefill there that the worker with the longest prefix would not compute.
fn lost_ms(choice: &Choice<'_>, candidate: &Candidate<'_>, most_tokens: u32) -> f64 {
    if candidate.hit_tokens >= most_tokens {
        return 0.0;
    }
    let (load, tokens) = (candidate.load, choice.request.prompt_tokens);
    let lost_ms =
        load.prefill_ms(candidate.hit_tokens, tokens) - load.prefill_ms(most_tokens, tokens);
    lost_ms / candidate.prefill_rate
}

/// Until the prompt is computed there, all of it that is not cached.
fn computed_ms(choice: &Choice<'_>, candidate: &Candidate<'_>) -> f64 {
    let tokens = choice.request.prompt_tokens;
    let work_ms = candidate.load.prefill_ms(candidate.hit_tokens, tokens);
    (candidate.work_ahead_ms + work_ms) / candidate.prefill_rate
}

/// The same if what a peer holds is copied first, beside the work that goes before.
fn pulled_ms(choice: &Choice<'_>, candidate: &Candidate<'_>) -> Option<f64> {
    let pull = candidate.pull?;
    let copied_tokens = pull.tokens - candidate.hit_tokens;
    if copied_tokens < MIN_PULL_TOKENS {
        return None;
    }
    let rate = candidate.prefill_rate;
    let copy_ms = choice.targets.pull_ms(copied_tokens);
    let work_ms = candidate.load.prefill_ms(pull.tokens, choice.request.prompt_tokens);
    Some((candidate.work_ahead_ms / rate).max(copy_ms) + work_ms / rate)
}

fn decode(choice: &Choice<'_>) -> usize {
    let here = choice.candidates.iter().position(|candidate| candidate.is_here);
    let any = choice.candidates.iter().any(|candidate| has_room(choice, candidate));
    let takes = |candidate: &Candidate<'_>| !any || has_room(choice, candidate);
    let stays = here.filter(|here| takes(&choice.candidates[*here]));
    let least = |cost: &dyn Fn(&Candidate<'_>) -> f64| {
        least(choice, |candidate| if takes(candidate) { cost(candidate) } else { f64::INFINITY })
    };
    if pays_to_pack(choice) {
        let packed = packed(choice, here).or(stays);
        return packed.unwrap_or_else(|| least(&|candidate| candidate.load.prefill_work_ms()));
    }
    stays.unwrap_or_else(|| {
        least(&|candidate| {
            let Candidate { load, prefill_rate, .. } = candidate;
            let step_ms = load.decode_step_ms(1, choice.request.prompt_tokens);
            step_ms + 0.02 * load.prefill_work_ms() / prefill_rate
        })
    })
}

/// The KV fits, and the steps are short enough with one more.
fn has_room(choice: &Choice<'_>, candidate: &Candidate<'_>) -> bool {
    let (load, tokens) = (candidate.load, choice.request.prompt_tokens);
    load.decode_step_ms(1, tokens) <= DECODE_HEADROOM * load.planned_step_ms(choice.targets)
        && load.has_kv_room(tokens, KV_HIGH)
}

/// Of those who decode already, and have room, the fullest.
fn packed(choice: &Choice<'_>, here: Option<usize>) -> Option<usize> {
    let tokens = choice.request.prompt_tokens;
    let step_ms = |candidate: &Candidate<'_>| candidate.load.decode_step_ms(1, tokens);
    let fullest = |takes: &dyn Fn(&Candidate<'_>) -> bool| {
        let takes = |one: &Candidate<'_>| one.load.decodes > 0 && takes(one);
        let taking = choice.candidates.iter().enumerate().filter(|(_, one)| takes(one));
        let fullest = taking.max_by(|(_, a), (_, b)| step_ms(a).total_cmp(&step_ms(b)));
        fullest.map(|(place, _)| place)
    };
    // An ITL that is kept is no help to who has missed his TTFT: rather than that one more worker begins to decode, and
    // all who wait for their prompt wait longer, such decodes are packed beyond what the ITL allows.
    let is_late = || here.is_some_and(|here| is_late(choice, &choice.candidates[here]));
    fullest(&|candidate| has_room(choice, candidate)).or_else(|| {
        is_late().then(|| fullest(&|candidate| candidate.load.has_kv_room(tokens, KV_HIGH)))?
    })
}

/// By the mean of what some workers say: each has learnt its model from noisy steps of its own.
fn pays_to_pack(choice: &Choice<'_>) -> bool {
    let asked = choice.candidates.iter().step_by(1 + choice.candidates.len() / ASKED);
    let (mut models, mut efficiency, mut token_ms) = (0.0, 0.0, 0.0);
    for model in asked.filter_map(|candidate| candidate.load.model) {
        let fixed = model.decode_ms[0] / choice.targets.step_ms;
        models += 1.0;
        efficiency += (1.0 - fixed) / model.prefill_interference_factor.max(1e-3);
        token_ms += model.prefill_ms[1];
    }
    let copied_token_ms = choice.targets.handoff_ms_per_thousand_tokens / 1000.0;
    models > 0.0
        && models * copied_token_ms <= LINK_SHARE * token_ms
        && efficiency < PACK_BELOW * models
}
