//! The dashboard and the alert rules over a real Prometheus that scrapes a live cluster under a little
//! load: each expression has data, and rules see what they are for.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use baton_tests::{Cluster, ClusterBuilder, Prometheus, TlsPem, prometheus_or_skip};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

fn deployed(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/dashboards").join(file)
}

/// Each expression of the dashboard, with its panel's title.
fn dashboard() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(deployed("grafana.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
            expressions.push((panel["title"].as_str().unwrap().to_owned(), text));
        }
    }
    expressions
}

/// What a rule compares. A comparison itself has data only while the alert fires.
fn operands(query: &str) -> Vec<String> {
    let query = query.split(" or absent(").next().unwrap_or_default();
    let (left, right) = [" > ", " < ", " == "]
        .iter()
        .find_map(|comparison| query.rsplit_once(comparison))
        .unwrap_or_else(|| panic!("no comparison: {query}"));
    let is_number = right.trim().parse::<f64>().is_ok();
    let sides = if is_number { vec![left] } else { vec![left, right] };
    sides.into_iter().map(str::to_owned).collect()
}

/// Of one host that trusts nobody but itself.
fn certificate() -> TlsPem {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap().pem();
    TlsPem { ca: certificate.clone(), certificate, private_key: key.serialize_pem() }
}

/// Requests that stream, of prompts that begin alike.
async fn load(cluster: &Cluster, round: u64) {
    let start: Vec<u64> = (0..64).collect();
    for number in 0..3 {
        let prompt: Vec<u64> = start.iter().copied().chain([1000 + round, number]).collect();
        let body = json!({"prompt": prompt, "max_tokens": 6, "stream": true, "ignore_eos": true});
        let streamed = cluster.stream("/v1/completions", &body).await;
        assert!(streamed.is_ok(), "{streamed:?}");
    }
    assert_eq!(cluster.complete("One token.", 1).await.path(), "aggregated");
}

/// Loads the cluster until the expression has a number.
async fn has_data(cluster: &Cluster, prometheus: &Prometheus, what: &str, expression: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut round = 0;
    loop {
        let values = prometheus.query(expression).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        if !values.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{what} has no data: {expression}");
        load(cluster, round).await;
        round += 1;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

async fn is_pending_or_fires(prometheus: &Prometheus, alert: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let rules = prometheus.alert_rules().await.unwrap();
        let rule = rules.iter().find(|rule| rule["name"] == alert).unwrap();
        if rule["state"] != "inactive" {
            return;
        }
        assert!(Instant::now() < deadline, "{alert} sees nothing: {rule}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn every_expression_has_data_and_rules_see_what_they_are_for() {
    let test = "every_expression_has_data_and_rules_see_what_they_are_for";
    let Some(programs) = prometheus_or_skip(test) else { return };
    let rules = deployed("alerts.yaml");
    let mut promtool = Command::new(programs.join("promtool"));
    let checked = promtool.args(["check", "rules"]).arg(&rules).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));

    let mut cluster = ClusterBuilder::sim()
        .pools(1, 3)
        .engine("time_scale = 0.05")
        .balancer("actuator = \"advise\"")
        .tls(certificate())
        .start()
        .await
        .unwrap();
    let prometheus = Prometheus::start(&programs, cluster.address(), &rules).await.unwrap();
    load(&cluster, 0).await;
    // A leg that fails, once Prometheus knows that there were none.
    has_data(&cluster, &prometheus, "the first scrape", "up{job=\"baton\"} == 1").await;
    let long = json!({"prompt": "Who catches it? ".repeat(30), "max_tokens": 8000,
        "stream": true, "ignore_eos": true});
    let broken = cluster.http.post(cluster.url("/v1/completions")).json(&long).send().await;
    let broken = broken.unwrap();
    let decode = broken.headers()["x-baton-decode-worker"].to_str().unwrap().to_owned();
    cluster.kill(&decode);
    let _ = broken.text().await;
    cluster.start_process(&decode).unwrap();

    // A worker that goes over to the other pool.
    let spare = if decode == "decode-2" { "decode-1" } else { "decode-2" };
    let role = format!("/admin/workers/{spare}/role");
    let ordered = cluster.admin_post(&role, &json!({"role": "prefill"})).await;
    assert_eq!(ordered.status, 200, "{}", ordered.text);

    let expressions = dashboard();
    assert!(expressions.len() > 30, "{}", expressions.len());
    for (title, expression) in &expressions {
        has_data(&cluster, &prometheus, title, expression).await;
    }
    let alerts = prometheus.alert_rules().await.unwrap();
    let page = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md"),
    );
    let page = page.unwrap();
    assert!(alerts.len() >= 15, "{}", alerts.len());
    for alert in &alerts {
        let name = alert["name"].as_str().unwrap();
        assert_eq!(alert["health"], "ok", "{alert}");
        for operand in operands(alert["query"].as_str().unwrap()) {
            has_data(&cluster, &prometheus, name, &operand).await;
        }
        assert!(page.contains(&format!("### {name}\n")), "docs/operations.md tells of {name}");
        let link = format!("docs/operations.md#{}", name.to_lowercase());
        assert_eq!(alert["annotations"]["runbook"], link);
    }

    cluster.terminate("prefill-0").unwrap();
    cluster.terminate(spare).unwrap();
    is_pending_or_fires(&prometheus, "BatonPoolEmpty").await;
    cluster.kill("coordinator");
    is_pending_or_fires(&prometheus, "BatonCoordinatorDown").await;
}
