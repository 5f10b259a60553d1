use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream as BlockingUnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_arena::{Arena, ArenaError};
use baton_config::ArenaConfig;
use baton_types::{Compatibility, CompatibilityMismatch};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::{
    arena_files::{self, ArenaTooSmall},
    frames::{self, Answer, FrameError, Hello},
    scheduler,
};
use crate::{EngineError, FromEngine, KvPort, RankPort, ToEngine, pacing::Pacing};

/// A connector says hello as soon as it has connected.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever is refused reads it at once, or not at all.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Messages on their way to or from the connector.
const QUEUE_MESSAGES: usize = 1024;

/// Listens for our connector and our scheduler inside vLLM. The connector connects once for each of the
/// engine's ranks, which together are one [`KvPort`]; whoever comes a second time ends what was before.
#[derive(Debug)]
pub(super) struct ConnectorListener {
    accepting: JoinHandle<()>,
    path: PathBuf,
}

impl Drop for ConnectorListener {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = fs::remove_file(&self.path);
    }
}

impl ConnectorListener {
    pub(super) fn bind(
        path: &Path,
        arena: &ArenaConfig,
        worker_name: &str,
        ports: mpsc::Sender<KvPort>,
        pacing: Pacing,
    ) -> Result<Self, EngineError> {
        let listener = listen(path).map_err(|error| {
            EngineError::NotStarted(format!("cannot listen at {}: {error}", path.display()))
        })?;
        arena_files::remove_stale(arena, worker_name);
        let worker_name = worker_name.to_owned();
        let host = Arc::new(Host { arena: arena.clone(), worker_name, ports, pacing });
        Ok(Self { accepting: tokio::spawn(accept(listener, host)), path: path.to_owned() })
    }
}

/// Binds beside the path and moves the socket there, so that it is never open to others, and a stale
/// socket is replaced at once.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if BlockingUnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another worker listens there"));
    }
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        fs::create_dir_all(directory)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".");
    let beside = PathBuf::from(beside);
    let _ = fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    fs::rename(&beside, path)?;
    Ok(listener)
}

struct Host {
    arena: ArenaConfig,
    worker_name: String,
    ports: mpsc::Sender<KvPort>,
    pacing: Pacing,
}

impl Host {
    fn tell(&self, who: &str, ended: Result<(), ConnectorError>) {
        let worker = &self.worker_name;
        match ended {
            Ok(()) => tracing::info!(worker, "{who} has gone"),
            Err(error) => tracing::error!(worker, %error, "{who}'s connection was closed"),
        }
    }
}

type Visitor = (Hello, UnixStream);

/// The ranks of one life of the engine, as they come. When one of them goes, all have gone.
struct Gathering {
    first: Compatibility,
    come: HashSet<u32>,
    visitors: mpsc::Sender<Visitor>,
    task: AbortOnDrop,
}

impl Gathering {
    fn of(first: &Compatibility, host: Arc<Host>) -> Self {
        let (visitors, coming) = mpsc::channel(1);
        let ranks = first.of_rank(0);
        let task = tokio::spawn(async move {
            let ended = serve(&ranks, coming, &host).await;
            host.tell("the connector", ended);
        });
        let task = AbortOnDrop(Some(task));
        Self { first: first.of_rank(0), come: HashSet::new(), visitors, task }
    }

    /// This rank has come before, or one has gone: whoever comes now is of another life.
    fn is_over(&self, next: &Compatibility) -> bool {
        self.visitors.is_closed() || self.come.contains(&next.tensor_parallel_rank)
    }

    async fn add(&mut self, visitor: Visitor, compatibility: &Compatibility) {
        self.come.insert(compatibility.tensor_parallel_rank);
        // Where the others have just gone, this one's stream is closed, and it comes again.
        let _ = self.visitors.send(visitor).await;
    }
}

