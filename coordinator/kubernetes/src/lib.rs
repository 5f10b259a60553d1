//! Scales the two pools of workers by the scale subresource of their Deployments.
//!
//! Needs the right to `get` and `patch` `deployments/scale` of these two Deployments and no other. What
//! it wants is a number of replicas, never a difference: doing it twice does no harm, and an answer that
//! got lost is simply asked for again. Whoever wants more gets at least that many, so that pods which are
//! still starting stay.

mod retry;

use std::{fmt, time::Duration};

use baton_types::Role;
use k8s_openapi::api::{apps::v1::Deployment, autoscaling::v1::Scale};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams},
    config::{InClusterError, InferConfigError},
};
use tracing::{info, warn};

use crate::retry::Retry;

/// Where the coordinator's pod finds who it is.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Of one request to the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Shown by `kubectl get deployment --show-managed-fields`.
const FIELD_MANAGER: &str = "baton-balancer";

/// Which Deployments are scaled, and how far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// Default: the coordinator's own.
    pub namespace: Option<String>,
    pub prefill: Target,
    pub decode: Target,
    /// An API server that does not answer, refuses, or is asked to change what others change too, is asked
    /// again for so long.
    pub patience: Duration,
}

/// One role's Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub deployment: String,
    pub min_replicas: u32,
    pub max_replicas: u32,
}

impl Target {
    fn within(&self, replicas: u32) -> u32 {
        replicas.clamp(self.min_replicas, self.max_replicas)
    }
}

/// Of one Deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    pub wanted: u32,
    /// Pods that exist, ready or not.
    pub existing: u32,
}

/// How many replicas there shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    AtLeast(u32),
    AtMost(u32),
}

impl Size {
    /// In place of so many.
    fn from(self, replicas: u32) -> u32 {
        match self {
            Self::AtLeast(least) => replicas.max(least),
            Self::AtMost(most) => replicas.min(most),
        }
    }
}

/// What an order to scale came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaled {
    pub before: u32,
    /// Within the target's bounds, whatever was asked for.
    pub after: u32,
}

