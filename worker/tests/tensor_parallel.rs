//! Engines whose KV heads are split over several ranks, over as many on both sides or not: the answer is that
//! of an engine of one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)] // A test says so.

mod fleet;

use std::{env, time::Duration};

use baton_config::{EngineConfig, SimConfig, TransportChoice, WorkerConfig};
use baton_proto::{Event, Leg, StartJob};
use baton_types::Role;
use fleet::{Fleet, Worker, completion, fast, job, split, timeout};

/// Of the embedded engine, which has four heads, and its layer groups. With eight ranks, two have the same head.
const RANKS: [(u32, u32, u32); 9] = [
    (2, 2, 1),
    (4, 2, 1),
    (2, 4, 1),
    (1, 4, 1),
    (4, 1, 1),
    (8, 2, 1),
    (2, 8, 1),
    (2, 2, 8),
    (8, 2, 4),
];
const BLOCK_BYTES: u64 = 16 * 1024;

async fn worker(
    fleet: &mut Fleet,
    name: &str,
    role: Role,
    (tensor_parallel, layer_groups): (u32, u32),
    transport: TransportChoice,
) -> Worker {
    let engine = EngineConfig::Sim(SimConfig { tensor_parallel, layer_groups, ..fast() });
    let mut config = fleet.config(vec![fleet.address()], name, role, engine);
    config.transfer.transport = transport;
    config.transfer.ucx_library = env::var_os("BATON_UCX_LIBRARY").map(Into::into);
    let running = fleet.spawn_as(config);
    Worker { attached: fleet.next_attached().await, running }
}

async fn hand_over(prefill: &mut Worker, decode: &mut Worker, legs: (StartJob, StartJob)) -> Event {
    let number = legs.0.job;
    decode.attached.command(vec![], vec![legs.1]).await;
    prefill.attached.command(vec![], vec![legs.0]).await;
    let answer = decode.attached.whole().await;
    let done = prefill.attached.event().await;
    assert!(done.end);
    prefill.attached.command(vec![number], vec![]).await;
    Event { payload: answer.text.into(), tokens: answer.tokens, ..answer.first }
}

fn words(payload: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(payload).unwrap();
    json["choices"][0]["text"].as_str().unwrap().to_owned()
}

