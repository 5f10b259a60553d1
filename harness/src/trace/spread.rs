//! Telling apart what arrived at one rounded stamp.

use std::time::Duration;

/// Finer stamps than this are no matter of rounding.
const FINEST_QUANTUM: Duration = Duration::from_secs(1);

/// Spreads equal stamps evenly up to the next distinct one, if all distinct stamps lie a second or
/// more apart and some are shared; otherwise stamps stay as they are.
///
/// The quantum is the least distance of two distinct stamps (in Mooncake's traces 2,999 to 3,001 ms).
/// Where the next stamp is farther off than one and a half of it, nothing arrived in between, and the
/// group takes one quantum; so does the last one.
pub(super) fn spread(stamps: &mut [Duration]) {
    let distances = stamps.windows(2).map(|pair| pair[1] - pair[0]).filter(|gap| !gap.is_zero());
    let Some(quantum) = distances.min().filter(|quantum| *quantum >= FINEST_QUANTUM) else {
        return;
    };
    let mut first = 0;
    while let Some(&stamp) = stamps.get(first) {
        let shared = stamps[first..].partition_point(|other| *other == stamp);
        let gap = stamps
            .get(first + shared)
            .map(|next| *next - stamp)
            .filter(|gap| 2 * *gap <= 3 * quantum)
            .unwrap_or(quantum);
        let sharing = u32::try_from(shared).unwrap_or(u32::MAX);
        for (place, slot) in (0..sharing).zip(&mut stamps[first..first + shared]) {
            *slot += gap * place / sharing;
        }
        first += shared;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread_ms(stamps: &[u64]) -> Vec<u64> {
        let mut stamps: Vec<_> = stamps.iter().copied().map(Duration::from_millis).collect();
        spread(&mut stamps);
        stamps.into_iter().map(|stamp| u64::try_from(stamp.as_millis()).unwrap()).collect()
    }

    #[test]
    fn equal_stamps_reach_up_to_the_next() {
        assert_eq!(
            spread_ms(&[0, 0, 0, 3000, 5999, 5999]),
            [0, 1000, 2000, 3000, 5999, 5999 + 1499]
        );
    }

    #[test]
    fn a_silence_is_no_reason_to_arrive_later() {
        assert_eq!(spread_ms(&[0, 0, 3000, 3000, 60_000]), [0, 1500, 3000, 4500, 60_000]);
    }

    #[test]
    fn fine_stamps_stay() {
        for stamps in [&[0, 0, 999, 999, 4000][..], &[7, 7, 7], &[5], &[]] {
            assert_eq!(spread_ms(stamps), stamps);
        }
    }
}
