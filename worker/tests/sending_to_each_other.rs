//! Two workers that compute prompts for each other, with arenas that hold a fraction of one prompt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by failing.

mod fleet;

use std::collections::BTreeMap;

use baton_config::SimConfig;
use baton_proto::{Event, StartJob};
use baton_types::Role;
use fleet::{Fleet, Worker, completion, fast, split};

/// Of each direction.
const REQUESTS: u64 = 24;
/// Of a prompt: an arena has room for 64 blocks on each side.
const PROMPT_TOKENS: u32 = 16 * 150;

/// Reads events until these jobs have ended. Answers how many blocks each took over, if it did.
async fn ended(worker: &mut Worker, jobs: impl Iterator<Item = u64>) -> BTreeMap<u64, u32> {
    let mut open: Vec<u64> = jobs.collect();
    let mut blocks = BTreeMap::new();
    while !open.is_empty() {
        let Event { job, fault, handoff, end, .. } = worker.attached.event().await;
        assert_eq!(fault, None, "job {job}");
        if let Some(moved) = handoff {
            blocks.insert(job, moved.blocks + moved.blocks_reused);
        }
        if end {
            open.retain(|one| *one != job);
        }
    }
    blocks
}

#[tokio::test]
async fn everything_arrives() {
    arrives_between(1, 1, 1).await;
}

/// Blocks of several ranks wait for slots of several ranks, and no two of them for one another.
#[tokio::test]
async fn everything_arrives_between_engines_of_several_ranks() {
    arrives_between(2, 2, 1).await;
    arrives_between(4, 2, 1).await;
    // Of a step there is more on its way than an arena holds, one layer group behind the other.
    arrives_between(4, 2, 4).await;
}

async fn arrives_between(ranks_of_one: u32, ranks_of_other: u32, layer_groups: u32) {
    let mut fleet = Fleet::start().await;
    let ranks = |tensor_parallel| SimConfig { tensor_parallel, layer_groups, ..fast() };
    let mut one = fleet.worker("one", Role::Prefill, ranks(ranks_of_one)).await;
    let mut other = fleet.worker("other", Role::Decode, ranks(ranks_of_other)).await;
    let (mut for_one, mut for_other): (Vec<StartJob>, Vec<StartJob>) = (Vec::new(), Vec::new());
    for number in 0..REQUESTS {
        let first = u32::try_from(number).unwrap() * 100;
        let there =
            completion((0..PROMPT_TOKENS).map(|token| 256 + (first + token) % 4000), false, 2);
        let back =
            completion((0..PROMPT_TOKENS).map(|token| 299 + (first + token) % 4000), false, 2);
        let (hello_one, hello_other) = (&one.attached.hello, &other.attached.hello);
        let (prefill, decode) = split(2 * number, &there, hello_one, hello_other);
        for_one.push(prefill);
        for_other.push(decode);
        let (prefill, decode) = split(2 * number + 1, &back, hello_other, hello_one);
        for_other.push(prefill);
        for_one.push(decode);
    }
    // All decodes first: every import slot is wanted before there is anything to fill it.
    one.attached.command(vec![], for_one.into_iter().rev().collect()).await;
    other.attached.command(vec![], for_other.into_iter().rev().collect()).await;
    let (of_one, of_other) =
        tokio::join!(ended(&mut one, 0..2 * REQUESTS), ended(&mut other, 0..2 * REQUESTS));
    for taken in [of_one, of_other] {
        assert_eq!(taken.len() as u64, REQUESTS);
        assert!(taken.values().all(|blocks| *blocks == PROMPT_TOKENS / 16), "{taken:?}");
    }
    for worker in [&mut one, &mut other] {
        let idle = |report: &baton_proto::Report| {
            report.jobs_running == 0 && report.handoffs_open == 0 && report.arena_slots_used == 0
        };
        worker.attached.report(idle).await;
    }
    one.stop().await;
    other.stop().await;
}
