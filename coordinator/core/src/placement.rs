//! Where the legs of a request may run: which workers are candidates. Which of them it is, a
//! [policy](crate::policy) says.

use std::fmt;

use baton_types::Role;

use crate::{
    caches::Found,
    fleet::{Fleet, HandoffMode, Worker, WorkerDescription, WorkerKey},
    request::RequestShape,
};

/// Which requests are split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// All that can be, between the two pools.
    #[default]
    Always,
    /// None: each worker does both legs, whatever its role.
    Never,
    /// Each worker may do any leg; the policy decides by each request whether its answer stays on the
    /// worker that prefilled it.
    PerRequest,
}

/// The way of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Disaggregated { prefill: WorkerKey, decode: WorkerKey, by_engine: bool },
    Aggregated { worker: WorkerKey, reason: AggregatedReason },
}

/// A prompt's start, copied from a peer's prefix cache instead of being computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixPull {
    pub from: WorkerKey,
    /// From the prompt's first token on, those that are cached where it is copied to included.
    pub tokens: u32,
}

/// Why a request was not split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AggregatedReason {
    /// Prefill's own token is the whole answer.
    OneToken,
    /// A parameter (or endpoint) that cannot be split.
    Unsplittable(&'static str),
    NoPrefillWorker,
    NoDecodeWorker,
    /// There are both, but none can take the other's KV.
    NoCompatiblePair,
    /// Splitting is turned off.
    TurnedOff,
    /// Its policy found that a handoff would cost more than it gains.
    StaysByPolicy,
    /// It was split, and its KV did not come.
    HandoffFailed,
}

impl AggregatedReason {
    /// A name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OneToken => "one_token",
            Self::Unsplittable(what) => what,
            Self::NoPrefillWorker => "no_prefill_worker",
            Self::NoDecodeWorker => "no_decode_worker",
            Self::NoCompatiblePair => "no_compatible_pair",
            Self::TurnedOff => "turned_off",
            Self::StaysByPolicy => "stays_by_policy",
            Self::HandoffFailed => "handoff_failed",
        }
    }
}

impl fmt::Display for AggregatedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoute {
    NoWorker,
    UnknownModel,
}

/// What an attempt shall be, before its workers are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    Split,
    Aggregated(AggregatedReason),
}

/// Decides whether a request is split, and writes down who could do its first leg.
pub(crate) fn plan(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
    split: Split,
    candidates: &mut Vec<WorkerKey>,
) -> Result<Plan, NoRoute> {
    if !fleet.is_routable() {
        return Err(NoRoute::NoWorker);
    }
    // Some worker may serve it that is given nothing now.
    let none_serves = || {
        let model = shape.model.as_deref();
        let is_known = fleet.iter().any(|(_, worker)| worker.serves(model));
        if is_known { NoRoute::NoWorker } else { NoRoute::UnknownModel }
    };
    let aggregated = |preferred: Option<Role>, reason, candidates: &mut Vec<WorkerKey>| {
        select(fleet, shape, avoid, candidates, |worker| {
            preferred.is_none_or(|role| worker.description.role == role)
        });
        if candidates.is_empty() {
            select(fleet, shape, avoid, candidates, |_| true);
        }
        if candidates.is_empty() { Err(none_serves()) } else { Ok(Plan::Aggregated(reason)) }
    };
    let by_role = |role| if split == Split::Always { Some(role) } else { None };

    if let Some(what) = shape.unsplittable {
        let reason = AggregatedReason::Unsplittable(what);
        return aggregated(by_role(Role::Decode), reason, candidates);
    }
    if shape.max_output_tokens == Some(1) {
        return aggregated(by_role(Role::Prefill), AggregatedReason::OneToken, candidates);
    }
    match split {
        Split::Never => return aggregated(None, AggregatedReason::TurnedOff, candidates),
        Split::PerRequest => {
            select(fleet, shape, avoid, candidates, |_| true);
            return if candidates.is_empty() { Err(none_serves()) } else { Ok(Plan::Split) };
        }
        Split::Always => {}
    }
    let is_served_by = |role| {
        fleet.iter().any(|(_, worker)| {
            worker.description.role == role && worker.takes(shape.model.as_deref())
        })
    };
    if !is_served_by(Role::Prefill) {
        return aggregated(Some(Role::Decode), AggregatedReason::NoPrefillWorker, candidates);
    }
    if !is_served_by(Role::Decode) {
        return aggregated(Some(Role::Prefill), AggregatedReason::NoDecodeWorker, candidates);
    }
    // There are few of them, in most fleets one, and many workers.
    let mut modes = Vec::new();
    for (_, worker) in fleet.iter() {
        let handoff = worker.description.handoff;
        let decodes =
            worker.description.role == Role::Decode && worker.takes(shape.model.as_deref());
        if decodes && handoff != HandoffMode::None && !modes.contains(&handoff) {
            modes.push(handoff);
        }
    }
    select(fleet, shape, avoid, candidates, |worker| {
        worker.description.role == Role::Prefill && modes.contains(&worker.description.handoff)
    });
    if candidates.is_empty() {
        return aggregated(Some(Role::Decode), AggregatedReason::NoCompatiblePair, candidates);
    }
    Ok(Plan::Split)
}

