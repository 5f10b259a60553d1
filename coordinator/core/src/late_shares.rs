use std::time::Duration;

/// Who may be late how often, by length: each tenth of the prompts, from the shortest to the longest, has an
/// account. Each prompt that is served earns its tenth a part of a lateness, each that comes too late spends one. A
/// tenth with nothing left to spend is served ahead of its turn, so that overload is not paid for by the long ones,
/// which are the first to miss when all wait until the last moment.
///
/// What was earned is forgotten in time: quiet hours do not pay for a long row of late ones.
#[derive(Clone, Debug, Default)]
pub(crate) struct LateShares {
    left: [f64; TENTHS],
    lengths: Lengths,
    /// When a prompt whose tenth is in debt was in time last.
    in_time_in_debt: Option<Duration>,
}

const TENTHS: usize = 10;
/// Of a tenth so many may be late, as long as others can be late in their place.
const SHARE: f64 = 0.18;
/// A prompt whose like have been late often enough is served ahead of its turn by this part of what it
/// takes. With more of it others lose more than these gain.
const HEAD_START: f64 = 0.4;
/// Who is in time although his tenth is in debt is taken to be followed by others for so long.
const AT_STAKE: Duration = Duration::from_secs(30);
/// So many prompts of its tenth are remembered.
const MEMORY: f64 = 4096.0;

impl LateShares {
    /// Whether prompts of this length have been late as often as they may.
    fn are_spent(&self, tokens: u32) -> bool {
        self.left[self.lengths.tenth(tokens)] < 1.0
    }

    /// The turn of a prompt that is due then, of so many tokens, that takes so long.
    pub(crate) fn turn(&self, due: Duration, tokens: u32, takes_ms: f64) -> Duration {
        let head_start_ms = if self.are_spent(tokens) { HEAD_START * takes_ms } else { 0.0 };
        let head_start = Duration::try_from_secs_f64(head_start_ms / 1000.0);
        due.saturating_sub(head_start.unwrap_or(Duration::MAX))
    }

    /// A prompt's turn came, in time or not.
    pub(crate) fn served(&mut self, tokens: u32, is_late: bool, now: Duration) {
        self.lengths.add(tokens);
        let left = &mut self.left[self.lengths.tenth(tokens)];
        let earned = SHARE - f64::from(u8::from(is_late));
        *left += earned - *left / MEMORY;
        if *left < 0.0 && !is_late {
            self.in_time_in_debt = Some(now);
        }
    }

    /// Whether others gain by it if those that are late are held back: some are in time whose like have been late more
    /// often than they may. Not where all is well, and not where nobody is in time whatever is done.
    pub(crate) fn are_at_stake(&self, now: Duration) -> bool {
        self.in_time_in_debt.is_some_and(|then| now.saturating_sub(then) < AT_STAKE)
    }
}

/// How long the prompts of late were: how many of each length, in steps of a quarter of a power of two at most.
#[derive(Clone, Debug)]
struct Lengths {
    prompts: [u32; step(u32::MAX) + 1],
    all: u32,
}

/// Beyond so many, half of them are forgotten.
const MOST_LENGTHS: u32 = 8192;

impl Default for Lengths {
    fn default() -> Self {
        Self { prompts: [0; step(u32::MAX) + 1], all: 0 }
    }
}

impl Lengths {
    fn add(&mut self, tokens: u32) {
        self.prompts[step(tokens)] += 1;
        self.all += 1;
        if self.all > MOST_LENGTHS {
            self.prompts.iter_mut().for_each(|prompts| *prompts /= 2);
            self.all = self.prompts.iter().sum();
        }
    }

    /// In which tenth of all prompts one of this length is. Those of one step are in one tenth.
    fn tenth(&self, tokens: u32) -> usize {
        let step = step(tokens);
        let shorter: u32 = self.prompts[..step].iter().sum();
        // Out of all, doubled: half of its like are taken to be shorter.
        let place = (2 * shorter + self.prompts[step]) as usize;
        let tenth = TENTHS * place / (2 * self.all).max(1) as usize;
        tenth.min(TENTHS - 1)
    }
}

const fn step(tokens: u32) -> usize {
    match tokens.checked_ilog2() {
        Some(power) if power >= 2 => {
            let quarter = (tokens >> (power - 2)) & 3;
            (4 * (power - 1) + quarter) as usize
        }
        _ => tokens as usize,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn each_tenth_has_its_own_account() {
        let mut shares = LateShares::default();
        assert!(shares.are_spent(0) && shares.are_spent(u32::MAX), "nothing is earned yet");
        for _ in 0..20 {
            shares.served(100, false, NOW);
            shares.served(5000, false, NOW);
        }
        assert!(!shares.are_spent(100) && !shares.are_spent(5000));
        for _ in 0..4 {
            shares.served(5000, true, NOW);
        }
        assert!(shares.are_spent(5000), "0.18 each are less than four");
        assert!(!shares.are_spent(100));
        assert!(shares.are_spent(4700), "as long as these, to a quarter of a power of two");
    }

    #[test]
    fn a_quiet_time_earns_no_more_than_is_remembered() {
        let mut shares = LateShares::default();
        for _ in 0..1_000_000 {
            shares.served(100, false, NOW);
        }
        let mut late = 0.0;
        while !shares.are_spent(100) {
            shares.served(100, true, NOW);
            late += 1.0;
        }
        assert!(late < 0.25 * MEMORY, "{late}");
    }

    #[test]
    fn something_is_at_stake_while_some_of_a_tenth_in_debt_are_in_time() {
        let mut shares = LateShares::default();
        let later = NOW + AT_STAKE;
        shares.served(100, false, NOW);
        assert!(!shares.are_at_stake(NOW), "nobody was late");
        (0..9).for_each(|_| shares.served(100, true, NOW));
        assert!(!shares.are_at_stake(NOW), "nobody is in time any more");
        shares.served(100, false, NOW);
        assert!(shares.are_at_stake(NOW));
        assert!(!shares.are_at_stake(later), "nobody was for long");
        (0..60).for_each(|_| shares.served(100, false, later));
        assert!(!shares.are_at_stake(later + AT_STAKE), "the debt is paid");
    }

    #[test]
    fn tenths_follow_the_traffic() {
        let mut lengths = Lengths::default();
        (0..MOST_LENGTHS).for_each(|_| lengths.add(100));
        lengths.add(9000);
        assert_eq!(lengths.tenth(9000), TENTHS - 1);
        (0..10 * MOST_LENGTHS).for_each(|_| lengths.add(20_000));
        assert!(lengths.tenth(9000) <= 1, "almost all are longer now");
    }

    proptest! {
        #[test]
        fn the_longer_is_in_no_lower_tenth(
            seen in prop::collection::vec(any::<u32>(), 0..50),
            (a, b) in any::<(u32, u32)>(),
        ) {
            let mut lengths = Lengths::default();
            seen.iter().for_each(|tokens| lengths.add(tokens >> (tokens % 32)));
            let (shorter, longer) = (a.min(b), a.max(b));
            prop_assert!(step(shorter) <= step(longer));
            prop_assert!(lengths.tenth(shorter) <= lengths.tenth(longer));
            prop_assert!(lengths.tenth(longer) < TENTHS);
        }
    }
}
