//! One connection to each peer, shared by all handoffs from it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
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

/// A peer that could not be reached is not tried for so long; twice as long after each further try.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LAST_WAIT: Duration = Duration::from_secs(5);

/// For the name's look-up and the handshake together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A dial that is under way, or what came of it. All who want the peer meanwhile share it.
type Dial = Shared<BoxFuture<'static, Result<Connection, TransferError>>>;

#[derive(Debug)]
pub(super) struct Peers {
    dialler: Arc<Dialler>,
    dials: Mutex<HashMap<PeerKey, Dial>>,
    unreached: Arc<Mutex<HashMap<PeerKey, Unreached>>>,
}

/// Address and fingerprint: a peer that restarted is another peer.
type PeerKey = (String, [u8; 32]);

/// A peer that could not be reached, and is left alone for a while: whoever wants it meanwhile hears so at once,
/// and can go elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unreached {
    error: TransferError,
    wait: Duration,
    until: Instant,
}

impl Unreached {
    /// Each failure in a row doubles the wait.
    fn after(before: Option<&Self>, error: TransferError, now: Instant) -> Self {
        let wait = before.map_or(FIRST_WAIT, |before| (2 * before.wait).min(LAST_WAIT));
        Self { error, wait, until: now + wait }
    }

    /// Of no more use than to tell how often it has failed, and after some time not for that.
    fn is_stale(&self, now: Instant) -> bool {
        now >= self.until + LAST_WAIT
    }
}

#[derive(Debug)]
struct Dialler {
    endpoint: Endpoint,
    local: SocketAddr,
    identity: Identity,
    transport: Arc<TransportConfig>,
    spoken: &'static [Protocol],
}

impl Peers {
    pub(super) fn new(
        endpoint: Endpoint,
        local: SocketAddr,
        identity: Identity,
        transport: Arc<TransportConfig>,
        spoken: &'static [Protocol],
    ) -> Self {
        let dialler = Arc::new(Dialler { endpoint, local, identity, transport, spoken });
        Self { dialler, dials: Mutex::default(), unreached: Arc::default() }
    }

    /// The living connection to this peer, dialled if there is none.
    pub(super) async fn connection(&self, peer: &PeerAddress) -> Result<Connection, TransferError> {
        let key = (peer.address.clone(), peer.certificate_fingerprint);
        let dial = {
            let mut dials = self.dials.lock();
            dials.retain(|_, dial| is_of_use(dial));
            if let Some(under_way) = dials.get(&key) {
                under_way.clone()
            } else {
                let now = Instant::now();
                if let Some(unreached) = self.unreached.lock().get(&key)
                    && now < unreached.until
                {
                    return Err(unreached.error.clone());
                }
                dials.entry(key.clone()).or_insert_with(|| self.dial(key, peer)).clone()
            }
        };
        dial.await
    }

    fn dial(&self, key: PeerKey, peer: &PeerAddress) -> Dial {
        let (dialler, peer) = (Arc::clone(&self.dialler), peer.clone());
        let unreached = Arc::clone(&self.unreached);
        let dial = async move {
            let dialled = dialler.dial(&peer).await;
            let (now, mut unreached) = (Instant::now(), unreached.lock());
            unreached.retain(|_, peer| !peer.is_stale(now));
            let before = unreached.remove(&key);
            if let Err(error) = &dialled {
                unreached.insert(key, Unreached::after(before.as_ref(), error.clone(), now));
            }
            dialled
        };
        let dial = dial.boxed().shared();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_their_limit_and_are_forgotten() {
        let error = || TransferError::Cancelled;
        let mut now = Instant::now();
        let mut unreached: Option<Unreached> = None;
        let mut waits = Vec::new();
        for _ in 0..8 {
            let next = Unreached::after(unreached.as_ref(), error(), now);
            assert_eq!(next.until, now + next.wait);
            waits.push(next.wait.as_millis());
            now = next.until;
            assert!(!next.is_stale(now), "it is known until it was tried again");
            unreached = Some(next);
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert!(unreached.is_some_and(|peer| peer.is_stale(now + LAST_WAIT)));
    }
}
