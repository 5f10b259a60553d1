//! Files that are written whole or not at all, and keys that only their owner reads.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// Who may read a file.
#[derive(Clone, Copy)]
pub(super) enum Secrecy {
    Public,
    /// Its owner alone.
    Secret,
}

impl Secrecy {
    fn mode(self) -> u32 {
        match self {
            Self::Public => 0o644,
            Self::Secret => 0o600,
        }
    }
}

/// A directory that only its owner enters; one that is there stays as it is.
pub(super) fn directory(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

/// Refuses where any of these files is there.
pub(super) fn refuse_existing(files: &[PathBuf], instead: &str) -> anyhow::Result<()> {
    for file in files {
        if fs::symlink_metadata(file).is_ok() {
            bail!("{} is there already: {instead}", file.display());
        }
    }
    Ok(())
}

/// Writes beside the file and renames: whoever reads it meanwhile sees the former or the new one.
pub(super) fn write(path: &Path, text: &str, secrecy: Secrecy) -> anyhow::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    let put = || -> io::Result<()> {
        // What an interrupted one left.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file: File =
            OpenOptions::new().write(true).create_new(true).mode(secrecy.mode()).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    put().with_context(|| format!("cannot write {}", path.display()))
}

pub(super) fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
