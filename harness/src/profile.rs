//! Profiles of engines, from measured points.
//!
//! ```text
//! prefill of n tokens:  a + b·n + c·n²                     milliseconds
//! decode step:          a + b·sequences + c·Σcontext       milliseconds
//! ```
//!
//! [`Points`] come from [CSV files](Points::read) or from a [live engine](measure::measure), and
//! [`fit`](fit::fit) finds the coefficients. [`read`] takes either kind of file.

pub mod fit;
mod given;
pub mod measure;
mod points;

pub use given::{Given, GivenError, Quality, read};
pub use points::{DecodePoint, Points, PointsError, PrefillPoint};