async fn same_answers(transport: TransportChoice, name: &str) {
    let prompt = |tokens: u32| completion((0..tokens).map(|token| 256 + token % 4000), false, 12);
    let mut expected = Vec::new();
    {
        let mut fleet = Fleet::start().await;
        let mut alone = fleet.worker("alone", Role::Decode, fast()).await;
        for tokens in [2, 100, 1500] {
            let whole = vec![job(u64::from(tokens), Leg::Aggregated, &prompt(tokens))];
            alone.attached.command(vec![], whole).await;
            expected.push((tokens, words(alone.attached.whole().await.text.as_bytes())));
        }
        alone.stop().await;
    }
    for (of_prefill, of_decode, groups) in RANKS {
        let mut fleet = Fleet::start().await;
        let [prefill, decode] = [(of_prefill, groups), (of_decode, groups)];
        let mut prefill = worker(&mut fleet, "p0", Role::Prefill, prefill, transport).await;
        let mut decode = worker(&mut fleet, "d0", Role::Decode, decode, transport).await;
        let who = format!("{of_prefill} to {of_decode} ranks, {groups} layer groups over {name}");
        for (tokens, expected) in &expected {
            let (of, to) = (&prefill.attached.hello, &decode.attached.hello);
            let legs = split(u64::from(*tokens), &prompt(*tokens), of, to);
            let answer = hand_over(&mut prefill, &mut decode, legs).await;
            assert_eq!(answer.fault, None, "{who}");
            assert_eq!(&words(&answer.payload), expected, "{tokens} tokens from {who}");
            let moved = answer.handoff.unwrap();
            assert_eq!(moved.transport, name);
            assert_eq!(moved.blocks + moved.blocks_reused, tokens.div_ceil(16), "{who}");
            // Every head crosses once, or once for each rank that holds it where both sides are alike.
            assert_eq!(moved.bytes, u64::from(moved.blocks) * BLOCK_BYTES, "{who}");
            // Rank from rank where both are alike, once the other's arena is mapped: in the course of the first
            // handoff, at the latest for the second.
            let can_map = name == "shm" && of_prefill == of_decode;
            assert!(can_map || moved.blocks_mapped == 0, "{who}: {moved:?}");
            let is_mapped = can_map && *tokens > 2;
            assert!(!is_mapped || moved.blocks_mapped > 0, "{who}: {moved:?}");
        }
        let idle = |report: &baton_proto::Report| {
            report.jobs_running == 0 && report.handoffs_open == 0 && report.arena_slots_used == 0
        };
        decode.attached.report(idle).await;
        // Every rank's part of every handoff. A report of a pause before lies behind.
        let all = 3 * u64::from(of_prefill);
        let acked = |report: &baton_proto::Report| report.handoffs_ended.get("acked") == Some(&all);
        prefill.attached.report(|report| idle(report) && acked(report)).await;
        prefill.stop().await;
        decode.stop().await;
        // UCX lets go of an arena on a thread of its own.
        timeout(async {
            while std::fs::read_dir(fleet.dir.path()).unwrap().count() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn through_shared_memory() {
    same_answers(TransportChoice::Shm, "shm").await;
}

#[tokio::test]
async fn by_quic() {
    same_answers(TransportChoice::Quic, "quic").await;
}

/// Over the real library. Where there is none that is said, and with BATON_REQUIRE_UCX it is a failure.
#[tokio::test]
async fn by_ucx() {
    if env::var_os("BATON_UCX_LIBRARY").is_none() {
        let demanded = env::var_os("BATON_REQUIRE_UCX").is_some_and(|value| value != "0");
        assert!(!demanded, "BATON_REQUIRE_UCX is set, and BATON_UCX_LIBRARY is not");
        eprintln!("SKIPPED, not run: BATON_UCX_LIBRARY is not set");
        return;
    }
    same_answers(TransportChoice::Ucx, "ucx").await;
}

#[tokio::test]
async fn engines_that_cannot_be_cut_up_alike_are_refused_with_what_differs() {
    let mut fleet = Fleet::start().await;
    let two = SimConfig { tensor_parallel: 2, ..fast() };
    let mut prefill = fleet.worker("p0", Role::Prefill, fast()).await;
    let mut decode = fleet.worker("d0", Role::Decode, two).await;
    let body = completion(300..400, false, 4);
    let theirs = prefill.attached.hello.compatibility.clone().unwrap();
    type Spoil = fn(&mut baton_proto::Compatibility);
    let cases: [(Spoil, &str); 3] = [
        // What a coordinator should not have paired: the consumer says why not.
        (|c| c.kv_heads.clear(), "kv_heads differs: sim/4/1*t16.h2.256 here, unknown at the peer"),
        (|c| c.kv_heads = "sim/4/1*t16.h4.255".into(), "kv_heads differs"),
        // What is not so: the producer says no.
        (|c| c.kv_layout.push('x'), "not compatible"),
    ];
    for (number, (spoil, told)) in (0..).zip(cases) {
        let (of, to) = (&prefill.attached.hello, &decode.attached.hello);
        let (produce, mut consume) = split(number, &body, of, to);
        let mut told_of = theirs.clone();
        spoil(&mut told_of);
        let handoff = consume.handoff.as_mut().unwrap();
        handoff.peer.as_mut().unwrap().compatibility = Some(told_of);
        let answer = hand_over(&mut prefill, &mut decode, (produce, consume)).await;
        let fault = answer.fault.unwrap();
        assert_eq!((&*fault.origin, &*fault.kind), ("handoff", "refused"), "{fault:?}");
        assert!(fault.message.contains(told), "{fault:?}");
    }
    let all = |report: &baton_proto::Report| report.handoff_errors.get("incompatible") == Some(&3);
    assert_eq!(decode.attached.report(all).await.handoff_errors.len(), 1);
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn heads_and_layers_that_cannot_be_split_so_keep_the_engine_from_starting() {
    let fleet = Fleet::start().await;
    let three = EngineConfig::Sim(SimConfig { tensor_parallel: 3, ..fast() });
    let config: WorkerConfig = fleet.config(vec![fleet.address()], "p0", Role::Prefill, three);
    let refused = fleet.spawn_as(config).running.await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("tensor_parallel is 3"), "{refused}");
    assert!(refused.contains("a divisor or a multiple of the 4 KV heads"), "{refused}");
    let three = EngineConfig::Sim(SimConfig { layer_groups: 3, ..fast() });
    let config: WorkerConfig = fleet.config(vec![fleet.address()], "p0", Role::Prefill, three);
    let refused = fleet.spawn_as(config).running.await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("layer_groups is 3"), "{refused}");
    assert!(refused.contains("a divisor of the 256 bytes of each"), "{refused}");
}