async fn accept(listener: UnixListener, host: Arc<Host>) {
    let mut greeting = JoinSet::new();
    let mut scheduler = AbortOnDrop(None);
    let mut engine: Option<Gathering> = None;
    loop {
        let visitor = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    greeting.spawn(greet(stream));
                    continue;
                }
                Err(error) => {
                    // Out of file descriptors, most likely: others may give some back.
                    tracing::warn!(%error, "cannot accept the connector");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(greeted) = greeting.join_next() => greeted,
        };
        let (hello, stream) = match visitor {
            Ok(Ok(Some(visitor))) => visitor,
            Ok(Ok(None)) | Err(_) => continue,
            Ok(Err(error)) => {
                tracing::error!(worker = host.worker_name, %error, "a connection was closed");
                continue;
            }
        };
        let compatibility = match fitting(&hello) {
            Ok(None) => {
                scheduler.end().await;
                let host = host.clone();
                let (read, write) = stream.into_split();
                scheduler.0 = Some(tokio::spawn(async move {
                    let served = scheduler::serve(read, write, &host.pacing).await;
                    host.tell("the scheduler", served.map_err(ConnectorError::from));
                }));
                continue;
            }
            Ok(Some(compatibility)) => compatibility,
            Err(refused) => {
                refuse(stream, refused, &host).await;
                continue;
            }
        };
        // The older port goes before the newer makes its arena.
        if let Some(older) = engine.as_mut().filter(|engine| engine.is_over(&compatibility)) {
            older.task.end().await;
            engine = None;
        }
        let gathering = engine.get_or_insert_with(|| Gathering::of(&compatibility, host.clone()));
        match gathering.first.check_ranks(&compatibility) {
            Ok(()) => gathering.add((hello, stream), &compatibility).await,
            Err(mismatch) => refuse(stream, mismatch.into(), &host).await,
        }
    }
}

/// What a connector says of its engine; nothing where it is a scheduler.
pub(super) fn fitting(hello: &Hello) -> Result<Option<Compatibility>, Refused> {
    let (protocol, compatibility) = match hello {
        Hello::Scheduler { protocol } => (*protocol, None),
        Hello::Connector { protocol, compatibility, .. } => {
            (*protocol, Some(compatibility.as_ref()))
        }
    };
    if protocol != frames::PROTOCOL {
        return Err(Refused::Protocol { theirs: protocol });
    }
    let Some(compatibility) = compatibility else { return Ok(None) };
    for (field, value) in [
        ("block_bytes", compatibility.block_bytes),
        ("block_size_tokens", compatibility.block_size_tokens.into()),
        ("tensor_parallel_size", compatibility.tensor_parallel_size.into()),
        ("layer_groups", compatibility.layer_groups.into()),
    ] {
        if value == 0 {
            return Err(Refused::Zero(field));
        }
    }
    let Compatibility { tensor_parallel_rank: rank, tensor_parallel_size: ranks, .. } =
        *compatibility;
    if rank >= ranks {
        return Err(Refused::NoSuchRank { rank, ranks });
    }
    Ok(Some(compatibility.clone()))
}

async fn refuse(stream: UnixStream, refused: Refused, host: &Host) {
    let (_, mut write) = stream.into_split();
    let answer = Answer::Refused { reason: refused.to_string() };
    let told = tokio::time::timeout(REFUSAL_TIMEOUT, send(&answer, &mut write)).await;
    if told.is_ok_and(|told| told.is_ok()) {
        host.tell("the connector", Err(refused.into()));
    }
}

/// Who has come. Nothing where they went without a word.
async fn greet(mut stream: UnixStream) -> Result<Option<(Hello, UnixStream)>, ConnectorError> {
    let mut buffer = Vec::new();
    let hello = tokio::time::timeout(HELLO_TIMEOUT, frames::read(&mut stream, &mut buffer)).await;
    let hello: Option<Hello> = hello.map_err(|_| ConnectorError::NoHello)??;
    Ok(hello.map(|hello| (hello, stream)))
}

struct AbortOnDrop(Option<JoinHandle<()>>);

