//! What was exported arrives.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use baton_types::{Epoch, HandoffId};
use futures::future::join_all;

use super::{
    Transport,
    world::{
        COMPATIBILITY, Consumer, FIRST, NEVER, PROMPT, PROMPT_TOKENS, Producer, Staging, content,
        eventually, soon,
    },
};
use crate::{
    channel::{ExportStream, Exports, Pulled, Refusal, Seal, Subscription},
    lease::{Ending, HandoffError},
    ledger::Ledger,
};

fn seal(prompt_blocks: u32) -> Seal {
    let (prompt_tokens, prompt_digest) = (PROMPT_TOKENS, PROMPT);
    Seal { prompt_blocks, prompt_tokens, prompt_digest, cached_tokens: 17 }
}

pub async fn blocks_of_any_size_arrive_as_they_were(transport: &dyn Transport) {
    const MIB: usize = 1 << 20;
    let producer = Producer::start(transport, Staging::new(12, 16 << 20)).await;
    let consumer = Consumer::start(transport, Staging::new(2, 16 << 20)).await;
    let lens = [1, 2, 1199, 1200, 6500, 65_535, 65_536, MIB - 1, MIB, 3 * MIB + 5, 16 * MIB, 1];

    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    producer.export(id, &lens).await;
    let pulled = consumer.pull(&producer, id, 0).await.unwrap();

    let bytes: usize = lens.iter().sum();
    let transport = pulled.transport;
    assert_eq!(pulled, Pulled { seal: seal(12), blocks: 12, bytes: bytes as u64, transport });
    let named = consumer.node.channel.transports();
    assert!(named.iter().any(|name| name.split(':').next() == Some(transport)), "{named:?}");
    assert_eq!(soon("the acknowledgement", ending).await.unwrap(), Ending::Acked);
    let counters = producer.ledger.counters();
    assert_eq!((counters.blocks_sent, counters.bytes_sent), (12, bytes as u64));
    assert_eq!((counters.handoffs_expected, counters.handoffs_acked), (1, 1));
    producer.holds_nothing().await;
    consumer.holds_nothing().await;
}

pub async fn the_longest_block_arrives(transport: &dyn Transport) {
    const LONGEST: usize = 64 << 20;
    let producer = Producer::start(transport, Staging::new(1, LONGEST as u64)).await;
    let consumer = Consumer::start(transport, Staging::new(1, LONGEST as u64)).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.export(id, &[LONGEST]).await;
    let pulled = consumer.pull(&producer, id, 0).await.unwrap();
    assert_eq!((pulled.blocks, pulled.bytes), (1, LONGEST as u64));
    producer.holds_nothing().await;
}

pub async fn blocks_pushed_while_the_consumer_waits_arrive(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(2, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(1, 4096)).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    // More blocks than slots on either side: each must travel before the next but one is made.
    let (pulled, ()) =
        tokio::join!(consumer.pull(&producer, id, 0), producer.export(id, &[4096; 40]));
    assert_eq!(pulled.unwrap().blocks, 40);
    producer.holds_nothing().await;
}

pub async fn blocks_that_the_consumer_has_are_not_sent(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(8, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(8, 4096)).await;

    let (before, after) = (HandoffId::random(), HandoffId::random());
    producer.expect(before, &consumer);
    producer.export(before, &[4096; 5]).await;
    let pulled = consumer.pull(&producer, before, 3).await.unwrap();
    assert_eq!((pulled.seal, pulled.blocks, pulled.bytes), (seal(5), 2, 2 * 4096));

    producer.expect(after, &consumer);
    let (pulled, ()) =
        tokio::join!(consumer.pull(&producer, after, 5), producer.export(after, &[4096; 5]));
    let pulled = pulled.unwrap();
    assert_eq!((pulled.seal, pulled.blocks, pulled.bytes), (seal(5), 0, 0));
    assert_eq!(producer.ledger.counters().blocks_sent, 2);
    producer.holds_nothing().await;
}

