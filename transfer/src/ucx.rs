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

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_arena::Arena;
use baton_ucx::{Options, Region, Resource, StartError, Ucx, UcxError};
use parking_lot::Mutex;

pub(crate) use self::lane::Lane;
use crate::{
    channel::{BlockSink, Channel, Exports, PeerAddress, Pulled, Subscription, TransferError},
    quic::{BindError, QuicChannel, QuicConfig},
};

/// How a worker takes part in handoffs over UCX.
#[derive(Clone, Debug)]
pub struct UcxConfig {
    /// The connections on which handoffs are agreed.
    pub control: QuicConfig,
    pub ucx: Options,
    /// Give handoffs up that UCX would not let a network card write.
    pub require_rdma: bool,
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
}

/// What the two sides share of UCX.
#[derive(Debug)]
pub(crate) struct Data {
    ucx: Ucx,
    require_rdma: bool,
    arenas: Mutex<Vec<OpenArena>>,
    picked: Mutex<BTreeSet<Resource>>,
}

#[derive(Debug)]
struct OpenArena {
    arena: Arena,
    region: Arc<Region>,
}

/// This table's clone, and the one in the registration itself.
const OWN_HOLDERS: usize = 2;

impl UcxChannel {
    /// Loads UCX and starts to listen, in the runtime that it is called in.
    pub fn bind(config: UcxConfig, exports: Arc<dyn Exports>) -> Result<Arc<Self>, UcxBindError> {
        let UcxConfig { control, ucx, require_rdma } = config;
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
        let data = Arc::new(Data { ucx, require_rdma, arenas, picked: Mutex::default() });
        let stall_timeout = control.stall_timeout;
        let control = QuicChannel::bind_beside(control, exports, Some(Arc::clone(&data)))?;
        Ok(Arc::new(Self { control, data, stall_timeout }))
    }

    /// The connections on which handoffs are agreed.
    pub fn control(&self) -> &QuicChannel {
        &self.control
    }

    pub fn ucx(&self) -> &Ucx {
        &self.data.ucx
    }

    /// What UCX has picked so far to write to peers with.
    pub fn picked(&self) -> Vec<Resource> {
        self.data.picked.lock().iter().cloned().collect()
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
        consume::pull(connection, &subscription, sink, &self.data, self.stall_timeout).await
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

    fn transport(&self) -> &'static str {
        "ucx"
    }
}

impl Data {
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
    let names =
        resources.iter().map(|Resource { transport, device }| format!("{transport}/{device}"));
    names.collect::<Vec<_>>().join(" ")
}

fn failed(error: &UcxError) -> TransferError {
    TransferError::BrokeOff(error.to_string())
}
