//! How long it takes to decide where a request goes, among a thousand workers.

#![allow(
    clippy::expect_used,
    missing_docs,
    reason = "a benchmark fails loudly, criterion has no docs"
)]

use std::{hint::black_box, time::Duration};

use baton_core::{
    Action, AdmissionSettings, Core, Event, HandoffMode, Order, RequestShape, Settings, Split,
    WorkerDescription, WorkerKey, policy,
};
use baton_types::{Epoch, HandoffId, Role, StepModel};
use criterion::{Criterion, criterion_group, criterion_main};

const WORKERS: u32 = 1000;
const NOW: Duration = Duration::from_secs(1);
const MODEL: StepModel = StepModel {
    prefill_ms: [16.0, 0.12, 2.5e-6],
    decode_ms: [11.0, 0.06, 2.6e-5],
    prefill_interference_factor: 0.8,
};

/// As a live coordinator has them.
fn live(split: Split) -> Settings {
    Settings {
        split,
        order: Order::LateLast,
        admission: Some(AdmissionSettings::default()),
        keeps_decisions: true,
        ..Settings::default()
    }
}

/// Each with a few prompts and a few sequences that decode.
fn busy_fleet(settings: Settings, policy: &str) -> (Core, Vec<WorkerKey>) {
    let entry = policy::policy(policy).expect("a policy");
    let mut core = Core::with_policy(settings, (entry.make)(1));
    let mut actions = Vec::new();
    let workers = (0..WORKERS)
        .map(|index| {
            let description = WorkerDescription {
                name: format!("worker-{index}"),
                epoch: Epoch::from_u128(index.into()),
                role: if index % 4 == 0 { Role::Prefill } else { Role::Decode },
                models: vec!["m".to_owned()],
                handoff: HandoffMode::Fenced { compatibility: [1; 32] },
                model: Some(MODEL),
                kv_capacity_tokens: Some(500_000),
                pulls_prefixes: true,
            };
            core.attach(description, NOW, &mut actions)
        })
        .collect();
    for index in 0..4 * WORKERS {
        actions.clear();
        core.arrive(shape(index, &[]), HandoffId::from_u128(index.into()), NOW, &mut actions);
        let started: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Start { job, .. } => Some(*job),
                _ => None,
            })
            .collect();
        // Half of them decode by now.
        if let Some(job) = started.last().filter(|_| index % 2 == 0) {
            core.handle(Event::Answered { job: *job }, NOW, &mut actions);
        }
    }
    (core, workers)
}

fn shape(seed: u32, holders: &[WorkerKey]) -> RequestShape {
    RequestShape {
        model: Some("m".to_owned()),
        prompt_tokens: 200 + seed * 977 % 4000,
        held_tokens: holders.iter().map(|worker| (*worker, 192)).collect(),
        ..RequestShape::default()
    }
}

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide among 1000 workers");
    let adaptive = live(Split::PerRequest);
    let late = Settings {
        order: Order::Arrival,
        admission: None,
        ttft: Duration::from_millis(500),
        ..adaptive
    };
    for (name, settings, policy) in [
        ("adaptive, slack", adaptive, "slack"),
        ("adaptive, slack, late everywhere", late, "slack"),
        ("always, least-load", live(Split::Always), "least-load"),
    ] {
        let (mut core, workers) = busy_fleet(settings, policy);
        let mut actions = Vec::new();
        // A tenth of them have the prompt's beginning cached.
        let holders: Vec<_> = workers.iter().step_by(10).copied().collect();
        let request = shape(7, &holders);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                actions.clear();
                let handoff = HandoffId::from_u128(1);
                let key = core.arrive(black_box(request.clone()), handoff, NOW, &mut actions);
                core.handle(Event::ClientGone { request: key }, NOW, &mut actions);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
