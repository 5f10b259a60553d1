//! The fences: what is not meant for each other does not meet.

use baton_types::{Epoch, Generation, HandoffId, PromptDigest};

use super::{
    Transport,
    world::{COMPATIBILITY, Consumer, FIRST, PROMPT, PROMPT_TOKENS, Producer, Staging, soon},
};
use crate::{
    channel::{Refusal, Subscription, TransferError},
    lease::{Ending, HandoffError},
};

type Change = fn(&mut Subscription);

async fn pair(transport: &dyn Transport) -> (Producer, Consumer) {
    let producer = Producer::start(transport, Staging::new(8, 4096)).await;
    let consumer = Consumer::start(transport, Staging::new(8, 4096)).await;
    (producer, consumer)
}

pub async fn each_fence_refuses_in_its_own_name(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let stranger = Consumer::start(transport, Staging::new(1, 4096)).await;
    let id = HandoffId::random();
    let generation = Generation(3);
    producer.ledger.expect(id, generation, consumer.fingerprint()).unwrap();
    producer.ledger.push(id, generation, 0, "kv".into()).unwrap();
    producer.ledger.seal(id, generation, PROMPT_TOKENS, PROMPT, 0).unwrap();
    let mut right = producer.subscription(id, 0);
    right.handoff.generation = generation;

    let changes: [(Refusal, Change); 9] = [
        (Refusal::WrongEpoch, |s| s.handoff.epoch = Epoch::from_u128(1)),
        (Refusal::WrongGeneration, |s| s.handoff.generation = Generation(2)),
        (Refusal::WrongGeneration, |s| s.handoff.generation = Generation(4)),
        (Refusal::Incompatible, |s| s.compatibility[31] ^= 1),
        (Refusal::WrongPrompt, |s| s.prompt_tokens += 1),
        (Refusal::WrongPrompt, |s| s.prompt_digest = PromptDigest([1; 32])),
        (Refusal::WrongPrompt, |s| s.first_block = 2),
        (Refusal::UnknownHandoff, |s| s.handoff.id = HandoffId::from_u128(1)),
        (Refusal::UnknownHandoff, |s| s.handoff.id = HandoffId::from_u128(u128::MAX)),
    ];
    for (refusal, change) in changes {
        let mut wrong = right.clone();
        change(&mut wrong);
        let pulled = soon("a refusal", consumer.pull_from(&producer.node.address, wrong)).await;
        assert_eq!(pulled, Err(TransferError::Refused(refusal)));
    }
    let pulled = stranger.pull_from(&producer.node.address, right.clone()).await;
    assert_eq!(pulled, Err(TransferError::Refused(Refusal::WrongPeer)));

    let counters = producer.ledger.counters();
    for refusal in Refusal::ALL {
        let times = match refusal {
            Refusal::WrongPeer | Refusal::WrongEpoch | Refusal::Incompatible => 1,
            Refusal::WrongGeneration | Refusal::UnknownHandoff => 2,
            Refusal::WrongPrompt => 3,
            Refusal::AlreadyTaken | Refusal::Aborted => 0,
        };
        assert_eq!(counters.refused(refusal), times, "{refusal}");
    }
    assert_eq!(counters.blocks_sent, 0);
}

