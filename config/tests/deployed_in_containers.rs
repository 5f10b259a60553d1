//! The files in `deploy/kubernetes` and `deploy/docker` are right.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{collections::BTreeSet, fs, path::Path};

use baton_config::{ClusterConfig, EngineConfig, Requirement, TransportChoice, VllmSource};
use baton_types::Role;

/// Reads one of the files where the Secrets are mounted.
fn deployed(file: &str) -> ClusterConfig {
    let mounted = tempfile::tempdir().unwrap();
    for file in [
        "baton-tls/ca.crt",
        "baton-tls/tls.crt",
        "baton-tls/tls.key",
        "baton-api-keys/default",
        "baton-admin/token",
    ] {
        let path = mounted.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    let text = fs::read_to_string(path).unwrap();
    let text = text.replace("/etc/baton-", &format!("{}/baton-", mounted.path().display()));
    ClusterConfig::parse(&text, mounted.path()).unwrap_or_else(|errors| panic!("{file}: {errors}"))
}

const WORKERS: [&str; 3] = [
    "kubernetes/base/worker.toml",
    "kubernetes/overlays/rdma/worker.toml",
    "kubernetes/overlays/cpu-demo/worker.toml",
];

#[test]
fn a_pod_of_either_deployment_is_a_worker_of_its_own_name() {
    for file in WORKERS {
        let cluster = deployed(file);
        for (pod, role) in [
            ("baton-prefill-7c9d4b-x2v9k", Role::Prefill),
            ("baton-decode-5f6-abcde", Role::Decode),
        ] {
            let worker = cluster.worker(pod, role, Some("10.1.2.3:7100")).unwrap();
            assert_eq!(worker.coordinators, ["baton-workers:7000"], "{file}");
            assert!(worker.every_address, "{file}");
            assert_eq!(worker.health_listen.unwrap().port(), 7200, "{file}");
        }
        assert_eq!(cluster.insecure_plaintext, file.contains("demo"), "{file}");
    }
}

#[test]
fn vllm_is_spoken_to_inside_its_pod_only() {
    for file in &WORKERS[..2] {
        for worker in deployed(file).workers {
            let EngineConfig::Vllm(vllm) = worker.engine else { panic!("{:?}", worker.engine) };
            assert_eq!(vllm.source, VllmSource::Url("http://127.0.0.1:8100".into()));
            assert_eq!(vllm.connector_socket.as_deref(), Some(Path::new("/run/baton/kv.sock")));
        }
    }
}

#[test]
fn only_the_rdma_overlay_wants_rdma_and_will_have_nothing_else() {
    for file in WORKERS {
        for worker in deployed(file).workers {
            let wants = file.contains("rdma");
            let required = if wants { vec![Requirement::Rdma] } else { Vec::new() };
            assert_eq!(worker.transfer.require, required, "{file}");
            assert_eq!(worker.transfer.transport == TransportChoice::Ucx, wants, "{file}");
        }
    }
}

#[test]
fn coordinators_listen_where_workers_dial() {
    for (coordinator, worker) in [
        ("kubernetes/base/coordinator.toml", WORKERS[0]),
        ("kubernetes/components/autoscaling/coordinator.toml", WORKERS[0]),
        ("kubernetes/overlays/cpu-demo/coordinator.toml", WORKERS[2]),
    ] {
        let (coordinator, worker) = (deployed(coordinator), deployed(worker));
        assert!(coordinator.workers.is_empty());
        assert_eq!(coordinator.coordinator.advertise, worker.coordinator.advertise);
        assert_eq!(coordinator.coordinator.workers_listen.port(), 7000);
        assert_eq!(coordinator.tls.is_some(), worker.tls.is_some());
    }
}

#[test]
fn nobody_is_let_in_without_a_key_but_by_the_demonstration() {
    for file in ["base", "components/autoscaling", "overlays/cpu-demo"] {
        let cluster = deployed(&format!("kubernetes/{file}/coordinator.toml"));
        let is_demo = file.ends_with("demo");
        assert_eq!(cluster.tenants.is_empty(), is_demo, "{file}");
        assert!(cluster.tenants.iter().all(|tenant| tenant.key_file.is_some()), "{file}");
        assert_eq!(cluster.admin.is_none(), is_demo, "{file}");
        assert!(cluster.admin.is_none_or(|admin| admin.listen.ip().is_loopback()), "{file}");
    }
}

#[test]
fn every_service_of_the_compose_file_has_its_worker() {
    let compose = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker/compose.yaml");
    let compose = fs::read_to_string(compose).unwrap();
    let cluster = deployed("docker/baton.toml");
    let mut started = BTreeSet::new();
    for line in compose.lines().filter(|line| line.contains("--name")) {
        let words: Vec<_> =
            line.split([' ', ',', '[', ']', '"']).filter(|w| !w.is_empty()).collect();
        let after = |flag: &str| words[words.iter().position(|word| *word == flag).unwrap() + 1];
        let (name, advertise) = (after("--name"), after("--advertise"));
        let role = words[1].trim_end_matches("-worker").parse().unwrap();
        cluster.worker(name, role, Some(advertise)).unwrap();
        assert!(compose.contains(&format!("\n  {name}:\n")), "advertised under its service's name");
        started.insert(name.to_owned());
    }
    assert_eq!(started.len(), 4);
}

const RULE: &str = "\
# Made of deploy/dashboards/alerts.yaml; a test sees to that, and `BATON_UPDATE=1 cargo test -p baton-config`
# writes it anew.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: baton
  labels:
    app.kubernetes.io/name: baton
spec:
";

#[test]
fn the_operator_is_given_the_rules_of_the_dashboards() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let alerts = fs::read_to_string(deploy.join("dashboards/alerts.yaml")).unwrap();
    let groups = alerts.find("groups:").unwrap();
    let indented = |line: &str| match line.trim() {
        "" => "\n".to_owned(),
        _ => format!("  {line}\n"),
    };
    let expected = RULE.to_owned() + &alerts[groups..].lines().map(indented).collect::<String>();
    let file = deploy.join("kubernetes/components/monitoring/prometheus-rule.yaml");
    if std::env::var_os("BATON_UPDATE").is_some() {
        fs::write(&file, &expected).unwrap();
    }
    assert!(
        fs::read_to_string(&file).unwrap_or_default() == expected,
        "{} is not what alerts.yaml gives: run `BATON_UPDATE=1 cargo test -p baton-config`",
        file.display()
    );
}

#[test]
fn an_image_is_made_from_every_crate() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let ignored = fs::read_to_string(root.join("deploy/docker/Dockerfile.dockerignore")).unwrap();
    let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap();
    let members: Vec<_> = members.split('"').skip(1).step_by(2).collect();
    assert!(members.contains(&"cli"), "{members:?}");
    for member in members {
        let folder = member.split('/').next().unwrap();
        let line = format!("!{folder}");
        assert!(ignored.lines().any(|it| it == line), "{line} is not in Dockerfile.dockerignore");
    }
}
