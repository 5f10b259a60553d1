//! Readings of a coordinator's state, and what happened between them.

use std::{collections::VecDeque, time::Duration};

use baton_coordinator::admin::{BucketCount, ClusterState};

use crate::quantity::milliseconds;

/// The last readings, over some of the past.
#[derive(Debug)]
pub(crate) struct Readings {
    window: Duration,
    readings: VecDeque<ClusterState>,
}

impl Readings {
    pub(crate) fn over(window: Duration) -> Self {
        Self { window, readings: VecDeque::new() }
    }

    pub(crate) fn add(&mut self, reading: ClusterState) {
        // A coordinator that started anew counts from zero.
        if self.last().is_some_and(|last| last.uptime_seconds > reading.uptime_seconds) {
            self.readings.clear();
        }
        let oldest_ms = reading
            .at_unix_ms
            .saturating_sub(u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX));
        self.readings.push_back(reading);
        while self.readings.front().is_some_and(|first| first.at_unix_ms < oldest_ms) {
            self.readings.pop_front();
        }
    }

    pub(crate) fn last(&self) -> Option<&ClusterState> {
        self.readings.back()
    }

    /// A second, over the window, of something that only grows.
    pub(crate) fn rate(&self, of: impl Fn(&ClusterState) -> u64) -> f64 {
        let (Some(first), Some(last)) = (self.readings.front(), self.readings.back()) else {
            return 0.0;
        };
        per_second(first, last, of)
    }

    /// The same since the reading before the last.
    pub(crate) fn rate_now(&self, of: impl Fn(&ClusterState) -> u64) -> f64 {
        let Some(before) = self.readings.len().checked_sub(2) else { return 0.0 };
        per_second(&self.readings[before], &self.readings[before + 1], of)
    }

    pub(crate) fn ttft_p50(&self) -> String {
        self.median(|state| &state.latency.ttft)
    }

    pub(crate) fn itl_p50(&self) -> String {
        self.median(|state| &state.latency.itl)
    }

    /// Over the window; of all time while that has none.
    fn median(&self, of: fn(&ClusterState) -> &Vec<BucketCount>) -> String {
        let (Some(first), Some(last)) = (self.readings.front(), self.readings.back()) else {
            return "–".to_owned();
        };
        let since = between(of(first), of(last));
        let median = median(&since).or_else(|| median(of(last)));
        median.map_or_else(|| "–".to_owned(), milliseconds)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate needs no more")]
fn per_second(first: &ClusterState, last: &ClusterState, of: impl Fn(&ClusterState) -> u64) -> f64 {
    let milliseconds = last.at_unix_ms.saturating_sub(first.at_unix_ms);
    if milliseconds == 0 {
        return 0.0;
    }
    of(last).saturating_sub(of(first)) as f64 * 1000.0 / milliseconds as f64
}

fn between(earlier: &[BucketCount], later: &[BucketCount]) -> Vec<BucketCount> {
    let before = |le| earlier.iter().find(|b| b.le_seconds == le).map_or(0, |b| b.count);
    let since = |bucket: &BucketCount| BucketCount {
        count: bucket.count.saturating_sub(before(bucket.le_seconds)),
        ..*bucket
    };
    later.iter().map(since).collect()
}

/// The value below which half of the observations lie, taken as evenly spread inside their bucket (as
/// Prometheus' `histogram_quantile` does). `None` without observations.
#[allow(clippy::cast_precision_loss, reason = "a median needs no more")]
fn median(buckets: &[BucketCount]) -> Option<f64> {
    let total = buckets.last().map(|bucket| bucket.count).filter(|total| *total > 0)?;
    let half = total as f64 / 2.0;
    let mut lower = (0.0, 0.0);
    for bucket in buckets {
        let count = bucket.count as f64;
        let Some(bound) = bucket.le_seconds else { return Some(lower.0) };
        if count >= half {
            let share = (half - lower.1) / (count - lower.1);
            return Some(lower.0 + (bound - lower.0) * share);
        }
        lower = (bound, count);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(counts: [u64; 3]) -> Vec<BucketCount> {
        let bounds = [Some(0.1), Some(0.2), None];
        bounds
            .into_iter()
            .zip(counts)
            .map(|(le_seconds, count)| BucketCount { le_seconds, count })
            .collect()
    }

    #[test]
    fn a_median_lies_inside_its_bucket() {
        // 2 of 8 below 0.1, 8 of 8 below 0.2: the fourth is a third of the way through the bucket.
        let ttft = buckets([2, 8, 8]);
        assert!((median(&ttft).unwrap() - (0.1 + 0.1 / 3.0)).abs() < 1e-9);
        assert_eq!(median(&between(&ttft, &ttft)), None);
        assert_eq!(between(&[], &ttft), ttft);
        assert_eq!(median(&[]), None);
        assert_eq!(median(&buckets([0, 0, 4])), Some(0.2));
    }
}
