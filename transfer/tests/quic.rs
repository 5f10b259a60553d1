//! The QUIC channel passes what every channel must.
#![allow(clippy::unwrap_used, clippy::expect_used)] // These are tests.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_transfer::{
    Exports, PeerAddress, QuicChannel, QuicConfig, channel_conformance,
    conformance::{Detour, Node, Transport},
};
use tokio::net::UdpSocket;

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

struct Quic;

#[async_trait]
impl Transport for Quic {
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node {
        let config = QuicConfig { listen: loopback(), max_mtu_bytes: 6500, stall_timeout };
        let channel = QuicChannel::bind(config, exports).unwrap();
        let address = PeerAddress {
            worker_name: format!("worker-{}", channel.local_address().port()),
            address: channel.local_address().to_string(),
            certificate_fingerprint: channel.certificate_fingerprint(),
        };
        Node { channel, address }
    }

    /// A relay of datagrams.
    async fn detour(&self, to: &PeerAddress) -> Detour {
        let (near, far) = (UdpSocket::bind(loopback()).await, UdpSocket::bind(loopback()).await);
        let (near, far) = (Arc::new(near.unwrap()), Arc::new(far.unwrap()));
        far.connect(&to.address).await.unwrap();
        let address = PeerAddress { address: near.local_addr().unwrap().to_string(), ..to.clone() };
        let relay = tokio::spawn(relay(Arc::clone(&near), Arc::clone(&far)));
        let cut = move || {
            relay.abort();
            // Still there, but deaf.
            std::mem::forget((near, far));
        };
        Detour { address, cut: Box::new(cut) }
    }

    /// One stream's window at the receiver, and what the sender holds unacknowledged.
    fn max_in_flight_bytes(&self) -> u64 {
        36 << 20
    }
}

async fn relay(near: Arc<UdpSocket>, far: Arc<UdpSocket>) {
    let (mut there, mut back) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut consumer = None;
    loop {
        tokio::select! {
            Ok((len, from)) = near.recv_from(&mut there) => {
                consumer = Some(from);
                let _ = far.send(&there[..len]).await;
            }
            Ok(len) = far.recv(&mut back) => if let Some(consumer) = consumer {
                let _ = near.send_to(&back[..len], consumer).await;
            },
        }
    }
}

channel_conformance!(Quic);
