//! What the coordinators' account may do, and what it may not.

use baton_tests::ControlPlane;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::{NAMESPACE, api, coordinators_token};

pub(super) async fn rights(control_plane: &ControlPlane) {
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
