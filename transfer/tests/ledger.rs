//! The ledger under random interleavings of producers, consumers and time.
#![allow(clippy::panic, clippy::unwrap_used)] // These are tests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use baton_transfer::{
    Ending, ExportStream, Exported, Exports, HandoffError, Ledger, Refusal, Subscription,
    TransferError,
};
use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use bytes::Bytes;
use futures::FutureExt;
use proptest::prelude::*;
use tokio::sync::oneshot;

const LEASE: Duration = Duration::from_secs(3600);
const PEER: [u8; 32] = [1; 32];
const PROMPT: PromptDigest = PromptDigest([2; 32]);
const HANDOFFS: usize = 3;

fn id(handoff: usize) -> HandoffId {
    HandoffId::from_u128(handoff as u128)
}

fn subscription(epoch: Epoch, handoff: usize, generation: u32, first_block: u32) -> Subscription {
    let generation = Generation(generation);
    Subscription {
        handoff: HandoffKey { epoch, id: id(handoff), generation },
        consumer_epoch: Epoch::from_u128(9),
        compatibility: [0; 32],
        first_block,
        prompt_tokens: 5,
        prompt_digest: PROMPT,
    }
}

#[derive(Clone, Default)]
struct Held(Arc<AtomicUsize>);

struct Block(Held);

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        b"kv"
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

