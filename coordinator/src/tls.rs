//! TLS on the coordinator's listeners. The files may change while it runs: each new connection is
//! met with what they say then, and the open ones go on.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_config::{ClusterConfig, Followed, HttpsConfig, Refreshed, TlsConfig};
use parking_lot::Mutex;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{VerifierBuilderError, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use crate::{CoordinatorError, journal::unix_ms, metrics::Metrics};

/// A stranger who connects and says nothing holds no socket for longer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Strangers at once. Workers keep their connections for days.
const MAX_HANDSHAKES: usize = 256;
/// However many come, the log has one line of them in so long.
const STRANGERS_TOLD_EVERY: Duration = Duration::from_secs(1);
/// As the alert has it.
const SOON_DAYS: i64 = 14;
/// What a certificate's URI begins with that says which worker's it is.
const WORKER_URI: &str = "baton:worker:";

/// The files of one listener, ready to be used.
pub(crate) type TlsFiles = Followed<ServerTls, TlsError>;

pub(crate) struct ServerTls {
    acceptor: TlsAcceptor,
    /// Of its own certificate, in seconds since 1970.
    expires_unix_s: i64,
}

impl ServerTls {
    fn new(config: ServerConfig, certificate: &Path) -> Result<Self, TlsError> {
        let own = certificates(certificate)?;
        let broken = |reason: String| TlsError::Broken { path: certificate.to_owned(), reason };
        let (_, parsed) = parse_x509_certificate(&own[0]).map_err(|e| broken(e.to_string()))?;
        let expires_unix_s = parsed.validity().not_after.timestamp();
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), expires_unix_s })
    }
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} holds no {what} in PEM", path = path.display())]
    Missing { path: PathBuf, what: &'static str },
    #[error("{path}: {reason}", path = path.display())]
    Broken { path: PathBuf, reason: String },
    #[error("{path} cannot be used with its private key: {source}", path = path.display())]
    Pair { path: PathBuf, source: rustls::Error },
    #[error("no certificate of {path} can verify anybody: {source}", path = path.display())]
    Authority { path: PathBuf, source: VerifierBuilderError },
}

/// Those of all listeners.
#[derive(Clone)]
pub(crate) struct Certificates {
    pub(crate) workers: Option<Arc<TlsFiles>>,
    pub(crate) clients: Option<Arc<TlsFiles>>,
    pub(crate) operators: Option<Arc<TlsFiles>>,
}

/// Tables of the file.
const WORKERS: &str = "tls";
const CLIENTS: &str = "coordinator.https";
const OPERATORS: &str = "admin.https";

impl Certificates {
    pub(crate) fn open(config: &ClusterConfig) -> Result<Self, CoordinatorError> {
        let of = |table, opened: Option<Result<TlsFiles, TlsError>>| {
            let files = opened.transpose();
            let files = files.map_err(|source| CoordinatorError::Tls { table, source })?;
            Ok::<_, CoordinatorError>(files.map(Arc::new))
        };
        let admin = config.admin.as_ref().and_then(|admin| admin.https.as_ref());
        Ok(Self {
            workers: of(WORKERS, config.tls.as_ref().map(for_workers))?,
            clients: of(CLIENTS, config.coordinator.https.as_ref().map(for_clients))?,
            operators: of(OPERATORS, admin.map(for_clients))?,
        })
    }

    /// Looks at the files, and says what became of them and until when they hold.
    pub(crate) fn follow(&self, metrics: &Metrics) {
        let tables =
            [(WORKERS, &self.workers), (CLIENTS, &self.clients), (OPERATORS, &self.operators)];
        for (table, files) in tables {
            if let Some(files) = files {
                follow(table, files, metrics);
            }
        }
    }
}

/// Mutual TLS: only who holds a certificate of the CA gets in. Between ourselves nothing older than
/// TLS 1.3 is spoken.
fn for_workers(tls: &TlsConfig) -> Result<TlsFiles, TlsError> {
    let tls = tls.clone();
    let files = vec![tls.ca.clone(), tls.certificate.clone(), tls.private_key.clone()];
    Followed::open(files, move || {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&tls.ca)? {
            roots.add(certificate).map_err(|error| TlsError::Broken {
                path: tls.ca.clone(),
                reason: error.to_string(),
            })?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .build()
            .map_err(|source| TlsError::Authority { path: tls.ca.clone(), source })?;
        let pair = |source| TlsError::Pair { path: tls.certificate.clone(), source };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&tls.certificate)?, private_key(&tls.private_key)?)
            .map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        ServerTls::new(config, &tls.certificate)
    })
}

