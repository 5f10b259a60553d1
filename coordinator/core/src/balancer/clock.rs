use std::time::Duration;

/// Looks that lie further apart than so many intervals are a clock that jumped, or a machine that
/// slept.
const JUMP_INTERVALS: u32 = 10;
/// Time as it can be believed: that of a clock which may jump. It may lag behind the true one, and where
/// looks are an interval apart at least, never runs ahead of it.
#[derive(Debug)]
pub(super) struct SteadyClock {
    interval: Duration,
    last: Option<Duration>,
    elapsed: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beat {
    /// Since the look before, as well as can be told.
    pub(super) passed: Duration,
    /// What was measured on this clock before cannot be compared with what is measured now.
    pub(super) jumped: bool,
}

impl SteadyClock {
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, last: None, elapsed: Duration::ZERO }
    }

    pub(super) fn beat(&mut self, now: Duration) -> Beat {
        let Some(last) = self.last.replace(now) else {
            return Beat { passed: Duration::ZERO, jumped: false };
        };
        let since = now.saturating_sub(last);
        let jumped = now < last || since > JUMP_INTERVALS * self.interval;
        self.elapsed += since.min(self.interval);
        Beat { passed: if jumped { self.interval } else { since }, jumped }
    }

    /// Since the first look. No look counts for more than an interval.
    pub(super) fn elapsed(&self) -> Duration {
        self.elapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumps_moves_time_by_an_interval_at_most() {
        let mut clock = SteadyClock::new(Duration::from_secs(1));
        let mut beats = Vec::new();
        for seconds in [5.0, 6.0, 7.5, 3600.0, 3601.0, 2.0, 3.0, 3.0] {
            let beat = clock.beat(Duration::from_secs_f64(seconds));
            beats.push((beat.passed.as_secs_f64(), beat.jumped));
        }
        let expected = [
            (0.0, false),
            (1.0, false),
            (1.5, false),
            (1.0, true),
            (1.0, false),
            (1.0, true),
            (1.0, false),
            (0.0, false),
        ];
        assert_eq!(beats, expected);
        assert_eq!(clock.elapsed(), Duration::from_secs(5));
    }
}
