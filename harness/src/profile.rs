//! Profiles of engines, from measured points.
//!
//! ```text
//! prefill of n tokens:  a + b·n + c·n²                     milliseconds
//! decode step:          a + b·sequences + c·Σcontext       milliseconds
//! ```
//!
//! [`Points`] come from [CSV files](Points::read) or from a [live engine](measure::measure), and
//! [`fit`](fit::fit) finds the coefficients.

pub mod fit;
pub mod measure;
mod points;

pub use points::{DecodePoint, Points, PointsError, PrefillPoint};
