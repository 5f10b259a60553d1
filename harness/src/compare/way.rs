//! What a contender is called, and the setups that this stands for.

use std::{fmt, str::FromStr};

use baton_core::policy;

use crate::{
    fleet::{Mode, Setup},
    goodput::{CHUNK_TOKENS, splits},
};

/// One way to use workers: "best-static", "static:7P1D", "aggregated by round-robin".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    pub kind: WayKind,
    /// Of `baton policies`; the mode's own where none is given.
    pub policy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayKind {
    /// With the chunk budget that serves most, or with the given one.
    Aggregated {
        chunk_tokens: Option<u32>,
    },
    Static {
        prefill: u32,
        decode: u32,
    },
    /// Two pools to begin with, and a balancer.
    Flip {
        prefill: u32,
        decode: u32,
    },
    /// Whichever split serves most.
    BestStatic,
    Adaptive,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseWayError {
    #[error("unknown mode {mode:?}{} Expected {EXPECTED}", meant(.mode))]
    Mode { mode: String },
    #[error("{mode:?} has an empty pool: xPyD needs one worker of each kind at least")]
    EmptyPool { mode: String },
    #[error(
        "unknown policy {policy:?}{} Expected one of {}", 
        alike(.policy, policy_names()), policy_names().collect::<Vec<_>>().join(", ")
    )]
    Policy { policy: String },
}

const EXPECTED: &str = "aggregated, aggregated:CHUNK_TOKENS, static:xPyD as in static:7P1D, best-static, \
                        flip:xPyD as in flip:4P4D, or adaptive; each also as MODE by POLICY";

fn policy_names() -> impl Iterator<Item = &'static str> {
    policy::POLICIES.iter().map(|entry| entry.name)
}

fn meant(mode: &str) -> String {
    alike(mode, ["aggregated", "static:7P1D", "best-static", "flip:4P4D", "adaptive"])
}

fn alike<'k>(text: &str, known: impl IntoIterator<Item = &'k str>) -> String {
    let nearest = baton_config::nearest(text, known);
    nearest.map_or_else(|| ".".to_owned(), |name| format!("; did you mean {name:?}?"))
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            WayKind::Aggregated { chunk_tokens: None } => f.write_str("aggregated")?,
            WayKind::Aggregated { chunk_tokens: Some(tokens) } => write!(f, "aggregated:{tokens}")?,
            WayKind::Static { prefill, decode } => {
                write!(f, "{}", Mode::Static { prefill, decode })?;
            }
            WayKind::Flip { prefill, decode } => {
                write!(f, "{}", Mode::Flip { prefill, decode })?;
            }
            WayKind::BestStatic => f.write_str("best-static")?,
            WayKind::Adaptive => f.write_str("adaptive")?,
        }
        match &self.policy {
            Some(policy) => write!(f, " by {policy}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Way {
    type Err = ParseWayError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mode, policy) = match text.split_once(" by ") {
            Some((mode, policy)) => (mode, Some(policy)),
            None => (text, None),
        };
        if let Some(policy) = policy
            && policy::policy(policy).is_none()
        {
            return Err(ParseWayError::Policy { policy: policy.to_owned() });
        }
        let unknown = || ParseWayError::Mode { mode: mode.to_owned() };
        let kind = if mode == "best-static" {
            WayKind::BestStatic
        } else if let Some(tokens) = mode.strip_prefix("aggregated:") {
            let tokens = tokens.parse().ok().filter(|tokens| *tokens > 0);
            WayKind::Aggregated { chunk_tokens: Some(tokens.ok_or_else(unknown)?) }
        } else {
            use crate::fleet::ParseModeError::{EmptyPool, Unknown};
            match mode.parse() {
                Ok(Mode::Aggregated) => WayKind::Aggregated { chunk_tokens: None },
                Ok(Mode::Static { prefill, decode }) => WayKind::Static { prefill, decode },
                Ok(Mode::Flip { prefill, decode }) => WayKind::Flip { prefill, decode },
                Ok(Mode::Adaptive) => WayKind::Adaptive,
                Err(EmptyPool(_)) => {
                    return Err(ParseWayError::EmptyPool { mode: mode.to_owned() });
                }
                Err(Unknown(_)) => return Err(unknown()),
            }
        };
        Ok(Self { kind, policy: policy.map(str::to_owned) })
    }
}

impl Way {
    /// The setups among which the best is to be found; `plain` says all but the mode. Empty where the
    /// workers are too few to be parted.
    pub fn candidates(&self, plain: &Setup) -> Vec<Setup> {
        let with = |mode| Setup { policy: self.policy.clone(), ..plain.in_mode(mode) };
        let chunked = |tokens: u32| Setup { chunk_tokens: tokens, ..with(Mode::Aggregated) };
        match self.kind {
            WayKind::Aggregated { chunk_tokens: None } => CHUNK_TOKENS.map(chunked).into(),
            WayKind::Aggregated { chunk_tokens: Some(tokens) } => vec![chunked(tokens)],
            WayKind::Static { prefill, decode } => vec![with(Mode::Static { prefill, decode })],
            WayKind::Flip { prefill, decode } => vec![with(Mode::Flip { prefill, decode })],
            WayKind::BestStatic => splits(plain.workers).map(with).collect(),
            WayKind::Adaptive => vec![with(Mode::Adaptive)],
        }
    }

    /// What of a candidate this way leaves open, in words.
    pub fn describe(&self, candidate: &Setup) -> String {
        let mut text = String::new();
        if self.kind == WayKind::BestStatic {
            let mode = candidate.mode.to_string();
            text.push_str(mode.strip_prefix("static:").unwrap_or(&mode));
            text.push_str(", ");
        }
        let most = if candidate.mode == Mode::Adaptive { "at most " } else { "" };
        text.push_str(&format!("{most}{} tokens a step", candidate.chunk_tokens));
        if self.policy.is_none() {
            text.push_str(&format!(", by {}", candidate.policy_name()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_read_as_it_is_written() {
        for text in [
            "aggregated",
            "aggregated:512",
            "static:7P1D",
            "best-static",
            "flip:4P4D",
            "adaptive",
            "best-static by round-robin",
        ] {
            assert_eq!(text.parse::<Way>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_way_is_refused_with_what_was_meant() {
        let refused = |text: &str| text.parse::<Way>().unwrap_err().to_string();
        insta::assert_snapshot!(
            ["agregated", "aggregated:0", "static:8P0D", "7P1D", "adaptive by least-lod"].map(refused).join("\n"),
            @r#"
unknown mode "agregated"; did you mean "aggregated"? Expected aggregated, aggregated:CHUNK_TOKENS, static:xPyD as in static:7P1D, best-static, flip:xPyD as in flip:4P4D, or adaptive; each also as MODE by POLICY
unknown mode "aggregated:0"; did you mean "aggregated"? Expected aggregated, aggregated:CHUNK_TOKENS, static:xPyD as in static:7P1D, best-static, flip:xPyD as in flip:4P4D, or adaptive; each also as MODE by POLICY
"static:8P0D" has an empty pool: xPyD needs one worker of each kind at least
unknown mode "7P1D". Expected aggregated, aggregated:CHUNK_TOKENS, static:xPyD as in static:7P1D, best-static, flip:xPyD as in flip:4P4D, or adaptive; each also as MODE by POLICY
unknown policy "least-lod"; did you mean "least-load"? Expected one of round-robin, random, power-of-two, least-load, least-work, prefix-affinity, slack
"#
        );
    }
}
