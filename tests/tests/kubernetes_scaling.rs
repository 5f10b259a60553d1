//! A coordinator scales Deployments of a real API server as the load shifts, from nothing and back. There
//! are no nodes: the scenario itself runs a worker for each replica that is wanted.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use baton_tests::{Cluster, ClusterBuilder, ControlPlane, kube_or_skip};
use k8s_openapi::api::apps::v1::Deployment;
use kube::{Api, Client};
use serde_json::json;

const NAMESPACE: &str = "baton";
const MAX_PREFILL: usize = 3;
const MAX_DECODE: usize = 2;
const POOLS: [(&str, usize); 2] = [("baton-prefill", MAX_PREFILL), ("baton-decode", MAX_DECODE)];

/// Applies the overlay for GPUs with the component that lets coordinators scale it.
fn apply(control_plane: &ControlPlane) {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes");
    let manifests = manifests.canonicalize().unwrap();
    let own: PathBuf = control_plane.path().join("own");
    std::fs::create_dir_all(&own).unwrap();
    // kustomize takes relative paths only.
    let up = "../".repeat(own.components().count() - 1);
    let at =
        |part: &str| format!("{up}{}", manifests.join(part).strip_prefix("/").unwrap().display());
    let text = format!(
        "namespace: {NAMESPACE}\nresources: [{}]\ncomponents: [{}]\n",
        at("overlays/cuda"),
        at("components/autoscaling")
    );
    std::fs::write(own.join("kustomization.yaml"), text).unwrap();
    let directory = own.to_string_lossy();
    control_plane.kubectl(&["apply", "--server-side", "-k", &directory], "").unwrap();
    for (pool, _) in POOLS {
        let arguments = ["-n", NAMESPACE, "scale", "deployment", pool, "--replicas=0"];
        control_plane.kubectl(&arguments, "").unwrap();
    }
}

/// What a cluster's nodes would do: as many workers as there are replicas.
struct Nodes {
    deployments: Api<Deployment>,
    cluster: Cluster,
    running: [usize; 2],
    /// The most that were ever wanted.
    most: [usize; 2],
}

impl Nodes {
    fn new(client: Client, cluster: Cluster) -> Self {
        let deployments = Api::namespaced(client, NAMESPACE);
        Self { deployments, cluster, running: [0; 2], most: [0; 2] }
    }

    /// Starts and stops workers as they are wanted. Answers how many are.
    async fn keep(&mut self) -> [usize; 2] {
        let mut wanted = [0; 2];
        for (place, (pool, max)) in POOLS.into_iter().enumerate() {
            let deployment = self.deployments.get(pool).await.unwrap();
            let replicas = usize::try_from(deployment.spec.unwrap().replicas.unwrap()).unwrap();
            assert!(replicas <= max, "{pool}: {replicas}");
            let running = &mut self.running[place];
            while *running < replicas {
                self.cluster.start_process(&format!("{pool}-{running}")).unwrap();
                *running += 1;
            }
            while *running > replicas {
                *running -= 1;
                self.cluster.terminate(&format!("{pool}-{running}")).unwrap();
            }
            wanted[place] = replicas;
            self.most[place] = self.most[place].max(replicas);
        }
        wanted
    }

    async fn until(&mut self, what: &str, holds: impl Fn([usize; 2]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let wanted = self.keep().await;
            if holds(wanted) {
                return;
            }
            let log = self.cluster.log("coordinator");
            assert!(Instant::now() < deadline, "never {what}, but {wanted:?}:\n{log}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Clients that ask without pause. Each request must be answered.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<usize>>,
}

impl Load {
    fn start(cluster: &Cluster, clients: u32, prompt_tokens: u32, max_tokens: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: u32| {
            let (http, url) = (cluster.http.clone(), cluster.url("/v1/completions"));
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut answered = 0;
                for round in 0.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    // No two prompts begin alike.
                    let prompt: Vec<u32> = (0..prompt_tokens)
                        .map(|i| 300 + (number * 131 + round * 17 + i) % 1700)
                        .collect();
                    let body = json!({
                        "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true,
                    });
                    let response = http.post(&url).json(&body).send().await.unwrap();
                    let status = response.status();
                    assert!(status.is_success(), "{status}: {}", response.text().await.unwrap());
                    response.bytes().await.unwrap();
                    answered += 1;
                }
                answered
            })
        };
        Self { clients: (0..clients).map(client).collect(), stop }
    }

