use std::time::Duration;

/// Who may be late how often, by length: prompts of like length, from each power of two to the next, are a
/// class with an account. Each prompt that is served earns its class a part of a lateness, each that comes
/// too late spends one. A class with nothing left to spend is served ahead of its turn, so that overload is not
/// paid for by the long ones, which are the first to miss when all wait until the last moment.
///
/// What was earned is forgotten in time: quiet hours do not pay for a long row of late ones.
#[derive(Clone, Debug)]
pub(crate) struct LateShares {
    left: [f64; 33],
}

impl Default for LateShares {
    fn default() -> Self {
        Self { left: [0.0; 33] }
    }
}

/// Of a class so many may be late, as long as others can be late in their place.
const SHARE: f64 = 0.18;
/// A prompt whose like have been late often enough is served ahead of its turn by this part of what it
/// takes. With more of it others lose more than these gain.
const HEAD_START: f64 = 0.5;
/// So many prompts of its class are remembered.
const MEMORY: f64 = 4096.0;

impl LateShares {
    /// Whether prompts of this length have been late as often as they may.
    fn are_spent(&self, tokens: u32) -> bool {
        self.left[class(tokens)] < 1.0
    }

    /// The turn of a prompt that is due then, of so many tokens, that takes so long.
    pub(crate) fn turn(&self, due: Duration, tokens: u32, takes_ms: f64) -> Duration {
        let head_start_ms = if self.are_spent(tokens) { HEAD_START * takes_ms } else { 0.0 };
        let head_start = Duration::try_from_secs_f64(head_start_ms / 1000.0);
        due.saturating_sub(head_start.unwrap_or(Duration::MAX))
    }

    /// A prompt's turn came, in time or not.
    pub(crate) fn served(&mut self, tokens: u32, is_late: bool) {
        let left = &mut self.left[class(tokens)];
        let earned = SHARE - f64::from(u8::from(is_late));
        *left += earned - *left / MEMORY;
    }
}

fn class(tokens: u32) -> usize {
    tokens.checked_ilog2().map_or(0, |power| power as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_has_its_own_account() {
        let mut shares = LateShares::default();
        assert!(shares.are_spent(0) && shares.are_spent(u32::MAX), "nothing is earned yet");
        for _ in 0..20 {
            shares.served(5000, false);
        }
        assert!(!shares.are_spent(4096) && !shares.are_spent(8191));
        assert!(shares.are_spent(4095) && shares.are_spent(8192));
        shares.served(5000, true);
        shares.served(5000, true);
        assert!(!shares.are_spent(5000), "0.18 each are more than three");
        shares.served(5000, true);
        shares.served(5000, true);
        assert!(shares.are_spent(5000));
    }

    #[test]
    fn a_quiet_time_earns_no_more_than_is_remembered() {
        let mut shares = LateShares::default();
        for _ in 0..1_000_000 {
            shares.served(100, false);
        }
        let mut late = 0.0;
        while !shares.are_spent(100) {
            shares.served(100, true);
            late += 1.0;
        }
        assert!(late < 0.25 * MEMORY, "{late}");
    }
}
