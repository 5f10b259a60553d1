use std::collections::HashMap;

use super::Percentiles;

/// Bits of a value's significand that tell one bucket from the next: within one, values differ by less than
/// 1 in 8,192.
const PRECISION_BITS: u32 = 13;

/// Values above 0, or equal to it, in room that does not grow with their number: those that are alike count as the
/// largest of them, so that each rank is a value that was measured, and off by less than 0.013 %.
#[derive(Clone, Debug, Default)]
pub struct Spread {
    /// By the leading bits of their values, which are in the order of the values themselves.
    buckets: HashMap<u64, Bucket>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    count: usize,
    largest: f64,
}

/// A [`Spread`] in order.
#[derive(Clone, Debug, Default)]
pub struct Ranks {
    /// How many values there are up to each, and it.
    upto: Vec<(usize, f64)>,
}

impl Spread {
    /// What is no number, or below 0, counts as 0.
    pub fn push(&mut self, value: f64) {
        let value = if value.is_finite() { value.max(0.0) } else { 0.0 };
        let key = value.to_bits() >> (f64::MANTISSA_DIGITS - 1 - PRECISION_BITS);
        let bucket = self.buckets.entry(key).or_default();
        bucket.count += 1;
        bucket.largest = bucket.largest.max(value);
    }

    pub fn ranks(&self) -> Ranks {
        let mut upto: Vec<_> = self.buckets.values().map(|b| (b.count, b.largest)).collect();
        upto.sort_unstable_by(|(_, a), (_, b)| a.total_cmp(b));
        let mut sum = 0;
        for (count, _) in &mut upto {
            sum += *count;
            *count = sum;
        }
        Ranks { upto }
    }
}

impl Ranks {
    pub fn count(&self) -> usize {
        self.upto.last().map_or(0, |(count, _)| *count)
    }

    /// From 1; none where there are fewer values.
    pub fn value(&self, rank: usize) -> Option<f64> {
        let place = self.upto.partition_point(|(count, _)| *count < rank.max(1));
        self.upto.get(place).map(|(_, value)| *value)
    }

    /// Of all values but the `least` smallest.
    pub(super) fn percentiles_above(&self, least: usize) -> Percentiles {
        Percentiles::of(self.count().saturating_sub(least), |rank| self.value(least + rank))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_rank_is_a_value_that_was_measured(
            mut values in prop::collection::vec(prop_oneof![0.0_f64..1e7, 99.0_f64..101.0], 1..400),
        ) {
            let mut spread = Spread::default();
            values.iter().for_each(|value| spread.push(*value));
            let ranks = spread.ranks();
            values.sort_unstable_by(f64::total_cmp);
            prop_assert_eq!(ranks.count(), values.len());
            for (rank, exact) in (1..).zip(&values) {
                let told = ranks.value(rank).unwrap();
                prop_assert!(values.contains(&told));
                prop_assert!(told >= *exact && told <= exact * (1.0 + 1.0 / 8192.0));
            }
            prop_assert_eq!(ranks.value(values.len() + 1), None);
        }

        #[test]
        fn many_values_take_no_more_room_than_few(values in prop::collection::vec(1.0_f64..2.0, 1..60_000)) {
            let mut spread = Spread::default();
            values.iter().for_each(|value| spread.push(*value));
            prop_assert!(spread.buckets.len() <= 1 << PRECISION_BITS);
        }
    }
}
