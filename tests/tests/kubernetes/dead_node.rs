//! A node that dies.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use baton_tests::ControlPlane;
use k8s_openapi::api::{
    apps::v1::Deployment,
    coordination::v1::Lease,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{api, apply, with_component};

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

pub(super) async fn node_dies(control_plane: &mut ControlPlane) {
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
