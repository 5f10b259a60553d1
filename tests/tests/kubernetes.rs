//! The manifests of `deploy/kubernetes` and the actuator, at a real API server without nodes.

// A scenario says what must hold by panicking.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use baton_kubernetes::{
    ConnectError, KubernetesConfig, KubernetesReplicas, ScaleError, Size, Target,
};
use baton_tests::{ControlPlane, kube_or_skip};
use baton_types::Role;
use k8s_openapi::api::{
    apps::v1::Deployment,
    coordination::v1::Lease,
    core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;

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
    custom_resources_are_defined(&control_plane).await;
    apply(&control_plane, &manifests().join("overlays/cuda"));
    secrets_are_made(&control_plane);
    for overlay in OVERLAYS {
        overlay_is_taken(&control_plane, overlay).await;
    }
    apply(&control_plane, &with_component(&control_plane, "components/network-policy"));
    for component in COMPONENTS {
        component_is_taken(&control_plane, component);
    }
    say("what is not right is refused");
    a_slip_is_refused(&control_plane);
    say("pods keep to the standard of their namespace");
    pod_security(&control_plane).await;

    let plain = with_component(&control_plane, "components/network-policy");
    apply(&control_plane, &plain);
    apply(&control_plane, &with_component(&control_plane, "components/autoscaling"));
    say("the coordinators may scale their two Deployments, and nothing else");
    rights(&control_plane).await;
    say("the actuator scales within its bounds");
    bounds(&control_plane).await;
    say("the actuator outlasts changes by others");
    conflicts(&control_plane).await;
    say("the actuator says what it lacks");
    refusals(&control_plane).await;
    say("the actuator outlasts an API server that goes away");
    outage(&mut control_plane).await;
    say("a node that dies needs no hand");
    node_dies(&mut control_plane).await;
}

// --- manifests

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

async fn custom_resources_are_defined(control_plane: &ControlPlane) {
    let directory = control_plane.custom_resources().to_string_lossy().into_owned();
    control_plane.kubectl(&["apply", "--server-side", "-f", &directory], "").unwrap();
    control_plane
        .kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"], "")
        .unwrap();
}

/// As docs/kubernetes.md makes them.
fn secrets_are_made(control_plane: &ControlPlane) {
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

fn api<K>(client: &Client) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    Api::namespaced(client.clone(), NAMESPACE)
}

async fn overlay_is_taken(control_plane: &ControlPlane, overlay: &str) {
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

fn component_is_taken(control_plane: &ControlPlane, component: &str) {
    let directory = with_component(control_plane, component);
    let text = control_plane.kubectl(&["kustomize", &directory.to_string_lossy()], "").unwrap().0;
    // All but what its custom resources mean to those who read them, which no API server knows.
    let arguments = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--validate=strict",
        "--dry-run=server",
        "-f",
        "-",
    ];
    let (taken, warnings) = control_plane.kubectl(&arguments, &text).unwrap();
    assert_eq!(warnings, "", "{component}");
    let expected = text.lines().filter(|line| line.starts_with("kind:")).count();
    assert_eq!(taken.lines().count(), expected, "{component}");
    println!("   {component}: {expected} objects");
}

