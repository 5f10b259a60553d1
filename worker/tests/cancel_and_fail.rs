//! What ends early ends everywhere, and gives back what it held.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by failing.

mod fleet;

use baton_config::SimConfig;
use baton_proto::{Leg, Report};
use baton_types::Role;
use fleet::{Fleet, completion, fast, job, split};

fn idle(report: &Report) -> bool {
    report.jobs_running == 0
        && report.handoffs_open == 0
        && report.arena_slots_used == 0
        && report.engine_requests_running == 0
}

fn prompt(tokens: u32) -> impl Iterator<Item = u32> {
    (0..tokens).map(|token| 300 + token)
}

#[tokio::test]
async fn cancelling_both_legs_frees_both_sides() {
    let mut fleet = Fleet::start().await;
    // Slow enough that the stream is under way when it is cancelled.
    let sim = SimConfig { time_scale: 1.0, ..SimConfig::default() };
    let (mut prefill, mut decode) = fleet.pair(&sim).await;
    let body = completion(prompt(200), true, 4000);
    let (p, d) = split(1, &body, &prefill.attached.hello, &decode.attached.hello);
    prefill.attached.command(vec![], vec![p]).await;
    decode.attached.command(vec![], vec![d]).await;
    let first = decode.attached.event().await;
    assert_eq!(first.status, 200);
    decode.attached.report(|report| report.jobs_running == 1).await;
    decode.attached.command(vec![1], vec![]).await;
    prefill.attached.command(vec![1], vec![]).await;
    decode.attached.report(idle).await;
    prefill.attached.report(idle).await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_prefill_that_nobody_takes_over_is_freed_by_cancelling_it() {
    let mut fleet = Fleet::start().await;
    let (mut prefill, decode) = fleet.pair(&fast()).await;
    let body = completion(prompt(200), true, 4);
    let (p, _) = split(1, &body, &prefill.attached.hello, &decode.attached.hello);
    prefill.attached.command(vec![], vec![p]).await;
    let done = prefill.attached.event().await;
    assert_eq!((done.status, done.end), (200, true));
    let held = prefill.attached.report(|report| report.arena_slots_used > 0).await;
    assert_eq!((held.jobs_running, held.handoffs_open), (0, 1));
    prefill.attached.command(vec![1], vec![]).await;
    prefill.attached.report(idle).await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_decode_whose_producer_is_gone_fails_with_the_handoffs_reason() {
    let mut fleet = Fleet::start().await;
    let (prefill, mut decode) = fleet.pair(&fast()).await;
    let body = completion(prompt(200), true, 4);
    let (_, d) = split(1, &body, &prefill.attached.hello, &decode.attached.hello);
    prefill.stop().await;
    decode.attached.command(vec![], vec![d]).await;
    let failed = decode.attached.event().await;
    assert_eq!((failed.status, failed.end), (0, true));
    let fault = failed.fault.unwrap();
    assert_eq!(fault.origin, "handoff", "{fault:?}");
    decode.attached.report(idle).await;
    decode.stop().await;
}

#[tokio::test]
async fn a_producer_of_another_epoch_is_refused() {
    let mut fleet = Fleet::start().await;
    let (mut prefill, mut decode) = fleet.pair(&fast()).await;
    let body = completion(prompt(40), true, 4);
    let (p, mut d) = split(1, &body, &prefill.attached.hello, &decode.attached.hello);
    d.handoff.as_mut().unwrap().peer.as_mut().unwrap().epoch = vec![9; 16].into();
    prefill.attached.command(vec![], vec![p]).await;
    decode.attached.command(vec![], vec![d]).await;
    let fault = decode.attached.event().await.fault.unwrap();
    assert!(fault.origin == "handoff" && fault.message.contains("epoch"), "{fault:?}");
    prefill.attached.command(vec![1], vec![]).await;
    prefill.attached.report(idle).await;
    decode.attached.report(idle).await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn what_is_wrong_is_said_and_the_worker_goes_on() {
    let mut fleet = Fleet::start().await;
    let mut worker = fleet.worker("p0", Role::Prefill, fast()).await;
    let attached = &mut worker.attached;
    let good = completion(prompt(20), false, 4);

    // The client's fault.
    let (p, _) = split(1, &b"[1,2]"[..].into(), &attached.hello, &attached.hello);
    attached.command(vec![], vec![p]).await;
    let fault = attached.event().await.fault.unwrap();
    assert_eq!((fault.origin.as_str(), fault.kind.as_str()), ("client", "refused"));

    // The coordinator's.
    attached
        .command(vec![], vec![job(2, Leg::Decode, &good), job(3, Leg::Unspecified, &good)])
        .await;
    for _ in 0..2 {
        let fault = attached.event().await.fault.unwrap();
        assert_eq!((fault.origin.as_str(), fault.kind.as_str()), ("coordinator", "refused"));
    }

    // The engine's own refusal is an answer.
    let (p, _) = split(
        4,
        &b"{\"model\":\"other\",\"prompt\":[1]}"[..].into(),
        &attached.hello,
        &attached.hello,
    );
    attached.command(vec![], vec![p]).await;
    let answer = attached.event().await;
    assert_eq!((answer.status, answer.end, answer.fault), (404, true, None));
    assert!(!answer.payload.is_empty());

    attached.command(vec![99], vec![job(5, Leg::Aggregated, &good)]).await;
    assert_eq!(attached.whole().await.tokens, 4);
    attached.report(idle).await;
    worker.stop().await;
}

#[tokio::test]
async fn a_lost_stream_cancels_its_jobs_and_is_dialled_again() {
    let mut fleet = Fleet::start().await;
    let sim = SimConfig { time_scale: 1.0, ..SimConfig::default() };
    let mut worker = fleet.worker("p0", Role::Prefill, sim).await;
    let body = completion(prompt(20), true, 4000);
    worker.attached.command(vec![], vec![job(1, Leg::Aggregated, &body)]).await;
    worker.attached.event().await;
    let epoch = worker.attached.hello.epoch.clone();

    worker.attached.close();
    worker.attached = fleet.next_attached().await;
    assert_eq!(worker.attached.hello.epoch, epoch, "the engine is the same");
    worker.attached.report(idle).await;
    worker.stop().await;
}
