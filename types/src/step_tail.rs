/// How much longer than predicted a worker's slowest steps take: the mean, over the slowest tenth, of
/// what a step took as a part of what was predicted. 1 where predictions are exact.
///
/// An ITL target is held against the slowest tenth of a request's gaps, so this is what steps are to be
/// planned shorter by: it covers a noisy engine and a model that is too optimistic alike, and a model that is too
/// pessimistic gives time back. It follows both by stochastic approximation (O. Bardou, N. Frikha and G. Pagès,
/// *Computing VaR and CVaR using stochastic approximation and adaptive unconstrained importance sampling*,
/// Monte Carlo Methods and Applications 15(3), 2009): where the slowest tenth begins, and by how much it
/// goes beyond.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTail {
    /// Nine steps of ten take less.
    begins: f64,
    /// What goes beyond `begins`, over all steps.
    beyond: f64,
    steps: u32,
}

/// The slowest of all that count.
const TAIL: f64 = 0.1;
/// A step that takes many times what was predicted was held up by something else.
const MOST: f64 = 2.0;
/// How much of what is known a step replaces, at least: the last few hundred steps count.
const FORGETTING: f64 = 1.0 / 256.0;
/// How far a step moves the beginning of the tail, as a part of the prediction, at that rate.
const STRIDE: f64 = 1.0;

/// Steps are planned for the slowest tenth of them to take this part of the ITL target.
pub const STEP_HEADROOM: f64 = 0.98;

impl Default for StepTail {
    fn default() -> Self {
        Self { begins: 1.0, beyond: 0.0, steps: 0 }
    }
}

impl StepTail {
    /// A step took so many times what was predicted. What is no number, or not above 0, teaches nothing.
    pub fn observe(&mut self, part: f64) {
        if !(part.is_finite() && part > 0.0) {
            return;
        }
        let part = part.min(MOST);
        self.steps = self.steps.saturating_add(1);
        // Quick at first.
        let weight = (1.0 / f64::from(self.steps)).max(FORGETTING);
        self.beyond += weight * ((part - self.begins).max(0.0) - self.beyond);
        let above = if part > self.begins { 1.0 - TAIL } else { -TAIL };
        // No further than the step that says so.
        let moved = self.begins + weight * STRIDE * above;
        self.begins = if above > 0.0 { moved.min(part) } else { moved.max(part) };
    }

    /// The mean of the slowest tenth.
    pub fn part(&self) -> f64 {
        self.begins + self.beyond / TAIL
    }

    /// What a step with decodes shall be predicted to take at most, for the slowest tenth to keep to the ITL target.
    /// Both in milliseconds.
    pub fn planned_step_ms(&self, itl_target_ms: f64) -> f64 {
        itl_target_ms * STEP_HEADROOM / self.part().max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Evenly spread over ±`spread` around `mean`, in an order without a pattern.
    fn observed(mean: f64, spread: f64, steps: u32) -> StepTail {
        let mut tail = StepTail::default();
        for step in 0..steps {
            let place = f64::from(step.wrapping_mul(0x9e37_79b9) >> 8) / f64::from(1_u32 << 24);
            tail.observe(mean * (1.0 + spread * (2.0 * place - 1.0)));
        }
        tail
    }

    #[test]
    fn an_exact_model_needs_no_room() {
        assert!((observed(1.0, 0.0, 1000).part() - 1.0).abs() < 1e-9);
        assert_eq!(StepTail::default().part(), 1.0);
    }

    #[test]
    fn the_slowest_tenth_of_noisy_steps_is_found() {
        // Evenly spread over 0.8 … 1.2 the slowest tenth begins at 1.16, and its mean is 1.18.
        for mean in [0.9, 1.0, 1.0 / 0.85] {
            let part = observed(mean, 0.2, 5000).part();
            assert!((part / mean - 1.18).abs() < 0.03, "{part} around {mean}");
        }
    }

    #[test]
    fn noisy_steps_are_planned_shorter_and_exact_ones_no_longer_than_the_headroom() {
        assert_eq!(observed(1.0, 0.0, 1000).planned_step_ms(100.0), 98.0);
        assert_eq!(observed(0.5, 0.0, 1000).planned_step_ms(100.0), 98.0);
        let noisy_ms = observed(1.0, 0.2, 5000).planned_step_ms(100.0);
        assert!((noisy_ms - 83.0).abs() < 2.5, "{noisy_ms}");
    }

    #[test]
    fn an_optimistic_model_is_seen_within_some_hundred_steps() {
        let mut tail = observed(1.0, 0.05, 2000);
        for _ in 0..300 {
            tail.observe(1.3);
        }
        assert!((1.3..1.5).contains(&tail.part()), "rather too careful for a while: {tail:?}");
    }

    #[test]
    fn one_step_that_hung_says_little() {
        let mut tail = observed(1.0, 0.0, 2000);
        let before = tail.part();
        tail.observe(1000.0);
        tail.observe(f64::NAN);
        assert!(tail.part() < before + 0.05, "{tail:?}");
    }
}
