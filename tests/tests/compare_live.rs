//! `baton compare --live`: the same requests in each mode, on a cluster that is not restarted.

use std::{path::Path, process::Stdio};

use baton_tests::{ADMIN_TOKEN, Cluster, ClusterBuilder, baton};
use serde_json::Value;

const REQUESTS: u64 = 20;

fn write_experiment(directory: &Path, prefill: u32) {
    let line = |n: u64| {
        format!("{{\"timestamp\":{},\"input_length\":{},\"output_length\":3}}\n", n * 10, 40 + n)
    };
    std::fs::write(directory.join("t.jsonl"), (0..REQUESTS).map(line).collect::<String>()).unwrap();
    let profile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/profiles/demo.json");
    let experiment = format!(
        "what = \"simulate\"\nprofile = {profile:?}\ntraces = [\"t.jsonl\"]\nworkers = [{}]\n\
         modes = [\"aggregated\", \"static:{prefill}P1D\"]\n[[slo]]\nttft_ms = 60000\nitl_ms = 60000\n",
        prefill + 1
    );
    std::fs::write(directory.join("live.toml"), experiment).unwrap();
}

/// Its success, stdout and stderr.
async fn compare(cluster: &Cluster, token: &str) -> (bool, String, String) {
    let at = |name: &str| cluster.directory().join(name).display().to_string();
    std::fs::write(at("token"), token).unwrap();
    let (config, out, token) = (at("live.toml"), at("out"), at("token"));
    let (url, admin) = (cluster.url(""), cluster.admin_url(""));
    let output = tokio::process::Command::new(baton().unwrap())
        .args(["compare", "--json", "--rounds", "2", "--config", &config, "--out", &out])
        .args(["--live", &url, "--admin", &admin, "--token-file", &token])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[tokio::test]
async fn modes_take_turns_on_one_cluster_that_keeps_its_own() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let before = cluster.state().await["mode"].clone();
    write_experiment(cluster.directory(), 1);
    let (success, out, errors) = compare(&cluster, ADMIN_TOKEN).await;
    assert!(success, "{errors}");
    let report: Value = serde_json::from_str(&out).unwrap();
    let contenders = report["scenarios"][0]["contenders"].as_array().unwrap();
    let told: Vec<_> = contenders
        .iter()
        .map(|contender| {
            let summary = &contender["run"]["summary"];
            let count = |key: &str| summary[key].as_u64().unwrap();
            (contender["mode"].as_str().unwrap(), count("completed"), count("disaggregated"))
        })
        .collect();
    let twice = 2 * REQUESTS;
    assert_eq!(told, [("aggregated", twice, 0), ("disaggregated", twice, twice)]);
    assert!(contenders[0]["setup"].as_str().unwrap().starts_with("2 rounds"), "{report}");
    assert!(report["origin"]["endpoint"].as_str().unwrap().contains("1 prefill and 1 decode"));
    assert_eq!(cluster.state().await["mode"], before);
    let page = std::fs::read_to_string(cluster.directory().join("out/report.html")).unwrap();
    assert!(page.contains("disaggregated") && !page.contains(ADMIN_TOKEN));
}

#[tokio::test]
async fn a_comparison_that_cannot_be_is_refused_before_it_begins() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    write_experiment(cluster.directory(), 2);
    let (success, _, errors) = compare(&cluster, ADMIN_TOKEN).await;
    assert!(!success && errors.contains("workers: [3], and the cluster has 2"), "{errors}");
    let (success, _, errors) = compare(&cluster, "guess").await;
    assert!(!success && errors.contains("does not take this token"), "{errors}");
    assert!(!errors.contains("guess"), "{errors}");
    let metrics = cluster.eventually_idle().await;
    assert_eq!(metrics.sum("baton_requests_total", &[]), 0.0);
}
