//! A worker goes over to the other pool: it is given nothing more, it finishes what it has, every
//! coordinator lets go of it, and it comes back under a new epoch in its new role.

use std::time::Duration;

use baton_types::Role;

use super::Core;
use crate::{event::Action, fleet::WorkerKey, placement::Route, request::Request};

/// Where a worker stands on its way to another role.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RoleChange {
    /// What it was told from here, and when.
    ordered: Option<(Role, Duration)>,
    /// What it says itself.
    announced: Option<AnnouncedChange>,
    /// The change for which it was let go.
    released: Option<u32>,
}

/// A worker's word that it is on its way to another role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnnouncedChange {
    pub to: Role,
    /// Counts the worker's changes, so that what belongs to an earlier one is known for it.
    pub number: u32,
}

impl RoleChange {
    pub(crate) fn to(&self) -> Option<Role> {
        self.announced.map(|change| change.to).or(self.ordered.map(|(role, _)| role))
    }
}

impl Core {
    pub(super) fn set_role(
        &mut self,
        worker: WorkerKey,
        role: Role,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(on) = self.fleet.get_mut(worker) else { return };
        let goes_to = on.role_change.to();
        if goes_to.unwrap_or(on.description.role) == role {
            return;
        }
        // Back to its own: whoever has not let go of it yet need not.
        on.role_change.ordered = if on.description.role == role { None } else { Some((role, now)) };
        actions.push(Action::SetRole { worker, role });
        self.empty_queue(worker, now, actions);
    }

    pub(super) fn role_change_announced(
        &mut self,
        worker: WorkerKey,
        change: Option<AnnouncedChange>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Some(on) = self.fleet.get_mut(worker) else { return };
        if on.role_change.announced == change {
            return;
        }
        if change.is_none() {
            // It stays, whoever wanted that.
            on.role_change = RoleChange::default();
            return;
        }
        on.role_change.announced = change;
        self.empty_queue(worker, now, actions);
        self.let_go(worker, actions);
    }

    /// Lets go of those that are through, and gives up what takes too long.
    pub(super) fn watch_role_changes(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let timeout = self.settings.role_change_timeout;
        let changing: Vec<WorkerKey> = self
            .fleet
            .iter()
            .filter(|(_, worker)| worker.role_change.to().is_some())
            .map(|(key, _)| key)
            .collect();
        for worker in changing {
            self.let_go(worker, actions);
            let Some(on) = self.fleet.get_mut(worker) else { continue };
            if let Some((_, since)) = on.role_change.ordered
                && now.saturating_sub(since) >= timeout
            {
                on.role_change.ordered = None;
                actions.push(Action::SetRole { worker, role: on.description.role });
            }
        }
    }

    fn let_go(&mut self, worker: WorkerKey, actions: &mut Vec<Action>) {
        if !self.is_idle(worker) {
            return;
        }
        let Some(on) = self.fleet.get_mut(worker) else { return };
        let RoleChange { announced, released, .. } = &mut on.role_change;
        if let Some(change) = announced
            && *released != Some(change.number)
        {
            *released = Some(change.number);
            actions.push(Action::Release { worker, change: change.number });
        }
    }

    /// Nothing of ours is there, and nothing that was begun elsewhere will come.
    fn is_idle(&self, worker: WorkerKey) -> bool {
        let will_decode = |request: &Request| {
            let engines = matches!(
                request.route,
                Some(Route::Disaggregated { decode, by_engine: true, .. }) if decode == worker
            );
            engines && request.answering.is_none()
        };
        self.fleet.get(worker).is_some_and(|on| on.jobs_open == 0)
            && !self.requests.iter().any(|(_, request)| will_decode(request))
    }
}
