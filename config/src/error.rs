use std::{fmt, path::PathBuf};

/// Everything that is wrong with one file, in the order of its lines.
///
/// Displays as one `FILE:LINE: key: message` a line, which terminals and CI systems make clickable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// As the user named it.
    pub file: PathBuf,
    /// Never empty.
    pub errors: Vec<ConfigError>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigError {
    /// Counted from 1. For something missing, the line of the table that lacks it; `None` where the
    /// file could not be read at all.
    pub line: Option<usize>,
    /// Full path: `worker[1].transfer.listen`, workers counted from 0. Empty for a syntax error.
    pub key: String,
    /// What was found, and what would be right.
    pub message: String,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}:", self.file.display())?;
            if let Some(line) = error.line {
                write!(f, "{line}:")?;
            }
            if !error.key.is_empty() {
                write!(f, " {}:", error.key)?;
            }
            write!(f, " {}", error.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
