//! UCX, safely: one-sided writes from this process's memory into a peer's staging arena.
//!
//! A [`Ucx`] owns one UCX context and one worker, both of them used by one thread of their own
//! ([`thread`]); everything else sends it [`Command`]s and awaits their answers. All that is `unsafe` about
//! UCX stands in [`native`].

mod command;
mod describe;
mod native;
mod thread;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_arena::Arena;
use bytes::Bytes;
use tokio::sync::oneshot;

pub use baton_ucx_sys::{LIBRARY_VARIABLE, LoadError, library};

pub use self::describe::{Lane, Resource};
use self::{
    command::{Command, Commands, EndpointId, RegionId, RkeyId},
    thread::Started,
};

/// How UCX is to be used.
#[derive(Clone, Debug)]
pub struct Options {
    /// The library; without it [`LIBRARY_VARIABLE`] or the loader's path says where it is.
    pub library: Option<PathBuf>,
    /// How long the thread asks for work before it sleeps. Waking it costs tens of microseconds a time.
    pub spin: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { library: None, spin: Duration::from_micros(200) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("UCX {version} cannot {action}: {reason}")]
    Init { version: String, action: &'static str, reason: String },
    #[error("cannot start UCX's thread: {0}")]
    Thread(std::io::Error),
}

/// A call into UCX that failed, by UCX's own words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UcxError {
    #[error("UCX cannot {action}: {reason}")]
    Failed { action: &'static str, reason: String },
    #[error("{offset} + {len} bytes do not fit the peer's region of {region_bytes} bytes")]
    OutOfRegion { offset: u64, len: u64, region_bytes: u64 },
    #[error("UCX was stopped")]
    Stopped,
}

/// One UCX context and worker, on a thread of their own, which ends with the last of its handles: this,
/// regions, endpoints.
#[derive(Clone)]
pub struct Ucx {
    commands: Arc<Commands>,
    facts: Arc<Facts>,
}

struct Facts {
    library: PathBuf,
    version: String,
    address: Bytes,
    resources: Vec<Resource>,
}

impl fmt::Debug for Ucx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ucx")
            .field("library", &self.facts.library)
            .field("version", &self.facts.version)
            .finish_non_exhaustive()
    }
}

impl Ucx {
    /// Loads UCX and starts its thread.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        let ucp = baton_ucx_sys::load(options.library.as_deref())?;
        let (commands, started) = thread::start(ucp, options.spin)?;
        let Started { version, address, resources } = started;
        let (library, _) = library(options.library.as_deref());
        Ok(Self { commands, facts: Arc::new(Facts { library, version, address, resources }) })
    }

    /// The file that was loaded, as it was named.
    pub fn library(&self) -> &Path {
        &self.facts.library
    }

    /// `1.22.0`.
    pub fn version(&self) -> &str {
        &self.facts.version
    }

    /// By what peers find this worker, in UCX's own form.
    pub fn address(&self) -> Bytes {
        self.facts.address.clone()
    }

    /// What UCX may use: each transport on each device that its own variables (`UCX_TLS`,
    /// `UCX_NET_DEVICES`) leave to it.
    pub fn resources(&self) -> &[Resource] {
        &self.facts.resources
    }

    /// Opens an arena to peers that are given its key. It stays registered, and mapped, as long as the
    /// region lives, which must be as long as a peer may still write into it: not every transport asks
    /// whether what it is told to write to is still there.
    pub async fn register(&self, arena: Arena) -> Result<Region, UcxError> {
        let base = arena.base() as u64;
        let len_bytes = arena.len_bytes() as u64;
        let (id, key) = self.commands.ask(|answer| Command::Register { arena, answer }).await?;
        Ok(Region { id, base, len_bytes, key, commands: Arc::clone(&self.commands) })
    }

    /// An endpoint to the worker of this address. Whether anybody is there shows at the first write.
    pub async fn connect(&self, address: Bytes) -> Result<Endpoint, UcxError> {
        let id = self.commands.ask(|answer| Command::Connect { address, answer }).await?;
        Ok(Endpoint(Arc::new(Connected { id, commands: Arc::clone(&self.commands) })))
    }
}

