//! The UCX channel passes what every channel must, over the real library.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)] // Tests.

mod relay;

use std::{env, sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_transfer::{
    Check, Exports, PeerAddress, QuicConfig, UcxChannel, UcxConfig, channel_conformance,
    conformance::{self, Detour, Node, Transport},
};
use baton_ucx::{Options, StartError, Ucx};

struct OverUcx {
    check: Check,
}

/// Where there is UCX. Where there is none that is said, and with BATON_REQUIRE_UCX it is a failure.
fn over_ucx(check: Check) -> Option<OverUcx> {
    match Ucx::start(&Options::default()) {
        Ok(_) => Some(OverUcx { check }),
        Err(StartError::Load(error)) => {
            let demanded = env::var_os("BATON_REQUIRE_UCX").is_some_and(|value| value != "0");
            assert!(!demanded, "BATON_REQUIRE_UCX is set, and {error}");
            eprintln!("SKIPPED, not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[async_trait]
impl Transport for OverUcx {
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node {
        let control = QuicConfig {
            listen: relay::loopback(),
            max_mtu_bytes: 6500,
            stall_timeout,
            check: self.check,
        };
        let config =
            UcxConfig { control, ucx: Options::default(), require_rdma: false, or_quic: false };
        let channel = UcxChannel::bind(config, exports).unwrap();
        let control = channel.control();
        let address = PeerAddress {
            worker_name: format!("worker-{}", control.local_address().port()),
            address: control.local_address().to_string(),
            certificate_fingerprint: control.certificate_fingerprint(),
        };
        Node { channel, address }
    }

    async fn detour(&self, to: &PeerAddress) -> Detour {
        relay::detour(to).await
    }

    /// What lies in the consumer's slots: nothing is sent that has none.
    fn max_in_flight_bytes(&self) -> u64 {
        4 << 20
    }
}

channel_conformance!(match over_ucx(Check::Crc) {
    Some(transport) => transport,
    None => return,
});

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_pass_under_a_mac() {
    let Some(transport) = over_ucx(Check::Blake3) else { return };
    conformance::delivery::blocks_of_any_size_arrive_as_they_were(&transport).await;
    conformance::delivery::hundreds_of_handoffs_share_few_slots(&transport).await;
    conformance::faults::a_block_that_changed_on_its_way_is_corrupt(&transport).await;
}
