//! Blocks that are taken where they lie. Not of every channel: of those between workers that share memory, with
//! consumers that take blocks there.

use std::sync::Arc;

use baton_types::HandoffId;
use tokio::task::JoinHandle;

use super::{
    Detour, Transport,
    world::{Consumer, FIRST, Producer, Reading, Staging, eventually, soon},
};
use crate::{
    channel::{PeerAddress, Pulled, Refusal, TransferError},
    lease::Ending,
};

const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 6;

/// Few enough blocks that the producer is not short of slots, and none at the consumer.
async fn pair(transport: &dyn Transport) -> (Producer, Consumer) {
    let producer = Producer::start(transport, Staging::new(4 * 6, BLOCK as u64)).await;
    let consumer = Consumer::start(transport, Staging::new(1, BLOCK as u64)).await;
    (producer, consumer)
}

/// A handoff whose blocks are all being read.
struct BeingRead {
    id: HandoffId,
    reading: Arc<Reading>,
    pull: JoinHandle<Result<Pulled, TransferError>>,
    ending: tokio::sync::oneshot::Receiver<Ending>,
}

async fn being_read(producer: &Producer, consumer: &Consumer, address: &PeerAddress) -> BeingRead {
    let id = HandoffId::random();
    let ending = producer.expect(id, consumer);
    producer.export(id, &[BLOCK; BLOCKS]).await;
    let reading = Arc::<Reading>::default();
    let mut sink = consumer.sink(id);
    sink.reading = Some(reading.clone());
    let (channel, address) = (consumer.node.channel.clone(), address.clone());
    let subscription = producer.subscription(id, 0);
    let pull = tokio::spawn(async move { channel.pull(&address, subscription, &sink).await });
    eventually("all blocks are being read", || reading.lock().len() == BLOCKS).await;
    BeingRead { id, reading, pull, ending }
}

/// Whether every block is still what was verified.
fn is_untouched(reading: &Reading) -> bool {
    let is_right = |block: &crate::MappedBlock, crc32| {
        crc_fast::crc32_iso_hdlc(block.bytes().unwrap()) == crc32
    };
    reading.lock().iter().all(|(block, crc32)| is_right(block, *crc32))
}

pub async fn blocks_stay_until_they_were_read(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let no_slot = consumer.staging.slots.reserve().await.unwrap();
    let address = producer.node.address.clone();
    let BeingRead { reading, pull, ending, .. } = being_read(&producer, &consumer, &address).await;
    assert_eq!(producer.staging.slots.used(), BLOCKS);
    // In whatever order they are let go of, each is free at once.
    for (left, at) in [2, 4, 0, 0].into_iter().enumerate() {
        drop(reading.lock().remove(at));
        let used = BLOCKS - 1 - left;
        eventually("its slot is free", || producer.staging.slots.used() == used).await;
    }
    assert!(is_untouched(&reading));
    assert!(!pull.is_finished() && producer.ledger.open_handoffs() == 1);
    reading.lock().clear();
    let pulled = soon("the end", pull).await.unwrap().unwrap();
    assert_eq!((pulled.blocks, pulled.bytes), (6, (BLOCKS * BLOCK) as u64));
    assert_eq!(soon("the acknowledgement", ending).await.unwrap(), Ending::Acked);
    assert_eq!(producer.ledger.counters().blocks_sent, BLOCKS as u64);
    producer.holds_nothing().await;
    drop(no_slot);
}

/// The producer takes the handoff back, and its engine fills the slots anew.
pub async fn what_is_overwritten_under_its_reader_counts_for_nothing(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let address = producer.node.address.clone();
    let BeingRead { id, reading, pull, ending } = being_read(&producer, &consumer, &address).await;
    producer.ledger.abort(id, FIRST);
    let pulled = soon("the consumer hears of it", pull).await.unwrap();
    assert_eq!(pulled, Err(TransferError::Refused(Refusal::Aborted)));
    assert_eq!(ending.await.unwrap(), Ending::Aborted);
    // Though they are still being read.
    producer.holds_nothing().await;
    let other = HandoffId::random();
    producer.expect(other, &consumer);
    producer.export(other, &[BLOCK; 4 * BLOCKS]).await;
    let touched = |(block, crc32): &(crate::MappedBlock, u32)| {
        crc_fast::crc32_iso_hdlc(block.bytes().unwrap()) != *crc32
    };
    assert!(reading.lock().iter().all(touched), "whoever loads one sees it");
    reading.lock().clear();
    assert_eq!(consumer.pull(&producer, other, 0).await.unwrap().blocks, 4 * 6);
    producer.holds_nothing().await;
}

