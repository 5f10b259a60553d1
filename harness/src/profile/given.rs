//! A profile as people have it: coefficients, or the points that they come from.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use baton_engine::sim::{Profile, ProfileError};

use super::{
    Points, PointsError,
    fit::{FitError, FitQuality, fit},
};

/// What a file gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    pub profile: Profile,
    /// How well it tells the points; none of a file of coefficients.
    pub quality: Option<Quality>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    pub prefill: FitQuality,
    pub decode: FitQuality,
}

#[derive(Debug, thiserror::Error)]
pub enum GivenError {
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Points(#[from] PointsError),
    #[error("{file}: cannot be fitted: {reason}", file = file.display())]
    Fit { file: PathBuf, reason: FitError },
}

/// Reads coefficients (JSON, `FILE#NAME` for one of several), or, from a file whose name ends in
/// `.csv`, [points](Points::read), and fits them.
///
/// # Errors
/// What is wrong with the file.
pub fn read(file: &Path) -> Result<Given, GivenError> {
    if !file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv")) {
        return Ok(Given { profile: Profile::read(file)?, quality: None });
    }
    let mut points = Points::default();
    points.read(file)?;
    let text = |part: Option<&OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let source = format!("Fitted on the points of {}", text(file.file_name()));
    let fitted = fit(&points, &text(file.file_stem()), &source, None)
        .map_err(|reason| GivenError::Fit { file: file.to_owned(), reason })?;
    let quality = Quality { prefill: fitted.prefill, decode: fitted.decode };
    Ok(Given { profile: fitted.profile, quality: Some(quality) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_become_a_profile_and_say_how_well() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("card.csv");
        let mut csv = "kind,sequences,tokens,ms\n".to_owned();
        for tokens in [100.0, 1_000.0, 4_000.0, 8_000.0] {
            csv.push_str(&format!(
                "prefill,,{tokens},{}\n",
                10.0 + 0.05 * tokens + 1e-6 * tokens * tokens
            ));
        }
        for (sequences, context) in
            [(1.0, 500.0), (8.0, 8_000.0), (64.0, 20_000.0), (64.0, 90_000.0)]
        {
            csv.push_str(&format!(
                "decode,{sequences},{context},{}\n",
                12.0 + 0.1 * sequences + 2e-5 * context
            ));
        }
        std::fs::write(&file, csv).unwrap();
        let given = read(&file).unwrap();
        assert_eq!(given.profile.name, "card");
        assert!((given.profile.model.decode_ms[0] - 12.0).abs() < 1e-6);
        let quality = given.quality.unwrap();
        assert!(quality.prefill.max_error < 1e-6 && quality.decode.points == 4);

        std::fs::write(&file, "kind,sequences,tokens,ms\nprefill,,100,9\n").unwrap();
        let said = read(&file).unwrap_err().to_string();
        assert!(said.ends_with("card.csv: cannot be fitted: prefill has 1 points: expected at least 3 different ones"), "{said}");
    }
}
