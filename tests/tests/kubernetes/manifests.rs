//! Overlays, components and examples, as a user applies them.

use std::time::Duration;

use baton_tests::ControlPlane;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{NAMESPACE, api, apply, manifests, with_component};

pub(super) async fn custom_resources_are_defined(control_plane: &ControlPlane) {
    let directory = control_plane.custom_resources().to_string_lossy().into_owned();
    control_plane.kubectl(&["apply", "--server-side", "-f", &directory], "").unwrap();
    control_plane
        .kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"], "")
        .unwrap();
}

/// As docs/kubernetes.md makes them.
pub(super) fn secrets_are_made(control_plane: &ControlPlane) {
    let pem = |name: &str| {
        let path = control_plane.path().join(name);
        std::fs::write(&path, "PEM").unwrap();
        path.display().to_string()
    };
    let [ca, certificate, key] = ["ca.pem", "host.pem", "host.key"].map(pem);
    let files = [
        "--type=kubernetes.io/tls".to_owned(),
        format!("--from-file=ca.crt={ca}"),
        format!("--from-file=tls.crt={certificate}"),
        format!("--from-file=tls.key={key}"),
    ];
    let create = |name: &str, arguments: &[String]| {
        let begin = ["-n", NAMESPACE, "create", "secret", "generic", name];
        let rest = arguments.iter().map(String::as_str);
        let all: Vec<&str> = begin.into_iter().chain(rest).collect();
        control_plane.kubectl(&all, "").unwrap();
    };
    create("baton-coordinator-tls", &files);
    create("baton-worker-tls", &files);
    create("baton-api-keys", &["--from-literal=default=0123456789abcdef".to_owned()]);
    create("baton-admin", &["--from-literal=token=0123456789abcdef".to_owned()]);
}

pub(super) async fn overlay_is_taken(control_plane: &ControlPlane, overlay: &str) {
    let directory = manifests().join("overlays").join(overlay);
    apply(control_plane, &directory);
    let client = control_plane.admin().unwrap();
    let deployments = api::<Deployment>(&client).list(&ListParams::default()).await.unwrap();
    let mut names: Vec<_> =
        deployments.iter().map(|it| it.metadata.name.clone().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["baton-coordinator", "baton-decode", "baton-prefill"]);
    for deployment in deployments {
        let pod = pod_of(&deployment, NAMESPACE);
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        let name = pod.metadata.name.clone();
        let taken = api::<Pod>(&client).create(&dry, &pod).await;
        let taken = taken.unwrap_or_else(|error| panic!("{overlay}: {name:?}: {error}"));
        contained(&taken, overlay);
        what_it_mounts_is_there(&client, &taken).await;
    }
    let services = api::<Service>(&client).list(&ListParams::default()).await.unwrap();
    let headless = services
        .iter()
        .filter(|it| it.spec.as_ref().unwrap().cluster_ip.as_deref() == Some("None"))
        .map(|it| it.metadata.name.as_deref().unwrap());
    assert_eq!(headless.collect::<Vec<_>>(), ["baton-workers"]);
}

/// The pod that a Deployment would make. Its name is like the ReplicaSet's would be.
fn pod_of(deployment: &Deployment, namespace: &str) -> Pod {
    let template = deployment.spec.as_ref().unwrap().template.clone();
    let labels = template.metadata.unwrap().labels;
    let name = format!("{}-5f6-abcde", deployment.metadata.name.as_deref().unwrap());
    let metadata = ObjectMeta {
        name: Some(name),
        namespace: Some(namespace.to_owned()),
        labels,
        ..ObjectMeta::default()
    };
    Pod { metadata, spec: template.spec, status: None }
}

/// No container of it has more rights than it must, or a way to the API server.
fn contained(pod: &Pod, overlay: &str) {
    let spec = pod.spec.as_ref().unwrap();
    let security = spec.security_context.as_ref().unwrap();
    assert_eq!(security.run_as_non_root, Some(true));
    assert_eq!(security.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault");
    let mut volumes = spec.volumes.iter().flatten();
    assert!(!volumes.any(|volume| volume.projected.is_some()), "it has no token");
    for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
        let security = container.security_context.as_ref().unwrap();
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.allow_privilege_escalation, Some(false));
        let capabilities = security.capabilities.as_ref().unwrap();
        assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
        let pins_memory = overlay == "rdma" && container.name == "worker";
        assert_eq!(capabilities.add.is_some(), pins_memory, "{overlay} {}", container.name);
    }
}

