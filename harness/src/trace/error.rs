use std::{fmt, path::PathBuf};

/// So many are told; the rest is counted.
const TOLD: usize = 20;

/// Everything that is wrong with a trace's file.
#[derive(Debug)]
pub struct TraceErrors {
    pub file: PathBuf,
    /// At most 20, in the order of the file.
    pub errors: Vec<TraceError>,
    /// Those that are not among `errors`.
    pub untold: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceError {
    /// From 1; none where it is about the whole file.
    pub line: Option<u64>,
    pub reason: String,
}

impl TraceErrors {
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, errors: Vec::new(), untold: 0 }
    }

    pub(super) fn at(&mut self, line: u64, reason: impl Into<String>) {
        self.errors.push(TraceError { line: Some(line), reason: reason.into() });
    }

    pub(super) fn whole_file(&mut self, reason: impl Into<String>) {
        self.errors.push(TraceError { line: None, reason: reason.into() });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// In the order of the file, whatever found them.
    pub(super) fn in_order(mut self) -> Self {
        self.errors.sort_by_key(|error| error.line);
        self.untold = self.errors.len().saturating_sub(TOLD);
        self.errors.truncate(TOLD);
        self
    }
}

impl fmt::Display for TraceErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for (index, TraceError { line, reason }) in self.errors.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match line {
                Some(line) => write!(f, "{file}:{line}: {reason}")?,
                None => write!(f, "{file}: {reason}")?,
            }
        }
        if self.untold > 0 {
            write!(f, "\n{file}: and {} more errors", self.untold)?;
        }
        Ok(())
    }
}

impl std::error::Error for TraceErrors {}
