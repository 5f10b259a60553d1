//! Pools whose workers are the pods of two Deployments.

use std::time::Duration;

use baton_config::{BalancerConfig, KubernetesScaling};
use baton_kubernetes::{
    ConnectError, KubernetesConfig, KubernetesReplicas, ScaleError, Scaled, Size, Target,
};
use baton_types::Role;

/// The balancer asks again a dwell later anyhow.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub(crate) struct KubernetesPools {
    replicas: KubernetesReplicas,
    deployments: Deployments,
}

/// Pods are named after them.
#[derive(Clone, Debug)]
struct Deployments {
    prefill: String,
    decode: String,
}

impl KubernetesPools {
    /// By the pod's service account, else by the kubeconfig.
    ///
    /// # Errors
    /// There is neither, or the bounds exclude every number.
    pub(crate) async fn connect(
        scaling: &KubernetesScaling,
        balancer: &BalancerConfig,
    ) -> Result<Self, ConnectError> {
        let target = |deployment: &String, min, max_replicas| Target {
            deployment: deployment.clone(),
            min_replicas: if scaling.zero_after.is_some() { 0 } else { min },
            max_replicas,
        };
        let (prefill, decode) = (&scaling.prefill_deployment, &scaling.decode_deployment);
        let config = KubernetesConfig {
            namespace: scaling.namespace.clone(),
            prefill: target(prefill, balancer.min_prefill, scaling.max_prefill),
            decode: target(decode, balancer.min_decode, scaling.max_decode),
            patience: PATIENCE,
        };
        let deployments = Deployments { prefill: prefill.clone(), decode: decode.clone() };
        Ok(Self { replicas: KubernetesReplicas::connect(config).await?, deployments })
    }

    /// Has a pool given more workers or fewer. `workers`: all that there are by name, each with the pool
    /// that it is in, which need not be the one that it was started for.
    pub(crate) async fn scale(
        &self,
        role: Role,
        size: Size,
        workers: &[(String, Role)],
    ) -> Result<Scaled, ScaleError> {
        self.replicas.scale(role, self.deployments.replicas(role, size, workers)).await
    }
}

impl Deployments {
    /// Whether a worker is a pod of this role's Deployment.
    fn started(&self, worker: &str, role: Role) -> bool {
        let deployment = match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
        };
        worker.strip_prefix(deployment.as_str()).is_some_and(|rest| rest.starts_with('-'))
    }

    /// So many replicas of a role's Deployment make so many workers of its pool: those that came over
    /// from the other are there already, and those that went over do not count.
    fn replicas(&self, role: Role, size: Size, workers: &[(String, Role)]) -> Size {
        let other = if role == Role::Prefill { Role::Decode } else { Role::Prefill };
        let serving = |started: Role, now: Role| {
            let workers =
                workers.iter().filter(|(name, role)| *role == now && self.started(name, started));
            u32::try_from(workers.count()).unwrap_or(u32::MAX)
        };
        let (came, went) = (serving(other, role), serving(role, other));
        let replicas = |workers: u32| workers.saturating_add(went).saturating_sub(came);
        match size {
            Size::AtLeast(workers) => Size::AtLeast(replicas(workers)),
            // Both pools go, wherever their workers are.
            Size::AtMost(0) => Size::AtMost(0),
            Size::AtMost(workers) => Size::AtMost(replicas(workers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_serves_in_the_other_pool_is_counted_where_they_serve() {
        let deployments =
            Deployments { prefill: "baton-prefill".into(), decode: "baton-decode".into() };
        let workers = |list: &[(&str, Role)]| -> Vec<(String, Role)> {
            list.iter().map(|(name, role)| ((*name).to_owned(), *role)).collect()
        };
        let least = |role, wanted, workers: &[(String, Role)]| {
            let Size::AtLeast(replicas) =
                deployments.replicas(role, Size::AtLeast(wanted), workers)
            else {
                panic!("what is wanted are more")
            };
            replicas
        };
        let at_home = workers(&[
            ("baton-prefill-a-1", Role::Prefill),
            ("baton-prefill-a-2", Role::Prefill),
            ("baton-decode-b-1", Role::Decode),
        ]);
        assert_eq!(least(Role::Decode, 2, &at_home), 2);
        // One prefill worker decodes: decode has two, of which its Deployment made one.
        let flipped = workers(&[
            ("baton-prefill-a-1", Role::Prefill),
            ("baton-prefill-a-2", Role::Decode),
            ("baton-decode-b-1", Role::Decode),
        ]);
        assert_eq!(least(Role::Decode, 3, &flipped), 2);
        assert_eq!(least(Role::Prefill, 2, &flipped), 3);
        let most = |workers| deployments.replicas(Role::Prefill, Size::AtMost(workers), &flipped);
        assert_eq!([most(1), most(0)], [Size::AtMost(2), Size::AtMost(0)]);
        // Neither is a stranger's name, nor one that only begins alike.
        let strangers = workers(&[("baton-prefiller-1", Role::Decode), ("else", Role::Decode)]);
        assert_eq!(least(Role::Prefill, 2, &strangers), 2);
    }
}