pub async fn a_producer_that_dies_under_its_reader_is_noticed(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let Detour { address, cut } = transport.detour(&producer.node.address).await;
    let BeingRead { reading, pull, ending, .. } = being_read(&producer, &consumer, &address).await;
    cut.await;
    let pulled = soon("the consumer notices", pull).await.unwrap();
    assert!(matches!(pulled, Err(TransferError::BrokeOff(_))), "{pulled:?}");
    let ended = soon("the producer notices", ending).await.unwrap();
    assert!(matches!(ended, Ending::Broken(_)), "{ended:?}");
    assert!(is_untouched(&reading));
    producer.holds_nothing().await;
}

/// A consumer that has read everything and does not hear that it was kept meanwhile has not got it.
pub async fn what_was_not_kept_was_not_handed_over(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let Detour { address, cut } = transport.detour(&producer.node.address).await;
    let BeingRead { reading, pull, .. } = being_read(&producer, &consumer, &address).await;
    // The consumer's words reach nobody any more, and it cannot know that yet.
    cut.await;
    reading.lock().clear();
    let pulled = soon("the consumer notices", pull).await.unwrap();
    assert!(matches!(pulled, Err(TransferError::BrokeOff(_))), "{pulled:?}");
    producer.holds_nothing().await;
}

pub async fn a_consumer_that_gives_up_while_it_reads_keeps_nothing(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let address = producer.node.address.clone();
    let BeingRead { reading, pull, ending, .. } = being_read(&producer, &consumer, &address).await;
    pull.abort();
    let ended = soon("the producer hears of it", ending).await.unwrap();
    assert!(matches!(ended, Ending::Broken(TransferError::BrokeOff(_))), "{ended:?}");
    producer.holds_nothing().await;
    drop(reading);
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.export(id, &[BLOCK; 2]).await;
    soon("another handoff", consumer.pull(&producer, id, 0)).await.unwrap();
}

/// Half of a producer's slots stay where they are; what lies in the others is copied, as far as there is room.
pub async fn a_producer_short_of_slots_has_them_copied(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(8, BLOCK as u64)).await;
    for room in [4, 2] {
        let consumer = Consumer::start(transport, Staging::new(room, BLOCK as u64)).await;
        let id = HandoffId::random();
        producer.expect(id, &consumer);
        producer.export(id, &[BLOCK; 8]).await;
        let reading = Arc::<Reading>::default();
        let mut sink = consumer.sink(id);
        sink.reading = Some(reading.clone());
        let subscription = producer.subscription(id, 0);
        let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
        let look = async {
            sink.pace.reached(8).await;
            // Blocks that were copied free their slots, though others before them are still read.
            let read = reading.lock().len();
            eventually("the others are free", || producer.staging.slots.used() == read).await;
            reading.lock().clear();
            read
        };
        let (pulled, read) = tokio::join!(pull, look);
        assert_eq!(pulled.unwrap().blocks, 8);
        assert!((4..8).contains(&read), "{read} of 8 were read where they lie");
        assert!(room < 4 || read == 4, "{read}");
        producer.holds_nothing().await;
        consumer.holds_nothing().await;
    }
}

/// An engine that loads nothing for long has its handoff fail.
pub async fn a_reader_that_never_ends_is_given_up(transport: &dyn Transport) {
    let stall = std::time::Duration::from_secs(1);
    let producer = Producer::start(transport, Staging::new(4 * 6, BLOCK as u64)).await;
    let staging = Staging::new(1, BLOCK as u64);
    let consumer = Consumer::start_with(transport, staging, stall).await;
    let address = producer.node.address.clone();
    let BeingRead { reading, pull, .. } = being_read(&producer, &consumer, &address).await;
    let pulled = soon("it is given up", pull).await.unwrap();
    assert_eq!(pulled, Err(TransferError::Stalled { seconds: 1 }));
    producer.holds_nothing().await;
    drop(reading);
}
