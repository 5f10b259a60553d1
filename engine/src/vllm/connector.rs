use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream as BlockingUnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use baton_arena::{Arena, ArenaError};
use baton_config::ArenaConfig;
use baton_types::Compatibility;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::{
    arena_files::{self, ArenaTooSmall},
    frames::{self, Answer, FrameError, Hello},
    scheduler,
};
use crate::{EngineError, FromEngine, KvPort, ToEngine, pacing::Pacing};

/// A connector says hello as soon as it has connected.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages on their way to or from the connector.
const QUEUE_MESSAGES: usize = 1024;

/// Listens for our connector and our scheduler inside vLLM. Each connection of the connector is one
/// [`KvPort`]; a newer one of the same kind ends the one before it.
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

async fn accept(listener: UnixListener, host: Arc<Host>) {
    let mut greeting = JoinSet::new();
    let (mut connector, mut scheduler) = (AbortOnDrop(None), AbortOnDrop(None));
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
        let (what, place) = match &hello {
            Hello::Connector { .. } => ("the connector", &mut connector),
            Hello::Scheduler { .. } => ("the scheduler", &mut scheduler),
        };
        // The older port goes before the newer makes its arena.
        place.end().await;
        let host = host.clone();
        place.0 = Some(tokio::spawn(async move {
            let worker = &host.worker_name;
            match serve(hello, stream, &host).await {
                Ok(()) => tracing::info!(worker, "{what} has gone"),
                Err(error) => tracing::error!(worker, %error, "{what}'s connection was closed"),
            }
        }));
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
enum Refused {
    #[error("it speaks protocol {theirs}, this worker {}", frames::PROTOCOL)]
    Protocol { theirs: u32 },
    #[error("its {0} is 0")]
    Zero(&'static str),
    #[error(transparent)]
    TooSmall(#[from] ArenaTooSmall),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("the worker is stopping")]
    Stopping,
}

async fn serve(hello: Hello, stream: UnixStream, host: &Host) -> Result<(), ConnectorError> {
    let (mut read, mut write) = stream.into_split();
    let welcomed = match hello {
        Hello::Scheduler { protocol } => match speaks(protocol) {
            Ok(()) => return Ok(scheduler::serve(read, write, &host.pacing).await?),
            Err(refused) => Err(refused),
        },
        Hello::Connector { protocol, connector_version, vllm_version, compatibility } => {
            match speaks(protocol) {
                Ok(()) => welcome(&connector_version, &vllm_version, compatibility, host).await,
                Err(refused) => Err(refused),
            }
        }
    };
    let (compatibility, arena) = match welcomed {
        Ok(welcomed) => welcomed,
        Err(refused) => {
            send(&Answer::Refused { reason: refused.to_string() }, &mut write).await?;
            return Err(refused.into());
        }
    };
    let layout = arena.layout();
    let answer = Answer::Welcome {
        protocol: frames::PROTOCOL,
        arena: arena.path().to_owned(),
        slot_bytes: layout.slot_bytes,
        export_slots: layout.export_slots,
        import_slots: layout.import_slots,
    };
    send(&answer, &mut write).await?;

    let (to_worker, from_engine) = mpsc::channel(QUEUE_MESSAGES);
    let (to_engine, mut from_worker) = mpsc::channel(QUEUE_MESSAGES);
    let port = KvPort { compatibility, arena, from_engine, to_engine };
    host.ports.send(port).await.map_err(|_| Refused::Stopping)?;
    tokio::select! {
        read = upwards(&mut read, &to_worker) => read,
        written = downwards(&mut from_worker, &mut write) => written,
    }
}

fn speaks(protocol: u32) -> Result<(), Refused> {
    if protocol == frames::PROTOCOL { Ok(()) } else { Err(Refused::Protocol { theirs: protocol }) }
}

async fn welcome(
    connector_version: &str,
    vllm_version: &str,
    compatibility: Compatibility,
    host: &Host,
) -> Result<(Compatibility, Arena), Refused> {
    if compatibility.block_bytes == 0 {
        return Err(Refused::Zero("block_bytes"));
    }
    if compatibility.block_size_tokens == 0 {
        return Err(Refused::Zero("block_size_tokens"));
    }
    let layout = arena_files::layout(&host.arena, compatibility.block_bytes)?;
    let path = arena_files::fresh_path(&host.arena, &host.worker_name);
    // Touching every page takes a while.
    let arena = tokio::task::spawn_blocking(move || Arena::create(&path, layout))
        .await
        .map_err(|_| Refused::Stopping)??;
    tracing::info!(
        worker = host.worker_name,
        connector_version,
        vllm_version,
        block_bytes = compatibility.block_bytes,
        export_slots = layout.export_slots,
        import_slots = layout.import_slots,
        "the connector is attached"
    );
    Ok((compatibility, arena))
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
