//! `baton bench` and `baton profile` against real clusters.

use std::{
    net::TcpListener,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use baton_tests::{ClusterBuilder, baton};
use serde_json::Value;

const REQUESTS: u64 = 40;

/// Runs the program to its end. Answers its success, stdout and stderr.
async fn run(arguments: &[&str]) -> (bool, String, String) {
    let output = tokio::process::Command::new(baton().unwrap())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

async fn bench(arguments: &[&str]) -> (bool, Value) {
    let arguments = [&["bench", "--json"], arguments].concat();
    let (success, out, errors) = run(&arguments).await;
    (success, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}\n{errors}")))
}

/// A conversation that goes on: each request has the prefix of the one before.
fn write_trace(file: &Path) {
    let line = |n: u64| {
        let (blocks, phase) = (n / 10 + 1, if n.is_multiple_of(2) { "even" } else { "odd" });
        let (input, output) = (blocks * 512, 3 + n % 5);
        let hash_ids: Vec<_> = (0..blocks).collect();
        format!(
            "{{\"timestamp\":{},\"input_length\":{input},\"output_length\":{output},\
             \"phase\":\"{phase}\",\"hash_ids\":{hash_ids:?}}}\n",
            n * 20
        )
    };
    std::fs::write(file, (0..REQUESTS).map(line).collect::<String>()).unwrap();
}

#[tokio::test]
async fn a_trace_is_replayed_to_the_token() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let (trace, out) = (cluster.directory().join("t.jsonl"), cluster.directory().join("out"));
    write_trace(&trace);
    let (success, report) = bench(&[
        "--url",
        &cluster.url(""),
        "--trace",
        trace.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--seed",
        "5",
        "--warmup",
        "2",
    ])
    .await;
    assert!(success, "{report}");
    assert_eq!(report["requests"], REQUESTS);
    assert_eq!(report["completed"], REQUESTS);
    assert_eq!(report["disaggregated"], REQUESTS);
    assert_eq!(report["prompt_tokens_ratio"], 1.0);
    assert_eq!(report["seed"], 5);
    assert_eq!(report["attainment_by_phase"].as_object().unwrap().len(), 2);
    assert!(report["ttft_ms"]["p50"].as_f64().unwrap() > 0.0);
    assert!(report["client"]["send_lag_ms"]["p99"].as_f64().is_some());

    let written: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("bench.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    let csv = std::fs::read_to_string(out.join("requests.csv")).unwrap();
    for (line, n) in csv.lines().skip(1).zip(0..) {
        let fields: Vec<_> = line.split(',').collect();
        assert_eq!(fields[1], if n % 2 == 0 { "even" } else { "odd" });
        assert_eq!(fields[2..4], [((n / 10 + 1) * 512).to_string(), (3 + n % 5).to_string()]);
        assert_eq!(fields[6], "completed");
    }
    assert_eq!(csv.lines().count(), 1 + usize::try_from(REQUESTS).unwrap());

    let metrics = cluster.eventually_idle().await;
    // Those of the warm-up are there too.
    let requests = metrics.sum("baton_requests_total", &[]);
    assert_eq!(requests, (REQUESTS + 2) as f64);
}

#[tokio::test]
async fn chat_endpoints_are_asked_in_words() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let (success, report) = bench(&[
        "--url",
        &cluster.url("/v1"),
        "--rate",
        "100",
        "--requests",
        "20",
        "--input-tokens",
        "50",
        "--output-tokens",
        "6",
        "--chat",
    ])
    .await;
    assert!(success, "{report}");
    assert_eq!(report["completed"], 20);
    assert!(report["prompt_tokens_ratio"].as_f64().unwrap() >= 1.0, "{report}");
}

#[tokio::test]
async fn refusals_are_counted_and_told() {
    let cluster = ClusterBuilder::sim().engine("max_model_tokens = 64").start().await.unwrap();
    let (success, report) = bench(&[
        "--url",
        &cluster.url(""),
        "--rate",
        "200",
        "--requests",
        "5",
        "--input-tokens",
        "100",
        "--output-tokens",
        "6",
    ])
    .await;
    assert!(!success);
    assert_eq!((&report["rejected"], &report["attainment"]), (&5.into(), &0.0.into()));
    let errors = report["errors"].as_object().unwrap();
    assert!(
        errors.iter().all(|(error, count)| error.starts_with("400: ") && *count == 5),
        "{report}"
    );
}

/// It never waits for an answer: a server that gives none gets every request all the same.
#[tokio::test]
async fn a_silent_server_gets_every_request() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    std::thread::spawn({
        let connections = connections.clone();
        move || {
            let mut held = Vec::new();
            for connection in listener.incoming() {
                held.push(connection);
                connections.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let (success, report) = bench(&[
        "--url",
        &url,
        "--model",
        "any",
        "--rate",
        "200",
        "--requests",
        "30",
        "--input-tokens",
        "5",
        "--output-tokens",
        "6",
        "--warmup",
        "0",
        "--patience",
        "1",
    ])
    .await;
    assert!(!success);
    assert_eq!((&report["requests"], &report["unfinished"]), (&30.into(), &30.into()));
    assert_eq!(connections.load(Ordering::Relaxed), 30);
}

#[tokio::test]
async fn a_live_engine_is_profiled() {
    // Slow enough that sequences decode together on a busy machine too.
    let cluster = ClusterBuilder::sim().engine("time_scale = 0.3").start().await.unwrap();
    let out = cluster.directory().join("live.json");
    let (success, said, errors) = run(&[
        "profile",
        "--url",
        &cluster.url(""),
        "--max-model-len",
        "512",
        "--max-sequences",
        "4",
        "--out",
        out.to_str().unwrap(),
    ])
    .await;
    assert!(success, "{said}\n{errors}");
    let profile: Value = serde_json::from_str(&std::fs::read_to_string(&out).unwrap()).unwrap();
    for kind in ["prefill_ms", "decode_ms"] {
        let coefficients = profile[kind].as_array().unwrap();
        assert!(coefficients.iter().all(|c| c.as_f64().unwrap() >= 0.0), "{profile}");
    }
    // What was measured can be fitted again.
    let points = out.with_extension("csv");
    let (success, again, errors) = run(&["profile", "--points", points.to_str().unwrap()]).await;
    assert!(success, "{errors}");
    assert!(again.contains("prefill  ") && again.contains("decode   "), "{again}");
}

#[tokio::test]
async fn what_cannot_be_replayed_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("bad.jsonl");
    std::fs::write(&trace, "{\"timestamp\":0,\"input_length\":0,\"output_length\":1}\n").unwrap();
    let trace = trace.to_str().unwrap();
    for (arguments, expected) in [
        (&["--trace", trace][..], "bad.jsonl:1: input_length is 0: expected at least 1"),
        (&["--rate", "0"], "give a number above 0"),
        (&["--rate", "1", "--input-tokens", "5"], "--output-tokens"),
        (&["--trace", "no-such-file"], "no-such-file: cannot be read: "),
    ] {
        let url = &["bench", "--url", "http://127.0.0.1:1"][..];
        let (success, _, errors) = run(&[url, arguments].concat()).await;
        assert!(!success && errors.contains(expected), "no {expected:?} in {errors}");
    }
}
