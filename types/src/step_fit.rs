//! Learns an engine's [`StepModel`] from the steps that it is seen to take.
//!
//! A step's time is linear in what it computed, so a Kalman filter follows the coefficients while they
//! drift: recursive least squares whose memory is bounded (L. Ljung and T. Söderström, *Theory and
//! Practice of Recursive Identification*, MIT Press 1983, ch. 2). Three things are added:
//!
//! - **What is not exercised is not forgotten without bound.** Each step moves the covariance a little
//!   towards that of a cold start, instead of dividing it by a constant (R. Kulhavý and M. B. Zarrop, *On
//!   a general concept of forgetting*, Int. J. Control 58(4), 1993).
//! - **Outliers are refused** by the size of their innovation. Many of a kind in a row are no outliers: then the
//!   engine has changed, and the filter opens up for what such steps teach. Nor are the first of a kind: what
//!   nobody measured is no ground to refuse them on.
//! - **No coefficient is below zero**: an estimate that is, is projected (D. Simon, *Kalman filtering
//!   with state constraints*, IET Control Theory & Applications 4(8), 2010). Nor is one above what can be.

use serde::{Deserialize, Serialize};

use crate::{StepLoad, StepModel};

/// A step's time strays from the model by this much of it (standard deviation): ±20 %, evenly spread.
const NOISE: f64 = 0.12;
/// Of clocks and of waking up, whatever the step's length.
const JITTER_MS: f64 = 0.1;
/// Longer than any step there is.
const LONGEST_STEP_MS: f64 = 3_600_000.0;
/// What a prefill costs beside decodes is at most so many times what it costs alone: what exceeds that is
/// the decodes' own.
const DEAREST_MIXTURE: f64 = 10.0;
/// A step that is further than so many standard deviations from what was foreseen teaches nothing.
const GATE: f64 = 3.0;
/// With so many such steps, each [`USUAL_STEPS`] others making up for one, it is the engine that has
/// changed: all of its steps, or those of one kind.
const CHANGE_STEPS: u32 = 8;
const USUAL_STEPS: u32 = 5;
/// Until so many steps of a kind were taken in, none of them is refused.
const GUESSED_STEPS: u64 = 4;
/// So many mixed steps after the last one of decodes alone, nothing vouches for the decodes' coefficients.
const VOUCHED_STEPS: u32 = 32;
/// How far each step moves the covariance towards that of a cold start. With [`NOISE`], a coefficient
/// that each step exercises is remembered for some 200 steps, as [`crate::StepTail`] remembers. With a fifth of that, what noisy
/// steps teach wanders so far that one request of a hundred has its slowest gaps beyond the target.
const FORGETTING: f64 = 3e-7;
/// A coefficient that is nearly zero may still come to make up this much of a typical step.
const LEAST_SHARE: f64 = 0.05;

const TYPICAL_PROMPT_TOKENS: f64 = 4096.0;
const TYPICAL_SEQUENCES: f64 = 64.0;
const TYPICAL_CONTEXT_TOKENS: f64 = 65_536.0;
const TYPICAL_CHUNK_TOKENS: f64 = 512.0;

/// What a step computed, said without a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepWork {
    /// Prompts whose first chunk is in the step.
    pub prompts_begun: u32,
    /// Prompts with a chunk in the step.
    pub prompts: u32,
    /// Tokens of those chunks.
    pub prefill_tokens: u64,
    /// Σ(to² − from²) over the chunks, each of tokens `from..to` of its prompt.
    pub prefill_squares: f64,
    pub decode_sequences: u32,
    /// Tokens that lie before those of this step, over all its decodes.
    pub decode_context_tokens: u64,
}

impl StepWork {
    /// Adds a chunk of tokens `from..to` of a prompt.
    pub fn add_chunk(&mut self, from: u32, to: u32, begins: bool) {
        self.prompts += 1;
        self.prompts_begun += u32::from(begins);
        self.prefill_tokens += u64::from(to.saturating_sub(from));
        self.prefill_squares += f64::from(to).powi(2) - f64::from(from).powi(2);
    }

    /// Adds a sequence that is given one more token.
    pub fn add_decode(&mut self, context_tokens: u32) {
        self.decode_sequences += 1;
        self.decode_context_tokens += u64::from(context_tokens);
    }

