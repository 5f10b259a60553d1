//! Who sends next over a link that many handoffs share: the one that is due first.
//!
//! Sent all at once they would all arrive last. Taken one after the other by when they are due, each that can
//! still be in time is, as far as the order can do it (earliest deadline first is optimal on one link).

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// One who asked, in the order in which they are served: by when it is due, then by when it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket {
    due: Instant,
    number: u64,
}

/// One turn, and those who wait for it, without clock, lock or I/O.
#[derive(Debug, Default)]
struct Line {
    holder: Option<Ticket>,
    waiting: BTreeSet<Ticket>,
    asked: u64,
}

impl Line {
    /// Joins. Who finds nobody there holds the turn.
    fn ask(&mut self, due: Instant) -> Ticket {
        let ticket = Ticket { due, number: self.asked };
        self.asked += 1;
        match self.holder {
            None => self.holder = Some(ticket),
            Some(_) => {
                self.waiting.insert(ticket);
            }
        }
        ticket
    }

    fn holds(&self, ticket: Ticket) -> bool {
        self.holder == Some(ticket)
    }

    /// Waits no more, or has had its turn. Answers who holds it from now on, if that has changed.
    fn leave(&mut self, ticket: Ticket) -> Option<Ticket> {
        if !self.holds(ticket) {
            self.waiting.remove(&ticket);
            return None;
        }
        self.holder = self.waiting.pop_first();
        self.holder
    }
}

/// The turns of one link.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<Shared>);

#[derive(Debug, Default)]
struct Shared {
    line: Line,
    callers: HashMap<Ticket, oneshot::Sender<()>>,
}

impl Turns {
    /// Waits for the turn, which lasts until what this returns is dropped.
    pub(crate) async fn turn(&self, due: Instant) -> Turn<'_> {
        let (ticket, called) = {
            let mut shared = self.0.lock();
            let ticket = shared.line.ask(due);
            let called = (!shared.line.holds(ticket)).then(|| {
                let (caller, called) = oneshot::channel();
                shared.callers.insert(ticket, caller);
                called
            });
            (ticket, called)
        };
        // From here on it leaves the line however this ends.
        let turn = Turn { turns: self, ticket };
        if let Some(called) = called {
            // Its caller goes only with a call.
            let _ = called.await;
        }
        turn
    }
}

#[derive(Debug)]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    ticket: Ticket,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut shared = self.turns.0.lock();
        shared.callers.remove(&self.ticket);
        let next = shared.line.leave(self.ticket);
        if let Some(caller) = next.and_then(|next| shared.callers.remove(&next)) {
            // Who has stopped waiting meanwhile leaves as soon as it may.
            let _ = caller.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Ask {
            due_ms: u64,
        },
        /// Of those who are in the line, the one at this place.
        Leave {
            place: usize,
        },
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..20_u64).prop_map(|due_ms| Step::Ask { due_ms }),
            (0..100_usize).prop_map(|place| Step::Leave { place }),
        ]
    }

    proptest! {
        #[test]
        fn one_holds_the_turn_and_it_passes_to_who_is_due_first(
            steps in prop::collection::vec(steps(), 0..200),
        ) {
            let begin = Instant::now();
            let mut line = Line::default();
            let mut present: Vec<Ticket> = Vec::new();
            let mut holder: Option<Ticket> = None;
            for step in steps {
                match step {
                    Step::Ask { due_ms } => {
                        let ticket = line.ask(begin + Duration::from_millis(due_ms));
                        prop_assert!(!present.contains(&ticket));
                        present.push(ticket);
                        // Nobody is turned out by who comes later, however urgent.
                        holder = holder.or(Some(ticket));
                    }
                    Step::Leave { place } if !present.is_empty() => {
                        let ticket = present.swap_remove(place % present.len());
                        let told = line.leave(ticket);
                        if holder == Some(ticket) {
                            // First due; of two that are due together, the one that came first.
                            holder = present.iter().copied().min_by_key(|one| (one.due, one.number));
                            prop_assert_eq!(told, holder);
                        } else {
                            prop_assert_eq!(told, None);
                        }
                    }
                    Step::Leave { .. } => {}
                }
                let holding: Vec<_> =
                    present.iter().copied().filter(|ticket| line.holds(*ticket)).collect();
                prop_assert_eq!(holding, Vec::from_iter(holder));
                prop_assert_eq!(line.waiting.len() + usize::from(holder.is_some()), present.len());
            }
        }
    }

    #[tokio::test]
    async fn turns_come_by_when_they_are_due_and_who_stops_waiting_is_passed_over() {
        let (turns, begin) = (Turns::default(), Instant::now());
        let order = Mutex::new(Vec::new());
        let take = async |due_ms: u64| {
            let _turn = turns.turn(begin + Duration::from_millis(due_ms)).await;
            order.lock().push(due_ms);
        };
        let first = turns.turn(begin).await;
        assert_eq!(take(5).now_or_never(), None);
        let release = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        tokio::join!(take(30), take(10), take(20), release);
        assert_eq!(*order.lock(), [10, 20, 30]);
        assert!(turns.0.lock().callers.is_empty());
    }
}
