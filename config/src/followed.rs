//! What is read from files that may change under a running process.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

/// What was made of some files, made anew when they change. A change that cannot be used leaves what
/// was there before: a half-written file takes nothing away.
pub struct Followed<T, E> {
    files: Vec<PathBuf>,
    read: Box<dyn Fn() -> Result<T, E> + Send + Sync>,
    state: Mutex<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    seen: Vec<Stamp>,
    /// A state of the files that could not be used.
    refused: Option<Vec<Stamp>>,
}

/// What became of a look at the files.
#[derive(Debug, PartialEq, Eq)]
pub enum Refreshed<E> {
    Unchanged,
    Renewed,
    /// They changed into something unusable. Told once for each such change, and only when it has
    /// stayed from one look to the next: who renews several files writes one after the other.
    Unusable(E),
}

impl<T, E> Followed<T, E> {
    /// Reads the files, by `read`, which is used for each further time as well.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn open(
        files: Vec<PathBuf>,
        read: impl Fn() -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        // Looked at before they are read: a change in between is seen at the next look.
        let seen = stamps(&files);
        let current = Arc::new(read()?);
        let state = Mutex::new(State { current, seen, refused: None });
        Ok(Self { files, read: Box::new(read), state })
    }

    pub fn current(&self) -> Arc<T> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// Looks whether the files changed, which costs one `stat` each, and reads them if so.
    pub fn refresh(&self) -> Refreshed<E> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamps(&self.files);
        if now == state.seen {
            return Refreshed::Unchanged;
        }
        match (self.read)() {
            Ok(current) => {
                *state = State { current: Arc::new(current), seen: now, refused: None };
                Refreshed::Renewed
            }
            Err(error) if state.refused.as_ref() == Some(&now) => {
                state.seen = now;
                Refreshed::Unusable(error)
            }
            Err(_) => {
                state.refused = Some(now);
                Refreshed::Unchanged
            }
        }
    }
}

impl<T, E> std::fmt::Debug for Followed<T, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not what was read: keys, mostly.
        f.debug_struct("Followed").field("files", &self.files).finish_non_exhaustive()
    }
}

/// Enough to see that a file, or that to which a link of that name points, is another.
type Stamp = Result<(u64, u64, SystemTime), io::ErrorKind>;

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |file: &Path| {
        let metadata = fs::metadata(file).map_err(|error| error.kind())?;
        let modified = metadata.modified().map_err(|error| error.kind())?;
        Ok((metadata.ino(), metadata.len(), modified))
    };
    files.iter().map(|file| stamp(file)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(file: &Path) -> Result<u32, String> {
        let text = fs::read_to_string(file).map_err(|error| error.to_string())?;
        text.trim().parse().map_err(|_| format!("{text:?} is no number"))
    }

    #[test]
    fn a_file_is_read_anew_when_it_changes_and_kept_while_it_is_unusable() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("number");
        fs::write(&file, "1").unwrap();
        let read = {
            let file = file.clone();
            move || number(&file)
        };
        let followed = Followed::open(vec![file.clone()], read).unwrap();
        assert_eq!((*followed.current(), followed.refresh()), (1, Refreshed::Unchanged));

        fs::write(&file, "20").unwrap();
        assert_eq!((followed.refresh(), *followed.current()), (Refreshed::Renewed, 20));

        // Unusable: said at the second look, and then no more.
        fs::write(&file, "three").unwrap();
        assert_eq!(followed.refresh(), Refreshed::Unchanged);
        assert_eq!(followed.refresh(), Refreshed::Unusable("\"three\" is no number".to_owned()));
        assert_eq!((followed.refresh(), *followed.current()), (Refreshed::Unchanged, 20));
        fs::remove_file(&file).unwrap();
        followed.refresh();
        assert!(matches!(followed.refresh(), Refreshed::Unusable(_)));

        // Put in place by a rename, as careful people do.
        let other = directory.path().join("other");
        fs::write(&other, "40").unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!((followed.refresh(), *followed.current()), (Refreshed::Renewed, 40));
    }
}
