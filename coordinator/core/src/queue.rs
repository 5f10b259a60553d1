use std::{collections::BTreeMap, time::Duration};

use crate::request::RequestKey;

/// In which order prompts are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As they come.
    #[default]
    Arrival,
    /// By the time at which the first token is due. Who is predicted to miss it is served after all
    /// who can still make it.
    LateLast,
}

/// The prompts that had their turn and wait for one worker's engine.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: BTreeMap<(Place, RequestKey), Waiting>,
    work_ms: f64,
}

/// The smallest is served first: by class, then by turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) priority: i32,
    pub(crate) turn: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    /// What its prefill costs, predicted.
    pub(crate) work_ms: f64,
    pub(crate) tokens: u32,
    pub(crate) is_long: bool,
    /// When its first token is due, where that matters.
    pub(crate) due: Option<Duration>,
}

/// What becomes of the first in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Popped {
    Served(RequestKey),
    Late(RequestKey),
}

impl Queue {
    pub(crate) fn push(&mut self, key: RequestKey, place: Place, waiting: Waiting) {
        self.work_ms += waiting.work_ms;
        self.waiting.insert((place, key), waiting);
    }

    /// Takes out the first, if it is late or the engine `admits` it.
    pub(crate) fn pop(
        &mut self,
        is_late: impl Fn(&Waiting) -> bool,
        admits: impl Fn(&Waiting) -> bool,
    ) -> Option<Popped> {
        let (&(place, key), waiting) = self.waiting.first_key_value()?;
        let popped = match is_late(waiting) {
            true => Popped::Late(key),
            false if admits(waiting) => Popped::Served(key),
            false => return None,
        };
        self.remove(key, place);
        Some(popped)
    }

    pub(crate) fn remove(&mut self, key: RequestKey, place: Place) {
        if let Some(waiting) = self.waiting.remove(&(place, key)) {
            self.work_ms -= waiting.work_ms;
        }
        if self.waiting.is_empty() {
            // Nothing is left of rounding.
            self.work_ms = 0.0;
        }
    }

    /// Milliseconds of prefill that are served before one whose place is this.
    pub(crate) fn work_before_ms(&self, place: Place) -> f64 {
        match self.waiting.last_key_value() {
            Some((&(last, _), _)) if last > place => {
                let before = self.waiting.iter().take_while(|((other, _), _)| *other <= place);
                before.map(|(_, waiting)| waiting.work_ms).sum()
            }
            _ => self.work_ms,
        }
    }

    pub(crate) fn work_ms(&self) -> f64 {
        self.work_ms
    }

    pub(crate) fn has_long(&self) -> bool {
        self.waiting.values().any(|waiting| waiting.is_long)
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Everyone, in the order of serving.
    pub(crate) fn keys(&self) -> impl Iterator<Item = RequestKey> {
        self.waiting.keys().map(|(_, key)| *key)
    }
}
