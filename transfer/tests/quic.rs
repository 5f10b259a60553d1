//! The QUIC channel passes what every channel must.
#![allow(clippy::unwrap_used, clippy::expect_used)] // These are tests.

mod relay;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_transfer::{
    Check, Exports, PeerAddress, QuicChannel, QuicConfig, channel_conformance,
    conformance::{self, Detour, Node, Transport},
};

struct Quic {
    check: Check,
}

#[async_trait]
impl Transport for Quic {
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node {
        let check = self.check;
        let config =
            QuicConfig { listen: relay::loopback(), max_mtu_bytes: 6500, stall_timeout, check };
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

channel_conformance!(Quic { check: Check::Crc });

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_pass_under_a_mac() {
    let transport = Quic { check: Check::Blake3 };
    conformance::delivery::blocks_of_any_size_arrive_as_they_were(&transport).await;
    conformance::delivery::hundreds_of_handoffs_share_few_slots(&transport).await;
    conformance::faults::a_block_that_changed_on_its_way_is_corrupt(&transport).await;
}

/// On one thread, so that all of them are there before the first can go.
#[tokio::test]
async fn of_handoffs_that_share_a_link_the_one_that_is_due_first_arrives_first() {
    conformance::delivery::the_first_due_is_the_first_there(&Quic { check: Check::Crc }).await;
}