impl Held {
    fn block(&self) -> Bytes {
        self.0.fetch_add(1, Relaxed);
        Bytes::from_owner(Block(self.clone()))
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Expect,
    Push,
    Seal,
    Abort,
    Attach { first_block: u32 },
    Take,
    Finish { acknowledged: bool },
    Vanish,
    Expire,
    Restart,
}

fn steps() -> impl Strategy<Value = (usize, Step)> {
    let step = prop_oneof![
        4 => Just(Step::Expect),
        8 => Just(Step::Push),
        3 => Just(Step::Seal),
        1 => Just(Step::Abort),
        4 => (0..3_u32).prop_map(|first_block| Step::Attach { first_block }),
        8 => Just(Step::Take),
        3 => prop::bool::weighted(0.7).prop_map(|acknowledged| Step::Finish { acknowledged }),
        1 => Just(Step::Vanish),
        1 => Just(Step::Expire),
        1 => Just(Step::Restart),
    ];
    (0..HANDOFFS, step)
}

/// What the test knows of one handoff.
#[derive(Default)]
struct Side {
    generation: u32,
    next_index: u32,
    stream: Option<Box<dyn ExportStream>>,
    next_wanted: u32,
    seal_seen: bool,
    ending: Option<oneshot::Receiver<Ending>>,
    endings: usize,
}

impl Side {
    fn hear(&mut self) -> Option<Ending> {
        let ending = self.ending.as_mut()?.try_recv().ok()?;
        self.ending = None;
        self.endings += 1;
        Some(ending)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_handoff_ends_once_and_leaves_nothing(
        steps in prop::collection::vec(steps(), 0..120),
    ) {
        // Only for the timer of a subscription that comes too early.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _in_runtime = runtime.enter();
        let held = Held::default();
        let mut epoch = Epoch::from_u128(100);
        let ledger = Ledger::new(epoch, [0; 32], LEASE);
        let mut sides: [Side; HANDOFFS] = std::array::from_fn(|_| Side::default());
        let mut expected = 0;
        for (handoff, step) in steps {
            let side = &mut sides[handoff];
            let generation = Generation(side.generation);
            match step {
                Step::Expect => {
                    // Each attempt is of the next generation; the open one, if any, is void.
                    side.generation += 1;
                    side.next_index = 0;
                    let before = side.ending.take();
                    let ending = ledger.expect(id(handoff), Generation(side.generation), PEER);
                    if let Some(mut before) = before {
                        prop_assert_eq!(before.try_recv(), Ok(Ending::Aborted));
                        side.endings += 1;
                    }
                    side.ending = Some(ending.unwrap());
                    expected += 1;
                }
                Step::Push => {
                    let pushed = ledger.push(id(handoff), generation, side.next_index, held.block());
                    match pushed {
                        Ok(()) => side.next_index += 1,
                        Err(error) => prop_assert!(
                            matches!(error, HandoffError::NotOpen | HandoffError::Sealed),
                            "{error}"
                        ),
                    }
                    prop_assert_eq!(pushed == Err(HandoffError::NotOpen), side.ending.is_none());
                }
                // May be of fewer blocks than the consumer has: another prompt, then.
                Step::Seal => drop(ledger.seal(id(handoff), generation, 5, PROMPT, 0)),
                Step::Abort => ledger.abort(id(handoff), generation),
                Step::Attach { first_block } => {
                    let wanted = subscription(epoch, handoff, side.generation, first_block);
                    // Not there yet means waiting, which is not of interest here.
                    match ledger.attach(&wanted, PEER).now_or_never() {
                        Some(Ok(stream)) => {
                            prop_assert!(side.ending.is_some());
                            // One of an older generation may still be around.
                            side.stream = Some(stream);
                            side.next_wanted = first_block;
                            side.seal_seen = false;
                        }
                        Some(Err(refusal)) => prop_assert!(
                            matches!(
                                refusal,
                                Refusal::AlreadyTaken | Refusal::WrongPrompt | Refusal::Aborted
                            ),
                            "{refusal}"
                        ),
                        None => prop_assert!(side.ending.is_none()),
                    }
                }
                Step::Take => {
                    let Some(stream) = &mut side.stream else { continue };
                    match stream.next().now_or_never() {
                        Some(Exported::Block { index, .. }) => {
                            prop_assert_eq!(index, side.next_wanted);
                            side.next_wanted += 1;
                            stream.sent(2);
                        }
                        Some(Exported::Sealed(seal)) => {
                            prop_assert_eq!(seal.prompt_blocks, side.next_wanted);
                            side.seal_seen = true;
                        }
                        Some(Exported::Refused(_) | Exported::Aborted) | None => {}
                    }
                }
                Step::Finish { acknowledged } => {
                    let Some(stream) = side.stream.take() else { continue };
                    let lost = TransferError::BrokeOff("lost".into());
                    stream.finish(if acknowledged { Ok(()) } else { Err(lost) });
                    if let Some(ending) = side.hear() {
                        prop_assert_eq!(ending == Ending::Acked, acknowledged && side.seal_seen);
                    }
                }
                Step::Vanish => side.stream = None,
                Step::Expire => {
                    let open = ledger.open_handoffs();
                    prop_assert!(ledger.expire(Instant::now()).is_empty());
                    prop_assert_eq!(ledger.expire(Instant::now() + 2 * LEASE).len(), open);
                }
                Step::Restart => {
                    epoch = Epoch::random();
                    ledger.begin_epoch(epoch, [0; 32], 1);
                }
            }
            sides.iter_mut().for_each(|side| drop(side.hear()));
            let waiting = sides.iter().filter(|side| side.ending.is_some()).count();
            prop_assert_eq!(ledger.open_handoffs(), waiting);
            if waiting == 0 {
                prop_assert_eq!(held.0.load(Relaxed), 0);
            }
        }
        ledger.expire(Instant::now() + 2 * LEASE);
        sides.iter_mut().for_each(|side| drop(side.hear()));
        prop_assert_eq!(ledger.open_handoffs(), 0);
        prop_assert_eq!(held.0.load(Relaxed), 0);
        prop_assert_eq!(sides.iter().map(|side| side.endings).sum::<usize>(), expected);
        let counters = ledger.counters();
        let ended = counters.handoffs_acked
            + counters.handoffs_aborted
            + counters.handoffs_expired
            + counters.handoffs_broken;
        prop_assert_eq!((counters.handoffs_expected, ended), (expected as u64, expected as u64));
        prop_assert_eq!(counters.bytes_sent, 2 * counters.blocks_sent);
    }
}

/// All ways to lay two scripts into one another, each in its own order.
fn merged<T: Copy>(first: &[T], second: &[T]) -> Vec<Vec<T>> {
    let begun_with = |head: &T, tails: Vec<Vec<T>>| {
        tails.into_iter().map(|tail| [vec![*head], tail].concat()).collect::<Vec<_>>()
    };
    match (first, second) {
        ([], only) | (only, []) => vec![only.to_vec()],
        ([a, of_first @ ..], [b, of_second @ ..]) => {
            let mut all = begun_with(a, merged(of_first, second));
            all.extend(begun_with(b, merged(first, of_second)));
            all
        }
    }
}

/// A producer's and a consumer's steps in every order, with every accident at every place: 4,000 lives of a
/// handoff and more, each of which ends once and leaves nothing.
#[test]
fn in_every_interleaving_a_handoff_ends_once_and_leaves_nothing() {
    let producer = [Step::Push, Step::Push, Step::Seal];
    let accidents = [Step::Abort, Step::Expire, Step::Vanish, Step::Restart, Step::Expect];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _in_runtime = runtime.enter();
    let (mut lives, mut acked) = (0, 0);
    for (first_block, acknowledged) in [(0, true), (1, true), (2, true), (3, true), (0, false)] {
        let attach = Step::Attach { first_block };
        let consumer = [attach, Step::Take, Step::Take, Step::Take, Step::Finish { acknowledged }];
        for order in merged(&producer, &consumer) {
            let with_accident = |accident: Step, at: usize| {
                let mut steps = order.clone();
                steps.insert(at, accident);
                steps
            };
            let places = 0..=order.len();
            let disturbed = accidents
                .into_iter()
                .flat_map(|accident| places.clone().map(move |at| (accident, at)));
            let all = disturbed.map(|(accident, at)| with_accident(accident, at));
            for steps in std::iter::once(order.clone()).chain(all) {
                lives += 1;
                acked += usize::from(live(&steps) == Ending::Acked);
            }
        }
    }
    assert_eq!(lives, 5 * 56 * (1 + 5 * 9));
    assert!(acked > 0 && acked < lives / 2, "{acked}");
}

/// Lives one life of a handoff to its end, which it answers.
fn live(steps: &[Step]) -> Ending {
    let held = Held::default();
    let epoch = Epoch::from_u128(100);
    let ledger = Ledger::new(epoch, [0; 32], LEASE);
    let mut ending = ledger.expect(id(0), Generation(1), PEER).unwrap();
    let (mut next_index, mut generation) = (0, 1);
    let mut newer = None;
    let mut stream: Option<Box<dyn ExportStream>> = None;
    let (mut taken, mut seal_seen) = (Vec::new(), false);
    for step in steps {
        match *step {
            Step::Expect => {
                generation = 2;
                newer = Some(ledger.expect(id(0), Generation(2), PEER).unwrap());
            }
            Step::Push => {
                if ledger.push(id(0), Generation(1), next_index, held.block()).is_ok() {
                    next_index += 1;
                }
            }
            Step::Seal => drop(ledger.seal(id(0), Generation(1), 5, PROMPT, 0)),
            Step::Abort => ledger.abort(id(0), Generation(1)),
            Step::Attach { first_block } => {
                let wanted = subscription(epoch, 0, 1, first_block);
                stream = ledger.attach(&wanted, PEER).now_or_never().and_then(Result::ok);
            }
            Step::Take => match stream.as_mut().map(|stream| stream.next().now_or_never()) {
                Some(Some(Exported::Block { index, .. })) => taken.push(index),
                Some(Some(Exported::Sealed(_))) => seal_seen = true,
                _ => {}
            },
            Step::Finish { acknowledged } => {
                let lost = TransferError::BrokeOff("lost".into());
                if let Some(stream) = stream.take() {
                    stream.finish(if acknowledged { Ok(()) } else { Err(lost) });
                }
            }
            Step::Vanish => stream = None,
            Step::Expire => drop(ledger.expire(Instant::now() + 2 * LEASE)),
            Step::Restart => ledger.begin_epoch(Epoch::from_u128(101), [0; 32], 1),
        }
    }
    drop(stream);
    ledger.abort(id(0), Generation(generation));
    ledger.expire(Instant::now() + 2 * LEASE);
    let ended = ending.try_recv().unwrap_or_else(|_| panic!("it did not end: {steps:?}"));
    if let Some(mut newer) = newer {
        assert!(newer.try_recv().is_ok(), "{steps:?}");
    }
    assert_eq!((held.0.load(Relaxed), ledger.open_handoffs()), (0, 0), "{steps:?}");
    assert!(taken.is_sorted_by(|one, next| one + 1 == *next), "{steps:?}: {taken:?}");
    assert!(ended != Ending::Acked || seal_seen, "{steps:?}");
    let counters = ledger.counters();
    let endings = counters.handoffs_acked
        + counters.handoffs_aborted
        + counters.handoffs_expired
        + counters.handoffs_broken;
    assert_eq!(counters.handoffs_expected, endings, "{steps:?}");
    ended
}

#[tokio::test(start_paused = true)]
async fn an_early_subscription_is_woken_and_a_hopeless_one_refused() {
    let epoch = Epoch::from_u128(1);
    let ledger = Ledger::new(epoch, [0; 32], LEASE);
    let early = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.attach(&subscription(epoch, 0, 1, 0), PEER).await }
    });
    tokio::task::yield_now().await;
    // An older attempt is not the one that is waited for.
    let _older = ledger.expect(id(0), Generation(0), PEER).unwrap();
    tokio::task::yield_now().await;
    assert!(!early.is_finished());
    let _this = ledger.expect(id(0), Generation(1), PEER).unwrap();
    let _stream = early.await.unwrap().unwrap();

    let never = ledger.attach(&subscription(epoch, 1, 0, 0), PEER).await;
    assert_eq!(never.err(), Some(Refusal::UnknownHandoff));
    let next_generation = ledger.attach(&subscription(epoch, 0, 2, 0), PEER).await;
    assert_eq!(next_generation.err(), Some(Refusal::WrongGeneration));
}

