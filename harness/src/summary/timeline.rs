use std::time::Duration;

use super::FleetSample;

/// Slots that are held at most.
const MOST_SLOTS: usize = 4_096;

/// Arrivals and samples of the fleet over the time of a run. A slot is a second; when a run outgrows its slots, each
/// two of them become one.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    doublings: u32,
    slots: Vec<Slot>,
    last_sample: Option<Duration>,
    /// Between one sample and the next.
    longest_step: Duration,
}

/// What lies in one slice of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slot {
    pub arrivals: usize,
    pub samples: usize,
    /// Of all samples.
    sum: FleetSample,
}

impl Slot {
    /// Mean of the samples; none where there is none.
    pub fn fleet(&self) -> Option<FleetSample> {
        (self.samples > 0).then(|| self.sum.divided_by(self.samples as f64))
    }

    pub(super) fn sampled(&mut self, sample: &FleetSample) {
        self.samples += 1;
        self.sum = self.sum.plus(sample);
    }

    fn plus(&self, other: &Self) -> Self {
        Self {
            arrivals: self.arrivals + other.arrivals,
            samples: self.samples + other.samples,
            sum: self.sum.plus(&other.sum),
        }
    }
}

impl Timeline {
    pub(super) fn arrived(&mut self, at: Duration) {
        self.slot(at).arrivals += 1;
    }

    /// Samples come in the order of time.
    pub(super) fn sampled(&mut self, at: Duration, sample: &FleetSample) {
        let step = self.last_sample.map_or(Duration::ZERO, |last| at.saturating_sub(last));
        self.longest_step = self.longest_step.max(step);
        self.last_sample = Some(at);
        self.slot(at).sampled(sample);
    }

    fn slot(&mut self, at: Duration) -> &mut Slot {
        let second = at.as_secs();
        while second >> self.doublings >= MOST_SLOTS as u64 {
            self.slots = merged(&self.slots, 2);
            self.doublings += 1;
        }
        let index = usize::try_from(second >> self.doublings).unwrap_or(MOST_SLOTS);
        if index >= self.slots.len() {
            self.slots.resize(index + 1, Slot::default());
        }
        &mut self.slots[index]
    }

    /// At most so many slices, from the start of the run on, and how many seconds each lasts: at least as many as lie
    /// between samples, since shorter ones would show noise and holes.
    pub fn slices(&self, most: usize) -> (f64, Vec<Slot>) {
        let slot = Duration::from_secs(1 << self.doublings);
        let finest = self.longest_step.as_nanos().div_ceil(slot.as_nanos());
        let finest = usize::try_from(finest).unwrap_or(MOST_SLOTS);
        let of = self.slots.len().div_ceil(most.max(1)).max(finest).max(1);
        (slot.as_secs_f64() * of as f64, merged(&self.slots, of))
    }
}

fn merged(slots: &[Slot], of: usize) -> Vec<Slot> {
    let sum = |slots: &[Slot]| slots.iter().fold(Slot::default(), |sum, slot| sum.plus(slot));
    slots.chunks(of).map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_any_length_has_room() {
        let mut timeline = Timeline::default();
        let day = 86_400;
        let far = [0, 1, day, 400 * day, 400 * day, u64::MAX];
        for second in far {
            timeline.arrived(Duration::from_secs(second));
            assert!(timeline.slots.len() <= MOST_SLOTS);
        }
        let (seconds, slices) = timeline.slices(200);
        assert!(slices.len() <= 200 && seconds * 200.0 >= u64::MAX as f64);
        let arrivals = |slots: &[Slot]| slots.iter().map(|slot| slot.arrivals).sum::<usize>();
        assert_eq!((arrivals(&slices), slices[0].arrivals), (far.len(), far.len() - 1));
    }

    #[test]
    fn slices_are_no_shorter_than_the_steps_between_samples() {
        let mut timeline = Timeline::default();
        for (at_ms, queued) in [(0, 2.0), (2_500, 4.0), (4_000, 9.0)] {
            let sample = FleetSample { requests_queued: queued, ..FleetSample::default() };
            timeline.sampled(Duration::from_millis(at_ms), &sample);
        }
        timeline.arrived(Duration::from_millis(5_999));
        let (seconds, slices) = timeline.slices(200);
        let told: Vec<_> = slices
            .iter()
            .map(|slot| (slot.arrivals, slot.fleet().map(|fleet| fleet.requests_queued)))
            .collect();
        assert_eq!((seconds, told), (3.0, vec![(0, Some(3.0)), (1, Some(9.0))]));
    }
}
