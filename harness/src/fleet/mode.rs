use std::{fmt, str::FromStr};

/// How a fleet uses its workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Every worker prefills and decodes its own requests.
    Aggregated,
    /// Two pools; every request is split between them.
    Static { prefill: u32, decode: u32 },
    /// Every worker does what it is given; each request's way is decided by itself.
    Adaptive,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aggregated => f.write_str("aggregated"),
            Self::Static { prefill, decode } => write!(f, "static:{prefill}P{decode}D"),
            Self::Adaptive => f.write_str("adaptive"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseModeError {
    #[error("unknown mode {0:?}: expected aggregated, adaptive, or static:xPyD, as in static:7P1D")]
    Unknown(String),
    #[error("the mode {0} has an empty pool: static:xPyD needs one worker of each kind at least")]
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
        let pools = text.strip_prefix("static:").ok_or_else(unknown)?;
        let (prefill, rest) = pools.split_once(['P', 'p']).ok_or_else(unknown)?;
        let decode = rest.strip_suffix(['D', 'd']).ok_or_else(unknown)?;
        let count = |text: &str| text.parse().map_err(|_| unknown());
        let mode = Self::Static { prefill: count(prefill)?, decode: count(decode)? };
        match mode {
            Self::Static { prefill, decode } if prefill == 0 || decode == 0 => {
                Err(ParseModeError::EmptyPool(mode))
            }
            _ => Ok(mode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_read_as_it_is_written() {
        for text in ["aggregated", "adaptive", "static:7P1D"] {
            assert_eq!(text.parse::<Mode>().unwrap().to_string(), text);
        }
        for text in
            ["", "static", "static:1P", "static:-1P2D", "static:1P2", "7P1D", "static:1P2D "]
        {
            assert_eq!(text.parse::<Mode>(), Err(ParseModeError::Unknown(text.to_owned())));
        }
        for text in ["static:0P1D", "static:3P0D"] {
            assert!(matches!(text.parse::<Mode>(), Err(ParseModeError::EmptyPool(_))));
        }
    }
}
