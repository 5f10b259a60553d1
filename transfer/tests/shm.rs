//! The channel over shared memory passes what every channel must, copying blocks and leaving them where they lie.
#![allow(clippy::unwrap_used, clippy::expect_used)] // These are tests.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_transfer::{
    Exports, PeerAddress, ShmChannel, ShmConfig, channel_conformance,
    conformance::{Detour, Node, Transport},
};
use baton_types::HandoffId;
use tokio::{
    io::copy_bidirectional,
    net::{UnixListener, UnixStream},
};

struct Shm {
    takes_them_there: bool,
}

#[async_trait]
impl Transport for Shm {
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node {
        let (first, second) = (HandoffId::random(), HandoffId::random());
        let fingerprint = [*first.as_bytes(), *second.as_bytes()].concat().try_into().unwrap();
        let config = ShmConfig {
            directory: std::env::temp_dir(),
            certificate_fingerprint: fingerprint,
            stall_timeout,
        };
        let channel = ShmChannel::bind(config, exports).unwrap();
        let address = PeerAddress {
            worker_name: format!("worker-{first}"),
            address: channel.path().to_str().unwrap().to_owned(),
            certificate_fingerprint: fingerprint,
        };
        Node { channel, address }
    }

    /// A relay of what is said. The memory is the producer's as before.
    async fn detour(&self, to: &PeerAddress) -> Detour {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("detour.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let address = PeerAddress { address: path.to_str().unwrap().to_owned(), ..to.clone() };
        let far = to.address.clone();
        let (cut, mut cut_off) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            let _directory = directory;
            loop {
                let mut near = tokio::select! {
                    near = listener.accept() => near.unwrap().0,
                    _ = cut_off.wait_for(|cut| *cut) => break,
                };
                let (far, mut cut_off) = (far.clone(), cut_off.clone());
                tokio::spawn(async move {
                    let mut far = UnixStream::connect(far).await.unwrap();
                    let was_cut = tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => false,
                        cut = cut_off.wait_for(|cut| *cut) => cut.is_ok(),
                    };
                    if was_cut {
                        // Still there, but deaf.
                        std::mem::forget((near, far));
                    }
                });
            }
        });
        let cut = async move {
            cut.send_replace(true);
            cut.closed().await;
        };
        Detour { address, cut: Box::pin(cut) }
    }

    /// Nothing is under way but what lies in the producer's arena.
    fn max_in_flight_bytes(&self) -> u64 {
        4 << 20
    }

    fn takes_them_there(&self) -> bool {
        self.takes_them_there
    }
}

mod copied {
    use super::*;

    channel_conformance!(Shm { takes_them_there: false });
}

mod there {
    use super::*;

    channel_conformance!(Shm { takes_them_there: true });

    channel_conformance! { @ Shm { takes_them_there: true };
        mapped: [
            blocks_stay_until_they_were_read,
            what_is_overwritten_under_its_reader_counts_for_nothing,
            a_producer_that_dies_under_its_reader_is_noticed,
            what_was_not_kept_was_not_handed_over,
            a_consumer_that_gives_up_while_it_reads_keeps_nothing,
            a_producer_short_of_slots_has_them_copied,
            a_reader_that_never_ends_is_given_up,
        ]
    }
}