    async fn stop(self, nodes: &mut Nodes) -> usize {
        self.stop.store(true, Relaxed);
        let mut answered = 0;
        for client in self.clients {
            while !client.is_finished() {
                nodes.keep().await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            answered += client.await.expect("every request is answered");
        }
        answered
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deployments_follow_the_load_from_nothing_and_back() {
    let Some(programs) = kube_or_skip("deployments_follow_the_load_from_nothing_and_back") else {
        return;
    };
    let control_plane = ControlPlane::start(programs).await.unwrap();
    apply(&control_plane);
    // With no more rights than the coordinators' own account has.
    let arguments = ["create", "token", "baton-coordinator", "--namespace", NAMESPACE];
    let token = control_plane.kubectl(&arguments, "").unwrap().0;
    let kubeconfig = control_plane.path().join("coordinators-kubeconfig");
    std::fs::write(&kubeconfig, control_plane.kubeconfig_of(token.trim())).unwrap();

    let cluster = ClusterBuilder::sim()
        .named("baton-")
        .pools(MAX_PREFILL, MAX_DECODE)
        .engine("time_scale = 1.0")
        .slo("ttft_ms = 600\nitl_ms = 60")
        .admission("wait_for_worker_seconds = 120")
        .balancer(&format!(
            "dwell_seconds = 3\n[balancer.kubernetes]\nprefill_deployment = \"baton-prefill\"\n\
             decode_deployment = \"baton-decode\"\nmax_prefill = {MAX_PREFILL}\n\
             max_decode = {MAX_DECODE}\nzero_after_seconds = 8\n"
        ))
        .environment("KUBECONFIG", &kubeconfig.to_string_lossy())
        .drain_timeout_seconds(30)
        .without_workers()
        .start()
        .await
        .unwrap();
    let mut nodes = Nodes::new(control_plane.admin().unwrap(), cluster);

    // The first request waits for the first workers.
    while nodes.cluster.try_metrics().await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(nodes.keep().await, [0, 0], "nobody asked for anything");
    let first = tokio::spawn({
        let (http, url) = (nodes.cluster.http.clone(), nodes.cluster.url("/v1/completions"));
        async move {
            let body = json!({"prompt": "Is anybody there?", "max_tokens": 4});
            http.post(url).json(&body).send().await.unwrap().status()
        }
    });
    nodes.until("one worker each", |wanted| wanted == [1, 1]).await;
    while !first.is_finished() {
        nodes.keep().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(first.await.unwrap().is_success());
    assert_eq!(nodes.most, [1, 1]);

    // Long prompts, short answers: prefill is given more, as many as it may have at most.
    let load = Load::start(&nodes.cluster, 24, 1500, 2);
    nodes
        .until("as many prefill workers as there may be", |[prefill, _]| prefill == MAX_PREFILL)
        .await;
    let grown = nodes.cluster.eventually("all are there", |metrics| {
        metrics.sum("baton_workers", &["role=\"prefill\""]) >= 2.0
    });
    grown.await;
    let answered = load.stop(&mut nodes).await;
    assert!(answered > 0);

    // Nobody comes any more.
    nodes.until("none at all", |wanted| wanted == [0, 0]).await;
    let metrics = nodes.cluster.eventually_idle().await;
    let ended = |labels: &[&str]| metrics.sum("baton_requests_total", labels);
    assert_eq!(ended(&["outcome=\"ok\""]), ended(&[]), "no request failed: {metrics:#?}");
    let orders = |outcome: &str| metrics.sum("baton_scale_orders_total", &[outcome]);
    assert!(
        orders("outcome=\"more\"") >= 3.0 && orders("outcome=\"fewer\"") >= 2.0,
        "{metrics:#?}"
    );
    assert_eq!(orders("outcome=\"failed\""), 0.0, "{metrics:#?}");

    // And again from nothing.
    let again = Load::start(&nodes.cluster, 1, 20, 2);
    nodes.until("one worker each, again", |wanted| wanted == [1, 1]).await;
    assert!(again.stop(&mut nodes).await > 0);
}