/// HTTPS, for whoever trusts the certificate.
fn for_clients(https: &HttpsConfig) -> Result<TlsFiles, TlsError> {
    let https = https.clone();
    let files = vec![https.certificate.clone(), https.private_key.clone()];
    Followed::open(files, move || {
        let pair = |source| TlsError::Pair { path: https.certificate.clone(), source };
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_protocol_versions(&[&TLS13, &TLS12])
                .map_err(pair)?
                .with_no_client_auth()
                .with_single_cert(
                    certificates(&https.certificate)?,
                    private_key(&https.private_key)?,
                )
                .map_err(pair)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        ServerTls::new(config, &https.certificate)
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| TlsError::Broken { path: path.to_owned(), reason: error.to_string() })?;
    if certificates.is_empty() {
        return Err(TlsError::Missing { path: path.to_owned(), what: "certificate" });
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?)
        .map_err(|_| TlsError::Missing { path: path.to_owned(), what: "private key" })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn follow(table: &'static str, files: &TlsFiles, metrics: &Metrics) {
    match files.refresh() {
        Refreshed::Unchanged => {}
        Refreshed::Renewed => {
            info!(table, "certificates changed: new connections use the new ones");
        }
        Refreshed::Unusable(error) => {
            warn!(table, %error, "certificates changed and cannot be used: the former ones stay");
        }
    }
    let expires_unix_s = files.current().expires_unix_s;
    let is_news = metrics.certificate_expires(table, expires_unix_s);
    let now_s = i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX);
    let left_days = expires_unix_s.saturating_sub(now_s) / 86_400;
    if is_news && left_days < SOON_DAYS {
        warn!(table, left_days, "this certificate expires soon");
    }
}

/// The server's side of one handshake.
pub(crate) async fn handshake(
    files: &TlsFiles,
    stream: TcpStream,
) -> io::Result<TlsStream<TcpStream>> {
    let accept = files.current().acceptor.accept(stream);
    tokio::time::timeout(HANDSHAKE_TIMEOUT, accept).await.map_err(|_| io::ErrorKind::TimedOut)?
}

/// Connections of `listener` whose handshake is done. A stranger who is slow keeps nobody waiting.
pub(crate) fn incoming(
    listener: TcpListener,
    files: Arc<TlsFiles>,
) -> ReceiverStream<io::Result<TlsStream<TcpStream>>> {
    let (sender, accepted) = mpsc::channel(1);
    let strangers = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let told = Arc::new(Mutex::new(Told::default()));
    tokio::spawn(async move {
        loop {
            // The semaphore is never closed.
            let Ok(place) = strangers.clone().acquire_owned().await else { return };
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        warn!(%error, "cannot accept a worker");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
                () = sender.closed() => return,
            };
            let (files, sender, told) = (files.clone(), sender.clone(), told.clone());
            tokio::spawn(async move {
                let met = match stream.set_nodelay(true) {
                    Ok(()) => handshake(&files, stream).await,
                    Err(error) => Err(error),
                };
                match met {
                    // Nobody takes it: the server is going.
                    Ok(stream) => drop(sender.send(Ok(stream)).await),
                    Err(error) => {
                        if let Some(others) = told.lock().may_tell(Instant::now()) {
                            info!(%peer, %error, others, "a stranger at the workers' door");
                        }
                    }
                }
                drop(place);
            });
        }
    });
    ReceiverStream::new(accepted)
}

/// Keeps whoever knocks from filling the log.
#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    untold: u64,
}

impl Told {
    /// Whether it is time for a line, and of how many there was none since the last.
    fn may_tell(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + STRANGERS_TOLD_EVERY) {
            self.untold += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// The workers as which the holder of a certificate may attach, where it says so: its URIs
/// `baton:worker:NAME`. One that names none may be any.
pub(crate) fn worker_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let names = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(WORKER_URI).map(str::to_owned),
        _ => None,
    });
    names.collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    #[test]
    fn a_certificate_says_which_worker_it_is_for() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["prefill-0.internal".to_owned()]).unwrap();
        let plain = params.self_signed(&key).unwrap();
        assert!(worker_names(plain.der()).is_empty());
        for uri in ["https://elsewhere", "baton:worker:prefill-0", "baton:worker:prefill-1"] {
            params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        }
        let named = params.self_signed(&key).unwrap();
        assert_eq!(worker_names(named.der()), ["prefill-0", "prefill-1"]);
    }

    #[test]
    fn strangers_do_not_fill_the_log() {
        let start = Instant::now();
        let mut told = Told::default();
        let lines = (0..2500).map(|ms| told.may_tell(start + Duration::from_millis(ms)));
        let lines: Vec<u64> = lines.flatten().collect();
        assert_eq!(lines, [0, 999, 999]);
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_and_the_former_pair_stays() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, private_key] =
            ["front.pem", "front.key"].map(|name| directory.path().join(name));
        let pair = || {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        let (pem, key) = pair();
        // As careful people do, and other than by the clock's grain to be told apart.
        let put = |path: &Path, text: String| {
            let beside = path.with_extension("new");
            fs::write(&beside, text).unwrap();
            fs::rename(beside, path).unwrap();
        };
        put(&certificate, pem);
        put(&private_key, key);
        let files = for_clients(&HttpsConfig {
            certificate: certificate.clone(),
            private_key: private_key.clone(),
        })
        .unwrap();
        let before = files.current();

        let (pem, key) = pair();
        put(&certificate, pem);
        assert!(matches!(files.refresh(), Refreshed::Unchanged), "not yet said");
        assert!(matches!(files.refresh(), Refreshed::Unusable(TlsError::Pair { .. })));
        assert!(Arc::ptr_eq(&before, &files.current()));
        put(&private_key, key);
        assert!(matches!(files.refresh(), Refreshed::Renewed));
        assert!(!Arc::ptr_eq(&before, &files.current()));
    }
}
