//! What happened lately, for people who look: bounded, in memory, of this coordinator alone.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use baton_core::WorkerKey;
use baton_types::Role;
use http::HeaderValue;

use crate::{
    admin::{Decision, RoleSince},
    metrics::{Outcome, Path},
    timeline::Timeline,
};

const DECISIONS: usize = 200;
const ENDED_REQUESTS: usize = 100;
/// Workers that went away and may stand in what ended.
const DEPARTED: usize = 64;
/// Spells of one worker in one role.
const ROLES: usize = 16;
/// Workers whose roles are remembered, attached or not.
const WORKERS: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Journal {
    decisions: VecDeque<Decision>,
    ended: VecDeque<Ended>,
    departed: VecDeque<(WorkerKey, String)>,
    ended_by_outcome: BTreeMap<&'static str, u64>,
    ended_split: u64,
    roles: BTreeMap<String, VecDeque<RoleSince>>,
}

/// A request that is over.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) request_id: HeaderValue,
    pub(crate) path: Path,
    pub(crate) outcome: Outcome,
    pub(crate) timeline: Timeline,
    pub(crate) at: Instant,
}

impl Journal {
    /// Something was decided, or had to be taken note of: `kind` in a word, about whom, why, and by
    /// whom.
    pub(crate) fn decided(
        &mut self,
        kind: &'static str,
        subject: impl Into<String>,
        reason: impl Into<String>,
        by: &'static str,
    ) {
        let decision = Decision {
            at_unix_ms: unix_ms(),
            kind: kind.into(),
            subject: subject.into(),
            reason: reason.into(),
            by: by.into(),
        };
        keep(&mut self.decisions, decision, DECISIONS);
    }

    pub(crate) fn ended(&mut self, request: Ended) {
        *self.ended_by_outcome.entry(request.outcome.as_str()).or_default() += 1;
        self.ended_split += u64::from(request.path == Path::Disaggregated);
        keep(&mut self.ended, request, ENDED_REQUESTS);
    }

    /// A worker goes: its name may be asked for yet.
    pub(crate) fn worker_goes(&mut self, worker: WorkerKey, name: &str) {
        keep(&mut self.departed, (worker, name.to_owned()), DEPARTED);
    }

    /// A worker has this role from now on.
    pub(crate) fn role(&mut self, worker: &str, role: Role) {
        if !self.roles.contains_key(worker) && self.roles.len() >= WORKERS {
            return;
        }
        let roles = self.roles.entry(worker.to_owned()).or_default();
        if roles.back().is_none_or(|last| last.role != role.as_str()) {
            let since = RoleSince { role: role.as_str().into(), since_unix_ms: unix_ms() };
            keep(roles, since, ROLES);
        }
    }

    pub(crate) fn decisions(&self) -> Vec<Decision> {
        self.decisions.iter().cloned().collect()
    }

    pub(crate) fn ended_last(&self) -> impl Iterator<Item = &Ended> {
        self.ended.iter()
    }

    pub(crate) fn departed(&self, worker: WorkerKey) -> Option<&str> {
        let (_, name) = self.departed.iter().find(|(key, _)| *key == worker)?;
        Some(name)
    }

    pub(crate) fn ended_by_outcome(&self) -> BTreeMap<String, u64> {
        self.ended_by_outcome.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    pub(crate) fn ended_split(&self) -> u64 {
        self.ended_split
    }

    pub(crate) fn roles_of(&self, worker: &str) -> Vec<RoleSince> {
        self.roles.get(worker).map(|roles| roles.iter().cloned().collect()).unwrap_or_default()
    }
}

fn keep<T>(ring: &mut VecDeque<T>, value: T, most: usize) {
    if ring.len() == most {
        ring.pop_front();
    }
    ring.push_back(value);
}

/// Of a moment that lies behind.
pub(crate) fn unix_ms_of(at: Instant) -> u64 {
    let ago = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
    unix_ms().saturating_sub(ago)
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_what_is_newest_and_each_spell_once() {
        let mut journal = Journal::default();
        for number in 0..DECISIONS + 5 {
            journal.decided("drain", number.to_string(), "", "operator");
        }
        let decisions = journal.decisions();
        assert_eq!((decisions.len(), decisions[0].subject.as_str()), (DECISIONS, "5"));

        for role in [Role::Prefill, Role::Prefill, Role::Decode] {
            journal.role("w", role);
        }
        let roles: Vec<String> =
            journal.roles_of("w").into_iter().map(|spell| spell.role).collect();
        assert_eq!(roles, ["prefill", "decode"]);
        assert_eq!(journal.roles_of("other"), []);
    }
}
