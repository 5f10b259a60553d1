//! The actuator, beside others who change what it changes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use baton_kubernetes::{
    ConnectError, KubernetesConfig, KubernetesReplicas, ScaleError, Size, Target,
};
use baton_tests::ControlPlane;
use baton_types::Role;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Client,
    api::{Patch, PatchParams},
};
use serde_json::json;

use super::{NAMESPACE, api, coordinators_token};

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

pub(super) async fn bounds(control_plane: &ControlPlane) {
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

pub(super) async fn conflicts(control_plane: &ControlPlane) {
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

pub(super) async fn refusals(control_plane: &ControlPlane) {
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

pub(super) async fn outage(control_plane: &mut ControlPlane) {
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
