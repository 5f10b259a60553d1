//! What every engine must do, told by doing it: a suite over any two engines whose KV side can be
//! reached in this process. A pair of workers is played by [`Loopback`], which carries blocks from
//! one engine's arena to the other's, and can carry them badly.
//!
//! A check panics with what it found; run each under a test of your own.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)] // For tests, which fail by it.

mod client;
mod loopback;
mod prompts;

use std::{ops::Range, sync::Arc, time::Duration};

use baton_types::HandoffId;
use futures::{StreamExt, stream};
use http::StatusCode;

pub use self::{
    client::{Reply, ask, ask_streaming},
    loopback::{Ending, Interference, Loopback, Outstanding, Passed, Way},
    prompts::{edge_prompts, prompts_with_shared_prefixes},
};
use crate::contract::Engine;

/// What an engine that hangs is given before its test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two engines of the same model, between which KV is handed over.
pub struct Pair {
    pub producer: Arc<dyn Engine>,
    pub consumer: Arc<dyn Engine>,
    /// Gives the answers that the others are compared with; may be the producer.
    pub reference: Arc<dyn Engine>,
    pub model: String,
    pub loopback: Loopback,
    /// Token ids to make prompts of.
    pub vocabulary: Range<u32>,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("model", &self.model).finish_non_exhaustive()
    }
}

impl Pair {
    /// Waits until both serve, and attaches to their KV sides.
    pub async fn attach(
        producer: Arc<dyn Engine>,
        consumer: Arc<dyn Engine>,
        reference: Arc<dyn Engine>,
        vocabulary: Range<u32>,
        way: Way,
    ) -> Self {
        let description = producer.ready().await.expect("the producer serves");
        consumer.ready().await.expect("the consumer serves");
        reference.ready().await.expect("the reference serves");
        let mut ports = Vec::new();
        for engine in [&producer, &consumer] {
            let mut attaching = engine.kv_ports().expect("the engine takes part in handoffs");
            let port = within(attaching.recv()).await.expect("the KV side attaches");
            ports.push((port, attaching));
        }
        let (consumer_port, producer_port) = (ports.pop().unwrap(), ports.pop().unwrap());
        producer_port
            .0
            .compatibility
            .check(&consumer_port.0.compatibility)
            .expect("engines of one model are compatible");
        let model = description.models.first().expect("an engine has a model").clone();
        let loopback = Loopback::start(producer_port, consumer_port, way);
        Self { producer, consumer, reference, model, loopback, vocabulary }
    }

    pub fn block_size_tokens(&self) -> u32 {
        self.loopback.block_size_tokens()
    }

    /// The answer of the engine that does both.
    pub async fn aggregated(&self, prompt: &[u32], tokens: u32) -> Reply {
        within(ask(&*self.reference, client::completion(&self.model, prompt, tokens))).await
    }

    /// Both legs of one handoff.
    pub async fn handed_over(&self, prompt: &[u32], tokens: u32) -> (Reply, Passed) {
        self.interfered(prompt, tokens, Interference::None).await
    }

    /// Both legs of one handoff that is carried badly.
    pub async fn interfered(
        &self,
        prompt: &[u32],
        tokens: u32,
        interference: Interference,
    ) -> (Reply, Passed) {
        let handoff = HandoffId::random();
        self.loopback.interfere(handoff, interference);
        let legs = async {
            tokio::join!(self.produce(handoff, prompt), self.consume(handoff, prompt, tokens))
        };
        let (produced, consumed) = within(legs).await;
        assert_eq!(produced.status, StatusCode::OK, "{produced:?}");
        (consumed, within(self.loopback.passed(handoff)).await)
    }

    async fn produce(&self, handoff: HandoffId, prompt: &[u32]) -> Reply {
        let body = client::completion(&self.model, prompt, 1);
        ask(&*self.producer, client::with_handoff(body, "produce", handoff)).await
    }

    async fn lend(&self, handoff: HandoffId, prompt: &[u32]) -> Reply {
        let body = client::completion(&self.model, prompt, 1);
        ask(&*self.producer, client::with_handoff(body, "lend", handoff)).await
    }

    async fn consume(&self, handoff: HandoffId, prompt: &[u32], tokens: u32) -> Reply {
        let body = client::completion(&self.model, prompt, tokens);
        ask(&*self.consumer, client::with_handoff(body, "consume", handoff)).await
    }

    fn blocks_of(&self, prompt: &[u32]) -> u32 {
        u32::try_from(prompt.len()).unwrap().div_ceil(self.block_size_tokens())
    }
}

