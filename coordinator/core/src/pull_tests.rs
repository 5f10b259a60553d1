//! Who copies a cached prefix from a peer, and who does not.

use baton_types::{BlockHash, Epoch, StepModel};

use super::*;
use crate::{HandoffMode, PrefixPull, PromptBlocks, policy};

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
    let name = |block| if block <= shared { block } else { number << 8 | block };
    let names = (1..=16).map(|block| BlockHash::new(name(block)).expect("not 0")).collect();
    RequestShape {
        prompt_tokens: 16 * BLOCK_TOKENS,
        blocks: [PromptBlocks { tokens: BLOCK_TOKENS, names }].into(),
        ..RequestShape::default()
    }
}

fn core(order: Order, policy: &str, copy_ms_per_thousand_tokens: f64) -> Core {
    let ttft = Duration::from_secs(60);
    let mut settings = Settings { split: Split::PerRequest, order, ttft, ..Settings::default() };
    settings.targets.handoff_ms_per_thousand_tokens = copy_ms_per_thousand_tokens;
    let entry = policy::policy(policy).expect("it is there");
    Core::with_policy(settings, (entry.make)(0))
}

/// So many prompts that begin alike, all at once, come to one worker, which tells of the first; then there is another
/// worker, and one prompt more: the workers, and the worker and the pull of that one.
fn one_more(
    core: &mut Core,
    workers: [WorkerDescription; 2],
    prompts: u64,
    shared: u64,
) -> ([WorkerKey; 2], WorkerKey, Option<PrefixPull>) {
    let mut actions = Vec::new();
    let mut arrive = |core: &mut Core, number: u64| {
        actions.clear();
        let handoff = HandoffId::from_u128(u128::from(number));
        let key = core.arrive(shape(number, shared), handoff, Duration::ZERO, &mut actions);
        let start = |action: &Action| match *action {
            Action::Start { pull, .. } => Some(pull),
            _ => None,
        };
        (key, actions.iter().find_map(start).flatten())
    };
    let [first, second] = workers;
    let first = core.attach(first, Duration::ZERO, &mut Vec::new());
    for number in 1..=prompts {
        arrive(core, number);
    }
    let stored = &shape(1, shared).blocks[0].names;
    core.kv_told(first, &KvUpdate { sequence: 1, restart: true, removed: &[], stored });
    let second = core.attach(second, Duration::ZERO, &mut Vec::new());
    let (key, pull) = arrive(core, prompts + 1);
    let request = core.requests.get(key.0).expect("it is open");
    let job = request.answering.and_then(|job| core.job(job));
    let worker = job.map(|(.., worker)| worker).or(request.waits_for);
    ([first, second], worker.expect("it is placed"), pull)
}

fn pair() -> [WorkerDescription; 2] {
    [0, 1].map(|i| worker(i, FENCED, true))
}

/// After twelve prompts the first worker has some three seconds of work. What the last one computes anew is
/// 0.6 s of it.
const MANY: u64 = 12;

#[test]
fn an_idle_worker_copies_what_a_busy_one_holds() {
    for order in [Order::Arrival, Order::LateLast] {
        let mut core = core(order, "slack", 8.0);
        let ([a, b], worker, pull) = one_more(&mut core, pair(), MANY, 12);
        let expected = PrefixPull { from: a, tokens: 12 * BLOCK_TOKENS };
        assert_eq!((worker, pull), (b, Some(expected)), "{order:?}");
    }
}

#[test]
fn a_prompt_waits_a_while_for_who_holds_its_start() {
    for order in [Order::Arrival, Order::LateLast] {
        let mut core = core(order, "slack", 8.0);
        let ([a, _], worker, _) = one_more(&mut core, pair(), 3, 12);
        assert_eq!(worker, a, "{order:?}");
    }
}

#[test]
fn what_is_quicker_to_compute_is_computed() {
    // A copied token costs five times a computed one.
    let mut slow = core(Order::LateLast, "slack", 500.0);
    let ([_, b], worker, pull) = one_more(&mut slow, pair(), MANY, 12);
    assert_eq!((worker, pull), (b, None));

    let mut little = core(Order::LateLast, "slack", 8.0);
    let ([_, b], worker, pull) = one_more(&mut little, pair(), 1, 0);
    assert_eq!((worker, pull), (b, None), "nothing is shared");
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
        let ([_, b], worker, pull) = one_more(&mut core, pair, MANY, 12);
        assert_eq!((worker, pull), (b, None));
    }
    let mut core = core(Order::Arrival, "prefix-affinity", 8.0);
    let (_, _, pull) = one_more(&mut core, pair(), MANY, 12);
    assert_eq!(pull, None, "not every policy pulls");
}