/// Chunk by chunk, and in each chunk one layer group of all blocks after the other.
pub async fn layer_groups_come_in_their_own_order(transport: &dyn Transport) {
    const GROUPS: u32 = 3;
    let producer = Producer::start(transport, Staging::new(2, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(2, 4096)).await;
    producer.ledger.begin_epoch(producer.epoch, COMPATIBILITY, GROUPS);
    let chunks = [0..4_u32, 4..5, 5..12];
    let of_chunk = |blocks: Range<u32>| {
        (0..GROUPS).flat_map(move |group| blocks.clone().map(move |block| block * GROUPS + group))
    };
    for has in [0, 3] {
        let id = HandoffId::random();
        let ending = producer.expect(id, &consumer);
        let mut sink = consumer.sink(id);
        sink.layer_groups = GROUPS;
        let subscription = producer.subscription(id, has * GROUPS);
        let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
        let export = async {
            for index in chunks.clone().into_iter().flat_map(of_chunk) {
                producer.push(id, index, 4096).await;
            }
            let again = producer.ledger.push(id, FIRST, 35, "again".into());
            assert_eq!(again, Err(HandoffError::OutOfOrder { given: 35, expected: 38 }));
            producer.seal(id);
        };
        let (pulled, ()) = tokio::join!(pull, export);
        let pulled = pulled.unwrap();
        assert_eq!((pulled.seal, pulled.blocks), (seal(12 * GROUPS), (12 - has) * GROUPS));
        assert_eq!(soon("the acknowledgement", ending).await.unwrap(), Ending::Acked);
    }
    assert_eq!(producer.ledger.counters().blocks_sent, 12 + 9, "each with all its groups");

    // Of one group there is a block more than of the others.
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    for index in 0..=GROUPS {
        producer.ledger.push(id, FIRST, index, "kv".into()).unwrap();
    }
    let sealed = producer.ledger.seal(id, FIRST, PROMPT_TOKENS, PROMPT, 0);
    assert_eq!(sealed, Err(HandoffError::Uneven));
    producer.ledger.abort(id, FIRST);
    producer.holds_nothing().await;
    consumer.holds_nothing().await;
}

pub async fn a_subscription_may_come_before_its_handoff(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(2, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(2, 4096)).await;
    let id = HandoffId::random();
    let later = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        producer.expect(id, &consumer);
        producer.export(id, &[100, 100]).await;
    };
    let (pulled, ()) = tokio::join!(consumer.pull(&producer, id, 0), later);
    assert_eq!(pulled.unwrap().blocks, 2);
}

pub async fn hundreds_of_handoffs_share_few_slots(transport: &dyn Transport) {
    const HANDOFFS: usize = 300;
    let producer = Producer::start(transport, Staging::new(64, 16 << 10)).await;
    let consumer = Consumer::start(transport, Staging::new(8, 16 << 10)).await;
    let legs = (0..HANDOFFS).map(|n| {
        let (producer, consumer) = (&producer, &consumer);
        async move {
            let id = HandoffId::random();
            let ending = producer.expect(id, consumer);
            let lens: Vec<usize> =
                (0..5).map(|block| 1 + (n * 37 + block * 4099) % 16_384).collect();
            let (pulled, ()) =
                tokio::join!(consumer.pull(producer, id, 0), producer.export(id, &lens));
            let bytes: usize = lens.iter().sum();
            assert_eq!(pulled.unwrap().bytes, bytes as u64);
            assert_eq!(ending.await.unwrap(), Ending::Acked);
        }
    });
    join_all(legs).await;
    assert_eq!(producer.ledger.counters().blocks_sent, 5 * HANDOFFS as u64);
    producer.holds_nothing().await;
    consumer.holds_nothing().await;
}

pub async fn thousands_of_handoffs_at_once(transport: &dyn Transport) {
    const HANDOFFS: u32 = 2500;
    let producer = Producer::start(transport, Staging::new(HANDOFFS, 64)).await;
    let consumer = Consumer::start(transport, Staging::new(4, 64)).await;
    let ids: Vec<_> = (0..HANDOFFS).map(|_| HandoffId::random()).collect();
    for id in &ids {
        producer.expect(*id, &consumer);
        producer.export(*id, &[64]).await;
    }
    assert_eq!(producer.ledger.open_handoffs(), ids.len());
    let pulls = ids.iter().map(|id| consumer.pull(&producer, *id, 0));
    for pulled in join_all(pulls).await {
        assert_eq!(pulled.unwrap().blocks, 1);
    }
    eventually("all are acknowledged", || {
        producer.ledger.counters().handoffs_acked == u64::from(HANDOFFS)
    })
    .await;
    producer.holds_nothing().await;
    assert_eq!(consumer.staging.slots.used(), 0);
}

/// Each is prefill for the other's decodes, with one import slot and fewer export slots than handoffs.
pub async fn workers_that_send_to_each_other_do_not_wait_for_ever(transport: &dyn Transport) {
    const HANDOFFS: usize = 30;
    let mut workers = Vec::new();
    for _ in 0..2 {
        let producer = Producer::start(transport, Staging::new(4, 4096)).await;
        let staging = Staging::new(1, 4096).into();
        let takes_them_there = transport.takes_them_there();
        let consumer = Consumer { node: producer.node.clone(), staging, takes_them_there };
        workers.push((producer, consumer));
    }
    let [(here, to_here), (there, to_there)] = &workers[..] else { panic!("two workers") };
    let ways = [(here, to_there), (there, to_here)];
    let legs = ways.iter().flat_map(|(producer, consumer)| {
        (0..HANDOFFS).map(move |_| async move {
            let id = HandoffId::random();
            let ending = producer.expect(id, consumer);
            let (pulled, ()) =
                tokio::join!(consumer.pull(producer, id, 0), producer.export(id, &[4096; 6]));
            assert_eq!(pulled.unwrap().blocks, 6);
            assert_eq!(ending.await.unwrap(), Ending::Acked);
        })
    });
    join_all(legs).await;
    for (producer, consumer) in ways {
        producer.holds_nothing().await;
        assert_eq!(consumer.staging.slots.used(), 0);
    }
}