/// Who could decode what this worker prefills.
pub(crate) fn partners(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
    split: Split,
    prefill: WorkerKey,
    candidates: &mut Vec<WorkerKey>,
) {
    candidates.clear();
    let Some(worker) = fleet.get(prefill) else { return };
    select(fleet, shape, avoid, candidates, |other| is_partner(worker, other, shape, split));
    if split == Split::PerRequest && !candidates.contains(&prefill) {
        candidates.push(prefill);
    }
}

fn is_partner(prefill: &Worker, decode: &Worker, shape: &RequestShape, split: Split) -> bool {
    let handoff = &prefill.description.handoff;
    *handoff != HandoffMode::None
        && decode.description.handoff == *handoff
        && (split == Split::PerRequest || decode.description.role == Role::Decode)
        && decode.takes(shape.model.as_deref())
}

/// Those that take requests for the model and are admitted, but for `avoid` (workers that failed this request)
/// where there are others.
fn select(
    fleet: &Fleet,
    shape: &RequestShape,
    avoid: &[WorkerKey],
    candidates: &mut Vec<WorkerKey>,
    admits: impl Fn(&Worker) -> bool,
) {
    let model = shape.model.as_deref();
    let admitted = |worker: &Worker| admits(worker) && worker.takes(model);
    candidates.clear();
    candidates.extend(
        fleet
            .iter()
            .filter(|(key, worker)| !avoid.contains(key) && admitted(worker))
            .map(|(key, _)| key),
    );
    if candidates.is_empty() && !avoid.is_empty() {
        let admitted = fleet.iter().filter(|(_, worker)| admitted(worker));
        candidates.extend(admitted.map(|(key, _)| key));
    }
}

/// Who holds the most of a prompt's start, of those whose peers can copy it.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// The two that hold the most, so that each worker has one other than itself.
    most: [Option<Holder>; 2],
}

#[derive(Clone, Copy, Debug)]
struct Holder {
    worker: WorkerKey,
    handoff: HandoffMode,
    tokens: u32,
}

impl Holders {
    pub(crate) fn of(fleet: &Fleet, shape: &RequestShape, found: &Found) -> Self {
        let mut holders = Self::default();
        if shape.prompt_unknown {
            return holders;
        }
        for (key, tokens) in found.holders() {
            let worker = fleet.get(key).filter(|worker| worker.description.pulls_prefixes);
            if let Some(worker) = worker
                && tokens > 0
                && worker.takes(shape.model.as_deref())
            {
                let handoff = worker.description.handoff;
                holders.add(Holder { worker: key, handoff, tokens });
            }
        }
        holders
    }

    fn add(&mut self, holder: Holder) {
        let tokens = |place: Option<Holder>| place.map_or(0, |holder| holder.tokens);
        if holder.tokens > tokens(self.most[0]) {
            self.most = [Some(holder), self.most[0]];
        } else if holder.tokens > tokens(self.most[1]) {
            self.most[1] = Some(holder);
        }
    }

    /// What this worker, which holds so much itself, could copy.
    pub(crate) fn pull_to(
        &self,
        key: WorkerKey,
        worker: &Worker,
        hit_tokens: u32,
    ) -> Option<PrefixPull> {
        let WorkerDescription { handoff, pulls_prefixes, .. } = &worker.description;
        if !pulls_prefixes || *handoff == HandoffMode::None {
            return None;
        }
        // The longest first, so that who holds as much itself is not compared any further.
        let mut longer = self.most.iter().flatten().take_while(|holder| holder.tokens > hit_tokens);
        let holder = longer.find(|holder| holder.worker != key && holder.handoff == *handoff)?;
        Some(PrefixPull { from: holder.worker, tokens: holder.tokens })
    }
}
