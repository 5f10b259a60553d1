//! Memory that changes, peers that lie, peers that die.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use baton_types::{Epoch, HandoffId, HandoffKey};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    Detour, Node, Transport,
    world::{
        COMPATIBILITY, Consumer, FIRST, NEVER, PROMPT, PROMPT_TOKENS, Producer, Staging, content,
        soon,
    },
};
use crate::{
    channel::{
        ExportStream, Exported, Exports, PeerAddress, Pulled, Refusal, Seal, Subscription,
        TransferError,
    },
    lease::Ending,
};

pub async fn a_block_that_changed_on_its_way_is_corrupt(transport: &dyn Transport) {
    let producer = Producer::start(transport, Staging::new(8, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(8, 4096)).await;
    for (index, byte) in [(0, 0_u64), (1, 2048), (2, 4095)] {
        let id = HandoffId::random();
        let ending = producer.expect(id, &consumer);
        let mut slots = Vec::new();
        for block in 0..3 {
            slots.push(producer.push(id, block, 4096).await);
        }
        producer.seal(id);
        let flipped = content(id, index, 4096)[usize::try_from(byte).unwrap()] ^ 0x10;
        producer.staging.arena.write(slots[index as usize], byte, &[flipped]).unwrap();

        let pulled = consumer.pull(&producer, id, 0).await;
        let expected = crc_fast::crc64_nvme(&content(id, index, 4096));
        match pulled {
            Err(TransferError::Corrupt { index: at, expected: sent, found }) => {
                assert_eq!((at, sent), (index, expected));
                assert_ne!(found, expected);
            }
            other => panic!("{other:?}"),
        }
        let ended = soon("the producer hears of it", ending).await.unwrap();
        assert!(matches!(ended, Ending::Broken(TransferError::BrokeOff(_))), "{ended:?}");
        producer.holds_nothing().await;
        consumer.holds_nothing().await;
    }
}

/// Hands out what a script says, right or wrong.
struct Script(parking_lot::Mutex<Vec<Exported>>);

struct ScriptStream(std::vec::IntoIter<Exported>);

#[async_trait]
impl Exports for Script {
    async fn attach(
        &self,
        _subscription: &Subscription,
        _peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal> {
        Ok(Box::new(ScriptStream(std::mem::take(&mut *self.0.lock()).into_iter())))
    }
}

#[async_trait]
impl ExportStream for ScriptStream {
    async fn next(&mut self) -> Exported {
        match self.0.next() {
            Some(item) => item,
            None => std::future::pending().await,
        }
    }

    async fn revoked(&mut self) {
        std::future::pending::<()>().await;
    }

    fn due(&self) -> Instant {
        Instant::now()
    }

    fn sent(&mut self, _bytes: u64) {}

    fn finish(self: Box<Self>, outcome: Result<(), TransferError>) {
        assert!(outcome.is_err(), "a lie was acknowledged");
    }
}

/// What a consumer that wants all blocks from the second on makes of a script.
async fn told(
    transport: &dyn Transport,
    id: HandoffId,
    script: Vec<Exported>,
) -> Result<Pulled, TransferError> {
    told_in_groups(transport, id, script, 1, 1).await
}

/// The same, from another block on and of so many layer groups.
async fn told_in_groups(
    transport: &dyn Transport,
    id: HandoffId,
    script: Vec<Exported>,
    first_block: u32,
    layer_groups: u32,
) -> Result<Pulled, TransferError> {
    let liar = transport.start(Arc::new(Script(parking_lot::Mutex::new(script))), NEVER).await;
    let consumer = Consumer::start(transport, Staging::new(2, 4096)).await;
    let subscription = Subscription {
        handoff: scripted(id),
        consumer_epoch: Epoch::from_u128(2),
        compatibility: COMPATIBILITY,
        first_block,
        prompt_tokens: PROMPT_TOKENS,
        prompt_digest: PROMPT,
    };
    let mut sink = consumer.sink(id);
    sink.layer_groups = layer_groups;
    soon("an error", consumer.node.channel.pull(&liar.address, subscription, &sink)).await
}

/// What a handoff that is told by a script is called.
fn scripted(id: HandoffId) -> HandoffKey {
    HandoffKey { epoch: Epoch::from_u128(1), id, generation: FIRST }
}

fn block(id: HandoffId, index: u32, len: usize) -> Exported {
    let bytes = Bytes::from(content(id, index, len));
    let (handoff, crc) = (scripted(id), crc_fast::crc64_nvme(&bytes));
    Exported::Block { handoff, index, crc, bytes }
}

pub async fn blocks_out_of_order_are_not_taken(transport: &dyn Transport) {
    let id = HandoffId::from_u128(3);
    for indices in [vec![0], vec![2], vec![1, 1], vec![1, 3], vec![1, 0], vec![u32::MAX]] {
        let wrong = *indices.last().unwrap();
        let expected = u32::try_from(indices.len()).unwrap();
        let script = indices.into_iter().map(|index| block(id, index, 64)).collect();
        let pulled = told(transport, id, script).await;
        assert_eq!(pulled, Err(TransferError::UnexpectedBlock { index: wrong, expected }));
    }
}

pub async fn blocks_out_of_order_in_their_layer_group_are_not_taken(transport: &dyn Transport) {
    let id = HandoffId::from_u128(9);
    // Of two groups, from the second block on.
    for (indices, expected) in
        [(vec![2, 5], 3), (vec![2, 4, 4], 6), (vec![3, 0], 2), (vec![3, 5, 6], 2)]
    {
        let wrong = *indices.last().unwrap();
        let script = indices.into_iter().map(|index| block(id, index, 64)).collect();
        let pulled = told_in_groups(transport, id, script, 2, 2).await;
        assert_eq!(pulled, Err(TransferError::UnexpectedBlock { index: wrong, expected }));
    }
    // As many as the seal says, and all of them in order, but not of both groups equally many.
    let (prompt_tokens, prompt_digest) = (PROMPT_TOKENS, PROMPT);
    let seal = Seal { prompt_blocks: 4, prompt_tokens, prompt_digest, cached_tokens: 0 };
    let script = vec![block(id, 2, 64), block(id, 4, 64), Exported::Sealed(seal)];
    let error = told_in_groups(transport, id, script, 2, 2).await.unwrap_err();
    assert_eq!(error.name(), "seal_mismatch");
}

pub async fn blocks_of_another_handoff_are_not_taken(transport: &dyn Transport) {
    let id = HandoffId::from_u128(6);
    let due = scripted(id);
    for (of, name) in [
        (HandoffKey { epoch: Epoch::from_u128(7), ..due }, "cross_epoch"),
        (HandoffKey { id: HandoffId::from_u128(7), ..due }, "cross_handoff"),
        (HandoffKey { generation: FIRST.next(), ..due }, "late"),
    ] {
        // Nothing is wrong with the block itself: the place and the sum of its bytes are right.
        let bytes = Bytes::from(content(id, 1, 64));
        let crc = crc_fast::crc64_nvme(&bytes);
        let foreign = Exported::Block { handoff: of, index: 1, crc, bytes };
        let error = told(transport, id, vec![foreign]).await.unwrap_err();
        assert_eq!(error, TransferError::ForeignBlock { index: 1, of, due });
        assert_eq!(error.name(), name);
    }
}

pub async fn a_seal_over_other_blocks_is_not_taken(transport: &dyn Transport) {
    let id = HandoffId::from_u128(4);
    let (prompt_tokens, prompt_digest) = (PROMPT_TOKENS, PROMPT);
    let right = Seal { prompt_blocks: 3, prompt_tokens, prompt_digest, cached_tokens: 0 };
    let other_prompt = baton_types::PromptDigest([0; 32]);
    let wrong = [
        ("the prompt's blocks", Seal { prompt_blocks: 4, ..right }),
        ("the prompt's blocks", Seal { prompt_blocks: 0, ..right }),
        ("prompt tokens", Seal { prompt_tokens: PROMPT_TOKENS - 1, ..right }),
        ("prompt digest", Seal { prompt_digest: other_prompt, ..right }),
    ];
    for (named, seal) in wrong {
        let script = vec![block(id, 1, 64), block(id, 2, 64), Exported::Sealed(seal)];
        match told(transport, id, script).await {
            Err(TransferError::SealMismatch { field, .. }) => assert_eq!(field, named),
            other => panic!("{other:?}"),
        }
    }
}

pub async fn a_block_longer_than_a_slot_is_not_read(transport: &dyn Transport) {
    let id = HandoffId::from_u128(5);
    let pulled = told(transport, id, vec![block(id, 1, 4097)]).await;
    assert!(matches!(pulled, Err(TransferError::Protocol(_))), "{pulled:?}");
}

/// Two workers with a detour between them, and a handoff on its way: one block has arrived.
async fn cut_in_the_middle(
    transport: &dyn Transport,
) -> (Producer, Consumer, oneshot::Receiver<Ending>, Result<Pulled, TransferError>) {
    let producer = Producer::start(transport, Staging::new(3, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(3, 4096)).await;
    let Detour { address, cut } = transport.detour(&producer.node.address).await;
    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    let sink = consumer.sink(id);
    let pace = Arc::clone(&sink.pace);
    let pull = consumer.node.channel.pull(&address, producer.subscription(id, 0), &sink);
    let kill = async {
        producer.push(id, 0, 4096).await;
        pace.reached(1).await;
        cut.await;
        producer.push(id, 1, 4096).await;
    };
    let (pulled, ()) = tokio::join!(soon("the consumer notices", pull), kill);
    (producer, consumer, ending, pulled)
}

pub async fn a_dead_producer_is_noticed(transport: &dyn Transport) {
    let (producer, consumer, _ending, pulled) = cut_in_the_middle(transport).await;
    assert!(matches!(pulled, Err(TransferError::BrokeOff(_))), "{pulled:?}");
    // Another peer is not concerned, and neither is the same one by another way.
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.seal(id);
    soon("another handoff", consumer.pull(&producer, id, 0)).await.unwrap();
}

pub async fn a_dead_consumer_is_noticed(transport: &dyn Transport) {
    let (producer, _consumer, ending, _pulled) = cut_in_the_middle(transport).await;
    let ended = soon("the producer notices", ending).await.unwrap();
    assert!(matches!(ended, Ending::Broken(TransferError::BrokeOff(_))), "{ended:?}");
    producer.holds_nothing().await;
}

pub async fn nobody_listens_at_the_address(transport: &dyn Transport) {
    let consumer = Consumer::start(transport, Staging::new(1, 4096)).await;
    let Node { channel, address } = {
        let script = Script(parking_lot::Mutex::new(Vec::new()));
        transport.start(Arc::new(script), NEVER).await
    };
    drop(channel);
    let nowhere = [address.clone(), PeerAddress { address: "no address".into(), ..address }];
    for peer in nowhere {
        let handoff =
            HandoffKey { epoch: Epoch::random(), id: HandoffId::random(), generation: FIRST };
        let subscription = Subscription {
            handoff,
            consumer_epoch: Epoch::random(),
            compatibility: COMPATIBILITY,
            first_block: 0,
            prompt_tokens: 1,
            prompt_digest: PROMPT,
        };
        // Many at once are told at once, not one after the other.
        let pulls = (0..20).map(|_| consumer.pull_from(&peer, subscription.clone()));
        let all = futures::future::join_all(pulls);
        let all = tokio::time::timeout(Duration::from_secs(20), all).await.expect("an answer");
        for pulled in all {
            assert!(matches!(pulled, Err(TransferError::Unreachable { .. })), "{pulled:?}");
        }
    }
}
