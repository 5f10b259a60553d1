//! The QUIC channel passes what every channel must.
#![allow(clippy::unwrap_used, clippy::expect_used)] // These are tests.

mod relay;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_transfer::{
    Exports, PeerAddress, QuicChannel, QuicConfig, channel_conformance,
    conformance::{Detour, Node, Transport},
};

struct Quic;

#[async_trait]
impl Transport for Quic {
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node {
        let config = QuicConfig { listen: relay::loopback(), max_mtu_bytes: 6500, stall_timeout };
        let channel = QuicChannel::bind(config, exports).unwrap();
        let address = PeerAddress {
            worker_name: format!("worker-{}", channel.local_address().port()),
            address: channel.local_address().to_string(),
            certificate_fingerprint: channel.certificate_fingerprint(),
        };
        Node { channel, address }
    }

    async fn detour(&self, to: &PeerAddress) -> Detour {
        relay::detour(to).await
    }

    /// One stream's window at the receiver, and what the sender holds unacknowledged.
    fn max_in_flight_bytes(&self) -> u64 {
        36 << 20
    }
}

channel_conformance!(Quic);
