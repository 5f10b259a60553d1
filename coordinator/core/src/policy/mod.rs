//! Which worker takes a leg. One policy a file: it is shown the candidates for one leg of one request,
//! with what each has to do already, and answers with one of them.
//!
//! To add one: write a file beside these, and name it in [`POLICIES`].

mod least_load;
mod least_work;
mod power_of_two;
mod prefix_affinity;
mod random;
mod round_robin;
mod slack;

use std::{fmt, time::Duration};

use baton_types::Leg;

use crate::{
    fleet::{Load, WorkerKey},
    placement::PrefixPull,
    request::RequestShape,
};

/// Chooses a worker for one leg.
pub trait Policy: fmt::Debug + Send {
    /// Answers with a place in `choice.candidates`, of which there is at least one.
    fn choose(&mut self, choice: &Choice<'_>) -> usize;

    /// Whether a candidate shall copy the start of the prompt that a peer holds, where one could.
    fn pulls(&self, _choice: &Choice<'_>, _candidate: &Candidate<'_>) -> bool {
        false
    }
}

/// One leg of one request, and who could take it.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    pub now: Duration,
    /// [`Leg::Prefill`] also where the answer may stay on the worker that prefills.
    pub leg: Leg,
    pub request: &'a RequestShape,
    /// When the first token is due, and how long after the request came that is.
    pub due: Duration,
    pub ttft: Duration,
    pub targets: &'a Targets,
    /// Those that may take it, in the order of their attachment.
    pub candidates: &'a [Candidate<'a>],
}

#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub worker: WorkerKey,
    pub load: &'a Load,
    /// Tokens of the prompt whose KV it is believed to hold.
    pub hit_tokens: u32,
    /// A peer holds more, and it could be copied here first. None for [`Leg::Decode`], which computes no prompt.
    pub pull: Option<PrefixPull>,
    /// The part of its time that it has for prefill.
    pub prefill_rate: f64,
    /// Milliseconds of prefill that go before this request's, if it came here.
    pub work_ahead_ms: f64,
    /// The prompt is prefilled here: to decode here costs no handoff.
    pub is_here: bool,
}

/// What the requests are held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// A decode step shall not take longer.
    pub step_ms: f64,
    /// What a handoff costs, with the KV of a thousand tokens.
    pub handoff_ms: f64,
    pub handoff_ms_per_thousand_tokens: f64,
    /// What a copy from one prefix cache into another costs beyond a handoff: steps of both engines that it
    /// waits for.
    pub pull_ms: f64,
}

impl Default for Targets {
    fn default() -> Self {
        Self { step_ms: 50.0, handoff_ms: 2.0, handoff_ms_per_thousand_tokens: 8.0, pull_ms: 0.0 }
    }
}

impl Targets {
    /// To copy the KV of so many tokens from one worker to another.
    pub fn copy_ms(&self, tokens: u32) -> f64 {
        self.handoff_ms + self.handoff_ms_per_thousand_tokens * f64::from(tokens) / 1000.0
    }

    /// To copy the KV of so many tokens out of one prefix cache into another.
    pub fn pull_ms(&self, tokens: u32) -> f64 {
        self.pull_ms + self.copy_ms(tokens)
    }
}

/// A policy as users know it.
#[derive(Clone, Copy)]
pub struct PolicyEntry {
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Makes one; the seed is for those that draw lots.
    pub make: fn(u64) -> Box<dyn Policy>,
}

impl fmt::Debug for PolicyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

pub const POLICIES: &[PolicyEntry] = &[
    PolicyEntry {
        name: "round-robin",
        about: "each worker in its turn",
        make: |_| Box::new(round_robin::RoundRobin),
    },
    PolicyEntry {
        name: "random",
        about: "any worker",
        make: |seed| Box::new(random::Random::new(seed)),
    },
    PolicyEntry {
        name: "power-of-two",
        about: "the less loaded of two drawn at random",
        make: |seed| Box::new(power_of_two::PowerOfTwo::new(seed)),
    },
    PolicyEntry {
        name: "least-load",
        about: "the worker with the fewest jobs, the one that waited longest among equals",
        make: |_| Box::new(least_load::LeastLoad),
    },
    PolicyEntry {
        name: "least-work",
        about: "the worker whose queued prefills, and whose decodes, cost the least time",
        make: |_| Box::new(least_work::LeastWork),
    },
    PolicyEntry {
        name: "prefix-affinity",
        about: "the worker that would compute the first token soonest, cached prefix counted",
        make: |_| Box::new(prefix_affinity::PrefixAffinity),
    },
    PolicyEntry {
        name: "slack",
        about: "by predicted TTFT and the slack that ITL leaves; decodes stay or are packed, \
                whichever the ITL target makes cheaper",
        make: |_| Box::new(slack::Slack),
    },
];

/// The policy of this name.
pub fn policy(name: &str) -> Option<&'static PolicyEntry> {
    POLICIES.iter().find(|entry| entry.name == name)
}

/// The candidate with the least of `cost`; among equals the one that was given work least lately.
fn least(choice: &Choice<'_>, cost: impl Fn(&Candidate<'_>) -> f64) -> usize {
    let mut best = 0;
    let mut best_cost = (f64::INFINITY, u64::MAX);
    for (place, candidate) in choice.candidates.iter().enumerate() {
        let this = (cost(candidate), candidate.load.last_placed);
        if this < best_cost {
            (best, best_cost) = (place, this);
        }
    }
    best
}