/// So that what was taken says something.
fn a_slip_is_refused(control_plane: &ControlPlane) {
    let refused = |from: &str, to: &str, says: &str| {
        let directory = with_component(control_plane, "examples/keda");
        let text =
            control_plane.kubectl(&["kustomize", &directory.to_string_lossy()], "").unwrap().0;
        assert!(text.contains(from), "{from}");
        let arguments = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "--validate=strict",
            "--dry-run=server",
            "-f",
            "-",
        ];
        let error = control_plane.kubectl(&arguments, &text.replace(from, to)).unwrap_err();
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

async fn pod_security(control_plane: &ControlPlane) {
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

// --- rights

/// The coordinators' own.
async fn coordinators_token(control_plane: &ControlPlane) -> String {
    let arguments = ["create", "token", "baton-coordinator", "--namespace", NAMESPACE];
    control_plane.kubectl(&arguments, "").unwrap().0.trim().to_owned()
}

async fn rights(control_plane: &ControlPlane) {
    let token = coordinators_token(control_plane).await;
    let client = control_plane.client(&token).unwrap();
    let deployments = api::<Deployment>(&client);
    let two = Patch::Merge(json!({"spec": {"replicas": 2}}));
    let parameters = PatchParams::default();
    for pool in ["baton-prefill", "baton-decode"] {
        deployments.get_scale(pool).await.unwrap();
        deployments.patch_scale(pool, &parameters, &two).await.unwrap();
    }

    let forbidden = |what: &str, outcome: Result<(), kube::Error>| {
        let Err(kube::Error::Api(status)) = outcome else { panic!("{what}: {outcome:?}") };
        assert_eq!(status.code, 403, "{what}: {status:?}");
    };
    let own = deployments.patch_scale("baton-coordinator", &parameters, &two).await;
    forbidden("its own scale", own.map(drop));
    forbidden("reading a pool", deployments.get("baton-prefill").await.map(drop));
    let image = Patch::Merge(json!({"metadata": {"annotations": {"a": "b"}}}));
    forbidden(
        "changing a pool",
        deployments.patch("baton-prefill", &parameters, &image).await.map(drop),
    );
    let list = ListParams::default();
    forbidden("listing Deployments", deployments.list(&list).await.map(drop));
    let delete = DeleteParams::default();
    forbidden("deleting a pool", deployments.delete("baton-prefill", &delete).await.map(drop));
    forbidden("listing Pods", api::<Pod>(&client).list(&list).await.map(drop));
    forbidden("reading a Secret", api::<Secret>(&client).get("baton-worker-tls").await.map(drop));
    forbidden("reading a ConfigMap", api::<ConfigMap>(&client).list(&list).await.map(drop));
    let elsewhere = Api::<Deployment>::namespaced(client.clone(), "default");
    forbidden("another namespace", elsewhere.get_scale("baton-prefill").await.map(drop));
    let replaced = deployments
        .replace_scale("baton-prefill", &PostParams::default(), &Default::default())
        .await;
    forbidden("replacing a scale", replaced.map(drop));

    // And all that the API server knows of, beyond what it lets everybody who is known do.
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": NAMESPACE},
    });
    let request = http::Request::post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews")
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&review).unwrap())
        .unwrap();
    let review: serde_json::Value = client.request(request).await.unwrap();
    let rules: Vec<_> = review["status"]["resourceRules"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|rule| {
            let groups = rule["apiGroups"].to_string();
            !groups.contains("authorization.k8s.io") && !groups.contains("authentication.k8s.io")
        })
        .cloned()
        .collect();
    assert_eq!(
        rules,
        [json!({
            "verbs": ["get", "patch"], "apiGroups": ["apps"], "resources": ["deployments/scale"],
            "resourceNames": ["baton-prefill", "baton-decode"],
        })]
    );

    // A worker has no token, and one made for it may do nothing.
    let arguments = ["create", "token", "baton-worker", "--namespace", NAMESPACE];
    let token = control_plane.kubectl(&arguments, "").unwrap().0.trim().to_owned();
    let worker = control_plane.client(&token).unwrap();
    forbidden("a worker", api::<Deployment>(&worker).get_scale("baton-prefill").await.map(drop));
}

// --- the actuator

fn config() -> KubernetesConfig {
    let target = |deployment: &str, min_replicas, max_replicas| Target {
        deployment: deployment.to_owned(),
        min_replicas,
        max_replicas,
    };
    KubernetesConfig {
        namespace: Some(NAMESPACE.to_owned()),
        prefill: target("baton-prefill", 1, 5),
        decode: target("baton-decode", 2, 3),
        patience: Duration::from_secs(180),
    }
}

async fn actuator(control_plane: &ControlPlane, config: KubernetesConfig) -> KubernetesReplicas {
    let token = coordinators_token(control_plane).await;
    let credentials = control_plane.credentials(&token).unwrap();
    KubernetesReplicas::connect_as(config, credentials).unwrap()
}

