//! Coefficients from points: least squares of the relative error, none of them negative.
//!
//! Times span orders of magnitude and errors of measurement grow with them, so that each point counts by
//! its relative error (weight 1/ms²). A negative coefficient would predict negative times somewhere;
//! the best fit without one has some coefficients at zero and is the plain fit of the others, and with
//! three of them all seven choices are tried.

use std::fmt;

use baton_engine::sim::Profile;
use baton_types::StepModel;

use super::{DecodePoint, Points, PrefillPoint};

/// A profile, and how well it tells what was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    pub profile: Profile,
    pub prefill: FitQuality,
    pub decode: FitQuality,
}

/// Absolute errors as shares of what was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FitQuality {
    pub points: usize,
    /// Left out, since the fit was off by more than was allowed.
    pub dropped: usize,
    /// Mean (MAPE).
    pub mean_error: f64,
    pub max_error: f64,
    /// Milliseconds measured, and predicted, where the error is largest.
    pub worst_ms: (f64, f64),
}

impl fmt::Display for FitQuality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (measured, predicted) = self.worst_ms;
        write!(
            f,
            "{} points; off by {:.2} % in the mean, {:.2} % at most ({measured:.2} ms measured, \
             {predicted:.2} ms predicted)",
            self.points,
            self.mean_error * 100.0,
            self.max_error * 100.0
        )
    }
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FitError {
    #[error("{kind} has {points} points: expected at least 3 different ones")]
    TooFew { kind: &'static str, points: usize },
}

/// One row of the system: Σ terms × coefficients ≈ ms.
#[derive(Clone, Copy, Debug)]
struct Row {
    terms: [f64; 3],
    ms: f64,
}

/// Fits a profile. Points whose error is above `drop_above` (a share) are left out of a second fit,
/// and counted.
///
/// # Errors
/// Where points are too few, or too alike, to tell the coefficients apart.
pub fn fit(
    points: &Points,
    name: &str,
    source: &str,
    drop_above: Option<f64>,
) -> Result<Fitted, FitError> {
    let prefill: Vec<_> = points.prefill.iter().map(PrefillPoint::row).collect();
    let decode: Vec<_> = points.decode.iter().map(DecodePoint::row).collect();
    let (prefill_ms, prefill) = fit_kind("prefill", &prefill, drop_above)?;
    let (decode_ms, decode) = fit_kind("decode", &decode, drop_above)?;
    let model = StepModel { prefill_ms, decode_ms, prefill_interference_factor: 1.0 };
    let profile = Profile {
        name: name.to_owned(),
        source: source.to_owned(),
        model,
        kv_capacity_tokens: points.kv_capacity_tokens,
        kv_bytes_per_token: None,
    };
    Ok(Fitted { profile, prefill, decode })
}

impl PrefillPoint {
    fn row(&self) -> Row {
        Row { terms: [1.0, self.tokens, self.tokens * self.tokens], ms: self.ms }
    }
}

impl DecodePoint {
    fn row(&self) -> Row {
        Row { terms: [1.0, self.sequences, self.context_tokens], ms: self.ms }
    }
}

fn fit_kind(
    kind: &'static str,
    rows: &[Row],
    drop_above: Option<f64>,
) -> Result<([f64; 3], FitQuality), FitError> {
    let too_few = |rows: &[Row]| FitError::TooFew { kind, points: rows.len() };
    let mut coefficients = least_squares(rows).ok_or_else(|| too_few(rows))?;
    let mut kept = rows.to_vec();
    if let Some(limit) = drop_above {
        // The worst first, one by one: it bends the fit, so that others look worse than they are.
        while let Some((worst, error)) = worst_of(&kept, &coefficients)
            && error > limit
        {
            kept.swap_remove(worst);
            coefficients = least_squares(&kept).ok_or_else(|| too_few(&kept))?;
        }
    }
    let errors = || kept.iter().map(|row| row.error(&coefficients));
    let worst = worst_of(&kept, &coefficients);
    let quality = FitQuality {
        points: kept.len(),
        dropped: rows.len() - kept.len(),
        mean_error: errors().sum::<f64>() / kept.len() as f64,
        max_error: worst.map_or(0.0, |(_, error)| error),
        worst_ms: worst.map_or((0.0, 0.0), |(index, _)| {
            (kept[index].ms, kept[index].predicted(&coefficients))
        }),
    };
    Ok((coefficients, quality))
}

fn worst_of(rows: &[Row], coefficients: &[f64; 3]) -> Option<(usize, f64)> {
    let errors = rows.iter().map(|row| row.error(coefficients)).enumerate();
    errors.max_by(|(_, a), (_, b)| a.total_cmp(b))
}

impl Row {
    fn predicted(&self, coefficients: &[f64; 3]) -> f64 {
        self.terms.iter().zip(coefficients).map(|(term, coefficient)| term * coefficient).sum()
    }

    fn error(&self, coefficients: &[f64; 3]) -> f64 {
        (self.predicted(coefficients) - self.ms).abs() / self.ms
    }
}

/// None where no three rows tell the coefficients apart.
fn least_squares(rows: &[Row]) -> Option<[f64; 3]> {
    // Columns are brought to one size, or the tokens' square would drown the constant.
    let scale: [f64; 3] = std::array::from_fn(|column| {
        rows.iter().map(|row| row.terms[column] / row.ms).fold(0.0, f64::max)
    });
    if scale.iter().any(|largest| *largest <= 0.0) {
        return None;
    }
    // Normal equations of the rows over ms, whose right side is 1.
    let mut matrix = [[0.0; 3]; 3];
    let mut right = [0.0; 3];
    for row in rows {
        let terms: [f64; 3] =
            std::array::from_fn(|column| row.terms[column] / row.ms / scale[column]);
        for i in 0..3 {
            right[i] += terms[i];
            for j in 0..3 {
                matrix[i][j] += terms[i] * terms[j];
            }
        }
    }
    // All three together must be told apart, even if the best fit has no need of some.
    solve(&matrix, &right, [true; 3])?;
    let choices = (1_u8..8).map(|bits| std::array::from_fn(|column| bits & (1 << column) != 0));
    choices
        .filter_map(|free| solve(&matrix, &right, free))
        .filter(|solution| solution.iter().all(|coefficient| *coefficient >= 0.0))
        .map(|solution| std::array::from_fn(|column| solution[column] / scale[column]))
        .min_by(|a, b| squares(rows, a).total_cmp(&squares(rows, b)))
}

fn squares(rows: &[Row], coefficients: &[f64; 3]) -> f64 {
    rows.iter().map(|row| row.error(coefficients).powi(2)).sum()
}

/// Gaussian elimination over the free unknowns; the others are 0. None where the matrix is singular.
fn solve(matrix: &[[f64; 3]; 3], right: &[f64; 3], free: [bool; 3]) -> Option<[f64; 3]> {
    let unknowns: Vec<usize> = (0..3).filter(|column| free[*column]).collect();
    let size = unknowns.len();
    let mut rows: Vec<Vec<f64>> = unknowns
        .iter()
        .map(|&i| unknowns.iter().map(|&j| matrix[i][j]).chain([right[i]]).collect())
        .collect();
    for column in 0..size {
        let pivot = (column..size)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))?;
        rows.swap(column, pivot);
        let (done, below) = rows.split_at_mut(column + 1);
        let pivot = &done[column];
        // Of columns whose largest entry is about 1.
        if pivot[column].abs() < 1e-11 {
            return None;
        }
        for row in below {
            let factor = row[column] / pivot[column];
            for (entry, above) in row.iter_mut().zip(pivot) {
                *entry -= factor * above;
            }
        }
    }
    let mut solution = [0.0; 3];
    for (index, row) in rows.iter().enumerate().rev() {
        let known: f64 =
            (index + 1..size).map(|later| row[later] * solution[unknowns[later]]).sum();
        solution[unknowns[index]] = (row[size] - known) / row[index];
    }
    Some(solution)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFILL: [f64; 3] = [18.6, 0.0488, 1.11e-6];
    const DECODE: [f64; 3] = [11.1, 0.0593, 2.65e-5];

    fn points(prefill_ms: [f64; 3], decode_ms: [f64; 3], noise: impl Fn(usize) -> f64) -> Points {
        let mut points = Points::default();
        for (index, tokens) in
            [64.0, 500.0, 2000.0, 4000.0, 8000.0, 16_000.0].into_iter().enumerate()
        {
            let row = PrefillPoint { tokens, ms: 1.0 }.row();
            points
                .prefill
                .push(PrefillPoint { tokens, ms: row.predicted(&prefill_ms) * noise(index) });
        }
        let mut index = 0;
        for sequences in [1.0, 8.0, 64.0, 256.0] {
            for context in [200.0, 2000.0, 20_000.0] {
                let context_tokens = sequences * context;
                let row = DecodePoint { sequences, context_tokens, ms: 1.0 }.row();
                let ms = row.predicted(&decode_ms) * noise(index);
                points.decode.push(DecodePoint { sequences, context_tokens, ms });
                index += 1;
            }
        }
        points
    }

    fn assert_near(found: [f64; 3], expected: [f64; 3], share: f64) {
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() <= share * expected, "{found} is not {expected}");
        }
    }

    #[test]
    fn exact_points_give_their_coefficients() {
        let fitted = fit(&points(PREFILL, DECODE, |_| 1.0), "n", "s", None).unwrap();
        assert_near(fitted.profile.model.prefill_ms, PREFILL, 1e-6);
        assert_near(fitted.profile.model.decode_ms, DECODE, 1e-6);
        assert!(fitted.prefill.max_error < 1e-9 && fitted.decode.max_error < 1e-9);
        assert_eq!((fitted.prefill.points, fitted.decode.points), (6, 12));
    }

    #[test]
    fn errors_are_told() {
        let noise = |index: usize| if index.is_multiple_of(2) { 1.05 } else { 0.95 };
        let fitted = fit(&points(PREFILL, DECODE, noise), "n", "s", None).unwrap();
        assert!((0.01..0.06).contains(&fitted.decode.mean_error), "{fitted:?}");
        assert!(fitted.decode.max_error >= fitted.decode.mean_error);
    }

    #[test]
    fn a_glitch_can_be_left_out() {
        let noise = |index| if index == 3 { 1.9 } else { 1.0 };
        let spoilt = fit(&points(PREFILL, DECODE, noise), "n", "s", None).unwrap();
        assert!(spoilt.prefill.max_error > 0.2);
        let cleaned = fit(&points(PREFILL, DECODE, noise), "n", "s", Some(0.2)).unwrap();
        assert_near(cleaned.profile.model.prefill_ms, PREFILL, 1e-6);
        assert_eq!((cleaned.prefill.dropped, cleaned.prefill.points), (1, 5));
    }

    #[test]
    fn points_that_are_alike_are_too_few() {
        let mut same = points(PREFILL, DECODE, |_| 1.0);
        same.decode = vec![same.decode[0]; 9];
        let error = fit(&same, "n", "s", None).unwrap_err();
        assert_eq!(error, FitError::TooFew { kind: "decode", points: 9 });
        let error = fit(&Points::default(), "n", "s", None).unwrap_err();
        assert_eq!(error, FitError::TooFew { kind: "prefill", points: 0 });
    }

    proptest! {
        /// Whatever was measured, no time that the profile predicts is negative, and no other choice of
        /// coefficients nearby does better.
        #[test]
        fn the_fit_is_the_best_without_negative_coefficients(
            ms in prop::collection::vec(0.1_f64..500.0, 6), nudges in prop::array::uniform3(-0.2_f64..0.2),
        ) {
            let mut points = points(PREFILL, DECODE, |_| 1.0);
            for (point, ms) in points.prefill.iter_mut().zip(ms) {
                point.ms = ms;
            }
            let fitted = fit(&points, "n", "s", None).unwrap().profile.model.prefill_ms;
            prop_assert!(fitted.iter().all(|coefficient| *coefficient >= 0.0));
            let rows: Vec<_> = points.prefill.iter().map(PrefillPoint::row).collect();
            let typical = [10.0, 0.01, 1e-6];
            let nudged = std::array::from_fn(|i| (fitted[i] + nudges[i] * typical[i]).max(0.0));
            prop_assert!(squares(&rows, &fitted) <= squares(&rows, &nudged) * (1.0 + 1e-9));
        }
    }
}
