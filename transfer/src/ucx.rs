//! The channel over UCX: the producer writes each block into a slot that the consumer granted for it.
//!
//! What is said about blocks goes over the same pinned connections as in [`QuicChannel`], one stream a
//! handoff; see [`wire`]. UCX itself knows no identities and no encryption: the connection decides who
//! is given a key.
//!
//! A granted slot is the consumer's again when the block was verified, or when the producer has ended the
//! stream, which it does only once none of its writes is under way.

mod consume;
mod lane;
pub(crate) mod produce;
mod wire;

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use baton_arena::Arena;
use baton_ucx::{Options, Region, Resource, StartError, Ucx, UcxError};
use parking_lot::Mutex;

pub(crate) use self::lane::Lane;
#[cfg(feature = "fuzzing")]
pub(crate) use self::wire::{fuzz_frames, fuzz_words};
use crate::{
    channel::{BlockSink, Channel, Exports, PeerAddress, Pulled, Subscription, TransferError},
    mac::{Check, MacKey},
    quic::{BindError, QuicChannel, QuicConfig, tls::Protocol},
};

/// The name by which users choose it.
const TRANSPORT: &str = "ucx";

/// How a worker takes part in handoffs over UCX.
#[derive(Clone, Debug)]
pub struct UcxConfig {
    /// The connections on which handoffs are agreed.
    pub control: QuicConfig,
    pub ucx: Options,
    /// Give handoffs up that UCX would not let a network card write.
    pub require_rdma: bool,
    /// With peers that have no UCX, pass blocks by QUIC. Otherwise they are refused in the handshake.
    pub or_quic: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum UcxBindError {
    #[error(transparent)]
    Ucx(#[from] StartError),
    #[error(transparent)]
    Control(#[from] BindError),
    #[error("UCX {version} ({library}) finds no RDMA device here, only {found}")]
    NoRdma { version: String, library: String, found: String },
}

/// Both sides of handoffs over UCX. Dropping it ends every handoff.
#[derive(Debug)]
pub struct UcxChannel {
    control: Arc<QuicChannel>,
    data: Arc<Data>,
    stall_timeout: Duration,
    check: Check,
    /// Connections to peers without UCX, of which a word was said.
    by_quic: Mutex<HashSet<usize>>,
}

/// What the two sides share of UCX.
#[derive(Debug)]
pub(crate) struct Data {
    ucx: Ucx,
    require_rdma: bool,
    or_quic: bool,
    arenas: Mutex<Vec<OpenArena>>,
    picked: Mutex<BTreeSet<Resource>>,
}

#[derive(Debug)]
struct OpenArena {
    arena: Arena,
    region: Arc<Region>,
}

/// Connections of which it is remembered that a word was said.
const MAX_TOLD: usize = 4096;

/// This table's clone, and the one in the registration itself.
const OWN_HOLDERS: usize = 2;

impl UcxChannel {
    /// Loads UCX and starts to listen, in the runtime that it is called in.
    pub fn bind(config: UcxConfig, exports: Arc<dyn Exports>) -> Result<Arc<Self>, UcxBindError> {
        let UcxConfig { control, ucx, require_rdma, or_quic } = config;
        let ucx = Ucx::start(&ucx)?;
        if require_rdma && !ucx.resources().iter().any(Resource::is_rdma) {
            return Err(UcxBindError::NoRdma {
                version: ucx.version().to_owned(),
                library: ucx.library().display().to_string(),
                found: names(ucx.resources()),
            });
        }
        tracing::info!(
            version = ucx.version(),
            library = %ucx.library().display(),
            resources = names(ucx.resources()),
            "UCX is loaded"
        );
        let arenas = Mutex::default();
        let picked = Mutex::default();
        let data = Arc::new(Data { ucx, require_rdma, or_quic, arenas, picked });
        let (stall_timeout, check) = (control.stall_timeout, control.check);
        let control = QuicChannel::bind_beside(control, exports, Some(Arc::clone(&data)))?;
        Ok(Arc::new(Self { control, data, stall_timeout, check, by_quic: Mutex::default() }))
    }

    /// The connections on which handoffs are agreed.
    pub fn control(&self) -> &QuicChannel {
        &self.control
    }

    /// Says once of each connection that it goes without UCX.
    fn warn(&self, peer: &PeerAddress, connection: usize) {
        let mut known = self.by_quic.lock();
        if known.len() >= MAX_TOLD {
            known.clear();
        }
        if known.insert(connection) {
            let worker = &peer.worker_name;
            tracing::warn!(worker, "a peer has no UCX: its blocks come by QUIC");
        }
    }
}

#[async_trait]
impl Channel for UcxChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let connection = self.control.connection(peer).await?;
        if Protocol::of(&connection) != Some(Protocol::Ucx) {
            self.warn(peer, connection.stable_id());
            return self.control.pull_over(connection, &subscription, sink).await;
        }
        let (data, stall) = (&self.data, self.stall_timeout);
        let key = MacKey::for_check(self.check)?;
        consume::pull(connection, &subscription, sink, key, data, stall).await
    }

    /// Registers it now: its first handoff need not wait for that.
    fn use_arena(&self, arena: &Arena) {
        let (data, arena) = (Arc::clone(&self.data), arena.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = data.region(&arena).await {
                    tracing::error!(%error, "the staging arena cannot be opened to peers");
                }
            });
        }
    }

    fn transports(&self) -> Vec<String> {
        let picked = self.data.picked.lock();
        let named = picked.iter().map(|resource| format!("{TRANSPORT}:{}", name(resource)));
        let mut all: Vec<String> = named.collect();
        if all.is_empty() {
            all.push(TRANSPORT.to_owned());
        }
        if self.data.or_quic {
            all.extend(self.control.transports());
        }
        all
    }
}

impl Data {
    /// Whether peers without UCX are refused.
    pub(crate) fn is_alone(&self) -> bool {
        !self.or_quic
    }

    /// The arena, opened to peers. Arenas that nobody uses any more are closed meanwhile.
    async fn region(&self, arena: &Arena) -> Result<Arc<Region>, UcxError> {
        if let Some(region) = self.known_region(arena) {
            return Ok(region);
        }
        let region = Arc::new(self.ucx.register(arena.clone()).await?);
        let mut arenas = self.arenas.lock();
        arenas.retain(|open| open.arena.holders() > OWN_HOLDERS);
        arenas.push(OpenArena { arena: arena.clone(), region: Arc::clone(&region) });
        Ok(region)
    }

    fn known_region(&self, arena: &Arena) -> Option<Arc<Region>> {
        let arenas = self.arenas.lock();
        let known = arenas.iter().find(|open| open.arena.base() == arena.base());
        known.map(|open| Arc::clone(&open.region))
    }
}

fn names(resources: &[Resource]) -> String {
    resources.iter().map(name).collect::<Vec<_>>().join(" ")
}

fn name(Resource { transport, device }: &Resource) -> String {
    format!("{transport}/{device}")
}

fn failed(error: &UcxError) -> TransferError {
    TransferError::BrokeOff(error.to_string())
}
