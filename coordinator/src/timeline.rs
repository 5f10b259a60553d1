use std::time::Instant;

use baton_core::WorkerKey;
use baton_types::Leg;

use crate::admin::Phases;

/// The turning points of a request's way. None of them is a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeline {
    pub(crate) arrived: Instant,
    /// When its workers were being chosen.
    pub(crate) placing: Option<(Instant, Instant)>,
    /// Its first leg was given to a worker: of the last attempt.
    pub(crate) placed: Option<Instant>,
    /// Its prefill leg was through.
    pub(crate) prefilled: Option<Instant>,
    /// Its answer began.
    pub(crate) answered: Option<Instant>,
    pub(crate) attempts: u32,
    /// Of the last attempt.
    pub(crate) prefill_worker: Option<WorkerKey>,
    pub(crate) answering_worker: Option<WorkerKey>,
}

impl Timeline {
    pub(crate) fn new(arrived: Instant) -> Self {
        Self {
            arrived,
            placing: None,
            placed: None,
            prefilled: None,
            answered: None,
            attempts: 0,
            prefill_worker: None,
            answering_worker: None,
        }
    }

    /// Until its first token is due, in milliseconds; 1 where that is past.
    pub(crate) fn due_in_ms(&self, ttft_target_ms: f64) -> u32 {
        let left_ms = ttft_target_ms - self.arrived.elapsed().as_secs_f64() * 1000.0;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Saturates.
        let left_ms = left_ms.max(1.0) as u32;
        left_ms
    }

    /// A leg was given to a worker. All but decode's begin an attempt.
    pub(crate) fn leg_given(&mut self, leg: Leg, worker: WorkerKey, now: Instant) {
        match leg {
            Leg::Decode => return self.answering_worker = Some(worker),
            Leg::Prefill => {
                (self.prefill_worker, self.answering_worker) = (Some(worker), None);
            }
            Leg::Aggregated => {
                (self.prefill_worker, self.answering_worker) = (None, Some(worker));
            }
            Leg::Lend => return,
        }
        self.attempt_began(now);
    }

    fn attempt_began(&mut self, now: Instant) {
        self.placed = Some(now);
        self.prefilled = None;
        self.attempts += 1;
    }

    /// What of its time until `end` went into what. Of a handoff this is the part that its prefill did
    /// not hide: both run at once.
    pub(crate) fn phases(&self, is_split: bool, end: Instant) -> Phases {
        let placed = self.placed.unwrap_or(end);
        let answered = self.answered.unwrap_or(end);
        let prefilled = self.prefilled.filter(|_| is_split).unwrap_or(answered).min(answered);
        let between =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1000.0;
        Phases {
            queue_ms: between(self.arrived, placed),
            prefill_ms: between(placed, prefilled),
            handoff_ms: between(prefilled, answered),
            decode_ms: between(answered, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn phases(timeline: &Timeline, is_split: bool, end: Instant) -> [f64; 4] {
        let Phases { queue_ms, prefill_ms, handoff_ms, decode_ms } = timeline.phases(is_split, end);
        [queue_ms, prefill_ms, handoff_ms, decode_ms].map(f64::round)
    }

    #[test]
    fn every_moment_belongs_to_one_phase() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut timeline = Timeline::new(start);
        assert_eq!(phases(&timeline, false, at(5)), [5.0, 0.0, 0.0, 0.0]);
        timeline.attempt_began(at(10));
        assert_eq!(phases(&timeline, true, at(30)), [10.0, 20.0, 0.0, 0.0]);
        timeline.prefilled = Some(at(40));
        assert_eq!(phases(&timeline, true, at(45)), [10.0, 30.0, 5.0, 0.0]);
        timeline.answered = Some(at(50));
        assert_eq!(phases(&timeline, true, at(90)), [10.0, 30.0, 10.0, 40.0]);
        // Where one worker does both there is no handoff.
        assert_eq!(phases(&timeline, false, at(90)), [10.0, 40.0, 0.0, 40.0]);
        // Word of the prefill's end may come after the answer's beginning.
        timeline.prefilled = Some(at(60));
        assert_eq!(phases(&timeline, true, at(90)), [10.0, 40.0, 0.0, 40.0]);
        timeline.attempt_began(at(70));
        assert_eq!((timeline.attempts, timeline.prefilled), (2, None));
    }
}