    /// What it costs by a model.
    #[allow(clippy::cast_precision_loss)]
    pub fn load(&self, model: &StepModel) -> StepLoad {
        let [_, per_token, per_square] = model.prefill_ms;
        StepLoad {
            prompts_begun: self.prompts_begun,
            prompts: self.prompts,
            prefill_work_ms: per_token * self.prefill_tokens as f64
                + per_square * self.prefill_squares,
            decode_sequences: self.decode_sequences,
            decode_context_tokens: self.decode_context_tokens,
        }
    }
}

/// A [`StepModel`] that follows what is observed. Deterministic, and a few hundred operations a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepFit {
    /// Of steps without decodes: [`StepModel::prefill_ms`].
    prefill: Filter<3>,
    /// Of steps with decodes: [`StepModel::decode_ms`], then the interference factor, over the
    /// prefill's cost by the filter above.
    decode: Filter<4>,
    prompts: Gate,
    decodes: Gate,
    /// Of steps with decodes and prompts in them.
    mixed: Gate,
    /// Mixed steps since one of decodes alone was taken in.
    unvouched: u32,
}

/// Steps that a fit learned from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSamples {
    /// Those of prompts alone, which teach [`StepModel::prefill_ms`].
    pub prompts: u64,
    /// Those with decodes in them, which teach all else.
    pub decodes: u64,
}

impl StepFit {
    /// Begins with a model from a profile, or from a peer. A far-off one is unlearnt within some ten
    /// steps of each kind.
    pub fn new(cold_start: &StepModel) -> Self {
        let [a, b, c] = cold_start.decode_ms;
        let factor = cold_start.prefill_interference_factor;
        Self {
            prefill: Filter::new(
                cold_start.prefill_ms,
                [1.0, TYPICAL_PROMPT_TOKENS, TYPICAL_PROMPT_TOKENS.powi(2)],
                [LONGEST_STEP_MS; 3],
            ),
            decode: Filter::new(
                [a, b, c, factor],
                [1.0, TYPICAL_SEQUENCES, TYPICAL_CONTEXT_TOKENS, chunk_ms(&cold_start.prefill_ms)],
                [LONGEST_STEP_MS, LONGEST_STEP_MS, LONGEST_STEP_MS, DEAREST_MIXTURE],
            ),
            prompts: Gate::new(),
            decodes: Gate::new(),
            mixed: Gate::new(),
            unvouched: VOUCHED_STEPS,
        }
    }

    /// Learns from one step that took `ms` milliseconds. False where it was taken for an outlier, or
    /// says nothing: an empty step, a time that cannot be one.
    #[allow(clippy::cast_precision_loss)]
    pub fn observe(&mut self, work: &StepWork, ms: f64) -> bool {
        if !(ms > 0.0 && ms < LONGEST_STEP_MS) {
            return false;
        }
        match (work.decode_sequences, work.prompts) {
            (0, 0) => false,
            (0, _) => {
                let begins = if work.prompts_begun > 0 { 1.0 } else { 0.0 };
                let features = [begins, work.prefill_tokens as f64, work.prefill_squares];
                let before_ms = self.chunk_ms();
                let taken = self.prefill.observe(&mut self.prompts, &[true; 3], &features, ms);
                if self.mixed.samples > 0 {
                    // What a prefill costs beside decodes is known from such steps, and stays as it was.
                    self.decode.rescale(3, before_ms / self.chunk_ms());
                } else {
                    self.decode.typical[3] = self.chunk_ms();
                }
                taken
            }
            (sequences, prompts) => {
                let context_tokens = work.decode_context_tokens as f64;
                let prefill_ms = work.load(&self.model()).prefill_work_ms;
                let features = [1.0, f64::from(sequences), context_tokens, prefill_ms];
                if prompts > 0 {
                    let is_unvouched = self.unvouched >= VOUCHED_STEPS;
                    let open = [is_unvouched, is_unvouched, is_unvouched, true];
                    self.unvouched = self.unvouched.saturating_add(1);
                    self.decode.observe(&mut self.mixed, &open, &features, ms)
                } else {
                    let open = [true, true, true, false];
                    let taken = self.decode.observe(&mut self.decodes, &open, &features, ms);
                    self.unvouched = if taken { 0 } else { self.unvouched };
                    taken
                }
            }
        }
    }

    fn chunk_ms(&self) -> f64 {
        chunk_ms(&self.prefill.coefficients)
    }

