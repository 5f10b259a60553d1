//! The start of a prompt goes from one worker's prefix cache into another's, which then computes the rest; and
//! where it does not come, all of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by failing.

mod fleet;

use std::time::Duration;

use baton_config::{EngineConfig, SimConfig, TransferConfig, WorkerConfig};
use baton_proto::{Hello, Leg, PrefixPull, PullResult, Report, StartJob};
use baton_transfer::faults::{FaultPlan, Faults};
use baton_types::Role;
use bytes::Bytes;
use fleet::{Fleet, Worker, completion, fast, job, split};

const BLOCK_TOKENS: u32 = 16;

fn idle(report: &Report) -> bool {
    report.jobs_running == 0
        && report.handoffs_open == 0
        && report.arena_slots_used == 0
        && report.engine_requests_running == 0
}

fn prompt(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|token| 300 + token).collect()
}

/// So many blocks of a prompt.
fn pull(
    number: u64,
    prompt: &[u32],
    blocks: u32,
    from: &Hello,
    to: &Hello,
) -> (StartJob, PrefixPull) {
    fleet::pull(number, &prompt[..=(blocks * BLOCK_TOKENS) as usize], from, to)
}

/// The answer of a worker to all of it, which it has cached from then on.
async fn whole(worker: &mut Worker, number: u64, body: &Bytes) -> serde_json::Value {
    worker.attached.command(vec![], vec![job(number, Leg::Aggregated, body)]).await;
    serde_json::from_str(&worker.attached.whole().await.text).unwrap()
}

fn choices(answer: &str) -> serde_json::Value {
    serde_json::from_str::<serde_json::Value>(answer).unwrap()["choices"].take()
}

async fn told(worker: &mut Worker) -> PullResult {
    fleet::pulled(&worker.attached.event().await)
}

#[tokio::test]
async fn a_cached_prefix_is_copied_and_the_rest_is_computed() {
    let mut fleet = Fleet::start().await;
    // Blocks of one rank are made of those of two, whole and layer group by layer group.
    for (ranks, layer_groups) in [(1, 1), (2, 1), (2, 4)] {
        let fast = || SimConfig { layer_groups, ..fast() };
        let mut a = fleet.worker("a", Role::Prefill, fast()).await;
        let sim = SimConfig { tensor_parallel: ranks, ..fast() };
        let mut b = fleet.worker("b", Role::Prefill, sim).await;
        let mut d = fleet.worker("d", Role::Decode, fast()).await;
        assert!(a.attached.hello.pulls_prefixes && b.attached.hello.pulls_prefixes);

        let first = prompt(200);
        let body = completion(first.clone(), false, 12);
        let right = whole(&mut a, 1, &body).await;
        let (to_a, to_b) = (a.attached.hello.clone(), b.attached.hello.clone());
        let (lend, pulled) = pull(2, &first, 5, &to_a, &to_b);
        // What is copied is there, whatever becomes of the leg.
        let refused = completion(first.clone(), false, 0);
        let leg = StartJob { pull: Some(pulled), ..job(3, Leg::Aggregated, &refused) };
        b.attached.command(vec![], vec![leg]).await;
        a.attached.command(vec![], vec![lend]).await;
        let result = told(&mut b).await;
        assert_eq!((result.failure.as_str(), result.tokens), ("", 80));
        let moved = result.handoff.unwrap();
        // The sixth has the one token that both compute.
        assert_eq!((moved.blocks, moved.blocks_reused, moved.bytes), (6, 0, 6 * 16 * 1024));
        assert_eq!(b.attached.whole().await.first.status, 400);
        let lent = a.attached.event().await;
        assert_eq!((lent.job, lent.status, lent.end, lent.fault), (2, 200, true, None));

        let (lend, pulled) = pull(4, &first, 12, &to_a, &to_b);
        let leg = StartJob { pull: Some(pulled), ..job(5, Leg::Aggregated, &body) };
        b.attached.command(vec![], vec![leg]).await;
        a.attached.command(vec![], vec![lend]).await;
        let result = told(&mut b).await;
        assert_eq!((result.failure.as_str(), result.tokens), ("", 112));
        assert_eq!(result.handoff.unwrap().blocks_reused, 5, "it found them");
        let answer = b.attached.whole().await;
        assert_eq!(choices(&answer.text), right["choices"]);
        assert!(a.attached.event().await.end);

        // For a leg that hands everything over in its turn.
        let second: Vec<u32> = first.iter().map(|token| token + 1000).collect();
        let body = completion(second.clone(), false, 12);
        let right = whole(&mut a, 6, &body).await;
        let (lend, pulled) = pull(7, &second, 11, &to_a, &to_b);
        let (prefill, decode) = split(8, &body, &to_b, &d.attached.hello);
        let prefill = StartJob { pull: Some(pulled.clone()), ..prefill };
        d.attached.command(vec![], vec![decode]).await;
        a.attached.command(vec![], vec![lend]).await;
        b.attached.command(vec![], vec![prefill]).await;
        assert_eq!(told(&mut b).await.tokens, 176);
        let answer = d.attached.whole().await;
        assert_eq!(answer.first.handoff.as_ref().unwrap().blocks, 13);
        assert_eq!(choices(&answer.text), right["choices"]);
        assert_eq!(b.attached.event().await.status, 200);
        assert!(a.attached.event().await.end);

        // What is all there is not asked for.
        let leg = StartJob { pull: Some(pulled), ..job(9, Leg::Aggregated, &body) };
        b.attached.command(vec![], vec![leg]).await;
        let result = told(&mut b).await;
        assert_eq!((result.failure.as_str(), result.tokens, result.handoff), ("", 0, None));
        assert_eq!(choices(&b.attached.whole().await.text), right["choices"]);

        for worker in [&mut a, &mut b, &mut d] {
            worker.attached.report(idle).await;
        }
        for worker in [a, b, d] {
            worker.stop().await;
        }
    }
}

