use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_config::{EngineConfig, WorkerConfig};
use baton_engine::{Engine, EngineDescription, EngineError, KvPort, SimEngine, VllmEngine};
use baton_proto::CoordinatorHere;
use baton_transfer::{Interpose, RankLedgers};
use baton_types::{Compatibility, Epoch};
use futures::{
    FutureExt,
    future::{FusedFuture, join_all},
};
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};

use crate::{
    attach::{self, Coordinator, TlsError, TlsFiles, TlsPem},
    counters::Counters,
    discover,
    handoff::{Handoffs, PortLoop, Transfer},
    health::Health,
    life::{Fenced, KvSide, Life},
    role::RoleKeeper,
    transport::{self, OpenTransport, TransportError},
};

/// A handoff lives this many stall timeouts without anything moving: its consumer's engine may let it
/// queue for a while before it subscribes.
const LEASE_STALLS: u32 = 3;
const EXPIRE_INTERVAL: Duration = Duration::from_millis(500);
/// The engine is asked for its load this often, for all coordinators together.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);
/// An engine whose connector has not come by then is worth a word in the log.
const CONNECTOR_PATIENCE: Duration = Duration::from_secs(10);
/// A job that was sent to a worker which leaves comes within this time.
const LAST_JOBS: Duration = Duration::from_millis(300);
const LEAVE_INTERVAL: Duration = Duration::from_millis(20);
/// A worker that was let go looks this often whether its last handoffs have ended.
const IDLE_INTERVAL: Duration = Duration::from_millis(10);
const FIRST_RESTART_DELAY: Duration = Duration::from_millis(500);
const LAST_RESTART_DELAY: Duration = Duration::from_secs(30);

/// Why a worker does not run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Only of the first start: an engine that served once is started again.
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Transfer(#[from] TransportError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot listen on {address} (health_listen): {source}")]
    Health { address: SocketAddr, source: std::io::Error },
}

/// Runs one worker until `shutdown` is ready: its engine, its handoffs, and its streams to the
/// coordinators. To be run on a current-thread runtime.
///
/// An engine that ends is started again, after a wait that grows, with a new epoch. On shutdown the
/// coordinators are asked for nothing new, and what there is may go on for the configured time; then the
/// streams are closed, which cancels what is left, and the engine is stopped.
pub async fn run(
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    run_through(&(), config, shutdown).await
}

/// The same, attached to the coordinator of this process and to no other.
pub async fn run_here(
    coordinator: CoordinatorHere,
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    Worker::new(config, Some(coordinator), &())?.run(shutdown).await
}

/// The same, with something between the worker and its channel.
pub async fn run_through(
    interpose: &dyn Interpose,
    config: WorkerConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    Worker::new(config, None, interpose)?.run(shutdown).await
}

fn start_engine(config: &WorkerConfig) -> Result<Arc<dyn Engine>, EngineError> {
    Ok(match &config.engine {
        EngineConfig::Sim(sim) => {
            let engine = SimEngine::start(sim, &config.arena, &config.name)
                .map_err(|error| EngineError::NotStarted(error.to_string()))?;
            Arc::new(engine)
        }
        EngineConfig::Vllm(vllm) => Arc::new(VllmEngine::start(vllm, &config.arena, &config.name)?),
    })
}

/// What outlives the engine.
struct Worker {
    config: WorkerConfig,
    /// In place of those of the configuration.
    here: Option<CoordinatorHere>,
    tls: Option<TlsFiles>,
    role: RoleKeeper,
    counters: Arc<Counters>,
    leaving: watch::Sender<bool>,
    /// Absent where Baton does no handoffs.
    transfer: Option<WorkerTransfer>,
}

struct WorkerTransfer {
    transfer: Transfer,
    opened: OpenTransport,
    /// Where other workers are told that this one is.
    address: String,
    expiring: tokio::task::JoinHandle<()>,
}

impl Drop for WorkerTransfer {
    fn drop(&mut self) {
        self.expiring.abort();
    }
}

/// What of one life of the engine's KV side goes on when the worker changes its role.
struct KvSideParts {
    /// The first.
    epoch: Epoch,
    fenced: Option<(Handoffs, Compatibility)>,
}

struct Ended {
    error: EngineError,
    was_ready: bool,
}

impl Worker {
    fn new(
        config: WorkerConfig,
        here: Option<CoordinatorHere>,
        interpose: &dyn Interpose,
    ) -> Result<Self, WorkerError> {
        let tls = config.tls.as_ref().map(TlsPem::open).transpose()?;
        let transfer =
            is_fenced(&config).then(|| WorkerTransfer::bind(&config, interpose)).transpose()?;
        let role = RoleKeeper::new(config.role);
        let leaving = watch::Sender::new(false);
        Ok(Self { config, here, tls, role, counters: Arc::default(), leaving, transfer })
    }