pub async fn a_prompt_that_turns_out_another_is_refused(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    let sink = consumer.sink(id);
    let pace = std::sync::Arc::clone(&sink.pace);
    let subscription = producer.subscription(id, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
    let export = async {
        producer.push(id, 0, 4096).await;
        pace.reached(1).await;
        producer.push(id, 1, 4096).await;
        let sealed = producer.ledger.seal(id, FIRST, PROMPT_TOKENS, PromptDigest([7; 32]), 0);
        assert_eq!(sealed, Err(HandoffError::WrongPrompt));
    };
    let (pulled, ()) = tokio::join!(pull, export);
    let refused = TransferError::Refused(Refusal::WrongPrompt);
    assert_eq!(pulled, Err(refused.clone()));
    assert_eq!(soon("its end", ending).await.unwrap(), Ending::Broken(refused));
    assert_eq!(producer.ledger.counters().refused(Refusal::WrongPrompt), 1);
    producer.holds_nothing().await;
}

pub async fn a_handoff_is_taken_once(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    let sink = consumer.sink(id);
    let pace = std::sync::Arc::clone(&sink.pace);
    let subscription = producer.subscription(id, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, subscription, &sink);
    let again = async {
        producer.push(id, 0, 4096).await;
        pace.reached(1).await;
        let second = consumer.pull(&producer, id, 0).await;
        assert_eq!(second, Err(TransferError::Refused(Refusal::AlreadyTaken)));
        producer.seal(id);
    };
    let (pulled, ()) = tokio::join!(pull, again);
    assert_eq!(pulled.unwrap().blocks, 1);
    assert_eq!(soon("its end", ending).await.unwrap(), Ending::Acked);
    let late = consumer.pull(&producer, id, 0).await;
    assert_eq!(late, Err(TransferError::Refused(Refusal::AlreadyTaken)));

    // Nor can its name be used again, but by the next attempt.
    let fingerprint = consumer.fingerprint();
    let same = producer.ledger.expect(id, FIRST, fingerprint);
    assert!(matches!(same, Err(HandoffError::Stale { .. })));
    producer.ledger.expect(id, FIRST.next(), fingerprint).unwrap();
    let pushed = producer.ledger.push(id, FIRST, 0, "stale".into());
    assert_eq!(pushed, Err(HandoffError::Stale { given: FIRST, known: FIRST.next() }));
}

pub async fn two_epochs_are_never_mixed(transport: &dyn Transport) {
    let (mut producer, consumer) = pair(transport).await;
    let id = HandoffId::random();
    let ending = producer.expect(id, &consumer);
    producer.push(id, 0, 4096).await;
    let sink = consumer.sink(id);
    let pace = std::sync::Arc::clone(&sink.pace);
    let old = producer.subscription(id, 0);
    let pull = consumer.node.channel.pull(&producer.node.address, old.clone(), &sink);
    let (next, next_compatibility) = (Epoch::random(), COMPATIBILITY);
    let restart = async {
        pace.reached(1).await;
        producer.ledger.begin_epoch(next, next_compatibility, 1);
        // The same name, and what would be the next blocks, of another life.
        producer.expect(id, &consumer);
        producer.ledger.push(id, FIRST, 0, "other".into()).unwrap();
        producer.push(id, 1, 4096).await;
        producer.seal(id);
    };
    let (pulled, ()) = tokio::join!(pull, restart);
    assert_eq!(pulled, Err(TransferError::Refused(Refusal::Aborted)));
    assert_eq!(ending.await.unwrap(), Ending::Aborted);

    let late = consumer.pull_from(&producer.node.address, old).await;
    assert_eq!(late, Err(TransferError::Refused(Refusal::WrongEpoch)));
    producer.epoch = next;
    assert_eq!(consumer.pull(&producer, id, 1).await.unwrap().blocks, 1);
    producer.holds_nothing().await;
}

pub async fn nobody_but_the_pinned_peer_is_listened_to(transport: &dyn Transport) {
    let (producer, consumer) = pair(transport).await;
    let id = HandoffId::random();
    producer.expect(id, &consumer);
    producer.export(id, &[4096]).await;
    let mut impostor = producer.node.address.clone();
    impostor.certificate_fingerprint[0] ^= 1;
    for _ in 0..2 {
        let pulled = consumer.pull_from(&impostor, producer.subscription(id, 0)).await;
        let worker = impostor.worker_name.clone();
        assert_eq!(pulled, Err(TransferError::WrongCertificate { worker }));
    }
    assert_eq!(consumer.pull(&producer, id, 0).await.unwrap().blocks, 1);
}