/// A prompt of which the first worker lends the start to the second: the request, the job that pulls, the job that
/// lends and who, and for how long it is worth to wait.
fn lent(core: &mut Core) -> (RequestKey, JobId, JobId, WorkerKey, Duration) {
    let mut actions = Vec::new();
    let [first, second] = pair();
    let first = core.attach(first, Duration::ZERO, &mut actions);
    for number in 1..=MANY {
        let handoff = HandoffId::from_u128(number.into());
        core.arrive(shape(number, 12), handoff, Duration::ZERO, &mut actions);
    }
    let stored = &shape(1, 12).blocks[0].names;
    core.kv_told(first, &KvUpdate { sequence: 1, restart: true, removed: &[], stored });
    core.attach(second, Duration::ZERO, &mut actions);
    actions.clear();
    let id = HandoffId::from_u128(99);
    let request = core.arrive(shape(99, 12), id, Duration::ZERO, &mut actions);
    let [
        Action::Lend { job: lending, pull, worth, id: name, to, .. },
        Action::Start { job, worker, .. },
    ] = actions[..]
    else {
        panic!("{actions:?}")
    };
    assert_eq!((to, name), (worker, id.of_pull()));
    core.check_invariants();
    (request, job, lending, pull.from, worth)
}

#[test]
fn the_lender_has_a_job_until_the_copy_is_over() {
    for how in 0..4 {
        let mut core = core(Order::Arrival, "slack", 8.0);
        let (request, job, lending, from, worth) = lent(&mut core);
        // 6,144 tokens of 0.1 ms at a rate of 0.95.
        assert_eq!(worth.as_millis(), 646);
        let open = core.worker(from).expect("it is there").jobs_open;
        let mut actions = Vec::new();
        let mut tell = |event| core.handle(event, Duration::ZERO, &mut actions);
        match how {
            0 => tell(Event::PullOver { job }),
            1 => tell(Event::Ended { job: lending }),
            2 => tell(Event::Answered { job }),
            _ => tell(Event::ClientGone { request }),
        }
        let cancel = Action::Cancel { worker: from, job: lending };
        assert_eq!(actions.contains(&cancel), how != 1, "{how}: {actions:?}");
        assert_eq!(core.job(lending), None);
        assert_eq!(core.worker(from).expect("it is there").jobs_open, open - 1);
        core.check_invariants();
    }
}

#[test]
fn a_lender_that_fails_or_goes_fails_nobody() {
    for goes in [false, true] {
        let mut core = core(Order::Arrival, "slack", 8.0);
        let (request, job, lending, from, _) = lent(&mut core);
        let mut actions = Vec::new();
        if goes {
            core.handle(Event::WorkerLost { worker: from }, Duration::ZERO, &mut actions);
        } else {
            let fault = Fault::new(Origin::Handoff, FaultKind::Failed, "x");
            core.handle(Event::LegFailed { job: lending, fault }, Duration::ZERO, &mut actions);
            assert_eq!(actions, [], "nobody is to blame");
        }
        assert_eq!((core.job(lending), core.job(job).map(|(of, ..)| of)), (None, Some(request)));
        let known = core.requests.get(request.0).expect("it goes on");
        assert_eq!((known.retries_left, known.generation), (1, Generation(0)));
        core.check_invariants();
    }
}

#[test]
fn nothing_is_asked_of_who_is_given_nothing_or_of_prompts_that_are_not_known() {
    let prompts = |core: &mut Core, worker: WorkerKey, unknown: bool| {
        let stored = &shape(1, 12).blocks[0].names;
        core.kv_told(worker, &KvUpdate { sequence: 1, restart: true, removed: &[], stored });
        if !unknown {
            core.handle(Event::Drain { worker }, Duration::ZERO, &mut Vec::new());
        }
        let mut actions = Vec::new();
        let shape = RequestShape { prompt_unknown: unknown, ..shape(99, 12) };
        core.arrive(shape, HandoffId::from_u128(99), Duration::ZERO, &mut actions);
        actions
    };
    for unknown in [false, true] {
        let mut core = core(Order::Arrival, "slack", 8.0);
        let [first, second] = pair();
        let first = core.attach(first, Duration::ZERO, &mut Vec::new());
        for number in 1..=MANY {
            let handoff = HandoffId::from_u128(number.into());
            core.arrive(shape(number, 12), handoff, Duration::ZERO, &mut Vec::new());
        }
        core.attach(second, Duration::ZERO, &mut Vec::new());
        let actions = prompts(&mut core, first, unknown);
        assert!(actions.iter().all(|action| !matches!(action, Action::Lend { .. })), "{actions:?}");
        assert_eq!(core.requests_open() as u64, MANY + 1, "it is computed by somebody");
    }
}

#[test]
fn the_steps_that_a_copy_waits_for_count() {
    let mut core = core(Order::LateLast, "slack", 8.0);
    // To compute what could be copied takes 646 ms.
    core.settings.targets.pull_ms = 4_000.0;
    let ([_, b], worker, pull) = one_more(&mut core, pair(), MANY, 12);
    assert_eq!((worker, pull), (b, None));
}