async fn what_it_mounts_is_there(client: &Client, pod: &Pod) {
    let spec = pod.spec.as_ref().unwrap();
    let account = spec.service_account_name.as_deref().unwrap();
    api::<ServiceAccount>(client).get(account).await.unwrap();
    for volume in spec.volumes.iter().flatten() {
        if let Some(map) = &volume.config_map {
            api::<ConfigMap>(client).get(&map.name).await.unwrap();
        }
        if let Some(secret) = &volume.secret {
            let name = secret.secret_name.as_deref().unwrap();
            api::<Secret>(client).get(name).await.unwrap();
            assert_eq!(
                secret.default_mode,
                Some(0o440),
                "{name}: for its group, and for no others"
            );
        }
    }
    for container in spec.init_containers.iter().flatten() {
        for source in container.env_from.iter().flatten() {
            let map = source.config_map_ref.as_ref().unwrap();
            api::<ConfigMap>(client).get(&map.name).await.unwrap();
        }
    }
}

/// The server checks every field and keeps nothing.
const STRICT_DRY_RUN: [&str; 7] = [
    "apply",
    "--server-side",
    "--force-conflicts",
    "--validate=strict",
    "--dry-run=server",
    "-f",
    "-",
];

pub(super) fn component_is_taken(control_plane: &ControlPlane, component: &str) {
    let directory = with_component(control_plane, component);
    let text = control_plane.kubectl(&["kustomize", &directory.to_string_lossy()], "").unwrap().0;
    // All is checked but what its custom resources mean to those who read them, which no API server knows.
    let (taken, warnings) = control_plane.kubectl(&STRICT_DRY_RUN, &text).unwrap();
    assert_eq!(warnings, "", "{component}");
    let expected = text.lines().filter(|line| line.starts_with("kind:")).count();
    assert_eq!(taken.lines().count(), expected, "{component}");
    println!("   {component}: {expected} objects");
}

/// So that what was taken says something.
pub(super) fn a_slip_is_refused(control_plane: &ControlPlane) {
    let refused = |from: &str, to: &str, says: &str| {
        let directory = with_component(control_plane, "examples/keda");
        let text =
            control_plane.kubectl(&["kustomize", &directory.to_string_lossy()], "").unwrap().0;
        assert!(text.contains(from), "{from}");
        let error = control_plane.kubectl(&STRICT_DRY_RUN, &text.replace(from, to)).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{error:#}");
    };
    refused(
        "terminationGracePeriodSeconds:",
        "terminationGraceSeconds:",
        "terminationGraceSeconds",
    );
    refused("maxReplicaCount: 8", "maxReplicaCount: many", "spec.maxReplicaCount");
    refused("maxReplicaCount: 8", "maxReplicas: 8", "spec.maxReplicas");
}

/// What the API server says against a pod, once it has heard of its namespace's label.
async fn refusal(client: &Client, pod: &Pod) -> String {
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    loop {
        match api::<Pod>(client).create(&dry, pod).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => return error.to_string(),
        }
    }
}

pub(super) async fn pod_security(control_plane: &ControlPlane) {
    let client = control_plane.admin().unwrap();
    apply(control_plane, &manifests().join("overlays/rdma"));
    let worker = api::<Deployment>(&client).get("baton-decode").await.unwrap();
    let pod = pod_of(&worker, NAMESPACE);
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    // In the namespace as all other overlays have it, IPC_LOCK is too much.
    let namespaces = Api::<Namespace>::all(client.clone());
    let label =
        json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    namespaces.patch(NAMESPACE, &PatchParams::default(), &Patch::Merge(label)).await.unwrap();
    let refused =
        tokio::time::timeout(Duration::from_secs(30), refusal(&client, &pod)).await.unwrap();
    assert!(refused.contains("violates PodSecurity"), "{refused}");
    assert!(refused.contains("IPC_LOCK"), "{refused}");
    // A volume of the example is a generic ephemeral one, that goes with its pod.
    apply(control_plane, &with_component(control_plane, "examples/model-ephemeral-volume"));
    let worker = api::<Deployment>(&client).get("baton-decode").await.unwrap();
    let taken = api::<Pod>(&client).create(&dry, &pod_of(&worker, NAMESPACE)).await.unwrap();
    let spec = taken.spec.unwrap();
    let volumes = spec.volumes.unwrap();
    let models = volumes.iter().find(|volume| volume.name == "models").unwrap();
    assert!(models.ephemeral.is_some() && models.empty_dir.is_none(), "{models:?}");
    let waits: Vec<_> = spec
        .tolerations
        .unwrap()
        .into_iter()
        .filter(|toleration| toleration.effect.as_deref() == Some("NoExecute"))
        .map(|toleration| toleration.toleration_seconds)
        .collect();
    assert_eq!(waits, [Some(30), Some(30)], "and nothing holds a pod to a node that died");
}