/// A handed-over answer equals the aggregated one, token for token, and its KV really came by the
/// handoff: as many blocks as the consumer did not have.
pub async fn handed_over_equals_aggregated(pair: &Pair, prompts: Vec<Vec<u32>>, at_once: usize) {
    assert!(!prompts.is_empty());
    let checks = prompts.into_iter().map(|prompt| async move {
        let length = prompt.len();
        let aggregated = pair.aggregated(&prompt, 24).await;
        let (handed_over, passed) = pair.handed_over(&prompt, 24).await;
        assert_eq!(aggregated.tokens().len(), 24);
        assert_eq!(handed_over.tokens(), aggregated.tokens(), "of a prompt of {length} tokens");
        assert_eq!(handed_over.text(), aggregated.text());
        assert_eq!(handed_over.usage(), aggregated.usage());
        match passed.ending {
            Ending::Completed => {
                assert_eq!(passed.blocks, pair.blocks_of(&prompt) - passed.first_block);
                assert_eq!(passed.prompt_tokens as usize, length);
            }
            Ending::NotNeeded => assert_eq!(passed.blocks, 0),
            other => panic!("a prompt of {length} tokens ended {other:?}"),
        }
    });
    stream::iter(checks).buffer_unordered(at_once.max(1)).collect::<Vec<()>>().await;
    everything_is_free(pair).await;
}

/// The second turn of a conversation brings only what the first did not leave behind.
pub async fn second_turn_brings_only_what_is_new(pair: &Pair) {
    let block_size = pair.block_size_tokens();
    let turns = prompts::some_tokens(&pair.vocabulary, "two turns", 6 * block_size as usize + 1);
    let first = &turns[..3 * block_size as usize + 2];
    let (_, passed) = pair.handed_over(first, 4).await;
    assert_eq!((passed.first_block, passed.blocks), (0, 4));

    let (answer, passed) = pair.handed_over(&turns, 12).await;
    assert_eq!((passed.first_block, passed.blocks), (3, 4), "three full blocks were there");
    assert_eq!(answer.tokens(), pair.aggregated(&turns, 12).await.tokens());

    let (again, passed) = pair.handed_over(&turns, 12).await;
    assert_eq!((passed.ending, passed.blocks), (Ending::NotNeeded, 0));
    assert_eq!(again.tokens(), answer.tokens());
    everything_is_free(pair).await;
}

/// What an engine has cached of a prompt's start it lends, and another that took it finds it cached; what it has not
/// it does not compute.
pub async fn a_cached_prefix_is_lent_and_no_other(pair: &Pair) {
    let block_size = pair.block_size_tokens() as usize;
    let prompt = prompts::some_tokens(&pair.vocabulary, "lent", 5 * block_size + 3);
    let right = pair.aggregated(&prompt, 12).await;
    within(ask(&*pair.producer, client::completion(&pair.model, &prompt, 1))).await;
    for blocks in [3, 5] {
        let start = &prompt[..=blocks * block_size];
        let handoff = HandoffId::random();
        let legs =
            async { tokio::join!(pair.lend(handoff, start), pair.consume(handoff, start, 1)) };
        let (lent, taken) = within(legs).await;
        assert_eq!((lent.status, taken.status), (StatusCode::OK, StatusCode::OK), "{lent:?}");
        let passed = within(pair.loopback.passed(handoff)).await;
        let tokens = blocks * block_size;
        assert_eq!(passed.ending, Ending::Completed);
        assert_eq!(
            (passed.prompt_tokens as usize, passed.cached_tokens as usize),
            (tokens + 1, tokens)
        );
        // The puller had those of the first round by the second.
        assert_eq!(passed.first_block, if blocks == 3 { 0 } else { 3 });
    }
    let (answer, passed) = pair.handed_over(&prompt, 12).await;
    assert_eq!((passed.first_block, passed.blocks), (5, 1), "the others were there");
    assert_eq!(answer.tokens(), right.tokens());

    let unknown = prompts::some_tokens(&pair.vocabulary, "not there", 3 * block_size + 1);
    let half = [&prompt[..2 * block_size], &unknown[..=block_size]].concat();
    for start in [unknown, half] {
        let handoff = HandoffId::random();
        // The embedded engine says so at once; of a vLLM the request is to be dropped then.
        let refused = async {
            tokio::select! {
                reply = pair.lend(handoff, &start) => assert_ne!(reply.status, StatusCode::OK),
                () = pair.loopback.is_over(handoff) => {}
            }
        };
        within(refused).await;
        let passed = within(pair.loopback.passed(handoff)).await;
        assert_eq!((passed.ending, passed.blocks), (Ending::Aborted, 0));
    }
    everything_is_free(pair).await;
}