    async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), WorkerError> {
        let _health = Health::serve(&self.config, &self.counters, self.leaving.subscribe())?;
        let ended = self.serve_until(std::pin::pin!(shutdown.fuse())).await;
        self.close().await;
        ended
    }

    async fn serve_until(
        &self,
        mut shutdown: impl FusedFuture<Output = ()> + Unpin,
    ) -> Result<(), WorkerError> {
        let mut delay = FIRST_RESTART_DELAY;
        let mut has_served = false;
        while let Some(Ended { error, was_ready }) = self.serve_once(&mut shutdown).await {
            if was_ready {
                has_served = true;
                delay = FIRST_RESTART_DELAY;
            } else if !has_served {
                return Err(error.into());
            }
            tracing::error!(%error, "the engine does not run; starting it again in {delay:?}");
            tokio::select! {
                () = &mut shutdown => break,
                () = tokio::time::sleep(delay) => {}
            }
            delay = (2 * delay).min(LAST_RESTART_DELAY);
        }
        Ok(())
    }

    /// One engine from its start to its stop. Answers why it ended, unless the worker was told to stop.
    async fn serve_once(&self, shutdown: impl Future<Output = ()>) -> Option<Ended> {
        let engine = match start_engine(&self.config) {
            Ok(engine) => engine,
            Err(error) => return Some(Ended { error, was_ready: false }),
        };
        let served = tokio::select! {
            served = self.serve(&engine) => Some(served),
            () = async { shutdown.await; self.leave().await } => None,
        };
        engine.stop().await;
        // An engine may have ended while the worker was leaving: whoever was told to stop starts no other.
        served.filter(|_| !*self.leaving.borrow())
    }

    /// Serves with one engine until it ends.
    async fn serve(&self, engine: &Arc<dyn Engine>) -> Ended {
        let description = match engine.ready().await {
            Ok(description) => description,
            Err(error) => return Ended { error, was_ready: false },
        };
        tracing::info!(
            engine = description.engine,
            model = description.models.first().map(String::as_str).unwrap_or_default(),
            max_model_tokens = description.max_model_tokens,
            "the engine serves"
        );
        let mut ports = engine.kv_ports();
        let lives = async {
            loop {
                let (side, port_loop) = self.next_kv_side(&mut ports).await;
                let carrying = async {
                    match port_loop {
                        Some(port_loop) => port_loop.run().await,
                        None => std::future::pending().await,
                    }
                };
                let roles = async {
                    let mut epoch = side.epoch;
                    loop {
                        self.live(Arc::new(self.life(engine, &description, &side, epoch))).await;
                        epoch = Epoch::random();
                        if let Some((handoffs, _)) = &side.fenced {
                            handoffs.begin_epoch(epoch);
                        }
                    }
                };
                tokio::select! {
                    // For ever.
                    () = roles => {}
                    () = carrying => tracing::warn!("the engine's KV side is gone"),
                }
            }
        };
        tokio::select! {
            error = engine.ended() => Ended { error, was_ready: true },
            () = lives => Ended {
                error: EngineError::Ended("it has no further life".to_owned()),
                was_ready: true,
            },
        }
    }

    /// Waits for the engine's KV side where it has one.
    async fn next_kv_side(
        &self,
        ports: &mut Option<mpsc::Receiver<KvPort>>,
    ) -> (KvSideParts, Option<PortLoop>) {
        let epoch = Epoch::random();
        let (Some(transfer), Some(ports)) = (&self.transfer, ports) else {
            return (KvSideParts { epoch, fenced: None }, None);
        };
        let port = next_port(ports).await;
        let compatibility = port.compatibility.clone();
        let (handoffs, carrying) =
            Handoffs::of_port(port, epoch, transfer.transfer.clone(), self.counters.clone());
        (KvSideParts { epoch, fenced: Some((handoffs, compatibility)) }, Some(carrying))
    }

    fn life(
        &self,
        engine: &Arc<dyn Engine>,
        description: &EngineDescription,
        side: &KvSideParts,
        epoch: Epoch,
    ) -> Life {
        let kv = match (&self.transfer, &side.fenced) {
            (Some(transfer), Some((handoffs, compatibility))) => KvSide::Fenced(Box::new(Fenced {
                handoffs: handoffs.clone(),
                ledgers: transfer.transfer.ledgers.clone(),
                compatibility: compatibility.clone(),
                address: transfer.address.clone(),
                certificate_fingerprint: transfer.opened.certificate_fingerprint,
                channel: transfer.transfer.channel.clone(),
            })),
            _ if engine_hands_over(&self.config) => KvSide::Engine,
            _ => KvSide::None,
        };
        Life {
            engine: engine.clone(),
            epoch,
            kv,
            name: self.config.name.clone(),
            role: self.role.clone(),
            description: description.clone(),
            counters: self.counters.clone(),
            load: parking_lot::Mutex::default(),
            leaving: self.leaving.subscribe(),
            born: std::time::Instant::now(),
        }
    }

    /// Attached to every coordinator until the worker takes another role.
    async fn live(&self, life: Arc<Life>) {
        let _lives = self.counters.lives.one();
        let attached = self.keep_attached_to_all(&life);
        tokio::select! {
            // Both for ever.
            () = attached => {}
            () = watch_load(&life) => {}
            () = attach::follow(self.tls.as_ref()) => {}
            () = takes_another_role(&life) => {
                tracing::info!(role = %life.role.role(), "has another role");
            }
        }
    }

    async fn keep_attached_to_all(&self, life: &Arc<Life>) {
        if let Some(here) = &self.here {
            let coordinator = Coordinator::Here(here.clone());
            attach::keep_attached(life.clone(), &coordinator, None, || true).await;
            return;
        }
        let coordinators = self.config.coordinators.iter();
        join_all(coordinators.map(|address| self.keep_attached(life.clone(), address))).await;
    }

    async fn keep_attached(&self, life: Arc<Life>, coordinator: &str) {
        let tls = self.tls.as_ref();
        if self.config.every_address {
            discover::keep_attached_to_all(life, coordinator, tls).await;
        } else {
            let coordinator = Coordinator::At { address: coordinator.to_owned(), name: None };
            attach::keep_attached(life, &coordinator, tls, || true).await;
        }
    }

    /// Takes nothing new, and waits for what there is.
    async fn leave(&self) {
        self.leaving.send_replace(true);
        let open = || self.counters.jobs_open.get();
        tracing::info!(jobs_open = open(), "told to stop; finishing what there is");
        let finished = async {
            let mut idle_since = Instant::now();
            // What a coordinator sent before it heard of it still comes.
            while open() > 0 || idle_since.elapsed() < LAST_JOBS {
                if open() > 0 {
                    idle_since = Instant::now();
                }
                tokio::time::sleep(LEAVE_INTERVAL).await;
            }
        };
        if tokio::time::timeout(self.config.drain_timeout, finished).await.is_err() {
            tracing::warn!(jobs_open = open(), "not all was finished in time");
        }
    }

    async fn close(&self) {
        if let Some(transfer) = &self.transfer {
            transfer.opened.close().await;
        }
    }
}