async fn wanted(client: &Client, deployment: &str) -> i32 {
    let deployment = api::<Deployment>(client).get(deployment).await.unwrap();
    deployment.spec.unwrap().replicas.unwrap()
}

async fn bounds(control_plane: &ControlPlane) {
    let admin = control_plane.admin().unwrap();
    let actuator = actuator(control_plane, config()).await;
    use Size::{AtLeast, AtMost};
    for (asked, given) in [
        (AtLeast(4), 4),
        (AtLeast(2), 4),
        (AtMost(5), 4),
        (AtMost(1), 1),
        (AtMost(0), 1),
        (AtLeast(9), 5),
        (AtLeast(9), 5),
        (AtMost(2), 2),
    ] {
        let before = wanted(&admin, "baton-prefill").await;
        let scaled = actuator.scale(Role::Prefill, asked).await.unwrap();
        assert_eq!(scaled.before, u32::try_from(before).unwrap());
        assert_eq!(scaled.after, given, "{asked:?}");
        assert_eq!(wanted(&admin, "baton-prefill").await, i32::try_from(given).unwrap());
        assert_eq!(actuator.replicas(Role::Prefill).await.unwrap().wanted, given);
    }
    actuator.scale(Role::Decode, Size::AtLeast(100)).await.unwrap();
    assert_eq!(wanted(&admin, "baton-decode").await, 3);
    assert_eq!(wanted(&admin, "baton-prefill").await, 2, "the other pool's stays");

    let mut impossible = config();
    impossible.prefill.min_replicas = 6;
    let credentials = control_plane.credentials("any").unwrap();
    let error = KubernetesReplicas::connect_as(impossible, credentials).unwrap_err();
    assert!(matches!(error, ConnectError::Bounds { min: 6, max: 5, .. }), "{error}");
}

/// A client between whose reading and writing somebody else changes the Deployment, so many times.
async fn meddled_client(control_plane: &ControlPlane, times: Arc<AtomicU32>) -> Client {
    let (inner, admin) = (
        control_plane.client(&coordinators_token(control_plane).await).unwrap(),
        control_plane.admin().unwrap(),
    );
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        let (inner, admin, times) = (inner.clone(), admin.clone(), times.clone());
        async move {
            let reads = request.method() == http::Method::GET;
            let response = inner.send(request).await?;
            if reads && times.load(Relaxed) > 0 {
                let left = times.fetch_sub(1, Relaxed);
                let note = json!({"metadata": {"annotations": {"meddled": left.to_string()}}});
                let parameters = PatchParams::default();
                api::<Deployment>(&admin)
                    .patch("baton-prefill", &parameters, &Patch::Merge(note))
                    .await
                    .expect("the administrator may");
            }
            Ok::<_, kube::Error>(response)
        }
    });
    Client::new(service, NAMESPACE)
}

async fn conflicts(control_plane: &ControlPlane) {
    let admin = control_plane.admin().unwrap();
    let times = Arc::new(AtomicU32::new(3));
    let client = meddled_client(control_plane, times.clone()).await;
    let actuator = KubernetesReplicas::with_client(config(), client).unwrap();
    let scaled = actuator.scale(Role::Prefill, Size::AtLeast(4)).await.unwrap();
    assert_eq!((scaled.before, scaled.after), (2, 4));
    assert_eq!(times.load(Relaxed), 0, "each of the three was a conflict");
    assert_eq!(wanted(&admin, "baton-prefill").await, 4);

    // Somebody who never stops is told of.
    times.store(u32::MAX, Relaxed);
    let client = meddled_client(control_plane, times).await;
    let patience = Duration::from_millis(500);
    let actuator =
        KubernetesReplicas::with_client(KubernetesConfig { patience, ..config() }, client).unwrap();
    let error = actuator.scale(Role::Prefill, Size::AtMost(2)).await.unwrap_err();
    assert!(matches!(error, ScaleError::Conflict { .. }), "{error}");
    assert_eq!(wanted(&admin, "baton-prefill").await, 4, "and nothing was overwritten");
}

