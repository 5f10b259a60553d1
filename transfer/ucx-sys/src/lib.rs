//! What Baton uses of UCX's C interface, found when the program runs: nothing of UCX is needed to build,
//! and where it is missing that is an error like any other. `baton-ucx` beside it is the safe way in.
#![allow(unsafe_code)] // Opens a C library.

#[allow(
    non_camel_case_types,
    dead_code,
    missing_debug_implementations,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::pedantic
)] // They are generated.
mod bindings;

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

pub use bindings::*;

/// Names a library where the configuration names none.
pub const LIBRARY_VARIABLE: &str = "BATON_UCX_LIBRARY";

/// What the loader is asked for where nothing is named.
const LIBRARY_NAME: &str = "libucp.so.0";

#[derive(Debug, thiserror::Error)]
#[error("cannot load UCX from {}: {reason} (asked for by {by})", path.display())]
pub struct LoadError {
    pub path: PathBuf,
    pub by: NamedBy,
    pub reason: String,
}

/// Who said where the library is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    Configuration,
    Variable,
    Default,
}

impl fmt::Display for NamedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuration => "transfer.ucx_library",
            Self::Variable => LIBRARY_VARIABLE,
            Self::Default => {
                "its usual name on the loader's path; transfer.ucx_library or \
                 BATON_UCX_LIBRARY names another"
            }
        })
    }
}

/// The library that would be loaded, and who named it.
pub fn library(configured: Option<&Path>) -> (PathBuf, NamedBy) {
    if let Some(path) = configured {
        return (path.to_owned(), NamedBy::Configuration);
    }
    match env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => (path.into(), NamedBy::Variable),
        None => (LIBRARY_NAME.into(), NamedBy::Default),
    }
}

/// Loads UCX for the rest of the process: it hooks itself into memory management and must not be
/// unloaded.
pub fn load(configured: Option<&Path>) -> Result<&'static Ucp, LoadError> {
    let (path, by) = library(configured);
    // SAFETY: loading runs the library's constructors; that the file is UCX is for whoever configured
    // the path to answer for, as for every library that the loader finds.
    let loaded = unsafe { Ucp::new(&path) };
    match loaded {
        Ok(ucp) => Ok(Box::leak(Box::new(ucp))),
        Err(error) => Err(LoadError { path, by, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_named() {
        let path = Path::new("/nowhere/libucp.so.0");
        let Err(error) = load(Some(path)) else { panic!("there is none") };
        let told = error.to_string();
        assert!(told.contains("/nowhere/libucp.so.0"), "{told}");
        assert!(told.contains("transfer.ucx_library"), "{told}");
    }
}
