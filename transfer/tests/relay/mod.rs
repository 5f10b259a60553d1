//! A detour for datagrams that can be cut.

use std::{net::SocketAddr, sync::Arc};

use baton_transfer::{PeerAddress, conformance::Detour};
use tokio::net::UdpSocket;

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(crate) async fn detour(to: &PeerAddress) -> Detour {
    let (near, far) = (UdpSocket::bind(loopback()).await, UdpSocket::bind(loopback()).await);
    let (near, far) = (Arc::new(near.unwrap()), Arc::new(far.unwrap()));
    far.connect(&to.address).await.unwrap();
    let address = PeerAddress { address: near.local_addr().unwrap().to_string(), ..to.clone() };
    let relay = tokio::spawn(relay(Arc::clone(&near), Arc::clone(&far)));
    let cut = async move {
        relay.abort();
        let _ = relay.await;
        // Still there, but deaf.
        std::mem::forget((near, far));
    };
    Detour { address, cut: Box::pin(cut) }
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
