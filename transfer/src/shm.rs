//! The channel between workers of one user on one host. Where the consumer's engine can read them there, blocks
//! stay in the producer's arena until it has; else they are copied once, from the producer's arena straight into
//! the consumer's. Words pass over a Unix socket, one connection for each handoff.
//!
//! That both are of one host and user is shown by the kernel: by the socket, by who is at its other end,
//! and by the file behind the arena. Who is who among them is said, not proven: processes of one user
//! can read each other's memory anyway.

mod consume;
mod copying;
mod hello;
mod link;
mod mapped;
mod produce;

#[cfg(feature = "fuzzing")]
pub(crate) use self::hello::fuzz as fuzz_hello;

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use baton_arena::{Arena, ArenaFile, PeerArena};
use parking_lot::Mutex;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

pub use self::mapped::MappedBlock;

use self::copying::Copiers;
use crate::channel::{
    BlockSink, Channel, Exports, PeerAddress, Pulled, Subscription, TransferError,
};

/// The name by which users choose it.
const TRANSPORT: &str = "shm";

/// How often each side tells the other that it lives.
const BEAT: Duration = Duration::from_millis(250);
/// A side of which nothing is heard for so long is gone.
const SILENCE: Duration = Duration::from_millis(1500);
/// Blocks of a handoff that may be announced and not yet be taken. The arena's slots are what bounds them; this
/// bounds the words about them.
const WINDOW: usize = 1024;
/// How often it is looked for arenas that are gone.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
const SOCKET_PREFIX: &str = "baton-kv-";
const SOCKET_SUFFIX: &str = ".sock";
/// Handoffs at a time, of which each holds a socket; further ones wait.
const CONCURRENT_HANDOFFS: usize = 1024;
/// Of so many peers at the most arenas stay mapped.
const MAPPED_PEERS: usize = 64;

/// How a worker takes part in handoffs on its own host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShmConfig {
    /// Where the socket is made: the same for all workers of a host.
    pub directory: PathBuf,
    /// How this worker is known to others: the same as on its other channels.
    pub certificate_fingerprint: [u8; 32],
    /// A handoff that moves nothing for this long is given up.
    pub stall_timeout: Duration,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen for handoffs on {path}: {source}", path = path.display())]
pub struct ShmBindError {
    path: PathBuf,
    source: io::Error,
}

/// Both sides of handoffs over shared memory. Dropping it ends every handoff.
pub struct ShmChannel {
    shared: Arc<Shared>,
    path: PathBuf,
    handoffs: Semaphore,
    mapped: Arc<Mapped>,
    copiers: Copiers,
    _serving: JoinSet<()>,
}

impl fmt::Debug for ShmChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmChannel").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Peers' arenas, by the fingerprint of whose each is.
type Mapped = Mutex<HashMap<[u8; 32], Arc<PeerArena>>>;

/// What those who serve consumers need.
struct Shared {
    config: ShmConfig,
    exports: Arc<dyn Exports>,
    arena: Mutex<Option<Arena>>,
    /// Blocks that consumers may be reading, of all handoffs.
    announced: AtomicUsize,
}

impl Shared {
    /// Whether so many blocks are with consumers that the engine could run out of slots for others: half of them.
    fn is_short_of_slots(&self, arena: &Arena) -> bool {
        let half = arena.layout().export_slots / 2;
        self.announced.load(Relaxed) >= usize::try_from(half).unwrap_or(usize::MAX)
    }
}

impl Drop for ShmChannel {
    fn drop(&mut self) {
        // Somebody else may have tidied up already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl ShmChannel {
    /// Starts to listen, in the runtime that it is called in.
    pub fn bind(config: ShmConfig, exports: Arc<dyn Exports>) -> Result<Arc<Self>, ShmBindError> {
        let path = Self::socket_of(&config.directory, &config.certificate_fingerprint);
        let refused = |source| ShmBindError { path: path.clone(), source };
        allow_many_files();
        remove_deserted(&config.directory);
        // Has its name only once somebody listens.
        let unready = path.with_extension("new");
        let listener = std::os::unix::net::UnixListener::bind(&unready).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&unready, owner_only).map_err(refused)?;
        std::fs::rename(&unready, &path).map_err(refused)?;
        let listener = UnixListener::from_std(listener).map_err(refused)?;
        let (arena, announced) = (Mutex::default(), AtomicUsize::new(0));
        let shared = Arc::new(Shared { config, exports, arena, announced });
        let mapped = Arc::<Mapped>::default();
        let mut serving = JoinSet::new();
        serving.spawn(listen(listener, shared.clone()));
        serving.spawn(forget_gone(Arc::downgrade(&mapped)));
        Ok(Arc::new(Self {
            shared,
            path,
            handoffs: Semaphore::new(CONCURRENT_HANDOFFS),
            mapped,
            copiers: Copiers::new(),
            _serving: serving,
        }))
    }

    /// Where the worker of this fingerprint listens, if it is on this host.
    pub fn socket_of(directory: &Path, fingerprint: &[u8; 32]) -> PathBuf {
        // A socket's path has room for 107 bytes; half of the fingerprint is still unlike any other.
        let name: String = fingerprint.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        directory.join(format!("{SOCKET_PREFIX}{name}{SOCKET_SUFFIX}"))
    }