impl WorkerTransfer {
    fn bind(config: &WorkerConfig, interpose: &dyn Interpose) -> Result<Self, TransportError> {
        let stall_timeout = config.transfer.stall_timeout;
        // The first port brings the first epoch; until then nothing is there to be pulled.
        let ledgers = RankLedgers::new(LEASE_STALLS * stall_timeout);
        let exports = interpose.exports(Arc::new(ledgers.clone()));
        let opened = transport::open(&config.transfer, &config.arena.directory, &exports)?;
        let address = config.transfer.advertise.clone().unwrap_or(opened.address.clone());
        let expiring = tokio::spawn(expire(ledgers.clone()));
        let transfer =
            Transfer { ledgers, channel: interpose.channel(opened.channel.clone()), stall_timeout };
        Ok(Self { transfer, opened, address, expiring })
    }
}

fn is_fenced(config: &WorkerConfig) -> bool {
    match &config.engine {
        EngineConfig::Sim(_) => true,
        EngineConfig::Vllm(vllm) => vllm.connector_socket.is_some(),
    }
}

fn engine_hands_over(config: &WorkerConfig) -> bool {
    matches!(&config.engine, EngineConfig::Vllm(vllm) if vllm.engine_handoff)
}

/// Waits until the worker was told to change its role and nothing is left to do in the old one.
async fn takes_another_role(life: &Life) {
    loop {
        life.role.released().await;
        if life.is_idle() && life.role.take() {
            return;
        }
        // What the coordinators know to be over ends here within moments.
        tokio::time::sleep(IDLE_INTERVAL).await;
    }
}

/// The engine's next KV side. Never returns where none will come: then the engine has ended, which is
/// told elsewhere.
async fn next_port(ports: &mut mpsc::Receiver<KvPort>) -> KvPort {
    loop {
        match tokio::time::timeout(CONNECTOR_PATIENCE, ports.recv()).await {
            Ok(Some(port)) => return port,
            Ok(None) => std::future::pending().await,
            Err(_) => tracing::warn!(
                "the engine serves, but its connector has not come to the socket: not attached"
            ),
        }
    }
}

async fn watch_load(life: &Life) {
    let mut interval = tokio::time::interval(LOAD_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        match life.engine.load().await {
            Ok(load) => *life.load.lock() = load,
            Err(error) => tracing::debug!(%error, "the engine does not tell its load"),
        }
    }
}

async fn expire(ledgers: RankLedgers) {
    let mut interval = tokio::time::interval(EXPIRE_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        for (handoff, generation) in ledgers.expire(std::time::Instant::now()) {
            tracing::warn!(%handoff, %generation, "nobody took a handoff over: its lease ran out");
        }
    }
}
