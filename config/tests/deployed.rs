//! The file in `deploy/bare-metal` is right, but for the certificates that everybody makes themselves.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{fs, path::Path};

use baton_config::{ClusterConfig, EngineConfig, VllmSource};
use baton_types::Role;

fn deployed() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/bare-metal/baton.toml");
    fs::read_to_string(file).unwrap()
}

#[test]
fn only_the_certificates_are_missing() {
    let empty = tempfile::tempdir().unwrap();
    let errors = ClusterConfig::parse(&deployed(), empty.path()).unwrap_err().errors;
    let keys: Vec<_> = errors.iter().map(|error| error.key.as_str()).collect();
    assert_eq!(keys, ["tls.ca", "tls.certificate", "tls.private_key"], "{errors:#?}");
}

#[test]
fn with_them_it_is_two_prefill_and_two_decode_workers_behind_https_and_a_key() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("tls")).unwrap();
    for file in ["ca.pem", "host.pem", "host.key"] {
        fs::write(directory.path().join("tls").join(file), "").unwrap();
    }
    let cluster = ClusterConfig::parse(&deployed(), directory.path()).unwrap();
    let workers: Vec<_> =
        cluster.workers.iter().map(|worker| (worker.name.as_str(), worker.role)).collect();
    assert_eq!(
        workers,
        [
            ("prefill-0", Role::Prefill),
            ("prefill-1", Role::Prefill),
            ("decode-0", Role::Decode),
            ("decode-1", Role::Decode),
        ]
    );
    assert!(cluster.coordinator.https.is_some());
    let admin = cluster.admin.as_ref().unwrap();
    assert!(admin.listen.ip().is_loopback());
    assert_eq!(admin.token_file, Some(directory.path().join("admin.token")));
    let [tenant] = &cluster.tenants[..] else { panic!("{:?}", cluster.tenants) };
    assert_eq!(tenant.key_file.as_deref(), Some(directory.path().join("keys/default").as_path()));
    for worker in &cluster.workers {
        assert_eq!(worker.coordinators, ["10.77.0.10:7000"]);
        let EngineConfig::Vllm(vllm) = &worker.engine else { panic!("{:?}", worker.engine) };
        let VllmSource::Command { port, .. } = &vllm.source else { panic!("{:?}", vllm.source) };
        assert_eq!(*port, 8100);
        // Where baton-worker@.service makes a directory for it.
        let socket = format!("/run/baton/{}/kv.sock", worker.name);
        assert_eq!(vllm.connector_socket.as_deref(), Some(Path::new(&socket)));
    }
}
