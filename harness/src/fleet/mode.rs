use std::{fmt, str::FromStr};

/// How a fleet uses its workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Every worker prefills and decodes its own requests.
    Aggregated,
    /// Two pools; every request is split between them.
    Static { prefill: u32, decode: u32 },
    /// Two pools to begin with; workers go over to the one that needs them.
    Flip { prefill: u32, decode: u32 },
    /// Every worker does what it is given; each request's way is decided by itself.
    Adaptive,
}

impl Mode {
    /// Workers have roles.
    pub fn has_pools(self) -> bool {
        matches!(self, Self::Static { .. } | Self::Flip { .. })
    }

    /// Workers of each role at the start, where they have roles.
    pub fn pools(self) -> Option<(u32, u32)> {
        match self {
            Self::Static { prefill, decode } | Self::Flip { prefill, decode } => {
                Some((prefill, decode))
            }
            Self::Aggregated | Self::Adaptive => None,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aggregated => f.write_str("aggregated"),
            Self::Static { prefill, decode } => write!(f, "static:{prefill}P{decode}D"),
            Self::Flip { prefill, decode } => write!(f, "flip:{prefill}P{decode}D"),
            Self::Adaptive => f.write_str("adaptive"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseModeError {
    #[error(
        "unknown mode {0:?}: expected aggregated, adaptive, static:xPyD or flip:xPyD, as in static:7P1D"
    )]
    Unknown(String),
    #[error("the mode {0} has an empty pool: xPyD needs one worker of each kind at least")]
    EmptyPool(Mode),
}

impl FromStr for Mode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || ParseModeError::Unknown(text.to_owned());
        match text {
            "aggregated" => return Ok(Self::Aggregated),
            "adaptive" => return Ok(Self::Adaptive),
            _ => {}
        }
        let (kind, pools) = text.split_once(':').ok_or_else(unknown)?;
        let (prefill, rest) = pools.split_once(['P', 'p']).ok_or_else(unknown)?;
        let decode = rest.strip_suffix(['D', 'd']).ok_or_else(unknown)?;
        let count = |text: &str| text.parse().map_err(|_| unknown());
        let (prefill, decode) = (count(prefill)?, count(decode)?);
        let mode = match kind {
            "static" => Self::Static { prefill, decode },
            "flip" => Self::Flip { prefill, decode },
            _ => return Err(unknown()),
        };
        if prefill == 0 || decode == 0 {
            return Err(ParseModeError::EmptyPool(mode));
        }
        Ok(mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_read_as_it_is_written() {
        for text in ["aggregated", "adaptive", "static:7P1D", "flip:4P4D"] {
            assert_eq!(text.parse::<Mode>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "static",
            "static:1P",
            "static:-1P2D",
            "static:1P2",
            "7P1D",
            "flap:1P2D",
            "flip:1P2D ",
        ] {
            assert_eq!(text.parse::<Mode>(), Err(ParseModeError::Unknown(text.to_owned())));
        }
        for text in ["static:0P1D", "static:3P0D", "flip:0P4D"] {
            assert!(matches!(text.parse::<Mode>(), Err(ParseModeError::EmptyPool(_))));
        }
    }
}