/// Why there is no way to the API server at all.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("this pod's service account: {0}")]
    InCluster(#[from] InClusterError),
    #[error("no service account's token at {TOKEN}, and no kubeconfig: {0}")]
    Kubeconfig(#[from] InferConfigError),
    #[error("the API server's address or certificates: {0}")]
    Client(#[source] kube::Error),
    #[error("{role}: min_replicas {min} is more than max_replicas {max}")]
    Bounds { role: Role, min: u32, max: u32 },
}

/// Why a Deployment was not scaled, or not asked.
#[derive(Debug, thiserror::Error)]
pub enum ScaleError {
    #[error(
        "the service account may not {verb} deployments/scale of {deployment} in {namespace}: {reason}"
    )]
    Forbidden { verb: &'static str, deployment: String, namespace: String, reason: String },
    #[error("there is no Deployment {deployment} in {namespace}")]
    NoSuchDeployment { deployment: String, namespace: String },
    #[error("the API server refused ({code}): {reason}")]
    Refused { code: u16, reason: String },
    #[error("others kept changing the Deployment {deployment} for {patience:?}")]
    Conflict { deployment: String, patience: Duration },
    #[error("no answer from the API server for {patience:?}: {reason}")]
    Unreachable { patience: Duration, reason: String },
}

/// The two Deployments, and a way to the API server.
#[derive(Clone)]
pub struct KubernetesReplicas {
    deployments: Api<Deployment>,
    namespace: String,
    config: KubernetesConfig,
}

impl fmt::Debug for KubernetesReplicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesReplicas")
            .field("namespace", &self.namespace)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl KubernetesReplicas {
    /// As the pod's service account where there is one, else by the kubeconfig (`KUBECONFIG`, or
    /// `~/.kube/config`). Asks nothing of the API server yet, which may be away.
    ///
    /// # Errors
    /// There is neither, one of them cannot be used, or bounds that exclude every number.
    pub async fn connect(config: KubernetesConfig) -> Result<Self, ConnectError> {
        let credentials = if std::path::Path::new(TOKEN).exists() {
            Config::incluster()?
        } else {
            Config::infer().await?
        };
        Self::connect_as(config, credentials)
    }

    /// With credentials of the caller's.
    ///
    /// # Errors
    /// They cannot be used, or bounds that exclude every number.
    pub fn connect_as(
        mut config: KubernetesConfig,
        mut credentials: Config,
    ) -> Result<Self, ConnectError> {
        credentials.connect_timeout = Some(REQUEST_TIMEOUT);
        credentials.read_timeout = Some(REQUEST_TIMEOUT);
        credentials.write_timeout = Some(REQUEST_TIMEOUT);
        // A connection may have been idle for longer than that.
        credentials.reset_reader_on_write = true;
        // What may be asked again is known here.
        credentials.default_retry = false;
        config.namespace.get_or_insert_with(|| credentials.default_namespace.clone());
        Self::with_client(config, Client::try_from(credentials).map_err(ConnectError::Client)?)
    }

    /// By a client of the caller's making.
    ///
    /// # Errors
    /// Bounds that exclude every number.
    pub fn with_client(config: KubernetesConfig, client: Client) -> Result<Self, ConnectError> {
        for (role, target) in [(Role::Prefill, &config.prefill), (Role::Decode, &config.decode)] {
            if target.min_replicas > target.max_replicas {
                let (min, max) = (target.min_replicas, target.max_replicas);
                return Err(ConnectError::Bounds { role, min, max });
            }
        }
        let namespace =
            config.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
        Ok(Self { deployments: Api::namespaced(client, &namespace), namespace, config })
    }

    fn target(&self, role: Role) -> &Target {
        match role {
            Role::Prefill => &self.config.prefill,
            Role::Decode => &self.config.decode,
        }
    }

    /// How many replicas a pool has, and how many it shall have.
    ///
    /// # Errors
    /// The API server refuses, or does not answer for as long as the configured patience.
    pub async fn replicas(&self, role: Role) -> Result<Replicas, ScaleError> {
        let target = self.target(role);
        let mut retry = Retry::new(self.config.patience);
        loop {
            match self.deployments.get_scale(&target.deployment).await {
                Ok(scale) => return Ok(told(&scale)),
                Err(error) => self.pause_or_give_up(&mut retry, target, "get", error).await?,
            }
        }
    }

    /// Gives a pool more or fewer replicas, within its bounds. Returns when the API server has taken it down;
    /// pods come and go later.
    ///
    /// # Errors
    /// The API server refuses; or for as long as the configured patience it does not answer, or somebody
    /// else changes the Deployment each time between our reading and our writing.
    pub async fn scale(&self, role: Role, size: Size) -> Result<Scaled, ScaleError> {
        let target = self.target(role);
        let mut retry = Retry::new(self.config.patience);
        loop {
            match self.try_scale(target, size).await {
                Ok(scaled) => {
                    let Scaled { before, after } = scaled;
                    if before != after {
                        info!(%role, deployment = target.deployment, before, after, "scaled");
                    }
                    return Ok(scaled);
                }
                Err((verb, error)) => {
                    self.pause_or_give_up(&mut retry, target, verb, error).await?;
                }
            }
        }
    }

    /// Names the version that was read, so that a change by somebody else in between is a conflict and
    /// not lost unseen.
    async fn try_scale(
        &self,
        target: &Target,
        size: Size,
    ) -> Result<Scaled, (&'static str, kube::Error)> {
        let scale =
            self.deployments.get_scale(&target.deployment).await.map_err(|error| ("get", error))?;
        let before = told(&scale).wanted;
        let after = target.within(size.from(before));
        if before == after {
            return Ok(Scaled { before, after });
        }
        let patch = serde_json::json!({
            "metadata": { "resourceVersion": scale.metadata.resource_version },
            "spec": { "replicas": after },
        });
        let parameters =
            PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.deployments
            .patch_scale(&target.deployment, &parameters, &Patch::Merge(patch))
            .await
            .map_err(|error| ("patch", error))?;
        Ok(Scaled { before, after })
    }

    /// Waits before another try where one can help.
    async fn pause_or_give_up(
        &self,
        retry: &mut Retry,
        target: &Target,
        verb: &'static str,
        error: kube::Error,
    ) -> Result<(), ScaleError> {
        let patience = self.config.patience;
        let deployment = target.deployment.clone();
        let namespace = self.namespace.clone();
        let given_up = match error {
            kube::Error::Api(status) => match status.code {
                // Also what an API server says that has just started, until it has read who may do what.
                401 | 403 => {
                    let reason = status.message;
                    ScaleError::Forbidden { verb, deployment, namespace, reason }
                }
                404 => return Err(ScaleError::NoSuchDeployment { deployment, namespace }),
                409 => ScaleError::Conflict { deployment, patience },
                // Starting, overloaded, or without its store.
                429 | 500..=599 => {
                    let reason = format!("it says {} {}", status.code, status.message);
                    ScaleError::Unreachable { patience, reason }
                }
                code => return Err(ScaleError::Refused { code, reason: status.message }),
            },
            other => ScaleError::Unreachable { patience, reason: with_causes(&other) },
        };
        match retry.next() {
            Some(pause) => {
                warn!(reason = %given_up, "trying again in {pause:?}");
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None => Err(given_up),
        }
    }
}

fn told(scale: &Scale) -> Replicas {
    let count = |number: Option<i32>| u32::try_from(number.unwrap_or(0)).unwrap_or(0);
    Replicas {
        wanted: count(scale.spec.as_ref().and_then(|spec| spec.replicas)),
        existing: count(scale.status.as_ref().map(|status| status.replicas)),
    }
}

/// Only the causes say which address refused, and how.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
