//! The channel over QUIC: one UDP socket for both directions, one connection to each peer, one
//! bidirectional stream for each handoff.

pub(crate) mod code;
pub(crate) mod consume;
mod peers;
pub(crate) mod produce;
pub(crate) mod tls;
mod tuning;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use quinn::{Connection, Endpoint, Incoming, VarInt};
use rustls::pki_types::CertificateDer;

use self::{
    peers::Peers,
    tls::{Identity, Protocol},
};
use crate::{
    channel::{BlockSink, Channel, Exports, PeerAddress, Pulled, Subscription, TransferError},
    mac::{Check, MacKey},
    turns::Turns,
    ucx,
};

/// The name by which users choose it.
const TRANSPORT: &str = "quic";

/// Far more peers than one worker hands over to; what comes beyond is refused unread.
const MAX_CONNECTIONS: usize = 4096;

/// How a worker takes part in handoffs over QUIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuicConfig {
    /// Where other workers connect (UDP); port 0 takes any.
    pub listen: SocketAddr,
    /// Largest UDP payload to try for; the path's own limit is discovered. Taken into 1,200 to
    /// 6,500.
    pub max_mtu_bytes: u16,
    /// A handoff that moves nothing for this long is given up.
    pub stall_timeout: Duration,
    /// What this worker wants its blocks to be held against.
    pub check: Check,
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("cannot listen for handoffs on {listen} (UDP): {source}")]
    Socket { listen: SocketAddr, source: io::Error },
    #[error("cannot make a certificate for handoffs: {0}")]
    Certificate(String),
    #[error("no tokio runtime to listen for handoffs in")]
    NoRuntime,
}

/// Both sides of handoffs over one UDP socket. Dropping it ends every handoff.
#[derive(Debug)]
pub struct QuicChannel {
    endpoint: Endpoint,
    local: SocketAddr,
    fingerprint: [u8; 32],
    peers: Peers,
    stall_timeout: Duration,
    check: Check,
}

impl QuicChannel {
    /// Starts to listen, in the runtime that it is called in.
    pub fn bind(config: QuicConfig, exports: Arc<dyn Exports>) -> Result<Arc<Self>, BindError> {
        Self::bind_beside(config, exports, None)
    }

    /// With UCX, peers that have it, too, are spoken to by it; others are, or are refused, as `ucx` says.
    pub(crate) fn bind_beside(
        config: QuicConfig,
        exports: Arc<dyn Exports>,
        ucx: Option<Arc<ucx::Data>>,
    ) -> Result<Arc<Self>, BindError> {
        let QuicConfig { listen, max_mtu_bytes, stall_timeout, check } = config;
        let refused = |source| BindError::Socket { listen, source };
        let runtime = quinn::default_runtime().ok_or(BindError::NoRuntime)?;
        let identity = Identity::fresh()?;
        let spoken: &'static [Protocol] = match &ucx {
            None => &[Protocol::Blocks],
            Some(ucx) if ucx.is_alone() => &[Protocol::Ucx],
            Some(_) => &[Protocol::Ucx, Protocol::Blocks],
        };
        let mut server = identity.server(spoken)?;
        server.transport_config(tuning::transport(max_mtu_bytes, false)).migration(false);
        let socket = tuning::socket(listen).map_err(refused)?;
        let endpoint =
            Endpoint::new(tuning::endpoint(max_mtu_bytes), Some(server), socket, runtime)
                .map_err(refused)?;
        let local = endpoint.local_addr().map_err(refused)?;
        tokio::spawn(listen_for_consumers(endpoint.clone(), exports, ucx, stall_timeout));
        Ok(Arc::new(Self {
            fingerprint: identity.fingerprint(),
            peers: Peers::new(
                endpoint.clone(),
                local,
                identity,
                tuning::transport(max_mtu_bytes, true),
                spoken,
            ),
            endpoint,
            local,
            stall_timeout,
            check,
        }))
    }

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.local
    }

    /// SHA-256 of the certificate that it presents to both sides.
    pub fn certificate_fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Ends every handoff and waits until the peers were told.
    pub async fn close(&self) {
        self.say_goodbye();
        self.endpoint.wait_idle().await;
    }

    pub(crate) async fn connection(&self, peer: &PeerAddress) -> Result<Connection, TransferError> {
        self.peers.connection(peer).await
    }

    /// Blocks on the handoff's own stream.
    pub(crate) async fn pull_over(
        &self,
        connection: Connection,
        subscription: &Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let key = MacKey::for_check(self.check)?;
        consume::pull(connection, subscription, sink, key, self.stall_timeout).await
    }

    fn say_goodbye(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"the worker ends");
    }
}

impl Drop for QuicChannel {
    fn drop(&mut self) {
        self.say_goodbye();
    }
}

#[async_trait]
impl Channel for QuicChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let connection = self.peers.connection(peer).await?;
        self.pull_over(connection, &subscription, sink).await
    }

    fn transports(&self) -> Vec<String> {
        vec![TRANSPORT.to_owned()]
    }
}

async fn listen_for_consumers(
    endpoint: Endpoint,
    exports: Arc<dyn Exports>,
    ucx: Option<Arc<ucx::Data>>,
    stall: Duration,
) {
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() >= MAX_CONNECTIONS {
            incoming.refuse();
            continue;
        }
        tokio::spawn(meet(incoming, Arc::clone(&exports), ucx.clone(), stall));
    }
}

/// Serves one peer's handoffs until its connection ends.
async fn meet(
    incoming: Incoming,
    exports: Arc<dyn Exports>,
    ucx: Option<Arc<ucx::Data>>,
    stall: Duration,
) {
    let from = incoming.remote_address();
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(%from, %error, "a peer's handshake failed");
            return;
        }
    };
    let Some(peer) = presented_fingerprint(&connection) else {
        tracing::debug!(%from, "a peer presented no certificate");
        return;
    };
    let lane = match (Protocol::of(&connection), ucx) {
        (Some(Protocol::Ucx), Some(ucx)) => Some(Arc::new(ucx::Lane::new(ucx))),
        _ => None,
    };
    let turns = Arc::new(Turns::default());
    loop {
        match connection.accept_bi().await {
            Ok(stream) => {
                let exports = Arc::clone(&exports);
                match &lane {
                    None => {
                        let turns = Arc::clone(&turns);
                        tokio::spawn(produce::serve(stream, peer, exports, turns, stall))
                    }
                    Some(lane) => {
                        let lane = Arc::clone(lane);
                        tokio::spawn(ucx::produce::serve(stream, peer, exports, lane, stall))
                    }
                };
            }
            Err(error) => {
                tracing::debug!(%from, %error, "a peer's connection ended");
                return;
            }
        }
    }
}

fn presented_fingerprint(connection: &Connection) -> Option<[u8; 32]> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast_ref::<Vec<CertificateDer<'static>>>()?;
    chain.first().map(tls::fingerprint)
}

pub(crate) fn stalled(after: Duration) -> TransferError {
    TransferError::Stalled { seconds: u32::try_from(after.as_secs()).unwrap_or(u32::MAX) }
}
