//! The coordinator: OpenAI-compatible HTTP towards clients, one gRPC stream towards each worker, and
//! the pure core that decides in between.
//!
//! A request's way: [`client`] reads it and peeks at its shape, `shell` tells the core and carries its
//! actions out, [`fleet`] takes the legs to the workers and their events back, the answer's bytes are laid
//! down for the client's connection to pick up.
//!
//! Made for a current-thread runtime: a work-stealing one costs half as much again for each token.

pub mod admin;
mod balancing;
mod client;
mod fleet;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod handoffs;
mod journal;
mod listener;
mod metrics;
mod placed;
mod prefixes;
mod prompt;
mod settings;
mod shell;
mod spans;
mod timeline;
mod tls;

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use baton_config::{BalancerActuator, ClusterConfig};
use baton_proto::WorkersHere;
use baton_tokens::PromptTokenizer;
use tokio::net::TcpListener;
use tracing::info;

use crate::{
    admin::AdminToken,
    balancing::KubernetesPools,
    client::{Access, Tenants},
    fleet::Workers,
    listener::ConnectionLimits,
    shell::Shell,
    spans::Tracer,
    tls::Certificates,
};
pub use crate::{client::KeyFileError, tls::TlsError};

/// What is due by the clock, and by predictions, is looked after this often.
const TICK_INTERVAL: Duration = Duration::from_millis(20);
/// What operators, their pages and their scripts hold open; further ones wait.
const ADMIN_CONNECTIONS: usize = 64;
/// Certificates, keys and tokens are looked at this often.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error("cannot listen on {address} ({key}): {source}")]
    Listen { key: &'static str, address: SocketAddr, source: io::Error },
    #[error("{table}: {source}")]
    Tls { table: &'static str, source: TlsError },
    #[error("tenant {tenant:?}: {source}")]
    Tenant { tenant: String, source: KeyFileError },
    #[error("coordinator.tokenizer: {0}")]
    Tokenizer(#[from] baton_tokens::OpenError),
    #[error("telemetry.otlp_endpoint: {0}")]
    Telemetry(#[from] opentelemetry_otlp::ExporterBuildError),
    #[error("placement.policy is {name:?}: expected one of {known}")]
    Policy { name: String, known: String },
    #[error(transparent)]
    AdminToken(#[from] admin::TokenError),
    #[error("balancer.kubernetes: {0}")]
    Kubernetes(#[from] baton_kubernetes::ConnectError),
    #[error("the worker listener ended: {0}")]
    Fleet(#[from] tonic::transport::Error),
}

/// Serves until `shutdown`, then lets open answers finish for a while.
pub async fn run(
    config: ClusterConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    serve(config, None, shutdown).await
}

/// The same with its workers in this process; listens for no others.
pub async fn run_with(
    workers: WorkersHere,
    config: ClusterConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    serve(config, Some(workers), shutdown).await
}

async fn serve(
    config: ClusterConfig,
    workers_here: Option<WorkersHere>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), CoordinatorError> {
    let policy = settings::placement_policy(&config)?;
    let precise = config.placement.precise;
    let settings = settings::core_settings(&config);
    let certificates = Certificates::open(&config)?;
    let coordinator = config.coordinator;
    let clients = listen("coordinator.listen", coordinator.listen).await?;
    let workers = match workers_here {
        Some(workers) => Workers::Here(workers),
        None => {
            let address = coordinator.workers_listen;
            Workers::Dial(listen("coordinator.workers_listen", address).await?)
        }
    };
    let operators = match &config.admin {
        Some(admin) => {
            Some((listen("admin.listen", admin.listen).await?, AdminToken::find(admin)?))
        }
        None => None,
    };
    let limits = coordinator.limits;
    let drain_timeout = limits.drain_timeout;
    let balancer = config.balancer;
    let balances = balancer.actuator != BalancerActuator::Off;
    let scaling = config.kubernetes.as_ref();
    let balancing = balances.then(|| balancing::settings(&balancer, scaling));
    let pools = match scaling.filter(|_| balancer.actuator == BalancerActuator::Flip) {
        Some(scaling) => Some(KubernetesPools::connect(scaling, &balancer).await?),
        None => None,
    };
    let tokenizer = coordinator.tokenizer.as_deref().map(PromptTokenizer::open).transpose()?;
    let tracer = Tracer::open(&config.telemetry)?;
    let shell =
        Shell::new(settings, policy, balancing, config.slo, limits.max_unread_bytes, precise)
            .traced(tracer);
    info!(clients = %coordinator.listen, workers = %workers.address(), "coordinator serves");

    let access = Access {
        https: certificates.clients.clone(),
        tenants: Arc::new(Tenants::open(&config.tenants)?),
    };

    let fleet =
        workers.taken_in(shell.clone(), limits.max_body_bytes, certificates.workers.clone());

    let admin_limits =
        ConnectionLimits { connections: ADMIN_CONNECTIONS, header_timeout: limits.header_timeout };
    let front = tokio::spawn(client::serve(
        shell.clone(),
        limits,
        config.admission.tenant_header,
        tokenizer,
        access.clone(),
        clients,
    ));
    let admin_token = operators.as_ref().map(|(_, token)| token.clone());
    let admin = operators.map(|(listener, token)| {
        let router = admin::router(shell.clone(), token);
        tokio::spawn(listener::serve(
            router,
            listener,
            admin_limits,
            certificates.operators.clone(),
        ))
    });
    let metrics = shell.metrics.clone();
    let follows = tokio::spawn(async move {
        let mut interval = tokio::time::interval(FOLLOW_INTERVAL);
        loop {
            interval.tick().await;
            certificates.follow(&metrics);
            access.tenants.follow();
            if let Some(token) = &admin_token {
                token.follow();
            }
        }
    });
    let ticks = tokio::spawn({
        let shell = shell.clone();
        async move {
            let mut interval = tokio::time::interval(TICK_INTERVAL);
            loop {
                interval.tick().await;
                shell.tick();
            }
        }
    });

    let balancing = tokio::spawn(balancing::keep_balanced(shell.clone(), balancer, pools));

    tokio::pin!(fleet);
    tokio::select! {
        ended = &mut fleet => ended?,
        () = shutdown => {
            front.abort();
            balancing.abort();
            info!(open_requests = shell.requests_open(), "coordinator stops");
            let drained = async {
                while shell.requests_open() > 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                ended = &mut fleet => ended?,
                _ = tokio::time::timeout(drain_timeout, drained) => {}
            }
            shell.close();
            // The last words leave.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    ticks.abort();
    follows.abort();
    if let Some(tracer) = shell.tracer.clone() {
        // It waits for its own thread, whose connection this one drives.
        let _ = tokio::task::spawn_blocking(move || tracer.close()).await;
    }
    admin.inspect(tokio::task::JoinHandle::abort);
    Ok(())
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|source| CoordinatorError::Listen {
        key,
        address,
        source,
    })
}