    /// As it is known now. Every coefficient is finite and at least zero; of those in milliseconds none is longer
    /// than a step can be, and the factor is at most 10.
    pub fn model(&self) -> StepModel {
        let [a, b, c, prefill_interference_factor] = self.decode.coefficients;
        StepModel {
            prefill_ms: self.prefill.coefficients,
            decode_ms: [a, b, c],
            prefill_interference_factor,
        }
    }

    pub fn samples(&self) -> StepSamples {
        StepSamples {
            prompts: self.prompts.samples,
            decodes: self.decodes.samples + self.mixed.samples,
        }
    }
}

/// A usual chunk's, without the fixed part.
fn chunk_ms(prefill_ms: &[f64; 3]) -> f64 {
    let [_, per_token, per_square] = prefill_ms;
    (per_token * TYPICAL_CHUNK_TOKENS + per_square * TYPICAL_CHUNK_TOKENS.powi(2)).max(1e-3)
}

type Matrix<const N: usize> = [[f64; N]; N];

#[derive(Clone, Debug, PartialEq)]
struct Filter<const N: usize> {
    coefficients: [f64; N],
    covariance: Matrix<N>,
    /// What the features of a usual step are like.
    typical: [f64; N],
    /// No coefficient is above these.
    most: [f64; N],
}

/// Which steps of one kind are taken in. Each kind has its own: that others are as foreseen says nothing of it.
#[derive(Clone, Debug, PartialEq)]
struct Gate {
    /// [`USUAL_STEPS`] for each step refused lately, one less for each one taken.
    refused: u32,
    /// How many times as doubtful as at the start one must be to take in the nearest of them.
    surprise: f64,
    /// Steps that were taken in.
    samples: u64,
}

impl Gate {
    fn new() -> Self {
        Self { refused: 0, surprise: f64::INFINITY, samples: 0 }
    }

    fn is_guess(&self) -> bool {
        self.samples < GUESSED_STEPS
    }

    /// How much more doubtful than at the start to become, where refusing on would be wrong.
    fn refuse(&mut self, surprise: f64) -> Option<f64> {
        self.surprise = if self.is_guess() { surprise } else { self.surprise.min(surprise) };
        self.refused = self.refused.saturating_add(USUAL_STEPS);
        let has_changed = self.refused >= CHANGE_STEPS * USUAL_STEPS;
        if !(self.is_guess() || has_changed) || !self.surprise.is_finite() {
            return None;
        }
        let nearest = std::mem::replace(&mut self.surprise, f64::INFINITY);
        self.refused = 0;
        Some(nearest.max(1.0))
    }

    fn take(&mut self) {
        self.refused = self.refused.saturating_sub(1);
        if self.refused == 0 {
            self.surprise = f64::INFINITY;
        }
        self.samples += 1;
    }
}

impl<const N: usize> Filter<N> {
    fn new(coefficients: [f64; N], typical: [f64; N], most: [f64; N]) -> Self {
        let coefficients = coefficients.map(|c| if c.is_finite() { c.max(0.0) } else { 0.0 });
        let mut filter = Self { coefficients, covariance: [[0.0; N]; N], typical, most };
        filter.bound();
        filter.covariance = diagonal(&filter.doubt());
        filter
    }

    /// Variances of a cold start: each coefficient may be off by all of itself.
    fn doubt(&self) -> [f64; N] {
        let typical_ms = dot(&self.coefficients, &self.typical).max(1e-3);
        std::array::from_fn(|i| {
            self.coefficients[i].max(LEAST_SHARE * typical_ms / self.typical[i]).powi(2)
        })
    }

    /// Takes in a step of the gate's kind, or refuses it. Such steps are why the coefficients in `open` are what
    /// they are: it is those that are doubted when the steps turn out to be others than was foreseen.
    fn observe(&mut self, gate: &mut Gate, open: &[bool; N], features: &[f64; N], ms: f64) -> bool {
        let doubt = self.doubt();
        for (i, row) in self.covariance.iter_mut().enumerate() {
            for (j, entry) in row.iter_mut().enumerate() {
                let cold = if i == j { doubt[i] } else { 0.0 };
                *entry += FORGETTING * (cold - *entry);
            }
        }
        let foreseen_ms = dot(&self.coefficients, features);
        let innovation_ms = ms - foreseen_ms;
        // By a guess that is too short a step would pass for one that is measured exactly.
        let noise = noise(if gate.is_guess() { foreseen_ms.max(ms) } else { foreseen_ms });
        if self.is_outlier(features, innovation_ms, noise) {
            let doubt = std::array::from_fn(|i| if open[i] { doubt[i] } else { 0.0 });
            let cold_variance = dot(&product(&diagonal(&doubt), features), features);
            let Some(surprise) = gate.refuse(innovation_ms.powi(2) / cold_variance) else {
                return false;
            };
            self.open(open, &doubt.map(|variance| variance * surprise));
            // It may be an outlier even so.
            if self.is_outlier(features, innovation_ms, noise) {
                return false;
            }
        }
        gate.take();
        self.update(features, innovation_ms, noise);
        self.project();
        true
    }

