use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use baton_types::StepModel;
use serde::{Deserialize, Serialize};

use super::step::Step;

/// How long an engine's steps take, from measurements of a real one, and how much KV it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "ProfileFile", into = "ProfileFile")]
pub struct Profile {
    pub name: String,
    /// Where the numbers come from.
    pub source: String,
    pub model: StepModel,
    pub kv_capacity_tokens: Option<u64>,
    pub kv_bytes_per_token: Option<u64>,
}

/// As it is written: flat.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    name: String,
    source: String,
    prefill_ms: [f64; 3],
    decode_ms: [f64; 3],
    #[serde(default = "one")]
    prefill_interference_factor: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kv_capacity_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kv_bytes_per_token: Option<u64>,
}

/// One of several in a file; what else is said of it is for people.
#[derive(Clone, Copy, Deserialize)]
struct Coefficients {
    prefill_ms: [f64; 3],
    decode_ms: [f64; 3],
    #[serde(default = "one")]
    prefill_interference_factor: f64,
}

fn one() -> f64 {
    1.0
}

impl From<ProfileFile> for Profile {
    fn from(file: ProfileFile) -> Self {
        let ProfileFile { prefill_ms, decode_ms, prefill_interference_factor, .. } = file;
        Self {
            name: file.name,
            source: file.source,
            model: StepModel { prefill_ms, decode_ms, prefill_interference_factor },
            kv_capacity_tokens: file.kv_capacity_tokens,
            kv_bytes_per_token: file.kv_bytes_per_token,
        }
    }
}

impl From<Profile> for ProfileFile {
    fn from(profile: Profile) -> Self {
        let StepModel { prefill_ms, decode_ms, prefill_interference_factor } = profile.model;
        Self {
            name: profile.name,
            source: profile.source,
            prefill_ms,
            decode_ms,
            prefill_interference_factor,
            kv_capacity_tokens: profile.kv_capacity_tokens,
            kv_bytes_per_token: profile.kv_bytes_per_token,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("cannot read the profile {path}: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the profile {path} is not one: {source}", path = path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{path} holds several profiles: append one's name, as in FILE#NAME, of {names}", path = path.display())]
    OneOfSeveral { path: PathBuf, names: String },
    #[error("the profile {path} has {field} = {value}: expected a number from 0 up", path = path.display())]
    Coefficient { path: PathBuf, field: String, value: f64 },
}

impl Profile {
    /// Times that feel like a small model on one GPU.
    pub fn demo() -> Self {
        Self {
            name: "demo".to_owned(),
            source: "made up: about 50 ms to the first token, then one every 15 ms".to_owned(),
            model: StepModel {
                prefill_ms: [40.0, 0.1, 1e-6],
                decode_ms: [15.0, 0.02, 2e-5],
                prefill_interference_factor: 1.0,
            },
            kv_capacity_tokens: None,
            kv_bytes_per_token: None,
        }
    }

    /// Reads a profile's file; `FILE#NAME` takes one of a file of several, which is an object of
    /// coefficients by name.
    ///
    /// # Errors
    /// A file that cannot be read or is no profile, and coefficients that cannot be.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let whole = path.to_string_lossy();
        let (file, name) = match whole.rsplit_once('#') {
            Some((file, name)) if !path.exists() => (Path::new(file), Some(name)),
            _ => (path, None),
        };
        let text = std::fs::read_to_string(file)
            .map_err(|source| ProfileError::Unreadable { path: file.to_owned(), source })?;
        let several: Option<BTreeMap<String, Coefficients>> = serde_json::from_str(&text).ok();
        match (several, name) {
            (None, _) => Self::parse(&text, file),
            (Some(several), name) => {
                let names = several.keys().cloned().collect::<Vec<_>>().join(", ");
                let found = name.and_then(|name| several.get(name).map(|found| (name, *found)));
                let (name, found) = found
                    .ok_or_else(|| ProfileError::OneOfSeveral { path: file.to_owned(), names })?;
                let model = StepModel {
                    prefill_ms: found.prefill_ms,
                    decode_ms: found.decode_ms,
                    prefill_interference_factor: found.prefill_interference_factor,
                };
                let profile = Self {
                    name: name.to_owned(),
                    source: file.display().to_string(),
                    model,
                    kv_capacity_tokens: None,
                    kv_bytes_per_token: None,
                };
                profile.checked(file)
            }
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ProfileError> {
        let profile: Self = serde_json::from_str(text)
            .map_err(|source| ProfileError::Malformed { path: path.to_owned(), source })?;
        profile.checked(path)
    }

    fn checked(self, path: &Path) -> Result<Self, ProfileError> {
        let refuse = |field: String, value: f64| {
            if value.is_finite() && value >= 0.0 {
                return Ok(());
            }
            Err(ProfileError::Coefficient { path: path.to_owned(), field, value })
        };
        let model = &self.model;
        for (name, coefficients) in
            [("prefill_ms", model.prefill_ms), ("decode_ms", model.decode_ms)]
        {
            for (index, value) in coefficients.into_iter().enumerate() {
                refuse(format!("{name}[{index}]"), value)?;
            }
        }
        refuse("prefill_interference_factor".to_owned(), model.prefill_interference_factor)?;
        Ok(self)
    }

    /// Time of one step.
    pub fn step_seconds(&self, step: &Step) -> f64 {
        self.model.step_ms(&step.load(&self.model)) / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_profiles_are_profiles() {
        let demo = include_str!("../../profiles/demo.json");
        let demo = Profile::parse(demo, Path::new("demo.json")).unwrap();
        assert_eq!(demo.model, Profile::demo().model);
        let h100 = include_str!("../../profiles/h100_llama31_70b_fp8_tp4.json");
        let h100 = Profile::parse(h100, Path::new("h100.json")).unwrap();
        assert_eq!(h100.model.decode_ms, [11.1204, 0.0593175, 2.65005e-05]);
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
    fn one_of_several_is_taken_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("several.json");
        let text = r#"{"a":{"prefill_ms":[1,2,3],"decode_ms":[4,5,6],"mape":0.1},
                       "b":{"prefill_ms":[1,2,3],"decode_ms":[4,-5,6]}}"#;
        std::fs::write(&file, text).unwrap();
        let named = |name: &str| PathBuf::from(format!("{}#{name}", file.display()));
        assert_eq!(Profile::read(&named("a")).unwrap().model.decode_ms, [4.0, 5.0, 6.0]);
        for path in [file.clone(), named("c")] {
            let error = Profile::read(&path).unwrap_err().to_string();
            assert!(error.ends_with("as in FILE#NAME, of a, b"), "{error}");
        }
        assert!(Profile::read(&named("b")).unwrap_err().to_string().contains("decode_ms[1] = -5"));
    }
}
