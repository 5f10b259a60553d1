use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::request::RequestKey;

/// In which order a worker's prompts are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As they come: each is given to its engine at once.
    #[default]
    Arrival,
    /// By the time at which the first token is due. Who is predicted to miss it is served after all
    /// who can still make it.
    LateLast,
}

/// The prompts that wait for one worker.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    on_time: BTreeMap<(Duration, RequestKey), Waiting>,
    late: VecDeque<(RequestKey, Waiting)>,
    /// Of those that are on time.
    work_ms: f64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    /// What its prefill costs, predicted.
    pub(crate) work_ms: f64,
    pub(crate) tokens: u32,
    /// When its first token is due.
    pub(crate) due: Duration,
}

impl Queue {
    pub(crate) fn push(&mut self, key: RequestKey, turn: Duration, waiting: Waiting) {
        self.work_ms += waiting.work_ms;
        self.on_time.insert((turn, key), waiting);
    }

    /// The next to be served, if `admits` it, and whether it is late: of those that are not the one whose
    /// turn is first. Those that are are set behind, and their lengths written down.
    pub(crate) fn pop(
        &mut self,
        is_late: impl Fn(&Waiting) -> bool,
        admits: impl Fn(&Waiting) -> bool,
        demoted: &mut Vec<u32>,
    ) -> Option<(RequestKey, bool)> {
        while let Some((&(turn, key), waiting)) = self.on_time.first_key_value() {
            let waiting = *waiting;
            if !is_late(&waiting) {
                if !admits(&waiting) {
                    return None;
                }
                self.remove_on_time(turn, key);
                return Some((key, false));
            }
            self.remove_on_time(turn, key);
            demoted.push(waiting.tokens);
            self.late.push_back((key, waiting));
        }
        let (key, waiting) = self.late.front()?;
        if !admits(waiting) {
            return None;
        }
        let key = *key;
        self.late.pop_front();
        Some((key, true))
    }

    pub(crate) fn remove(&mut self, key: RequestKey, turn: Duration) -> bool {
        if self.remove_on_time(turn, key) {
            return true;
        }
        let place = self.late.iter().position(|(waiting, _)| *waiting == key);
        place.is_some_and(|place| self.late.remove(place).is_some())
    }

    fn remove_on_time(&mut self, turn: Duration, key: RequestKey) -> bool {
        let Some(waiting) = self.on_time.remove(&(turn, key)) else { return false };
        self.work_ms -= waiting.work_ms;
        if self.on_time.is_empty() {
            // Nothing is left of rounding.
            self.work_ms = 0.0;
        }
        true
    }

    /// Milliseconds of prefill that are served before one whose turn is then.
    pub(crate) fn work_before_ms(&self, turn: Duration) -> f64 {
        match self.on_time.last_key_value() {
            Some((&(last, _), _)) if last > turn => {
                let before = self.on_time.iter().take_while(|((other, _), _)| *other <= turn);
                before.map(|(_, waiting)| waiting.work_ms).sum()
            }
            _ => self.work_ms,
        }
    }

    pub(crate) fn work_ms(&self) -> f64 {
        self.work_ms
    }

    pub(crate) fn len(&self) -> usize {
        self.on_time.len() + self.late.len()
    }

    /// Everyone, in the order of serving.
    pub(crate) fn keys(&self) -> impl Iterator<Item = RequestKey> {
        let on_time = self.on_time.keys().map(|(_, key)| *key);
        on_time.chain(self.late.iter().map(|(key, _)| *key))
    }
}