#[tokio::test]
async fn where_it_does_not_come_all_is_computed() {
    let mut fleet = Fleet::start().await;
    let mut a = fleet.worker("a", Role::Prefill, fast()).await;
    let mut b = fleet.worker("b", Role::Prefill, fast()).await;
    let (to_a, to_b) = (a.attached.hello.clone(), b.attached.hello.clone());
    let all = prompt(4000);
    // Each begins otherwise.
    let part = |at: usize| {
        let prompt = all[at * 200..][..200].to_vec();
        let body = completion(prompt.clone(), false, 8);
        (prompt, body)
    };

    // The lender never had it.
    let (prompt, body) = part(0);
    let (lend, pulled) = pull(1, &prompt, 5, &to_a, &to_b);
    let leg = StartJob { pull: Some(pulled), ..job(1, Leg::Aggregated, &body) };
    a.attached.command(vec![], vec![lend]).await;
    b.attached.command(vec![], vec![leg]).await;
    assert_eq!(told(&mut b).await.failure, "failed");
    let answer = b.attached.whole().await;
    assert!(a.attached.event().await.fault.is_some());
    assert_eq!(choices(&answer.text), whole(&mut a, 2, &body).await["choices"]);

    // It was told of another prompt.
    let (prompt, body) = part(1);
    whole(&mut a, 3, &body).await;
    let (mut lend, pulled) = pull(4, &prompt, 5, &to_a, &to_b);
    lend.pull.as_mut().unwrap().prompt[80] += 1;
    let leg = StartJob { pull: Some(pulled), ..job(4, Leg::Aggregated, &body) };
    b.attached.command(vec![], vec![leg]).await;
    a.attached.command(vec![], vec![lend]).await;
    assert_eq!(told(&mut b).await.failure, "failed");
    assert_eq!(b.attached.whole().await.first.status, 200);
    assert!(a.attached.event().await.end);

    // It is never asked.
    let (prompt, body) = part(2);
    let (_, mut pulled) = pull(5, &prompt, 5, &to_a, &to_b);
    pulled.give_up_ms = 50;
    let leg = StartJob { pull: Some(pulled), ..job(5, Leg::Aggregated, &body) };
    b.attached.command(vec![], vec![leg]).await;
    let result = told(&mut b).await;
    assert_eq!((result.failure.as_str(), result.handoff), ("too_slow", None));
    assert!(result.micros >= 50_000);
    assert_eq!(b.attached.whole().await.first.status, 200);

    // Its client goes away meanwhile.
    let (prompt, body) = part(3);
    whole(&mut a, 6, &body).await;
    let (lend, pulled) = pull(7, &prompt, 5, &to_a, &to_b);
    let leg = StartJob { pull: Some(pulled), ..job(7, Leg::Aggregated, &body) };
    b.attached.command(vec![], vec![leg]).await;
    b.attached.report(|report| report.handoffs_open == 1).await;
    b.attached.command(vec![7], vec![]).await;
    b.attached.report(idle).await;
    a.attached.command(vec![], vec![lend]).await;
    a.attached.report(|report| report.handoffs_open == 1).await;
    a.attached.command(vec![7], vec![]).await;
    a.attached.report(idle).await;

    // It is gone.
    let (prompt, body) = part(4);
    let right = whole(&mut a, 8, &body).await;
    a.stop().await;
    let (_, pulled) = pull(9, &prompt, 5, &to_a, &to_b);
    let leg = StartJob { pull: Some(pulled), ..job(9, Leg::Aggregated, &body) };
    b.attached.command(vec![], vec![leg]).await;
    assert_eq!(told(&mut b).await.failure, "unavailable");
    assert_eq!(choices(&b.attached.whole().await.text), right["choices"]);
    b.attached.report(idle).await;
    b.stop().await;
}

