use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Tokens that a tenant may use in a minute, prompts' and answers'. It fills steadily and holds a
/// minute's at most. What a request takes is known when it has ended, so that more may be taken than
/// there is: then nobody is let in until that is made up for.
#[derive(Debug)]
pub(crate) struct TokenBudget {
    per_minute: f64,
    left: Mutex<Left>,
}

#[derive(Debug)]
struct Left {
    tokens: f64,
    at: Instant,
}

impl TokenBudget {
    pub(super) fn new(tokens_per_minute: u32, now: Instant) -> Arc<Self> {
        let per_minute = f64::from(tokens_per_minute);
        Arc::new(Self { per_minute, left: Mutex::new(Left { tokens: per_minute, at: now }) })
    }

    /// How long to wait until there is a token; `None` where there is one.
    pub(super) fn wait(&self, now: Instant) -> Option<Duration> {
        let tokens = self.filled(now, 0.0);
        let wait = || Duration::try_from_secs_f64((1.0 - tokens) * 60.0 / self.per_minute);
        (tokens < 1.0).then(|| wait().unwrap_or(Duration::MAX))
    }

    /// A request took so many.
    #[allow(clippy::cast_precision_loss)] // It has 2^53 to be exact in.
    pub(crate) fn take(&self, tokens: u64, now: Instant) {
        self.filled(now, tokens as f64);
    }

    fn filled(&self, now: Instant, taken: f64) -> f64 {
        let mut left = self.left.lock();
        let minutes = now.saturating_duration_since(left.at).as_secs_f64() / 60.0;
        left.tokens = (left.tokens + minutes * self.per_minute).min(self.per_minute) - taken;
        left.at = left.at.max(now);
        left.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_beyond_the_minute_is_made_up_for() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let budget = TokenBudget::new(600, start);
        assert_eq!(budget.wait(at(0)), None);
        budget.take(599, at(0));
        assert_eq!(budget.wait(at(0)), None, "one is left");
        budget.take(101, at(0));
        // 100 below nothing, and one more, at ten a second.
        assert_eq!(budget.wait(at(0)), Some(Duration::from_secs_f64(10.1)));
        assert_eq!(budget.wait(at(10)), Some(Duration::from_secs_f64(0.1)));
        assert_eq!(budget.wait(at(11)), None);
        // However long nobody asks, it holds no more than a minute's.
        budget.take(600, at(3600));
        assert!(budget.wait(at(3600)).is_some());
    }
}
