//! The manifests of `deploy/kubernetes` and the actuator, at a real API server without nodes.

mod actuator;
mod dead_node;
mod manifests;
mod rights;

use std::path::{Path, PathBuf};

use baton_tests::{ControlPlane, kube_or_skip};
use kube::{Api, Client};

const NAMESPACE: &str = "baton";
const OVERLAYS: [&str; 3] = ["cuda", "rdma", "cpu-demo"];
const COMPONENTS: [&str; 10] = [
    "components/autoscaling",
    "components/autoscaling/network-policy",
    "components/monitoring",
    "components/network-policy",
    "examples/cert-manager",
    "examples/hpa",
    "examples/keda",
    "examples/model-ephemeral-volume",
    "examples/model-object-storage",
    "examples/model-pvc",
];

fn say(scenario: &str) {
    println!("-- {scenario}");
}

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").canonicalize().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_real_api_server() {
    let Some(programs) = kube_or_skip("on_a_real_api_server") else { return };
    let mut control_plane = ControlPlane::start(programs).await.unwrap();

    say("every overlay and component is taken as it is");
    manifests::custom_resources_are_defined(&control_plane).await;
    apply(&control_plane, &manifests().join("overlays/cuda"));
    manifests::secrets_are_made(&control_plane);
    for overlay in OVERLAYS {
        manifests::overlay_is_taken(&control_plane, overlay).await;
    }
    apply(&control_plane, &with_component(&control_plane, "components/network-policy"));
    for component in COMPONENTS {
        manifests::component_is_taken(&control_plane, component);
    }
    say("what is not right is refused");
    manifests::a_slip_is_refused(&control_plane);
    say("pods keep to the standard of their namespace");
    manifests::pod_security(&control_plane).await;

    let plain = with_component(&control_plane, "components/network-policy");
    apply(&control_plane, &plain);
    apply(&control_plane, &with_component(&control_plane, "components/autoscaling"));
    say("the coordinators may scale their two Deployments, and nothing else");
    rights::rights(&control_plane).await;
    say("the actuator scales within its bounds");
    actuator::bounds(&control_plane).await;
    say("the actuator outlasts changes by others");
    actuator::conflicts(&control_plane).await;
    say("the actuator says what it lacks");
    actuator::refusals(&control_plane).await;
    say("the actuator outlasts an API server that goes away");
    actuator::outage(&mut control_plane).await;
    say("a node that dies needs no hand");
    dead_node::node_dies(&mut control_plane).await;
}

/// Applies strictly, on the server's side; whatever it warns of counts as wrong.
fn apply(control_plane: &ControlPlane, kustomization: &Path) {
    let arguments = ["apply", "--server-side", "--force-conflicts", "--validate=strict", "-k"];
    let directory = kustomization.to_string_lossy();
    let (_, warnings) =
        control_plane.kubectl(&[&arguments[..], &[&directory]].concat(), "").unwrap();
    assert_eq!(warnings, "", "{directory}");
}

/// A user's own kustomization: the overlay `cuda` with one component.
fn with_component(control_plane: &ControlPlane, component: &str) -> PathBuf {
    let directory = control_plane.path().join("own").join(component);
    std::fs::create_dir_all(&directory).unwrap();
    // kustomize takes relative paths only.
    let up = "../".repeat(directory.components().count() - 1);
    let at =
        |part: &str| format!("{up}{}", manifests().join(part).strip_prefix("/").unwrap().display());
    let text = format!(
        "namespace: {NAMESPACE}\nresources: [{}]\ncomponents: [{}]\n",
        at("overlays/cuda"),
        at(component)
    );
    std::fs::write(directory.join("kustomization.yaml"), text).unwrap();
    directory
}

fn api<K>(client: &Client) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    Api::namespaced(client.clone(), NAMESPACE)
}

/// The coordinators' own.
async fn coordinators_token(control_plane: &ControlPlane) -> String {
    let arguments = ["create", "token", "baton-coordinator", "--namespace", NAMESPACE];
    control_plane.kubectl(&arguments, "").unwrap().0.trim().to_owned()
}
