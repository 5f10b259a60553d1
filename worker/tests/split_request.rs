//! Two workers with the embedded engine: a request that is split gives the answer of one that is not,
//! and its KV crosses the network.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by failing.

mod fleet;

use baton_proto::Leg;
use fleet::{Fleet, Whole, Worker, completion, fast, job, split};

const BLOCK_TOKENS: u32 = 16;
const BLOCK_BYTES: u64 = 16 * 1024;

async fn aggregated(worker: &mut Worker, body: &bytes::Bytes) -> Whole {
    worker.attached.command(vec![], vec![job(next_job(), Leg::Aggregated, body)]).await;
    worker.attached.whole().await
}

async fn disaggregated(prefill: &mut Worker, decode: &mut Worker, body: &bytes::Bytes) -> Whole {
    let number = next_job();
    let (p, d) = split(number, body, &prefill.attached.hello, &decode.attached.hello);
    decode.attached.command(vec![], vec![d]).await;
    prefill.attached.command(vec![], vec![p]).await;
    let answer = decode.attached.whole().await;
    let done = prefill.attached.event().await;
    assert_eq!((done.status, done.end, done.payload.len(), &done.fault), (200, true, 0, &None));
    // A decode that needs no KV takes none over: a coordinator frees it where it waits.
    prefill.attached.command(vec![number], vec![]).await;
    answer
}

/// A job's number is its own for as long as the stream lives.
fn next_job() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// What does not differ from one run to the next.
fn comparable(text: &str) -> Vec<String> {
    let json = |text: &str| {
        let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
        for own in ["id", "created"] {
            json.as_object_mut().unwrap().remove(own);
        }
        // The second run finds more in its cache than the first did.
        if let Some(usage) = json.get_mut("usage").and_then(|usage| usage.as_object_mut()) {
            usage.remove("prompt_tokens_details");
        }
        json.to_string()
    };
    match text.strip_prefix("data: ") {
        None => vec![json(text)],
        Some(events) => events
            .split("data: ")
            .map(str::trim)
            .map(|data| if data == "[DONE]" { data.to_owned() } else { json(data) })
            .collect(),
    }
}

#[tokio::test]
async fn a_split_answer_equals_the_aggregated_one_and_its_kv_crossed() {
    let mut fleet = Fleet::start().await;
    let (mut prefill, mut decode) = fleet.pair(&fast()).await;
    let mut blocks_sent = 0;
    for (round, tokens) in [1, 15, 16, 17, 100, 1500].into_iter().enumerate() {
        for stream in [false, true] {
            let first = 1000 * u32::try_from(round).unwrap() + 500 * u32::from(stream);
            let body =
                completion((0..tokens).map(|token| 256 + (first + token) % 4000), stream, 12);
            let split = disaggregated(&mut prefill, &mut decode, &body).await;
            let whole = aggregated(&mut prefill, &body).await;
            assert_eq!(comparable(&split.text), comparable(&whole.text), "{tokens} tokens");
            assert_eq!((split.first.status, split.tokens, whole.tokens), (200, 12, 12));
            assert_eq!(split.first.fault, None);

            let moved = split.first.handoff.unwrap();
            if tokens > 1 {
                let blocks = tokens.div_ceil(BLOCK_TOKENS);
                assert_eq!(moved.blocks + moved.blocks_reused, blocks, "{tokens} tokens");
                assert_eq!(moved.bytes, u64::from(moved.blocks) * BLOCK_BYTES);
                assert_eq!(moved.transport, "shm");
            }
            blocks_sent += u64::from(moved.blocks);
        }
    }
    assert!(blocks_sent > 2 * 94);
    // Reports of the pauses between these requests lie before those of their end.
    let idle = |report: &baton_proto::Report| {
        report.jobs_running == 0
            && report.handoffs_open == 0
            && report.arena_slots_used == 0
            && report.handoff_blocks_sent.max(report.handoff_blocks_received) >= blocks_sent
    };
    let sent = prefill.attached.report(idle).await;
    let received = decode.attached.report(idle).await;
    assert_eq!(
        (sent.handoff_blocks_sent, received.handoff_blocks_received),
        (blocks_sent, blocks_sent)
    );
    assert_eq!(sent.handoff_bytes_sent, blocks_sent * BLOCK_BYTES);
    assert_eq!(received.handoff_bytes_received, blocks_sent * BLOCK_BYTES);
    // Not those of the first handoff, while which the engine mapped the other worker's arena.
    let mapped = received.handoff_blocks_mapped;
    assert!(mapped > 0 && mapped < blocks_sent, "{mapped} of {blocks_sent}");
    prefill.stop().await;
    decode.stop().await;
    let left: Vec<_> = std::fs::read_dir(fleet.dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_second_turn_sends_only_what_is_new() {
    let mut fleet = Fleet::start().await;
    let (mut prefill, mut decode) = fleet.pair(&fast()).await;
    let turn = |tokens: u32| completion((0..tokens).map(|token| 300 + token), true, 4);
    let first = disaggregated(&mut prefill, &mut decode, &turn(320)).await.first.handoff.unwrap();
    assert_eq!((first.blocks, first.blocks_reused), (20, 0));
    let moved = disaggregated(&mut prefill, &mut decode, &turn(400)).await.first.handoff.unwrap();
    assert_eq!((moved.blocks, moved.blocks_reused), (5, 20));
    let report = decode.attached.report(|report| report.handoff_blocks_reused > 0).await;
    assert_eq!(report.handoff_blocks_reused, 20);
    prefill.stop().await;
    decode.stop().await;
}
