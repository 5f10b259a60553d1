//! One decision of the policy `slack` among 1,000 workers: from a request's arrival to the start of its
//! legs.
//!
//! `cargo bench -p baton-core --bench placement`

#![allow(clippy::unwrap_used, missing_debug_implementations)]

use std::{hint::black_box, sync::Arc, time::Duration};

use baton_core::{
    Action, Core, Event, HandoffMode, JobId, Order, RequestShape, Settings, Split,
    WorkerDescription, policy,
};
use baton_types::{Epoch, HandoffId, Role, StepModel};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const WORKERS: u32 = 1_000;
/// Of each prompt, 512 tokens each.
const BLOCKS: u64 = 16;

const MODEL: StepModel = StepModel {
    prefill_ms: [18.6, 0.0488, 1.11e-6],
    decode_ms: [11.1, 0.059, 2.65e-5],
    prefill_interference_factor: 0.813,
};

fn shape(number: u64) -> RequestShape {
    // Every fourth begins as others do.
    let shared = if number.is_multiple_of(4) { number % 64 } else { number };
    let blocks: Arc<[u64]> = (0..BLOCKS)
        .map(|block| (shared << 8 | block).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect();
    RequestShape {
        prompt_tokens: 512 * 16,
        prefix_blocks: blocks,
        prefix_block_tokens: 512,
        ..RequestShape::default()
    }
}

/// A fleet where each worker decodes some and has prompts to compute.
fn busy(order: Order) -> Core {
    let settings = Settings { split: Split::PerRequest, order, ..Settings::default() };
    let mut core = Core::with_policy(settings, (policy::policy("slack").unwrap().make)(0));
    let mut actions = Vec::new();
    for worker in 0..WORKERS {
        let description = WorkerDescription {
            name: format!("worker-{worker}"),
            epoch: Epoch::from_u128(u128::from(worker)),
            role: Role::Prefill,
            models: Vec::new(),
            handoff: HandoffMode::Fenced { compatibility: [0; 32] },
            model: Some(MODEL),
            kv_capacity_tokens: Some(600_000),
            pulls_prefixes: true,
        };
        core.attach(description, Duration::ZERO, &mut actions);
    }
    for request in 0..6 * u64::from(WORKERS) {
        let handoff = HandoffId::from_u128(u128::from(request));
        core.arrive(shape(request), handoff, Duration::ZERO, &mut actions);
    }
    let started: Vec<JobId> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Start { job, .. } => Some(*job),
            _ => None,
        })
        .collect();
    for job in started.iter().step_by(2) {
        core.handle(Event::Answered { job: *job }, Duration::from_millis(1), &mut actions);
    }
    core
}

fn decisions(c: &mut Criterion) {
    for (name, order) in [("as they come", Order::Arrival), ("late last", Order::LateLast)] {
        let mut core = busy(order);
        let mut actions = Vec::new();
        let mut number = 1_000_000;
        c.bench_function(&format!("place a request on 1,000 workers, {name}"), |b| {
            b.iter_batched(
                || {
                    number += 1;
                    (number, shape(number))
                },
                |(number, shape)| {
                    let handoff = HandoffId::from_u128(u128::from(number));
                    let now = Duration::from_millis(2);
                    let key = core.arrive(shape, handoff, now, &mut actions);
                    // So that the fleet stays as it is; cheap beside the placement.
                    core.handle(Event::ClientGone { request: key }, now, &mut actions);
                    black_box(actions.len());
                    actions.clear();
                },
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