/// Of several choices the first takes the KV over; the others find it there.
pub async fn several_choices_share_one_handoff(pair: &Pair) {
    let length = 3 * pair.block_size_tokens() as usize + 3;
    let prompt = prompts::some_tokens(&pair.vocabulary, "two choices", length);
    let two = |body: serde_json::Value| {
        client::with(body, [("n", 2.into()), ("temperature", 0.9.into()), ("seed", 5.into())])
    };
    let body = two(client::completion(&pair.model, &prompt, 8));
    let aggregated = within(ask(&*pair.reference, body.clone())).await;
    let handoff = HandoffId::random();
    let consumer = client::with_handoff(body, "consume", handoff);
    let (_, handed_over) = within(async {
        tokio::join!(pair.produce(handoff, &prompt), ask(&*pair.consumer, consumer))
    })
    .await;
    assert_eq!(handed_over.body["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(handed_over.body["choices"], aggregated.body["choices"]);
    everything_is_free(pair).await;
}

/// Wherever the client leaves, on either side, nothing stays held.
pub async fn an_abort_at_any_stage_frees_everything(pair: &Pair) {
    let length = 5 * pair.block_size_tokens() as usize + 3;
    for (stage, interference) in [
        ("no block has come", Interference::HoldFrom { block: 0 }),
        ("some blocks have come", Interference::HoldFrom { block: 3 }),
        ("all but the seal has come", Interference::HoldSeal),
    ] {
        for leaves in ["consumer", "both"] {
            let seed = format!("{stage}, {leaves}");
            let prompt = prompts::some_tokens(&pair.vocabulary, &seed, length);
            let handoff = HandoffId::random();
            pair.loopback.interfere(handoff, interference);
            let produce = pair.produce(handoff, &prompt);
            let consume = pair.consume(handoff, &prompt, 8);
            if leaves == "both" {
                tokio::select! {
                    biased;
                    never = async { tokio::join!(produce, consume) } => panic!("{never:?}"),
                    () = within(pair.loopback.is_held(handoff)) => {}
                }
            } else {
                let (produced, ()) = tokio::join!(within(produce), async {
                    tokio::select! {
                        biased;
                        never = consume => panic!("{never:?}"),
                        () = within(pair.loopback.is_held(handoff)) => {}
                    }
                });
                assert_eq!(produced.status, StatusCode::OK);
            }
            let passed = within(pair.loopback.passed(handoff)).await;
            assert_eq!(passed.ending, Ending::Aborted, "{seed}");
            everything_is_free(pair).await;
        }
    }
    aborts_of_one_leg(pair, length).await;
}

async fn aborts_of_one_leg(pair: &Pair, length: usize) {
    let prompt = prompts::some_tokens(&pair.vocabulary, "a consumer alone", length);
    let handoff = HandoffId::random();
    tokio::select! {
        biased;
        never = pair.consume(handoff, &prompt, 8) => panic!("{never:?}"),
        () = within(pair.loopback.is_subscribed(handoff)) => {}
    }
    assert_eq!(within(pair.loopback.passed(handoff)).await.ending, Ending::Aborted);
    everything_is_free(pair).await;

    let prompt = prompts::some_tokens(&pair.vocabulary, "a producer alone", length);
    tokio::select! {
        biased;
        never = pair.produce(HandoffId::random(), &prompt) => panic!("{never:?}"),
        // The request is under way, its prefill not yet.
        () = std::future::ready(()) => {}
    }
    everything_is_free(pair).await;

    let prompt = prompts::some_tokens(&pair.vocabulary, "in the middle of the answer", length);
    let handoff = HandoffId::random();
    let body = client::completion(&pair.model, &prompt, 200);
    let body = client::with(body, [("stream", true.into())]);
    let body = client::with_handoff(body, "consume", handoff);
    let legs = async {
        tokio::join!(pair.produce(handoff, &prompt), ask_streaming(&*pair.consumer, body))
    };
    let (_, mut answer) = within(legs).await;
    let chunk = within(answer.body.next()).await.expect("the answer has begun").expect("and well");
    assert!(chunk.starts_with(b"data: ") && chunk.ends_with(b"\n\n"));
    drop(answer);
    everything_is_free(pair).await;
}

/// A block that is not the one that was sent gives another answer.
///
/// For engines whose answer depends on every bit of their KV: the embedded one. A real model
/// may well say the same over a block that is off by one bit.
pub async fn a_wrong_block_changes_the_answer(pair: &Pair) {
    let block_size = pair.block_size_tokens() as usize;
    for (name, of) in [
        ("flipped", (|block| Interference::Flip { block, byte: 5 }) as fn(u32) -> Interference),
        ("missing", |block| Interference::Skip { block }),
        ("stale", |block| Interference::Stale { block }),
    ] {
        for block in 0..3 {
            let seed = format!("{name} {block}");
            let earlier = prompts::some_tokens(&pair.vocabulary, "earlier", 3 * block_size);
            let earlier: Vec<u32> =
                earlier.iter().map(|token| if block == 1 { token + 1 } else { *token }).collect();
            pair.handed_over(&earlier, 1).await;
            let prompt = prompts::some_tokens(&pair.vocabulary, &seed, 3 * block_size - 2);
            let right = pair.aggregated(&prompt, 12).await;
            let (wrong, passed) = pair.interfered(&prompt, 12, of(block)).await;
            assert_eq!(passed.ending, Ending::Completed, "nobody noticed, as was intended");
            assert_ne!(wrong.tokens(), right.tokens(), "block {block} was {name}");
        }
    }
    everything_is_free(pair).await;
}

/// A block that changes between the worker's verification and the engine's load is seen by the engine,
/// and nothing is computed with it.
pub async fn a_block_that_rots_in_the_arena_is_seen(pair: &Pair) {
    let block_size = pair.block_size_tokens() as usize;
    for block in 0..3 {
        for byte in [0, 77, u64::from(pair.block_size_tokens()) * 8 - 1] {
            let seed = format!("rot {block} {byte}");
            let prompt = prompts::some_tokens(&pair.vocabulary, &seed, 3 * block_size);
            let rot = Interference::Rot { block, byte };
            let (reply, passed) = pair.interfered(&prompt, 4, rot).await;
            assert_eq!(passed.ending, Ending::Corrupt);
            assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR, "{reply:?}");
        }
    }
    everything_is_free(pair).await;
}

/// A block that is loaded where it lies, and is another by then, is seen, and nothing is computed with it: of pairs
/// that pass blocks so.
pub async fn a_block_that_is_overwritten_before_it_is_loaded_is_seen(pair: &Pair) {
    let block_size = pair.block_size_tokens() as usize;
    for block in 0..3 {
        let seed = format!("overwritten {block}");
        let prompt = prompts::some_tokens(&pair.vocabulary, &seed, 3 * block_size);
        let overwrite = Interference::Overwrite { block };
        let (reply, passed) = pair.interfered(&prompt, 4, overwrite).await;
        assert_eq!(passed.ending, Ending::Corrupt);
        assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR, "{reply:?}");
    }
    everything_is_free(pair).await;
}

