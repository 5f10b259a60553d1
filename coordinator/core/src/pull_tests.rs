//! Who copies a cached prefix from a peer, and who does not.

use baton_types::{Epoch, StepModel};

use super::*;
use crate::{HandoffMode, PrefixPull, policy};

const FENCED: HandoffMode = HandoffMode::Fenced { compatibility: [1; 32] };
const MODEL: StepModel = StepModel {
    prefill_ms: [10.0, 0.1, 0.0],
    decode_ms: [10.0, 0.1, 0.0],
    prefill_interference_factor: 0.8,
};
const BLOCK_TOKENS: u32 = 512;

fn worker(index: u64, handoff: HandoffMode, pulls_prefixes: bool) -> WorkerDescription {
    WorkerDescription {
        name: format!("w{index}"),
        epoch: Epoch::from_u128(1),
        role: Role::Prefill,
        models: Vec::new(),
        handoff,
        model: Some(MODEL),
        kv_capacity_tokens: Some(100_000),
        pulls_prefixes,
    }
}

/// Sixteen blocks, the first of which are the same for all requests.
fn shape(number: u64, shared: u64) -> RequestShape {
    RequestShape {
        prompt_tokens: 16 * BLOCK_TOKENS,
        prefix_blocks: (0..16)
            .map(|block| if block < shared { block } else { number << 8 | block })
            .collect(),
        prefix_block_tokens: BLOCK_TOKENS,
        ..RequestShape::default()
    }
}

fn core(order: Order, policy: &str, copy_ms_per_thousand_tokens: f64) -> Core {
    let mut settings = Settings { split: Split::PerRequest, order, ..Settings::default() };
    settings.targets.handoff_ms_per_thousand_tokens = copy_ms_per_thousand_tokens;
    let entry = policy::policy(policy).expect("it is there");
    Core::with_policy(settings, (entry.make)(0))
}

/// Two prompts that begin alike, one after the other: the worker and the pull of the second. The first
/// keeps its worker busy.
fn second_of_two(core: &mut Core, shared: u64) -> (WorkerKey, Option<PrefixPull>) {
    let mut actions = Vec::new();
    for number in 1..=2 {
        actions.clear();
        let handoff = HandoffId::from_u128(u128::from(number));
        core.arrive(shape(number, shared), handoff, Duration::ZERO, &mut actions);
    }
    let start = |action: &Action| match *action {
        Action::Start { worker, pull, .. } => Some((worker, pull)),
        _ => None,
    };
    actions.iter().find_map(start).expect("it starts at once")
}

fn attach(core: &mut Core, workers: [WorkerDescription; 2]) -> [WorkerKey; 2] {
    workers.map(|worker| core.attach(worker, Duration::ZERO, &mut Vec::new()))
}

#[test]
fn an_idle_worker_copies_what_a_busy_one_holds() {
    for order in [Order::Arrival, Order::LateLast] {
        let mut core = core(order, "slack", 8.0);
        let [a, b] = attach(&mut core, [0, 1].map(|i| worker(i, FENCED, true)));
        let pull = PrefixPull { from: a, tokens: 12 * BLOCK_TOKENS };
        assert_eq!(second_of_two(&mut core, 12), (b, Some(pull)), "{order:?}");
    }
}

#[test]
fn what_is_quicker_to_compute_is_computed() {
    // A copied token costs five times a computed one.
    let mut slow = core(Order::LateLast, "slack", 500.0);
    let [_, b] = attach(&mut slow, [0, 1].map(|i| worker(i, FENCED, true)));
    assert_eq!(second_of_two(&mut slow, 12), (b, None));

    let mut little = core(Order::LateLast, "slack", 8.0);
    let [_, b] = attach(&mut little, [0, 1].map(|i| worker(i, FENCED, true)));
    assert_eq!(second_of_two(&mut little, 0), (b, None), "nothing is shared");
}

#[test]
fn only_who_can_is_asked_to() {
    let other = HandoffMode::Fenced { compatibility: [2; 32] };
    let pairs = [
        [worker(0, FENCED, false), worker(1, FENCED, true)],
        [worker(0, FENCED, true), worker(1, FENCED, false)],
        [worker(0, FENCED, true), worker(1, other, true)],
        [worker(0, HandoffMode::None, true), worker(1, HandoffMode::None, true)],
    ];
    for pair in pairs {
        let mut core = core(Order::LateLast, "slack", 8.0);
        attach(&mut core, pair);
        assert_eq!(second_of_two(&mut core, 12).1, None);
    }
    let mut core = core(Order::Arrival, "prefix-affinity", 8.0);
    attach(&mut core, [0, 1].map(|i| worker(i, FENCED, true)));
    assert_eq!(second_of_two(&mut core, 12).1, None, "not every policy pulls");
}
