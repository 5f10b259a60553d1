//! What happened lately, for people who look: bounded, in memory, of this coordinator alone.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{SystemTime, UNIX_EPOCH},
};

use baton_types::Role;

use crate::admin::{Decision, EndedRequest, RoleSince};

const DECISIONS: usize = 200;
const ENDED_REQUESTS: usize = 100;
/// Spells of one worker in one role.
const ROLES: usize = 16;
/// Workers whose roles are remembered, attached or not.
const WORKERS: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Journal {
    decisions: VecDeque<Decision>,
    ended: VecDeque<EndedRequest>,
    ended_by_outcome: BTreeMap<&'static str, u64>,
    ended_split: u64,
    roles: BTreeMap<String, VecDeque<RoleSince>>,
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

    pub(crate) fn ended(&mut self, outcome: &'static str, request: EndedRequest) {
        *self.ended_by_outcome.entry(outcome).or_default() += 1;
        self.ended_split += u64::from(request.path == "disaggregated");
        keep(&mut self.ended, request, ENDED_REQUESTS);
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

    pub(crate) fn ended_requests(&self) -> Vec<EndedRequest> {
        self.ended.iter().cloned().collect()
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