/// A registered arena.
pub struct Region {
    id: RegionId,
    base: u64,
    len_bytes: u64,
    key: Bytes,
    commands: Arc<Commands>,
}

impl Region {
    /// Where it begins in this process, which is how peers address it.
    pub fn base(&self) -> u64 {
        self.base
    }

    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What lets a peer write anywhere in it.
    pub fn key(&self) -> Bytes {
        self.key.clone()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.commands.send(Command::Unregister(self.id));
    }
}

/// The way to one peer's worker. The last clone closes it when what is under way has ended, after a second at the
/// latest.
#[derive(Clone)]
pub struct Endpoint(Arc<Connected>);

struct Connected {
    id: EndpointId,
    commands: Arc<Commands>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.commands.send(Command::Leave(self.id));
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Makes a peer's region known, by what the peer said of it: where it begins over there, how long it
    /// is, its key.
    pub async fn import(
        &self,
        base: u64,
        len_bytes: u64,
        key: Bytes,
    ) -> Result<RemoteRegion, UcxError> {
        let endpoint = self.0.id;
        let id = self.0.commands.ask(|answer| Command::Import { endpoint, key, answer }).await?;
        Ok(RemoteRegion(Arc::new(Imported { id, base, len_bytes, endpoint: self.clone() })))
    }

    /// Closes it for all its clones: what is under way fails, and nothing more is written. Over tcp a peer that lives
    /// and only now comes to what was written may be aborted by its UCX.
    pub fn close(&self) {
        self.0.commands.send(Command::Close(self.0.id));
    }

    /// Which transports and devices UCX picked for it, as of now: the choice is complete after the first
    /// write.
    pub async fn lanes(&self) -> Result<Vec<Lane>, UcxError> {
        let endpoint = self.0.id;
        self.0.commands.ask(|answer| Command::Describe { endpoint, answer }).await
    }
}

/// A peer's region, as this process may write into it.
#[derive(Clone)]
pub struct RemoteRegion(Arc<Imported>);

struct Imported {
    id: RkeyId,
    base: u64,
    len_bytes: u64,
    endpoint: Endpoint,
}

impl Drop for Imported {
    fn drop(&mut self) {
        self.endpoint.0.commands.send(Command::Forget(self.id));
    }
}

impl fmt::Debug for RemoteRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteRegion").field("len_bytes", &self.0.len_bytes).finish_non_exhaustive()
    }
}

/// Bytes and where in the region they are to lie.
#[derive(Clone, Debug)]
pub struct Put {
    pub bytes: Bytes,
    pub offset: u64,
}

/// Writes that are under way. Dropping it does not stop them.
#[derive(Debug)]
pub struct Writing {
    under_way: oneshot::Receiver<Result<(), UcxError>>,
    ended: Option<Result<(), UcxError>>,
}

impl Writing {
    /// All bytes lie at the peer, or it failed; either way UCX lets go of them. Nothing is lost when the
    /// future is dropped.
    pub async fn done(&mut self) -> Result<(), UcxError> {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        let ended = (&mut self.under_way).await.unwrap_or(Err(UcxError::Stopped));
        self.ended.insert(ended).clone()
    }
}

impl RemoteRegion {
    /// Writes, and asks UCX to see to it that the bytes lie there before it says so.
    pub fn put(&self, puts: Vec<Put>) -> Result<Writing, UcxError> {
        let Imported { id, base, len_bytes, endpoint } = &*self.0;
        let mut at = Vec::with_capacity(puts.len());
        for Put { bytes, offset } in puts {
            let len = bytes.len() as u64;
            if offset.checked_add(len).is_none_or(|end| end > *len_bytes) {
                return Err(UcxError::OutOfRegion { offset, len, region_bytes: *len_bytes });
            }
            at.push((bytes, base.wrapping_add(offset)));
        }
        let (answer, writing) = oneshot::channel();
        let endpoint = endpoint.0.id;
        self.0.endpoint.0.commands.send(Command::Put { endpoint, rkey: *id, puts: at, answer });
        Ok(Writing { under_way: writing, ended: None })
    }
}
