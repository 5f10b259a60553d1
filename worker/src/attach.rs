use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use baton_config::{Followed, Refreshed, TlsConfig};
use baton_proto::{
    Commands, CoordinatorFrame, CoordinatorFrames, CoordinatorHere, MAX_FRAME_BYTES, Report,
    WINDOW_BYTES, Welcome, coordinator_frame::Frame, fleet_client::FleetClient,
};
use futures::{StreamExt as _, TryStreamExt as _};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::{
    counters::Running,
    jobs::Jobs,
    kv_telling::KvTelling,
    life::Life,
    outbox::{Frames, Outbox},
    role::Served,
};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A coordinator answers a hello at once.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream whose other end went away without a word is given up after interval + timeout.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Certificates are looked at this often.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// A coordinator bounds its clients' bodies itself; this is only above any of its bounds.
const MAX_MESSAGE_BYTES: usize = 1 << 30;

#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("cannot reach it: {0}")]
    Unreachable(String),
    #[error("it refused: {0}")]
    Refused(String),
    #[error("its first word was neither a welcome nor a refusal")]
    NoWelcome,
    #[error("no answer to the hello within {} s", WELCOME_TIMEOUT.as_secs())]
    NoAnswer,
    #[error("the stream broke off: {0}")]
    BrokeOff(String),
    #[error("it hung up before it answered the hello ({reason}); {hint}")]
    HungUp { reason: String, hint: &'static str },
    #[error("{0}: this one keeps away until it is restarted")]
    Displaced(String),
    #[error("the stream ended")]
    Ended,
}

/// Where a coordinator is.
#[derive(Clone, Debug)]
pub(crate) enum Coordinator {
    At {
        /// `host:port` to dial.
        address: String,
        /// The name that its certificate carries, where that is not the address's host.
        name: Option<String>,
    },
    Here(CoordinatorHere),
}

impl fmt::Display for Coordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At { address, .. } => f.write_str(address),
            Self::Here(_) => f.write_str("this process"),
        }
    }
}

/// A coordinator that can be reached.
enum Reached<'c> {
    Far(Channel),
    Here(&'c CoordinatorHere),
}

impl Coordinator {
    async fn reach(&self, tls: Option<&TlsPem>) -> Result<Reached<'_>, AttachError> {
        let (address, name) = match self {
            Self::Here(here) => return Ok(Reached::Here(here)),
            Self::At { address, name } => (address, name.as_deref()),
        };
        let unreachable = |error: tonic::transport::Error| AttachError::Unreachable(chain(&error));
        let endpoint = endpoint(address, name, tls).map_err(unreachable)?;
        endpoint.connect().await.map(Reached::Far).map_err(unreachable)
    }
}

impl Reached<'_> {
    async fn attach(self, frames: Frames) -> Result<CoordinatorFrames, tonic::Status> {
        match self {
            Self::Here(here) => here.attach(Box::pin(frames.map(Ok))).await,
            Self::Far(channel) => {
                let client = FleetClient::new(channel);
                let mut client = client.max_decoding_message_size(MAX_MESSAGE_BYTES);
                Ok(Box::pin(client.attach(frames).await?.into_inner()))
            }
        }
    }
}

/// Stays attached to one coordinator for as long as it is `wanted`, which is asked whenever it is away.
/// Dropping the future closes the stream and cancels its jobs.
pub(crate) async fn keep_attached(
    life: Arc<Life>,
    coordinator: &Coordinator,
    tls: Option<&TlsFiles>,
    wanted: impl Fn() -> bool,
) {
    let mut backoff = Backoff::default();
    while wanted() {
        let error = match attach(&life, coordinator, tls, &mut backoff).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if matches!(error, AttachError::Displaced(_)) {
            // Coming back would displace the other in its turn, and so on for ever.
            tracing::error!(%coordinator, %error, "not attached");
            return std::future::pending().await;
        }
        let wait = backoff.next();
        match (&error, coordinator) {
            (AttachError::Refused(_), _) => {
                tracing::error!(%coordinator, %error, "not attached");
            }
            // The process ends, and says so.
            (_, Coordinator::Here(_)) => tracing::debug!(%error, "not attached"),
            _ => tracing::warn!(%coordinator, %error, "not attached; trying again in {wait:?}"),
        }
        tokio::time::sleep(wait).await;
    }
}

