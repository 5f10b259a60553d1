//! What every [`Channel`] must do, as tests that take the channel as an argument.
//!
//! A channel's own tests give a [`Transport`] to [`channel_conformance!`], which makes one test of
//! each scenario. Producers are real ledgers, blocks lie in real arenas, and every scenario ends by
//! looking for export slots that were not given back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // They are tests.

pub mod delivery;
pub mod faults;
pub mod giving_up;
pub mod mapped;
pub mod refusals;
mod world;

use std::{fmt, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::channel::{Channel, Exports, PeerAddress};

/// Makes channels of the kind under test.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// A worker's end, with an identity of its own.
    async fn start(&self, exports: Arc<dyn Exports>, stall_timeout: Duration) -> Node;

    /// A detour to a peer that can be cut, after which each side hears nothing more of the other.
    async fn detour(&self, to: &PeerAddress) -> Detour;

    /// What may be under way to a consumer that takes nothing.
    fn max_in_flight_bytes(&self) -> u64;

    /// Whether consumers shall take blocks where they lie, in the producer's arena.
    fn takes_them_there(&self) -> bool {
        false
    }
}

/// One worker's end.
#[derive(Clone)]
pub struct Node {
    pub channel: Arc<dyn Channel>,
    pub address: PeerAddress,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("address", &self.address).finish_non_exhaustive()
    }
}

pub struct Detour {
    pub address: PeerAddress,
    /// Once it has been awaited, nothing gets through.
    pub cut: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl fmt::Debug for Detour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detour").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Makes a test of each scenario, given an expression for the [`Transport`], which may return from the test
/// where there is none to try.
#[macro_export]
macro_rules! channel_conformance {
    ($transport:expr) => {
        $crate::channel_conformance! { @ $transport;
            delivery: [
                blocks_of_any_size_arrive_as_they_were,
                the_longest_block_arrives,
                blocks_pushed_while_the_consumer_waits_arrive,
                blocks_that_the_consumer_has_are_not_sent,
                layer_groups_come_in_their_own_order,
                a_subscription_may_come_before_its_handoff,
                hundreds_of_handoffs_share_few_slots,
                thousands_of_handoffs_at_once,
                workers_that_send_to_each_other_do_not_wait_for_ever,
                a_slow_consumer_bounds_what_is_under_way,
                a_prefill_that_takes_long_is_waited_for,
            ]
            giving_up: [
                a_consumer_may_give_up_at_any_block,
                a_consumer_may_give_up_before_there_is_a_block,
                a_producer_may_give_up_at_any_block,
                a_producer_may_give_up_while_the_consumer_takes_nothing,
                an_expired_handoff_ends_for_both,
                a_consumer_without_room_gives_up,
            ]
            refusals: [
                each_fence_refuses_in_its_own_name,
                a_prompt_that_turns_out_another_is_refused,
                a_handoff_is_taken_once,
                two_epochs_are_never_mixed,
                nobody_but_the_pinned_peer_is_listened_to,
            ]
            faults: [
                a_block_that_changed_on_its_way_is_corrupt,
                blocks_out_of_order_are_not_taken,
                blocks_out_of_order_in_their_layer_group_are_not_taken,
                blocks_of_another_handoff_are_not_taken,
                a_seal_over_other_blocks_is_not_taken,
                a_block_longer_than_a_slot_is_not_read,
                a_dead_producer_is_noticed,
                a_dead_consumer_is_noticed,
                nobody_listens_at_the_address,
            ]
        }
    };
    (@ $transport:expr; $($group:ident: [$($scenario:ident,)*])*) => {
        $(mod $group {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $scenario() {
                    let limit = std::time::Duration::from_secs(120);
                    let transport = $transport;
                    let scenario = $crate::conformance::$group::$scenario(&transport);
                    tokio::time::timeout(limit, scenario).await.expect("the scenario hangs");
                }
            )*
        })*
    };
}
