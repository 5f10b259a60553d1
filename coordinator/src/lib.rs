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

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use baton_config::{BalancerActuator, ClusterConfig};
use baton_proto::{MAX_FRAME_BYTES, WINDOW_BYTES, WorkersHere, fleet_server::FleetServer};
use baton_tokens::PromptTokenizer;
use tokio::net::TcpListener;
use tonic::transport::{Server, server::TcpIncoming};
use tracing::info;

use crate::{
    admin::AdminToken,
    balancing::KubernetesPools,
    client::{Access, Tenants},
    fleet::FleetService,
    listener::ConnectionLimits,
    shell::Shell,
    spans::Tracer,
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

    let tls = config.tls.as_ref().map(tls::for_workers).transpose();
    let tls = tls.map_err(|source| CoordinatorError::Tls { table: "tls", source })?.map(Arc::new);
    let https = coordinator.https.as_ref().map(tls::for_clients).transpose();
    let https =
        https.map_err(|source| CoordinatorError::Tls { table: "coordinator.https", source })?;
    let admin_https = config.admin.as_ref().and_then(|admin| admin.https.as_ref());
    let admin_https = admin_https.map(tls::for_clients).transpose();
    let admin_https = admin_https
        .map_err(|source| CoordinatorError::Tls { table: "admin.https", source })?
        .map(Arc::new);
    let access =
        Access { https: https.map(Arc::new), tenants: Arc::new(Tenants::open(&config.tenants)?) };

    let fleet = take_in(workers, &shell, limits.max_body_bytes, tls.clone());

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
        tokio::spawn(listener::serve(router, listener, admin_limits, admin_https.clone()))
    });
    let metrics = shell.metrics.clone();
    let follows = tokio::spawn(async move {
        let mut interval = tokio::time::interval(FOLLOW_INTERVAL);
        loop {
            interval.tick().await;
            if let Some(tls) = &tls {
                tls::follow("tls", tls, &metrics);
            }
            if let Some(https) = &access.https {
                tls::follow("coordinator.https", https, &metrics);
            }
            access.tenants.follow();
            if let Some(https) = &admin_https {
                tls::follow("admin.https", https, &metrics);
            }
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

/// Where workers come from.
enum Workers {
    Dial(TcpListener),
    Here(WorkersHere),
}

impl Workers {
    fn address(&self) -> String {
        match self {
            Self::Dial(listener) => {
                listener.local_addr().map_or_else(|_| String::new(), |address| address.to_string())
            }
            Self::Here(_) => "in this process".to_owned(),
        }
    }
}

/// Attaches workers as they come, for as long as it is driven.
fn take_in(
    workers: Workers,
    shell: &Shell,
    max_body_bytes: u64,
    tls: Option<Arc<tls::TlsFiles>>,
) -> Pin<Box<dyn Future<Output = Result<(), tonic::transport::Error>> + Send>> {
    let service = FleetService { shell: shell.clone() };
    let listener = match workers {
        Workers::Dial(listener) => listener,
        Workers::Here(workers) => {
            return Box::pin(async {
                service.take_in_all(workers).await;
                std::future::pending().await
            });
        }
    };
    // A body of the largest size must fit into one message, with room for its headers.
    let max_message_bytes =
        usize::try_from(max_body_bytes).unwrap_or(usize::MAX).saturating_add(1 << 20);
    let service = FleetServer::new(service)
        .max_decoding_message_size(max_message_bytes)
        .max_encoding_message_size(max_message_bytes);
    let routes = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(1)))
        .http2_keepalive_timeout(Some(Duration::from_secs(2)))
        .add_service(service);
    match tls {
        Some(tls) => Box::pin(routes.serve_with_incoming(tls::incoming(listener, tls))),
        None => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            Box::pin(routes.serve_with_incoming(incoming))
        }
    }
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|source| CoordinatorError::Listen {
        key,
        address,
        source,
    })
}