async fn attach(
    life: &Arc<Life>,
    coordinator: &Coordinator,
    tls: Option<&TlsFiles>,
    backoff: &mut Backoff,
) -> Result<std::convert::Infallible, AttachError> {
    let pem = tls.map(TlsFiles::current);
    let reached = coordinator.reach(pem.as_deref()).await?;
    let served = life.role.serves(&coordinator.to_string());
    let (outbox, frames) = Outbox::open(life.hello());
    // Whichever way this ends, the stream ends with it.
    let _close = CloseOnDrop(outbox.clone());
    let (mut stream, welcome) = timeout(WELCOME_TIMEOUT, async {
        let hung_up = |status| hung_up(&status, coordinator, tls.is_some());
        let mut stream = reached.attach(frames).await.map_err(hung_up)?;
        match next(&mut stream, hung_up).await? {
            Frame::Welcome(welcome) => Ok((stream, welcome)),
            Frame::Refusal(refusal) => Err(AttachError::Refused(refusal.reason)),
            Frame::Commands(_) => Err(AttachError::NoWelcome),
        }
    })
    .await
    .map_err(|_| AttachError::NoAnswer)??;
    let _attached = life.counters.attached.one();
    tracing::info!(%coordinator, epoch = %life.epoch, "attached");
    backoff.reset();
    serve(life, &mut stream, welcome, outbox, served).await
}

async fn serve(
    life: &Arc<Life>,
    stream: &mut CoordinatorFrames,
    welcome: Welcome,
    outbox: Outbox,
    mut served: Served,
) -> Result<std::convert::Infallible, AttachError> {
    if let Some(pacing) = life.engine.pacing() {
        pacing.set_itl_target_ms(welcome.itl_target_ms.into());
    }
    let jobs = Jobs::new(life.clone(), outbox.clone());
    let every = Duration::from_millis(u64::from(welcome.report_interval_ms.max(10)));
    let mut kv_events = KvTelling::new(life);
    let mut leaving = life.leaving.clone();
    if *leaving.borrow_and_update() {
        outbox.leaving();
    }
    let mut reports = interval(every);
    reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            frame = next(stream, |status| AttachError::BrokeOff(told(&status))) => match frame? {
                Frame::Commands(commands) => {
                    if let Ok(role) = commands.set_role().try_into() {
                        life.role.order(role);
                    }
                    let Commands { cancel, start, restart_kv_events, release, .. } = commands;
                    if release != 0 {
                        served.released(release);
                    }
                    if restart_kv_events {
                        kv_events.restart();
                    }
                    cancel.into_iter().for_each(|job| jobs.cancel(job));
                    start.into_iter().for_each(|job| jobs.start(job));
                }
                Frame::Refusal(refusal) => return Err(AttachError::Displaced(refusal.reason)),
                Frame::Welcome(_) => {}
            },
            Ok(()) = leaving.changed() => outbox.leaving(),
            _ = reports.tick() => outbox.report(report(life, &served, jobs.own())),
            () = served.changed() => outbox.report(report(life, &served, jobs.own())),
            message = kv_events.next(&outbox) => outbox.kv_events(message),
        }
    }
}

fn report(life: &Life, served: &Served, own: &Running) -> Report {
    Report { leads: served.leads(), ..life.report(own) }
}

async fn next(
    stream: &mut CoordinatorFrames,
    broken: impl Fn(tonic::Status) -> AttachError,
) -> Result<Frame, AttachError> {
    loop {
        match stream.try_next().await.map_err(&broken)? {
            Some(CoordinatorFrame { frame: Some(frame) }) => return Ok(frame),
            // Of a newer coordinator, which knows that this worker may not know it.
            Some(CoordinatorFrame { frame: None }) => {}
            None => return Err(AttachError::Ended),
        }
    }
}

/// In TLS 1.3 a client is done with its handshake before the server has looked at its certificate: a
/// refusal of it comes only here.
fn hung_up(status: &tonic::Status, coordinator: &Coordinator, with_tls: bool) -> AttachError {
    if matches!(coordinator, Coordinator::Here(_)) {
        return AttachError::BrokeOff(told(status));
    }
    let hint = if with_tls {
        "its [tls] ca may not be the one that signed this worker's certificate"
    } else {
        "it may want TLS, and this worker's file has no [tls]"
    };
    AttachError::HungUp { reason: told(status), hint }
}

