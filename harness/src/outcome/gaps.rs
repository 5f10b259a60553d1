/// The gaps between one request's tokens, as they come.
///
/// Neighbours of one length are held as one: eight bytes for each change of pace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gaps {
    runs: Vec<Run>,
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    gap_ms: f32,
    count: u32,
}

impl Gaps {
    pub fn push(&mut self, gap_ms: f64) {
        self.push_many(gap_ms, 1);
    }

    /// `count` gaps of `gap_ms` each.
    // Seven digits are more than any clock gives.
    #[allow(clippy::cast_possible_truncation)]
    pub fn push_many(&mut self, gap_ms: f64, count: u32) {
        if count == 0 {
            return;
        }
        let gap_ms = gap_ms as f32;
        self.len += u64::from(count);
        if let Some(last) = self.runs.last_mut()
            && last.gap_ms.total_cmp(&gap_ms).is_eq()
            && let Some(sum) = last.count.checked_add(count)
        {
            last.count = sum;
        } else {
            self.runs.push(Run { gap_ms, count });
        }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all gaps and keeps the memory, for the next request.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.len = 0;
    }

    /// Mean of the longest tenth of the gaps, rounded up; 0 where there is no gap. Changes the order
    /// in which gaps are held, nothing else.
    pub fn tbt_ms(&mut self) -> f64 {
        let wanted = self.len.div_ceil(10);
        if wanted == 0 {
            return 0.0;
        }
        // So many runs hold at least as many gaps.
        let runs =
            usize::try_from(wanted).map_or(self.runs.len(), |wanted| wanted.min(self.runs.len()));
        let longest_first = |a: &Run, b: &Run| b.gap_ms.total_cmp(&a.gap_ms);
        if runs < self.runs.len() {
            self.runs.select_nth_unstable_by(runs, longest_first);
        }
        let longest = &mut self.runs[..runs];
        longest.sort_unstable_by(longest_first);
        let (mut left, mut sum_ms) = (wanted, 0.0);
        for run in longest {
            let taken = left.min(u64::from(run.count));
            sum_ms += f64::from(run.gap_ms) * taken as f64;
            left -= taken;
        }
        sum_ms / wanted as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_definition(mut gaps: Vec<f64>) -> f64 {
        gaps.sort_by(|a, b| b.total_cmp(a));
        let longest = gaps.len().div_ceil(10);
        gaps[..longest].iter().sum::<f64>() / longest as f64
    }

    proptest! {
        #[test]
        fn the_longest_tenth_is_averaged(
            runs in prop::collection::vec((0_u16..40, 1_u32..30), 1..60),
        ) {
            let mut gaps = Gaps::default();
            let mut all = Vec::new();
            for (gap, count) in runs {
                let gap = f64::from(gap) / 4.0;
                gaps.push_many(gap, count);
                all.extend(std::iter::repeat_n(gap, count as usize));
            }
            prop_assert_eq!(gaps.len(), all.len() as u64);
            let expected = by_definition(all);
            prop_assert!((gaps.tbt_ms() - expected).abs() < 1e-9);
            // Asking changes nothing.
            prop_assert!((gaps.tbt_ms() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn an_even_pace_takes_no_room() {
        let mut gaps = Gaps::default();
        for _ in 0..1000 {
            gaps.push(12.5);
        }
        gaps.push_many(12.5, u32::MAX);
        gaps.push_many(99.0, 0);
        assert_eq!(gaps.runs.len(), 2);
        assert_eq!(gaps.len(), 1000 + u64::from(u32::MAX));
        assert!((gaps.tbt_ms() - 12.5).abs() < 1e-12);
        gaps.clear();
        assert!(gaps.is_empty() && gaps.tbt_ms() == 0.0);
    }
}
