//! The Python package that vLLM loads, carried inside this program: one file to install.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

macro_rules! package {
    ($($file:literal)*) => {
        &[$(($file, include_str!(concat!("../../../connector/baton_connector/", $file)))),*]
    };
}

const PACKAGE: &[(&str, &str)] = package!(
    "__init__.py"
    "arena.py"
    "compatibility.py"
    "connector.py"
    "exports.py"
    "frames.py"
    "handoff.py"
    "layout.py"
    "link.py"
    "loads.py"
    "pacing.py"
    "peers.py"
    "plan.py"
    "scheduler.py"
    "scheduler_side.py"
    "steps.py"
    "version.py"
    "worker_side.py"
);

/// Writes the package below `directory` and answers what belongs into Python's path.
pub(super) fn write_to(directory: &Path) -> anyhow::Result<PathBuf> {
    let path = directory.join("connector");
    let package = path.join("baton_connector");
    let write = || {
        fs::create_dir_all(&package)?;
        PACKAGE.iter().try_for_each(|(name, text)| fs::write(package.join(name), text))
    };
    write().with_context(|| format!("cannot write the connector to {}", package.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_package_is_carried() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../connector/baton_connector");
        let mut files: Vec<String> = fs::read_dir(source)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".py"))
            .collect();
        files.sort();
        let carried: Vec<&str> = PACKAGE.iter().map(|(name, _)| *name).collect();
        assert_eq!(carried, files, "name new files in cli/src/up/connector.rs");
    }

    #[test]
    fn it_is_written_as_a_package() {
        let directory = tempfile::tempdir().unwrap();
        let path = write_to(directory.path()).unwrap();
        assert!(path.join("baton_connector/__init__.py").is_file());
    }
}
