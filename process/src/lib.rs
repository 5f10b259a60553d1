//! What every process of a cluster does alike: its command line, its log, its runtime, and when it stops.

mod log;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing::info;

pub use crate::log::LogOptions;

/// What a process of a cluster is told beside its file.
#[derive(Clone, Debug, clap::Args)]
pub struct ProcessOptions {
    #[command(flatten)]
    log: LogOptions,
    /// Stops when stdin ends: so a parent's death, however it came, is noticed.
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
}

/// The command line of a coordinator.
#[derive(Clone, Debug, clap::Args)]
pub struct CoordinatorOptions {
    /// The cluster's baton.toml.
    #[arg(long)]
    pub config: PathBuf,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// The command line of a worker.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerOptions {
    /// The cluster's baton.toml.
    #[arg(long)]
    pub config: PathBuf,
    /// Which of the file's workers of this role it is.
    #[arg(long)]
    pub name: String,
    /// HOST:PORT at which other workers reach this one, in place of the file's.
    #[arg(long)]
    pub advertise: Option<String>,
    #[command(flatten)]
    pub process: ProcessOptions,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot listen for {signal}: {error}")]
    Signal { signal: &'static str, error: io::Error },
}

/// When this process is asked to stop.
pub type Stop = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

impl ProcessOptions {
    /// Begins the log, and runs a program that ends when it likes, or soon after it is told to stop. One
    /// thread: a token crosses no others, which costs half of what work stealing would.
    ///
    /// # Errors
    /// The system gives no runtime or no signals; what the program answers is inside.
    pub fn run<P: Future>(&self, program: impl FnOnce(Stop) -> P) -> Result<P::Output, StartError> {
        self.log.begin();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartError::Runtime)?;
        runtime.block_on(async { Ok(program(self.stop()?).await) })
    }

    fn stop(&self) -> Result<Stop, StartError> {
        let listen =
            |kind, name| signal(kind).map_err(|error| StartError::Signal { signal: name, error });
        let mut interrupt = listen(SignalKind::interrupt(), "SIGINT")?;
        let mut terminate = listen(SignalKind::terminate(), "SIGTERM")?;
        let mut hang_up = listen(SignalKind::hangup(), "SIGHUP")?;
        // A service is asked by it to read its files anew; who has a terminal has lost it.
        let is_service = !io::stderr().is_terminal();
        let hung_up = async move {
            while hang_up.recv().await.is_some() && is_service {
                info!(
                    "SIGHUP changes nothing: certificates, keys and tokens are read anew when their \
                     files change, and baton.toml when this is started again"
                );
            }
        };
        let (ended, stdin_ended) = oneshot::channel();
        let watches_stdin = self.stop_with_stdin;
        if watches_stdin {
            // A thread of its own: tokio's stdin would keep the runtime from ending.
            std::thread::spawn(move || {
                let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
                let _ = ended.send(());
            });
        }
        Ok(Box::pin(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                () = hung_up => {}
                _ = stdin_ended, if watches_stdin => {}
            }
        }))
    }
}