    /// Forgets how these coefficients were found.
    fn open(&mut self, open: &[bool; N], variances: &[f64; N]) {
        for i in (0..N).filter(|i| open[*i]) {
            for j in 0..N {
                self.covariance[i][j] = 0.0;
                self.covariance[j][i] = 0.0;
            }
            self.covariance[i][i] = variances[i];
        }
    }

    fn is_outlier(&self, features: &[f64; N], innovation_ms: f64, noise: f64) -> bool {
        innovation_ms.powi(2) > GATE.powi(2) * (self.variance(features) + noise)
    }

    /// Of what is foreseen for such a step.
    fn variance(&self, features: &[f64; N]) -> f64 {
        dot(&product(&self.covariance, features), features).max(0.0)
    }

    /// The feature is from now on counted in a unit that is `1 / by` as large.
    fn rescale(&mut self, i: usize, by: f64) {
        self.coefficients[i] *= by;
        self.bound();
        self.typical[i] /= by;
        for j in 0..N {
            self.covariance[i][j] *= by;
            self.covariance[j][i] *= by;
        }
    }

    /// In Joseph's form, which keeps a covariance one.
    fn update(&mut self, features: &[f64; N], innovation_ms: f64, noise: f64) {
        let cross = product(&self.covariance, features);
        let total = dot(&cross, features) + noise;
        let gain = cross.map(|entry| entry / total);
        for (coefficient, gain) in self.coefficients.iter_mut().zip(&gain) {
            *coefficient += gain * innovation_ms;
        }
        let old = self.covariance;
        for (i, row) in self.covariance.iter_mut().enumerate() {
            for (j, entry) in row.iter_mut().enumerate() {
                *entry =
                    old[i][j] - gain[i] * cross[j] - cross[i] * gain[j] + gain[i] * gain[j] * total;
            }
        }
    }

    /// Takes the lowest coefficient that is below zero to zero, the others with it as the covariance
    /// says, until none is left.
    fn project(&mut self) {
        for _ in 0..N {
            let below = (0..N)
                .filter(|i| self.coefficients[*i] < 0.0)
                .min_by(|i, j| self.share(*i).total_cmp(&self.share(*j)));
            let Some(lowest) = below else { break };
            let variance = self.covariance[lowest][lowest];
            if variance > 0.0 {
                let by = self.coefficients[lowest] / variance;
                for (coefficient, row) in self.coefficients.iter_mut().zip(&self.covariance) {
                    *coefficient -= row[lowest] * by;
                }
            }
            self.coefficients[lowest] = 0.0;
        }
        // What one projection lifts, another may have pushed down again.
        self.bound();
    }

    fn bound(&mut self) {
        for (coefficient, most) in self.coefficients.iter_mut().zip(self.most) {
            *coefficient = coefficient.clamp(0.0, most);
        }
    }

    /// Of a usual step, in milliseconds.
    fn share(&self, i: usize) -> f64 {
        self.coefficients[i] * self.typical[i]
    }
}

/// The variance of a step of this length by itself.
fn noise(ms: f64) -> f64 {
    (NOISE * ms).powi(2) + JITTER_MS.powi(2)
}

fn dot<const N: usize>(a: &[f64; N], b: &[f64; N]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn product<const N: usize>(matrix: &Matrix<N>, vector: &[f64; N]) -> [f64; N] {
    std::array::from_fn(|i| dot(&matrix[i], vector))
}

fn diagonal<const N: usize>(entries: &[f64; N]) -> Matrix<N> {
    std::array::from_fn(|i| std::array::from_fn(|j| if i == j { entries[i] } else { 0.0 }))
}

#[cfg(test)]
#[path = "step_fit_tests.rs"]
mod tests;