async fn refusals(control_plane: &ControlPlane) {
    let mut other = KubernetesConfig { patience: Duration::from_millis(300), ..config() };
    other.decode.deployment = "baton-coordinator".to_owned();
    let forbidden = actuator(control_plane, other)
        .await
        .scale(Role::Decode, Size::AtLeast(2))
        .await
        .unwrap_err();
    let said = forbidden.to_string();
    assert!(matches!(forbidden, ScaleError::Forbidden { .. }), "{said}");
    assert!(said.contains("may not get deployments/scale of baton-coordinator in baton"), "{said}");

    let mut absent = config();
    absent.prefill.deployment = "baton-prefil".to_owned();
    let credentials = control_plane.credentials("admin-token-of-a-test").unwrap();
    let actuator = KubernetesReplicas::connect_as(absent, credentials).unwrap();
    let error = actuator.scale(Role::Prefill, Size::AtMost(2)).await.unwrap_err();
    assert!(matches!(error, ScaleError::NoSuchDeployment { .. }), "{error}");
}

async fn outage(control_plane: &mut ControlPlane) {
    let actuator = actuator(control_plane, config()).await;
    let token = coordinators_token(control_plane).await;
    let impatient = KubernetesConfig { patience: Duration::from_millis(200), ..config() };
    let impatient =
        KubernetesReplicas::connect_as(impatient, control_plane.credentials(&token).unwrap())
            .unwrap();
    actuator.scale(Role::Prefill, Size::AtMost(3)).await.unwrap();

    control_plane.stop("kube-apiserver");
    let error = impatient.scale(Role::Prefill, Size::AtMost(1)).await.unwrap_err();
    assert!(matches!(error, ScaleError::Unreachable { .. }), "{error}");
    let waiting = tokio::spawn({
        let actuator = actuator.clone();
        async move { actuator.scale(Role::Prefill, Size::AtLeast(5)).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!waiting.is_finished(), "it goes on trying");
    control_plane.start_api_server().await.unwrap();
    let scaled = waiting.await.unwrap().unwrap();
    assert_eq!((scaled.before, scaled.after), (3, 5));
    let admin = control_plane.admin().unwrap();
    assert_eq!(wanted(&admin, "baton-prefill").await, 5);
}

// --- a node that dies

/// Nodes in name only: what there is of a kubelet is its heartbeat, and its word that pods run.
struct Nodes {
    client: Client,
    alive: Arc<Mutex<BTreeSet<&'static str>>>,
    beating: tokio::task::JoinHandle<()>,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.beating.abort();
    }
}

impl Nodes {
    async fn start(client: Client, names: &[&'static str]) -> Self {
        for &name in names {
            let resources = json!({
                "cpu": "64", "memory": "512Gi", "ephemeral-storage": "4Ti", "pods": "110",
                "nvidia.com/gpu": "8",
            });
            let node = json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {
                    "capacity": resources, "allocatable": resources,
                    "conditions": [{
                        "type": "Ready", "status": "True", "reason": "KubeletReady",
                        "lastHeartbeatTime": k8s_openapi::jiff::Timestamp::now().to_string(),
                    }],
                },
            });
            let node: Node = serde_json::from_value(node).unwrap();
            Api::all(client.clone()).create(&PostParams::default(), &node).await.unwrap();
        }
        let alive = Arc::new(Mutex::new(names.iter().copied().collect::<BTreeSet<_>>()));
        let beating = tokio::spawn({
            let (client, alive) = (client.clone(), alive.clone());
            async move {
                loop {
                    let names = alive.lock().unwrap().clone();
                    for name in names {
                        beat(&client, name).await;
                        run_pods(&client, name).await;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        });
        Self { client, alive, beating }
    }

    /// Waits until the controllers have found that all of them are ready.
    async fn taken_in(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let nodes = Api::<Node>::all(self.client.clone());
        loop {
            let found = nodes.list(&ListParams::default()).await.unwrap();
            let is_tainted = |node: &Node| {
                node.spec.as_ref().is_some_and(|spec| spec.taints.iter().flatten().next().is_some())
            };
            if !found.iter().any(is_tainted) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{found:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn dies(&self, name: &str) {
        self.alive.lock().unwrap().retain(|alive| *alive != name);
    }

    /// Pods that are not being deleted, and the node of each.
    async fn pods(&self) -> Vec<(String, Option<String>)> {
        let pods = api::<Pod>(&self.client).list(&ListParams::default()).await.unwrap();
        pods.into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .map(|pod| (pod.metadata.name.unwrap(), pod.spec.unwrap().node_name))
            .collect()
    }

    /// Waits until each of so many pods is on a node that lives.
    async fn placed(&self, control_plane: &ControlPlane, count: usize) -> Vec<(String, String)> {
        let deadline = std::time::Instant::now() + Duration::from_secs(180);
        loop {
            let pods = self.pods().await;
            let alive = self.alive.lock().unwrap().clone();
            let on_live: Vec<_> = pods
                .iter()
                .filter_map(|(pod, node)| Some((pod.clone(), node.clone()?)))
                .filter(|(_, node)| alive.contains(node.as_str()))
                .collect();
            if on_live.len() == count && pods.len() == count {
                return on_live;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "{count} pods were to be placed: {pods:#?}\n{}\n{}",
                control_plane.log("kube-controller-manager"),
                control_plane.log("kube-scheduler")
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

async fn beat(client: &Client, node: &str) {
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": node, "namespace": "kube-node-lease"},
        "spec": {
            "holderIdentity": node, "leaseDurationSeconds": 40,
            "renewTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(
                k8s_openapi::jiff::Timestamp::now()
            ),
        },
    });
    let parameters = PatchParams::apply("kubelet").force();
    let leases = Api::<Lease>::namespaced(client.clone(), "kube-node-lease");
    // One that is missed comes again.
    let _ = leases.patch(node, &parameters, &Patch::Apply(lease)).await;
}

async fn run_pods(client: &Client, node: &str) {
    let here = ListParams::default().fields(&format!("spec.nodeName={node},status.phase=Pending"));
    for pod in api::<Pod>(client).list(&here).await.unwrap() {
        let status = json!({"status": {
            "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let name = pod.metadata.name.unwrap();
        // It may be gone by now.
        let _ = api::<Pod>(client)
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await;
    }
}

async fn node_dies(control_plane: &mut ControlPlane) {
    let client = control_plane.admin().unwrap();
    // With volumes whose provisioner is not there, nothing would be placed.
    apply(control_plane, &with_component(control_plane, "components/network-policy"));
    let key = format!("--service-account-private-key-file={}", control_plane.accounts_key());
    let arguments = [
        key.as_str(),
        "--use-service-account-credentials=false",
        // In place of 5 s and 50 s, to have it sooner. The pods' own 30 s stay.
        "--node-monitor-period=500ms",
        "--node-monitor-grace-period=6s",
        "--node-eviction-rate=10",
    ];
    control_plane.start_client("kube-controller-manager", &arguments).unwrap();
    let nodes = Nodes::start(client.clone(), &["node-a", "node-b", "node-c"]).await;
    // Only then: pods shall have a choice from the first.
    nodes.taken_in().await;
    control_plane.start_client("kube-scheduler", &[]).unwrap();

    let mut count = 0;
    for deployment in api::<Deployment>(&client).list(&ListParams::default()).await.unwrap() {
        count += usize::try_from(deployment.spec.unwrap().replicas.unwrap()).unwrap();
    }
    let before = nodes.placed(control_plane, count).await;
    for pool in ["baton-coordinator", "baton-prefill", "baton-decode"] {
        let used: BTreeSet<_> =
            before.iter().filter(|(pod, _)| pod.starts_with(pool)).map(|(_, node)| node).collect();
        assert!(used.len() > 1, "{pool} is spread: {before:?}");
    }
    let dead = before.iter().find(|(pod, _)| pod.starts_with("baton-decode")).unwrap().1.clone();
    nodes.dies(&dead);
    let after = nodes.placed(control_plane, count).await;
    assert!(after.iter().all(|(_, node)| *node != dead));
    let stayed = before.iter().filter(|(_, node)| *node != dead).all(|pod| after.contains(pod));
    assert!(stayed, "and nobody else was moved: {before:?} {after:?}");
}