fn told(status: &tonic::Status) -> String {
    let text = format!("{}: {}", status.code(), status.message());
    std::error::Error::source(status).map_or(text.clone(), |cause| joined(text, cause))
}

struct CloseOnDrop(Outbox);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The files of `[tls]`: each attempt to attach uses what they say then.
pub(crate) type TlsFiles = Followed<TlsPem, TlsError>;

/// Why the files of `[tls]` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path} (tls): {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{certificate}, its key and {ca} cannot be used together (tls): {reason}",
        certificate = certificate.display(), ca = ca.display())]
    Unusable { certificate: PathBuf, ca: PathBuf, reason: String },
}

/// The files' texts.
pub(crate) struct TlsPem {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    private_key: Vec<u8>,
}

impl TlsPem {
    pub(crate) fn open(config: &TlsConfig) -> Result<TlsFiles, TlsError> {
        let config = config.clone();
        let files = vec![config.ca.clone(), config.certificate.clone(), config.private_key.clone()];
        Followed::open(files, move || Self::read(&config))
    }

    fn read(config: &TlsConfig) -> Result<Self, TlsError> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|source| TlsError::Read { path: path.clone(), source })
        };
        let pem = Self {
            ca: read(&config.ca)?,
            certificate: read(&config.certificate)?,
            private_key: read(&config.private_key)?,
        };
        // Tried here, where what is wrong with them can still be said of the files.
        endpoint("localhost:1", None, Some(&pem)).map_err(|error| TlsError::Unusable {
            certificate: config.certificate.clone(),
            ca: config.ca.clone(),
            reason: chain(&error),
        })?;
        Ok(pem)
    }
}

/// Looks at the files now and then, for ever, and says what became of them.
pub(crate) async fn follow(tls: Option<&TlsFiles>) {
    let Some(tls) = tls else { return std::future::pending().await };
    let mut looks = interval(FOLLOW_INTERVAL);
    loop {
        looks.tick().await;
        match tls.refresh() {
            Refreshed::Unchanged => {}
            Refreshed::Renewed => {
                tracing::info!("certificates changed: the next attachment uses the new ones");
            }
            Refreshed::Unusable(error) => {
                tracing::warn!(%error, "certificates changed and cannot be used: the former ones stay");
            }
        }
    }
}

fn endpoint(
    address: &str,
    name: Option<&str>,
    tls: Option<&TlsPem>,
) -> Result<Endpoint, tonic::transport::Error> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    if let Some(tls) = tls {
        let mut config = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&tls.ca))
            .identity(Identity::from_pem(&tls.certificate, &tls.private_key));
        if let Some(name) = name {
            config = config.domain_name(name);
        }
        endpoint = endpoint.tls_config(config)?;
    }
    Ok(endpoint)
}

/// An error with its causes: tonic's own says only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or(error.to_string(), |cause| joined(error.to_string(), cause))
}

/// Some causes only repeat what was said.
fn joined(mut text: String, cause: &dyn std::error::Error) -> String {
    let mut cause = Some(cause);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Doubles from try to try. Half of each wait is drawn by lot, so that workers that lost their
/// coordinator together do not come back together.
#[derive(Debug)]
struct Backoff {
    current: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { current: FIRST_BACKOFF }
    }
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let wait = self.current.mul_f64(0.5 + 0.5 * fastrand::f64());
        self.current = (2 * self.current).min(LAST_BACKOFF);
        wait
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit_and_begin_anew() {
        let mut backoff = Backoff::default();
        let mut expected = FIRST_BACKOFF;
        for _ in 0..12 {
            let wait = backoff.next();
            assert!(wait >= expected / 2 && wait <= expected, "{wait:?} of {expected:?}");
            expected = (2 * expected).min(LAST_BACKOFF);
        }
        assert_eq!(expected, LAST_BACKOFF);
        backoff.reset();
        assert!(backoff.next() <= FIRST_BACKOFF);
    }
}
