use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::scheduler::Step;

/// How long an engine's steps take, from measurements of a real one.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub name: String,
    /// Where the numbers come from.
    pub source: String,
    /// `[a, b, c]`: a prefill of n tokens takes `a + b·n + c·n²` milliseconds.
    pub prefill_ms: [f64; 3],
    /// `[a, b, c]`: a decode step takes `a + b·sequences + c·Σcontext` milliseconds, Σcontext being
    /// the tokens that lie before those of this step, over all its sequences.
    pub decode_ms: [f64; 3],
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("cannot read the profile {path}: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the profile {path} is not one: {source}", path = path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("the profile {path} has {field} = {value}: expected a number from 0 up", path = path.display())]
    Coefficient { path: PathBuf, field: String, value: f64 },
}

impl Profile {
    /// Times that feel like a small model on one GPU.
    pub fn demo() -> Self {
        Self {
            name: "demo".to_owned(),
            source: "made up: about 50 ms to the first token, then one every 15 ms".to_owned(),
            prefill_ms: [40.0, 0.1, 1e-6],
            decode_ms: [15.0, 0.02, 2e-5],
        }
    }

    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ProfileError::Unreadable { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ProfileError> {
        let profile: Self = serde_json::from_str(text)
            .map_err(|source| ProfileError::Malformed { path: path.to_owned(), source })?;
        for (name, coefficients) in
            [("prefill_ms", profile.prefill_ms), ("decode_ms", profile.decode_ms)]
        {
            for (index, value) in coefficients.into_iter().enumerate() {
                if !value.is_finite() || value < 0.0 {
                    let field = format!("{name}[{index}]");
                    return Err(ProfileError::Coefficient { path: path.to_owned(), field, value });
                }
            }
        }
        Ok(profile)
    }

    /// Time of one step. All of a step is one pass over the weights, so that a step which prefills
    /// and decodes pays the fixed part once; a chunk pays its share of the whole prompt's square.
    pub fn step_seconds(&self, step: &Step) -> f64 {
        let [prefill_fixed, per_token, per_token_squared] = self.prefill_ms;
        let [decode_fixed, per_sequence, per_context_token] = self.decode_ms;
        let (mut fixed, mut variable) = (0.0_f64, 0.0_f64);
        for work in &step.work {
            let before = f64::from(work.first_token);
            if work.is_decode() {
                fixed = fixed.max(decode_fixed);
                variable += per_sequence + per_context_token * before;
            } else {
                let after = before + f64::from(work.tokens);
                fixed = fixed.max(prefill_fixed);
                variable += per_token * f64::from(work.tokens)
                    + per_token_squared * (after * after - before * before);
            }
        }
        (fixed + variable) / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::{super::scheduler::Work, *};

    fn step(parts: &[(u32, u32)]) -> Step {
        let mut step = Step::default();
        for (first_token, tokens) in parts.iter().copied() {
            let work = Work { first_token, tokens, ..Work::default() };
            step.work.push(work);
        }
        step
    }

    #[test]
    fn the_shipped_profiles_are_profiles() {
        let demo = include_str!("../../profiles/demo.json");
        let demo = Profile::parse(demo, Path::new("demo.json")).unwrap();
        assert_eq!(demo.prefill_ms, Profile::demo().prefill_ms);
        assert_eq!(demo.decode_ms, Profile::demo().decode_ms);
        let h100 = include_str!("../../profiles/h100_llama31_70b_fp8_tp4.json");
        let h100 = Profile::parse(h100, Path::new("h100.json")).unwrap();
        assert_eq!(h100.decode_ms, [11.1204, 0.0593175, 2.65005e-05]);
    }

    #[test]
    fn a_coefficient_that_cannot_be_is_named() {
        let bad = r#"{"name":"x","source":"y","prefill_ms":[1,2,3],"decode_ms":[1,-2,3]}"#;
        let error = Profile::parse(bad, Path::new("p.json")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the profile p.json has decode_ms[1] = -2: expected a number from 0 up"
        );
        let text = r#"{"name":"x","source":"y","prefill_ms":[1,2],"decode_ms":[1,2,3]}"#;
        assert!(matches!(
            Profile::parse(text, Path::new("p.json")),
            Err(ProfileError::Malformed { .. })
        ));
    }

    #[test]
    fn chunks_add_up_to_the_whole_prompt_but_for_the_fixed_part() {
        let profile = Profile {
            name: String::new(),
            source: String::new(),
            prefill_ms: [10.0, 0.5, 0.25],
            decode_ms: [20.0, 3.0, 0.125],
        };
        let milliseconds = |parts| profile.step_seconds(&step(parts)) * 1000.0;
        assert!((milliseconds(&[(0, 8)]) - (10.0 + 4.0 + 16.0)).abs() < 1e-9);
        let chunks = milliseconds(&[(0, 4)]) + milliseconds(&[(4, 4)]);
        assert!((chunks - milliseconds(&[(0, 8)]) - 10.0).abs() < 1e-9);
        assert!((milliseconds(&[(8, 1), (16, 1)]) - (20.0 + 6.0 + 3.0)).abs() < 1e-9);
        assert!((milliseconds(&[(8, 1), (0, 8)]) - (20.0 + 3.0 + 1.0 + 4.0 + 16.0)).abs() < 1e-9);
        assert!(milliseconds(&[]).abs() < 1e-9);
    }
}