impl AbortOnDrop {
    async fn end(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ConnectorError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("writing: {0}")]
    Write(#[from] io::Error),
    #[error("no hello came within {} s", HELLO_TIMEOUT.as_secs())]
    NoHello,
    #[error("the connector was refused: {0}")]
    Refused(#[from] Refused),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("it speaks protocol {theirs}, this worker {}", frames::PROTOCOL)]
    Protocol { theirs: u32 },
    #[error("its {0} is 0")]
    Zero(&'static str),
    #[error("its tensor_parallel_rank is {rank}, of {ranks}")]
    NoSuchRank { rank: u32, ranks: u32 },
    #[error("its ranks are not alike: {0}")]
    Ranks(#[from] CompatibilityMismatch),
    #[error(transparent)]
    TooSmall(#[from] ArenaTooSmall),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("the worker is stopping")]
    Stopping,
}

/// Welcomes each rank as it comes, hands them on as one port when all are there, and carries their
/// messages until one of them is gone.
async fn serve(
    engine: &Compatibility,
    mut coming: mpsc::Receiver<Visitor>,
    host: &Host,
) -> Result<(), ConnectorError> {
    let count = engine.tensor_parallel_size;
    let mut carrying = JoinSet::new();
    let mut ranks: BTreeMap<u32, RankPort> = BTreeMap::new();
    let mut arena: Option<Arena> = None;
    loop {
        let (hello, stream) = tokio::select! {
            Some(visitor) = coming.recv() => visitor,
            Some(ended) = carrying.join_next() => return ended.unwrap_or(Ok(())),
        };
        let Hello::Connector { connector_version, vllm_version, compatibility, .. } = hello else {
            continue;
        };
        let (read, mut write) = stream.into_split();
        let arena = match &arena {
            Some(arena) => arena.clone(),
            None => match new_arena(engine, host).await {
                Ok(made) => arena.insert(made).clone(),
                Err(refused) => {
                    send(&Answer::Refused { reason: refused.to_string() }, &mut write).await?;
                    return Err(refused.into());
                }
            },
        };
        let rank = compatibility.tensor_parallel_rank;
        let (exports, imports) = arena.layout().of_rank(rank, count);
        let answer = Answer::Welcome {
            protocol: frames::PROTOCOL,
            arena: arena.path().to_owned(),
            slot_bytes: arena.layout().slot_bytes,
            first_export_slot: exports.start,
            export_slots: exports.end - exports.start,
            first_import_slot: imports.start,
            import_slots: imports.end - imports.start,
        };
        send(&answer, &mut write).await?;
        tracing::info!(
            worker = host.worker_name,
            connector_version,
            vllm_version,
            rank,
            ranks = count,
            block_bytes = compatibility.block_bytes,
            export_slots = exports.end - exports.start,
            import_slots = imports.end - imports.start,
            "the connector is attached"
        );
        let (port, to_worker, from_worker) = RankPort::pair(QUEUE_MESSAGES);
        carrying.spawn(carry(read, write, to_worker, from_worker));
        ranks.insert(rank, port);
        if ranks.len() == count as usize {
            let ranks = std::mem::take(&mut ranks).into_values().collect();
            let port = KvPort { compatibility: engine.clone(), arena, ranks };
            host.ports.send(port).await.map_err(|_| Refused::Stopping)?;
        }
    }
}

/// An arena for all ranks of an engine.
async fn new_arena(engine: &Compatibility, host: &Host) -> Result<Arena, Refused> {
    let ranks = engine.tensor_parallel_size;
    let layout = arena_files::layout(&host.arena, engine.block_bytes, ranks)?;
    let path = arena_files::fresh_path(&host.arena, &host.worker_name);
    // Touching every page takes a while.
    let created = tokio::task::spawn_blocking(move || Arena::create(&path, layout)).await;
    Ok(created.map_err(|_| Refused::Stopping)??)
}

async fn carry(
    mut read: OwnedReadHalf,
    mut write: OwnedWriteHalf,
    to_worker: mpsc::Sender<FromEngine>,
    mut from_worker: mpsc::Receiver<ToEngine>,
) -> Result<(), ConnectorError> {
    tokio::select! {
        read = upwards(&mut read, &to_worker) => read,
        written = downwards(&mut from_worker, &mut write) => written,
    }
}

async fn send(answer: &Answer, write: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut frame = Vec::new();
    frames::append(answer, &mut frame)?;
    write.write_all(&frame).await
}

async fn upwards(
    read: &mut (impl AsyncRead + Unpin),
    to_worker: &mpsc::Sender<FromEngine>,
) -> Result<(), ConnectorError> {
    let mut buffer = Vec::new();
    while let Some(message) = frames::read(read, &mut buffer).await? {
        if to_worker.send(message).await.is_err() {
            break; // The worker has done with this port.
        }
    }
    Ok(())
}

async fn downwards(
    from_worker: &mut mpsc::Receiver<ToEngine>,
    write: &mut (impl AsyncWrite + Unpin),
) -> Result<(), ConnectorError> {
    let mut messages = Vec::new();
    let mut frame = Vec::new();
    while from_worker.recv_many(&mut messages, 64).await > 0 {
        frame.clear();
        for message in messages.drain(..) {
            frames::append(&message, &mut frame)?;
        }
        write.write_all(&frame).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
