//! Which pool this worker is in, and how it goes over to the other: it says so to every coordinator,
//! finishes what it has, and once all of them have let go of it begins another life, under a new epoch
//! and in its new role. Its engine runs on.

use std::{collections::BTreeMap, sync::Arc};

use baton_proto::RoleChange;
use baton_types::Role;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Outlives the engine. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct RoleKeeper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts what has changed.
    news: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    role: Role,
    to: Option<Role>,
    /// Counts the changes that were begun.
    number: u32,
    /// Coordinators that this worker serves, or is about to.
    streams: BTreeMap<u64, Stream>,
    next_stream: u64,
}

#[derive(Debug)]
struct Stream {
    coordinator: String,
    /// The change for which it let go.
    released: u32,
}

impl RoleKeeper {
    pub(crate) fn new(role: Role) -> Self {
        let state = State { role, to: None, number: 0, streams: BTreeMap::new(), next_stream: 0 };
        let shared = Shared { state: Mutex::new(state), news: watch::Sender::new(0) };
        Self { shared: Arc::new(shared) }
    }

    pub(crate) fn role(&self) -> Role {
        self.shared.state.lock().role
    }

    /// The change that is under way.
    pub(crate) fn change(&self) -> Option<RoleChange> {
        let state = self.shared.state.lock();
        let to = baton_proto::Role::from(state.to?).into();
        Some(RoleChange { to, number: state.number })
    }

    /// A coordinator wants this worker in that role: in its own, no change is wanted any more.
    pub(crate) fn order(&self, role: Role) {
        let mut state = self.shared.state.lock();
        let to = (role != state.role).then_some(role);
        if state.to == to {
            return;
        }
        state.to = to;
        match to {
            Some(to) => {
                state.number += 1;
                tracing::info!(from = %state.role, %to, "changes its role: finishes what it has");
            }
            None => tracing::info!(role = %state.role, "stays in its role"),
        }
        drop(state);
        self.shared.tell();
    }

    /// From before the hello, so that no coordinator sends a job that nobody waits for.
    pub(crate) fn serves(&self, coordinator: &str) -> Served {
        let mut state = self.shared.state.lock();
        let stream = state.next_stream;
        state.next_stream += 1;
        let coordinator = coordinator.to_owned();
        state.streams.insert(stream, Stream { coordinator, released: 0 });
        drop(state);
        self.shared.tell();
        Served { shared: self.shared.clone(), stream, news: self.shared.news.subscribe() }
    }

    /// Waits until every coordinator has let go for a change that is under way.
    pub(crate) async fn released(&self) {
        let mut news = self.shared.news.subscribe();
        while !self.is_released() {
            if news.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn is_released(&self) -> bool {
        let state = self.shared.state.lock();
        let all = state.streams.values().all(|stream| stream.released == state.number);
        state.to.is_some() && all
    }

    /// Takes the new role, if all have let go still. The streams are to be closed.
    pub(crate) fn take(&self) -> bool {
        if !self.is_released() {
            return false;
        }
        let mut state = self.shared.state.lock();
        match state.to.take() {
            Some(to) => state.role = to,
            None => return false,
        }
        true
    }
}

impl Shared {
    fn tell(&self) {
        self.news.send_modify(|count| *count += 1);
    }
}

/// One stream to a coordinator. It counts until this is dropped.
#[derive(Debug)]
pub(crate) struct Served {
    shared: Arc<Shared>,
    stream: u64,
    news: watch::Receiver<u64>,
}

impl Served {
    /// The coordinator has nothing more for this worker until the change of this number is through.
    pub(crate) fn released(&self, number: u32) {
        if let Some(stream) = self.shared.state.lock().streams.get_mut(&self.stream) {
            stream.released = number;
        }
        self.shared.tell();
    }

    /// Whether this is the coordinator whose balancer may order this worker about: of those that it
    /// serves the one whose address comes first, so that all workers follow the same.
    pub(crate) fn leads(&self) -> bool {
        let state = self.shared.state.lock();
        let first = state.streams.iter().min_by_key(|(_, stream)| &stream.coordinator);
        first.is_none_or(|(stream, _)| *stream == self.stream)
    }

    /// Waits until what coordinators are told of the role may have changed.
    pub(crate) async fn changed(&mut self) {
        if self.news.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shared.state.lock().streams.remove(&self.stream);
        self.shared.tell();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn every_coordinator_lets_go_before_the_role_is_taken() {
        let keeper = RoleKeeper::new(Role::Decode);
        let (b, a) = (keeper.serves("b:7000"), keeper.serves("a:7000"));
        assert!(a.leads() && !b.leads());
        assert!(!keeper.take(), "nothing was ordered");
        keeper.order(Role::Prefill);
        let number = keeper.change().unwrap().number;
        b.released(number);
        assert!(keeper.released().now_or_never().is_none());
        drop(a);
        assert!(b.leads());
        assert!(keeper.released().now_or_never().is_some());
        // One that comes meanwhile has to let go too.
        let late = keeper.serves("c:7000");
        assert!(!keeper.take());
        late.released(number);
        assert!(keeper.take());
        assert_eq!((keeper.role(), keeper.change()), (Role::Prefill, None));
    }

    #[test]
    fn what_was_let_go_for_one_change_is_not_for_the_next() {
        let keeper = RoleKeeper::new(Role::Decode);
        let served = keeper.serves("a:7000");
        keeper.order(Role::Prefill);
        served.released(keeper.change().unwrap().number);
        keeper.order(Role::Decode);
        assert_eq!(keeper.change(), None);
        assert!(!keeper.take(), "it stays");
        keeper.order(Role::Prefill);
        assert!(!keeper.take());
        served.released(keeper.change().unwrap().number);
        assert!(keeper.take());
    }
}
