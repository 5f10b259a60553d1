//! Either side may give up at any point: the other hears of it, and nothing is left behind.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use baton_types::HandoffId;

use super::{
    Transport,
    world::{Consumer, FIRST, NEVER, Producer, Staging, soon},
};
use crate::{
    channel::{Refusal, TransferError},
    lease::Ending,
};

const BLOCK: usize = 256 << 10;
const BLOCKS: u32 = 6;

async fn pair(transport: &dyn Transport) -> (Producer, Consumer) {
    let producer = Producer::start(transport, Staging::new(4 * BLOCKS, BLOCK as u64)).await;
    let consumer = Consumer::start(transport, Staging::new(4, BLOCK as u64)).await;
    (producer, consumer)
}

/// A handoff between the same two still works.
async fn another_goes_through(producer: &Producer, consumer: &Consumer) {
    let id = HandoffId::random();
    producer.expect(id, consumer);
    producer.export(id, &[BLOCK; 2]).await;
    soon("another handoff", consumer.pull(producer, id, 0)).await.unwrap();
}

pub async fn a_consumer_may_give_up_at_any_block(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    for blocks in 0..BLOCKS {
        let id = HandoffId::random();
        let ending = producer.expect(id, &consumer);
        for index in 0..BLOCKS {
            producer.push(id, index, BLOCK).await;
        }
        let sink = consumer.sink(id);
        let pace = Arc::clone(&sink.pace);
        pace.limit(blocks as usize);
        let subscription = producer.subscription(id, 0);
        let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
        tokio::select! {
            ended = pull => panic!("it cannot end unsealed: {ended:?}"),
            () = pace.asked(u64::from(blocks) + 1) => {}
        }
        drop(sink);
        let ending = soon("the producer hears of it", ending).await.unwrap();
        assert!(matches!(ending, Ending::Broken(TransferError::BrokeOff(_))), "{ending:?}");
        producer.holds_nothing().await;
        consumer.holds_nothing().await;
    }
    another_goes_through(&producer, &consumer).await;
}

pub async fn a_consumer_may_give_up_before_there_is_a_block(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let (expected, unknown) = (HandoffId::random(), HandoffId::random());
    let mut ending = producer.expect(expected, &consumer);
    for id in [expected, unknown] {
        let pull = consumer.pull(&producer, id, 0);
        let too_short = tokio::time::timeout(Duration::from_millis(500), pull).await;
        assert!(too_short.is_err(), "{too_short:?}");
    }
    let ended = soon("the producer hears of it", &mut ending).await.unwrap();
    assert!(matches!(ended, Ending::Broken(_)), "{ended:?}");
    producer.holds_nothing().await;
    another_goes_through(&producer, &consumer).await;
}

pub async fn a_producer_may_give_up_at_any_block(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let aborted = Err(TransferError::Refused(Refusal::Aborted));

    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    producer.push(id, 0, BLOCK).await;
    producer.ledger.abort(id, FIRST);
    assert_eq!(ending.await.unwrap(), Ending::Aborted);
    producer.holds_nothing().await;
    assert_eq!(soon("a refusal", consumer.pull(&producer, id, 0)).await, aborted);

    for blocks in 0..=BLOCKS {
        let id = HandoffId::random();
        let ending = producer.expect(id, &consumer);
        let sink = consumer.sink(id);
        let pace = Arc::clone(&sink.pace);
        let subscription = producer.subscription(id, 0);
        let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
        let give_up = async {
            for index in 0..blocks {
                producer.push(id, index, BLOCK).await;
            }
            pace.reached(u64::from(blocks)).await;
            producer.ledger.abort(id, FIRST);
        };
        let (pulled, ()) = tokio::join!(soon("the consumer hears of it", pull), give_up);
        assert_eq!(pulled, aborted, "after {blocks} blocks");
        assert_eq!(ending.await.unwrap(), Ending::Aborted);
        producer.holds_nothing().await;
    }
    another_goes_through(&producer, &consumer).await;
}

pub async fn a_producer_may_give_up_while_the_consumer_takes_nothing(transport: &dyn Transport) {
    let block = 1 << 20;
    let blocks = u32::try_from(transport.max_in_flight_bytes() / block).unwrap() * 3 / 2 + 1;
    let blocks = if blocks.is_multiple_of(7) { blocks + 1 } else { blocks };
    let producer = Producer::start(transport, Staging::new(blocks, block)).await;
    let consumer = Consumer::start(transport, Staging::new(2, block)).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.export(id, &vec![1 << 20; blocks as usize]).await;
    let sink = consumer.sink(id);
    let pace = Arc::clone(&sink.pace);
    pace.limit(1);
    let subscription = producer.subscription(id, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
    let give_up = async {
        pace.reached(1).await;
        let sent = producer.sends_no_more().await;
        assert!(sent < u64::from(blocks) * block, "it is not held up: {sent} bytes are sent");
        producer.ledger.abort(id, FIRST);
        // What was under way is let go, too.
        producer.holds_nothing().await;
    };
    let (pulled, ()) = tokio::join!(soon("the consumer hears of it", pull), give_up);
    assert_eq!(pulled, Err(TransferError::Refused(Refusal::Aborted)));
    another_goes_through(&producer, &consumer).await;
}

pub async fn an_expired_handoff_ends_for_both(transport: &dyn Transport) {
    let lease = Duration::from_secs(5);
    let producer =
        Producer::start_with(transport, Staging::new(3, BLOCK as u64), NEVER, lease).await;
    let consumer = Consumer::start(transport, Staging::new(3, BLOCK as u64)).await;
    let (waiting, abandoned) = (HandoffId::random(), HandoffId::random());
    let endings = [producer.expect(waiting, &consumer), producer.expect(abandoned, &consumer)];
    producer.export(abandoned, &[BLOCK; 2]).await;
    producer.push(waiting, 0, BLOCK).await;
    let sink = consumer.sink(waiting);
    let pace = Arc::clone(&sink.pace);
    let subscription = producer.subscription(waiting, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
    let expire = async {
        pace.reached(1).await;
        assert_eq!(producer.ledger.expire(Instant::now()), []);
        assert_eq!(producer.ledger.expire(Instant::now() + lease).len(), 2);
    };
    let (pulled, ()) = tokio::join!(soon("the consumer hears of it", pull), expire);
    assert_eq!(pulled, Err(TransferError::Refused(Refusal::Aborted)));
    for ending in endings {
        assert_eq!(ending.await.unwrap(), Ending::Expired);
    }
    assert_eq!(producer.ledger.counters().handoffs_expired, 2);
    producer.holds_nothing().await;
}

pub async fn a_consumer_without_room_gives_up(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(3, BLOCK as u64)).await;
    let staging = Staging::new(1, BLOCK as u64);
    let consumer = Consumer::start_with(transport, staging, Duration::from_secs(1)).await;
    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    producer.export(id, &[BLOCK; 3]).await;
    let taken = consumer.staging.slots.reserve().await.unwrap();
    let pulled = soon("it gives up", consumer.pull(&producer, id, 0)).await;
    if transport.takes_them_there() {
        // Such blocks need none.
        assert_eq!(pulled.unwrap().blocks, 3);
        return producer.holds_nothing().await;
    }
    assert!(matches!(pulled, Err(TransferError::NoRoom(_))), "{pulled:?}");
    drop(taken);
    let ended = soon("the producer hears of it", ending).await.unwrap();
    assert!(matches!(ended, Ending::Broken(TransferError::BrokeOff(_))), "{ended:?}");
    producer.holds_nothing().await;
}