/// A ledger that counts who has come.
struct Counting(Ledger, Arc<AtomicUsize>);

#[async_trait]
impl Exports for Counting {
    async fn attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal> {
        let attached = self.0.attach(subscription, peer).await;
        self.1.fetch_add(1, Relaxed);
        attached
    }
}

/// Not of every channel: of those whose handoffs share a link. To be run on one thread.
pub async fn the_first_due_is_the_first_there(transport: &dyn Transport) {
    const BLOCKS: u32 = 16;
    const BLOCK_BYTES: usize = 1 << 20;
    // As they subscribe; which is due first has nothing to do with that.
    let due_in: [u64; 5] = [30, 50, 10, 40, 20];
    let (epoch, attached) = (Epoch::random(), Arc::new(AtomicUsize::new(0)));
    let ledger = Ledger::new(epoch, COMPATIBILITY, NEVER);
    let exports = Counting(ledger.clone(), attached.clone());
    let node = transport.start(Arc::new(exports), NEVER).await;
    let staging = Staging::new(1, BLOCK_BYTES as u64);
    let producer = Producer { ledger, epoch, node, staging };
    let consumer = Consumer::start(transport, Staging::new(4, BLOCK_BYTES as u64)).await;

    let now = Instant::now();
    let handoffs: Vec<_> = due_in.iter().map(|due| (HandoffId::random(), *due)).collect();
    for (id, due) in &handoffs {
        let due = now + Duration::from_secs(*due);
        drop(producer.ledger.expect_by(due, *id, FIRST, consumer.fingerprint()).unwrap());
    }
    let arrived = parking_lot::Mutex::new(Vec::new());
    let pulls = handoffs.iter().map(|(id, due)| {
        let (arrived, producer, consumer) = (&arrived, &producer, &consumer);
        async move {
            consumer.pull(producer, *id, 0).await.unwrap();
            arrived.lock().push(*due);
        }
    });
    let fill = async {
        eventually("all have subscribed", || attached.load(Relaxed) == due_in.len()).await;
        for (id, _) in &handoffs {
            for index in 0..BLOCKS {
                let bytes = content(*id, index, BLOCK_BYTES).into();
                producer.ledger.push(*id, FIRST, index, bytes).unwrap();
            }
            producer.seal(*id);
        }
    };
    tokio::join!(join_all(pulls), fill);
    assert_eq!(*arrived.lock(), [10, 20, 30, 40, 50]);
    consumer.holds_nothing().await;
}

pub async fn a_slow_consumer_bounds_what_is_under_way(transport: &dyn Transport) {
    let block = 1 << 20;
    let bound = transport.max_in_flight_bytes();
    let blocks = u32::try_from(bound / block).unwrap() * 2 + 1;
    let producer = Producer::start(transport, Staging::new(blocks, block)).await;
    let consumer = Consumer::start(transport, Staging::new(2, block)).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.export(id, &vec![1 << 20; blocks as usize]).await;

    let sink = consumer.sink(id);
    let pace = std::sync::Arc::clone(&sink.pace);
    pace.limit(1);
    let subscription = producer.subscription(id, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
    let watch = async {
        pace.reached(1).await;
        let last = producer.sends_no_more().await;
        assert!(last <= bound + 2 * block, "{last} bytes are under way, {bound} are the most");
        assert_eq!(pace.verified(), 1);

        // Others are not held up by it.
        let other = HandoffId::random();
        producer.expect(other, &consumer);
        producer.seal(other);
        soon("another handoff", consumer.pull(&producer, other, 0)).await.unwrap();

        pace.limited.store(false, Relaxed);
        pace.permits.add_permits(1);
    };
    let (pulled, ()) = tokio::join!(pull, watch);
    assert_eq!(pulled.unwrap().blocks, blocks);
    producer.holds_nothing().await;
}

pub async fn a_prefill_that_takes_long_is_waited_for(transport: &dyn Transport) {
    let stall = Duration::from_secs(2);
    let producer = Producer::start_with(transport, Staging::new(2, 4096), stall, NEVER).await;
    let consumer = Consumer::start_with(transport, Staging::new(2, 4096), stall).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    let later = async {
        // Longer than what counts as a stall: the producer lives and says so.
        tokio::time::sleep(2 * stall).await;
        producer.export(id, &[100, 100]).await;
    };
    let (pulled, ()) = tokio::join!(consumer.pull(&producer, id, 0), later);
    assert_eq!(pulled.unwrap().blocks, 2);
    eventually("the handoff is acknowledged", || producer.ledger.counters().handoffs_acked == 1)
        .await;
}