    /// Whether this peer seems to be on this host, with its socket in the same directory.
    pub fn reaches(&self, peer: &PeerAddress) -> bool {
        self.path_of(peer).exists()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An address that is a path is meant; any other is that of another channel.
    fn path_of(&self, peer: &PeerAddress) -> PathBuf {
        let path = Path::new(&peer.address);
        if path.is_absolute() {
            return path.to_owned();
        }
        Self::socket_of(&self.shared.config.directory, &peer.certificate_fingerprint)
    }

    async fn connect(&self, peer: &PeerAddress) -> Result<UnixStream, TransferError> {
        let unreachable = |reason: String| TransferError::Unreachable {
            worker: peer.worker_name.clone(),
            address: peer.address.clone(),
            reason,
        };
        let connecting = timeout(SILENCE, UnixStream::connect(self.path_of(peer))).await;
        let stream = connecting
            .map_err(|_| unreachable("it does not answer".to_owned()))?
            .map_err(|error| unreachable(error.to_string()))?;
        match of_this_user(&stream) {
            Ok(true) => Ok(stream),
            Ok(false) => Err(unreachable("its process is another user's".to_owned())),
            Err(error) => Err(unreachable(error.to_string())),
        }
    }

    /// The peer's arena, mapped if it is not yet.
    async fn map(
        &self,
        peer: &PeerAddress,
        file: ArenaFile,
    ) -> Result<Arc<PeerArena>, TransferError> {
        let fingerprint = peer.certificate_fingerprint;
        let known = self.mapped.lock().get(&fingerprint).cloned();
        if let Some(known) = known.filter(|known| *known.file() == file) {
            return Ok(known);
        }
        let failed = |reason: String| {
            TransferError::Memory(format!("{} cannot be mapped: {reason}", peer.worker_name))
        };
        // Touches every page of it.
        let opened = spawn_blocking(move || PeerArena::open(&file)).await;
        let opened = opened.map_err(|error| failed(error.to_string()))?;
        let arena = Arc::new(opened.map_err(|error| failed(error.to_string()))?);
        let mut mapped = self.mapped.lock();
        // Two handoffs may have come at once: one mapping is enough for both.
        let known = mapped.get(&fingerprint).filter(|known| known.file() == arena.file());
        if let Some(known) = known {
            return Ok(Arc::clone(known));
        }
        if mapped.len() >= MAPPED_PEERS {
            mapped.clear();
        }
        mapped.insert(fingerprint, arena.clone());
        Ok(arena)
    }
}

#[async_trait]
impl Channel for ShmChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        // Never closed.
        let _turn = self.handoffs.acquire().await.map_err(|_| TransferError::Cancelled)?;
        let stream = match self.connect(peer).await {
            Ok(stream) => stream,
            Err(error) => {
                self.mapped.lock().remove(&peer.certificate_fingerprint);
                return Err(error);
            }
        };
        consume::pull(self, stream, peer, &subscription, sink).await
    }

    fn use_arena(&self, arena: &Arena) {
        *self.shared.arena.lock() = Some(arena.clone());
    }

    fn transports(&self) -> Vec<String> {
        vec![TRANSPORT.to_owned()]
    }
}

/// Removes the sockets of workers that were killed: nobody listens there, and nobody will again.
fn remove_deserted(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(SOCKET_PREFIX) || !name.ends_with(SOCKET_SUFFIX) {
            continue;
        }
        let path = entry.path();
        let tried = std::os::unix::net::UnixStream::connect(&path);
        if tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            // Another worker may have been faster.
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Lets go of arenas whose workers have removed them: their memory is free only then.
async fn forget_gone(mapped: Weak<Mapped>) {
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let Some(mapped) = mapped.upgrade() else { return };
        mapped.lock().retain(|_, arena| arena.is_there());
    }
}

async fn listen(listener: UnixListener, shared: Arc<Shared>) {
    // Ends them all when it is dropped.
    let mut consumers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match of_this_user(&stream) {
                    Ok(true) => {
                        consumers.spawn(produce::serve(stream, shared.clone()));
                    }
                    Ok(false) => tracing::warn!("another user's process asked for a handoff"),
                    Err(error) => tracing::debug!(%error, "a consumer that is gone already"),
                },
                Err(error) => {
                    // No file descriptor is left, most likely: some handoff will end.
                    tracing::warn!(%error, "cannot accept a consumer");
                    tokio::time::sleep(BEAT).await;
                }
            },
            Some(_) = consumers.join_next() => {}
        }
    }
}

/// Whether the process at the other end is this user's.
fn of_this_user(stream: &UnixStream) -> io::Result<bool> {
    Ok(stream.peer_cred()?.uid() == rustix::process::geteuid().as_raw())
}

fn silent() -> TransferError {
    TransferError::BrokeOff(format!("nothing was heard of it for {} ms", SILENCE.as_millis()))
}

/// What a write came to. That nobody reads any more is no error yet: what the peer said last, which is still
/// to be read, tells why.
fn written(result: io::Result<()>) -> Result<(), TransferError> {
    match result {
        Err(error) if !is_closed(&error) => Err(gone(&error)),
        _ => Ok(()),
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// A socket for each handoff may be more than a process has by default.
fn allow_many_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where it is not allowed, handoffs beyond the limit fail one by one, and say so.
    let _ = setrlimit(Resource::Nofile, limit);
}

fn gone(error: &io::Error) -> TransferError {
    TransferError::BrokeOff(error.to_string())
}