#[tokio::test]
async fn under_faults_every_answer_is_right_and_nothing_is_left() {
    const PROMPTS: usize = 60;
    let plan = FaultPlan {
        seed: 7,
        disturbed_ratio: 0.5,
        block_size_tokens: BLOCK_TOKENS,
        layer_groups: 1,
    };
    let faults = Faults::new(plan);
    let mut fleet = Fleet::start().await;
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        let config =
            fleet.config(vec![fleet.address()], name, Role::Prefill, EngineConfig::Sim(fast()));
        let stall_timeout = Duration::from_secs(1);
        let transfer = TransferConfig { stall_timeout, ..config.transfer };
        workers.push(fleet.disturbed(&faults, WorkerConfig { transfer, ..config }).await);
    }
    let [a, b] = &mut workers[..] else { panic!("two") };
    let (to_a, to_b) = (a.attached.hello.clone(), b.attached.hello.clone());
    // Each begins otherwise.
    let all: Vec<u32> =
        (0..200 * PROMPTS).map(|at| u32::try_from(300 + at % 5000 + at / 5000).unwrap()).collect();
    let prompts: Vec<&[u32]> = all.chunks(200).collect();
    let numbered = || (1..).zip(&prompts);
    let body = |prompt: &[u32]| completion(prompt.to_vec(), false, 8);
    let whole = numbered().map(|(number, prompt)| job(number, Leg::Aggregated, &body(prompt)));
    a.attached.command(vec![], whole.collect()).await;
    let right = a.attached.all(PROMPTS).await;

    let (mut lends, mut legs) = (Vec::new(), Vec::new());
    for (number, prompt) in numbered() {
        let (lend, mut pulled) = pull(1000 + number, prompt, 12, &to_a, &to_b);
        pulled.give_up_ms = 4000;
        lends.push(lend);
        legs.push(StartJob { pull: Some(pulled), ..job(number, Leg::Aggregated, &body(prompt)) });
    }
    b.attached.command(vec![], legs).await;
    a.attached.command(vec![], lends).await;
    let (mut copied, mut failed, mut ended) = (0, 0, 0);
    while ended < PROMPTS {
        let event = b.attached.event().await;
        if event.status == 0 {
            let result = fleet::pulled(&event);
            *(if result.failure.is_empty() { &mut copied } else { &mut failed }) += 1;
            continue;
        }
        assert!(event.end && event.fault.is_none(), "{event:?}");
        let text = std::str::from_utf8(&event.payload).unwrap();
        assert_eq!(choices(text), choices(&right[&event.job]), "{}", event.job);
        ended += 1;
    }
    assert_eq!(copied + failed, PROMPTS);
    assert!(copied > 10 && failed > 5, "{copied} {failed}");
    a.attached.command(numbered().map(|(number, _)| 1000 + number).collect(), vec![]).await;
    for worker in &mut workers {
        worker.attached.report(idle).await;
    }
    for worker in workers {
        worker.stop().await;
    }
}