/// KV that will not come is an error in OpenAI's shape, and never computed instead.
pub async fn a_failed_handoff_is_a_500(pair: &Pair) {
    let length = 3 * pair.block_size_tokens() as usize;
    for streams in [false, true] {
        let prompt = prompts::some_tokens(&pair.vocabulary, "failed", length);
        let handoff = HandoffId::random();
        pair.loopback.interfere(handoff, Interference::Fail);
        let body = client::completion(&pair.model, &prompt, 8);
        let body = client::with(body, [("stream", streams.into())]);
        let body = client::with_handoff(body, "consume", handoff);
        let (_, reply) = within(async {
            tokio::join!(pair.produce(handoff, &prompt), ask(&*pair.consumer, body))
        })
        .await;
        assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR, "{reply:?}");
        let error = &reply.body["error"];
        assert_eq!(error["code"], 500, "{reply:?}");
        assert!(error["message"].is_string() && error["type"].is_string(), "{reply:?}");
        assert_eq!(within(pair.loopback.passed(handoff)).await.ending, Ending::Failed);
    }
    everything_is_free(pair).await;
}

/// No request, no used block, no slot on its way. What was let go may take a moment to be free.
pub async fn everything_is_free(pair: &Pair) {
    let looking = async {
        loop {
            let mut loads = Vec::new();
            for engine in [&pair.producer, &pair.consumer] {
                loads.push(engine.load().await.expect("the engine tells its load"));
            }
            let engines_are_free = loads.iter().all(|load| {
                load.requests_running == 0
                    && load.requests_waiting == 0
                    && load.kv_used_ratio == 0.0
            });
            if engines_are_free && pair.loopback.outstanding() == Outstanding::default() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, looking).await.is_err() {
        let loads = (pair.producer.load().await, pair.consumer.load().await);
        panic!("still held: {loads:?}, {:?}", pair.loopback.outstanding());
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the engine hangs")
}