#[tokio::test]
async fn endings_are_remembered_for_a_while_only() {
    let epoch = Epoch::from_u128(1);
    let ledger = Ledger::new(epoch, [0; 32], LEASE);
    for handoff in 0..5000 {
        let ending = ledger.expect(id(handoff), Generation(0), PEER).unwrap();
        ledger.abort(id(handoff), Generation(0));
        assert_eq!(ending.await, Ok(Ending::Aborted));
    }
    let refused = |handoff| {
        let ledger = ledger.clone();
        async move { ledger.attach(&subscription(epoch, handoff, 0, 0), PEER).now_or_never() }
    };
    assert!(matches!(refused(4999).await, Some(Err(Refusal::Aborted))));
    assert!(refused(0).await.is_none(), "forgotten, so it might still come");
}

#[test]
fn an_owner_may_call_the_ledger_when_its_block_is_freed() {
    struct Caller(Ledger);
    impl AsRef<[u8]> for Caller {
        fn as_ref(&self) -> &[u8] {
            b"kv"
        }
    }
    impl Drop for Caller {
        fn drop(&mut self) {
            // Would hang if a block were dropped under the ledger's lock.
            self.0.open_handoffs();
        }
    }
    let epoch = Epoch::from_u128(1);
    let ledger = Ledger::new(epoch, [0; 32], LEASE);
    let block = || Bytes::from_owner(Caller(ledger.clone()));
    let push = |handoff, index| ledger.push(id(handoff), Generation(0), index, block());
    for handoff in 0..3 {
        drop(ledger.expect(id(handoff), Generation(0), PEER).unwrap());
        push(handoff, 0).unwrap();
    }
    assert_eq!(push(0, 7), Err(HandoffError::OutOfOrder { given: 7, expected: 1 }));
    assert_eq!(push(9, 0), Err(HandoffError::NotOpen));
    let wanted = subscription(epoch, 0, 0, 2);
    let stream = ledger.attach(&wanted, PEER).now_or_never().unwrap().unwrap();
    push(0, 1).unwrap();
    push(0, 2).unwrap();
    drop(stream);
    ledger.abort(id(1), Generation(0));
    ledger.begin_epoch(Epoch::from_u128(2), [0; 32], 1);
    assert_eq!(ledger.open_handoffs(), 0);
}
