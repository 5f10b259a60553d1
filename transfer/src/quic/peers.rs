//! One connection to each peer, shared by all handoffs from it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use quinn::{Connection, Endpoint, TransportConfig};
use tokio::time::timeout;

use super::tls::{CERTIFICATE_NAME, Identity, Protocol};
use crate::channel::{PeerAddress, TransferError};

/// For the name's look-up and the handshake together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A dial that is under way, or what came of it. All who want the peer meanwhile share it.
type Dial = Shared<BoxFuture<'static, Result<Connection, TransferError>>>;

#[derive(Debug)]
pub(super) struct Peers {
    dialler: Arc<Dialler>,
    /// By address and fingerprint: a peer that restarted is another peer.
    dials: Mutex<HashMap<(String, [u8; 32]), Dial>>,
}

#[derive(Debug)]
struct Dialler {
    endpoint: Endpoint,
    local: SocketAddr,
    identity: Identity,
    transport: Arc<TransportConfig>,
    spoken: Protocol,
}

impl Peers {
    pub(super) fn new(
        endpoint: Endpoint,
        local: SocketAddr,
        identity: Identity,
        transport: Arc<TransportConfig>,
        spoken: Protocol,
    ) -> Self {
        let dialler = Arc::new(Dialler { endpoint, local, identity, transport, spoken });
        Self { dialler, dials: Mutex::new(HashMap::new()) }
    }

    /// The living connection to this peer, dialled if there is none.
    pub(super) async fn connection(&self, peer: &PeerAddress) -> Result<Connection, TransferError> {
        let dial = {
            let mut dials = self.dials.lock();
            dials.retain(|_, dial| is_of_use(dial));
            let key = (peer.address.clone(), peer.certificate_fingerprint);
            dials.entry(key).or_insert_with(|| self.dial(peer)).clone()
        };
        dial.await
    }

    fn dial(&self, peer: &PeerAddress) -> Dial {
        let (dialler, peer) = (Arc::clone(&self.dialler), peer.clone());
        let dial = async move { dialler.dial(&peer).await }.boxed().shared();
        // Comes to its end even when those who asked for it have gone.
        tokio::spawn(dial.clone());
        dial
    }
}

fn is_of_use(dial: &Dial) -> bool {
    match dial.peek() {
        None => true,
        Some(Ok(connection)) => connection.close_reason().is_none(),
        Some(Err(_)) => false,
    }
}

impl Dialler {
    async fn dial(&self, peer: &PeerAddress) -> Result<Connection, TransferError> {
        let unreachable = |reason: String| TransferError::Unreachable {
            worker: peer.worker_name.clone(),
            address: peer.address.clone(),
            reason,
        };
        let address = timeout(DIAL_TIMEOUT, self.resolve(&peer.address))
            .await
            .map_err(|_| unreachable("its name's look-up took too long".to_owned()))?
            .map_err(unreachable)?;
        let (mut config, mismatch) = self
            .identity
            .client(peer.certificate_fingerprint, self.spoken)
            .map_err(|error| unreachable(error.to_string()))?;
        config.transport_config(Arc::clone(&self.transport));
        let connecting = self
            .endpoint
            .connect_with(config, address, CERTIFICATE_NAME)
            .map_err(|error| unreachable(error.to_string()))?;
        match timeout(DIAL_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            _ if mismatch.load(Relaxed) => {
                Err(TransferError::WrongCertificate { worker: peer.worker_name.clone() })
            }
            Ok(Err(error)) => Err(unreachable(error.to_string())),
            Err(_) => Err(unreachable("it does not answer".to_owned())),
        }
    }

    async fn resolve(&self, address: &str) -> Result<SocketAddr, String> {
        let found = tokio::net::lookup_host(address).await.map_err(|error| error.to_string())?;
        let mut of_our_family = found.filter(|found| found.is_ipv4() == self.local.is_ipv4());
        of_our_family.next().ok_or_else(|| {
            let family = if self.local.is_ipv4() { "IPv4" } else { "IPv6" };
            format!("it has no {family} address, and this worker listens on {}", self.local)
        })
    }
}
