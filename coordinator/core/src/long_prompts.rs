use std::time::Duration;

/// Long prompts give way. One that has begun holds its engine to its end, and whoever comes meanwhile waits: when a
/// lull lets one begin on each of the workers, all of the next burst is late. So of the workers only a part prefills
/// long prompts at the same time, the smaller the more of the others are late, and all of them when hardly anybody
/// is. One worker may always.
///
/// Sizes are kept apart where they vary much in Harchol-Balter, Crovella and Murta, *On Choosing a Task Assignment
/// Policy for a Distributed Server System*, 1999, which gives each size workers of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct LongPrompts {
    /// The natural logarithm of the part, 0 or below.
    log_part: f64,
}

/// A prompt is long that takes so many times the TTFT's target: of those that have the target alone to wait nobody
/// behind it is in time. Beyond it the factor matters little, up to three.
const LONG: f64 = 1.5;
/// The part settles where so many of the others are late.
const LATE_OTHERS: f64 = 0.01;
/// What one that is late takes off the part.
const GIVES_WAY: f64 = 0.1;
/// The part is no less than `e` to this: so soon is it back, in a fleet of any size.
const LEAST: f64 = -4.0;

impl LongPrompts {
    pub(crate) fn is_long(alone_ms: f64, ttft: Duration) -> bool {
        alone_ms > LONG * 1000.0 * ttft.as_secs_f64()
    }

    /// The turn of one came that is not long, in time or not.
    pub(crate) fn other_served(&mut self, is_late: bool) {
        let by = if is_late { -GIVES_WAY } else { GIVES_WAY * LATE_OTHERS / (1.0 - LATE_OTHERS) };
        self.log_part = (self.log_part + by).clamp(LEAST, 0.0);
    }

    /// Of the workers, the part that may prefill long prompts.
    pub(crate) fn part(&self) -> f64 {
        self.log_part.exp()
    }

    /// How many of so many workers that are.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]
    pub(crate) fn most_of(&self, workers: usize) -> usize {
        ((self.part() * workers as f64).round() as usize).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_settles_where_one_in_a_hundred_others_is_late() {
        let mut long = LongPrompts::default();
        assert_eq!([0, 1, 16].map(|workers| long.most_of(workers)), [1, 1, 16]);
        for _ in 0..10_000 {
            long.other_served(false);
        }
        assert_eq!(long.most_of(16), 16, "nothing is saved up");
        for _ in 0..14 {
            long.other_served(true);
        }
        assert_eq!([1, 2, 16].map(|workers| long.most_of(workers)), [1, 1, 4]);
        let before = long.part();
        for _ in 0..10 {
            long.other_served(true);
            (0..99).for_each(|_| long.other_served(false));
        }
        assert!((long.part() / before - 1.0).abs() < 1e-9, "{} {before}", long.part());
        for _ in 0..10_000 {
            long.other_served(true);
        }
        assert_eq!(long.most_of(1000), 18);
        (0..4000).for_each(|_| long.other_served(false));
        assert_eq!(long.most_of(1000), 1000, "what was is forgotten");
    }

    #[test]
    fn long_is_by_the_target() {
        let ttft = Duration::from_secs(2);
        assert_eq!([3000.0, 3001.0].map(|ms| LongPrompts::is_long(ms, ttft)), [false, true]);
    }
}
