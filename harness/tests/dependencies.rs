//! The simulator runs the coordinator's own core, and the core knows no runtime and no clock.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, process::Command};

use serde_json::Value;

#[test]
fn the_simulator_runs_the_production_core() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id_of = |name: &str| {
        let packages = metadata["packages"].as_array().unwrap();
        let found = packages.iter().find(|package| package["name"] == name).unwrap();
        found["id"].as_str().unwrap().to_owned()
    };
    let normal_dependencies = |id: &str| -> Vec<String> {
        let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
        let node = nodes.iter().find(|node| node["id"] == id).unwrap();
        let is_normal = |dependency: &&Value| {
            dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null())
        };
        let dependencies = node["deps"].as_array().unwrap().iter().filter(is_normal);
        dependencies.map(|dependency| dependency["pkg"].as_str().unwrap().to_owned()).collect()
    };

    let core = id_of("baton-core");
    for who in ["baton-harness", "baton-coordinator"] {
        assert!(normal_dependencies(&id_of(who)).contains(&core), "{who} runs the core");
    }
    let mut below = BTreeSet::new();
    let mut open = vec![core];
    while let Some(id) = open.pop() {
        for dependency in normal_dependencies(&id) {
            if below.insert(dependency.clone()) {
                open.push(dependency);
            }
        }
    }
    for runtime in ["tokio", "hyper", "mio", "tonic", "quinn"] {
        let is_it = |id: &&String| {
            id.contains(&format!("#{runtime}@")) || id.contains(&format!("/{runtime}#"))
        };
        assert!(below.iter().find(is_it).is_none(), "the core depends on {runtime}");
    }
}
