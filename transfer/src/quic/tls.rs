//! Who is who: one fresh self-signed certificate a process, known by its fingerprint.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    version::TLS13,
};
use sha2::{Digest, Sha256};

use super::BindError;

/// What passes over a connection. Of what both speak the dialled side takes what it likes best; peers that
/// speak nothing in common do not get past the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Blocks on the handoff's own stream.
    Blocks,
    /// UCX writes the blocks; the stream carries what is said about them.
    Ucx,
}

impl Protocol {
    fn alpn(self) -> Vec<u8> {
        match self {
            Self::Blocks => b"baton-kv".to_vec(),
            Self::Ucx => b"baton-kv-ucx".to_vec(),
        }
    }

    /// What was agreed on.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Self> {
        let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
        let agreed = data.protocol?;
        [Self::Blocks, Self::Ucx].into_iter().find(|protocol| protocol.alpn() == agreed)
    }
}

/// Certificates are known by fingerprint; the name in them says nothing.
pub(super) const CERTIFICATE_NAME: &str = "baton";

pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// This process's certificate and key.
#[derive(Debug)]
pub(super) struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    pub(super) fn fresh() -> Result<Self, BindError> {
        let made = rcgen::generate_simple_self_signed([CERTIFICATE_NAME.to_owned()])
            .map_err(|error| BindError::Certificate(error.to_string()))?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        Ok(Self {
            certificate: made.cert.der().clone(),
            key: key.into(),
            provider: Arc::new(provider()),
        })
    }

    pub(super) fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// Takes connections from anyone who proves to hold the key of the certificate presented;
    /// whether a handoff is meant for that certificate is decided for each handoff.
    pub(super) fn server(&self, spoken: &[Protocol]) -> Result<quinn::ServerConfig, BindError> {
        let refused = |error: &dyn ToString| BindError::Certificate(error.to_string());
        let verifier = Arc::new(AnyClient(Arc::clone(&self.provider)));
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| refused(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(|error| refused(&error))?;
        tls.alpn_protocols = spoken.iter().map(|protocol| protocol.alpn()).collect();
        tls.send_tls13_tickets = 0;
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| refused(&error))?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(crypto)))
    }

    /// Connects to nobody but the holder of the certificate with this fingerprint. The flag tells
    /// afterwards whether it was another's certificate that made a handshake fail.
    pub(super) fn client(
        &self,
        fingerprint: [u8; 32],
        spoken: &[Protocol],
    ) -> Result<(quinn::ClientConfig, Arc<AtomicBool>), Error> {
        let mismatch = Arc::new(AtomicBool::new(false));
        let verifier = PinnedServer {
            fingerprint,
            mismatch: Arc::clone(&mismatch),
            provider: Arc::clone(&self.provider),
        };
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        tls.alpn_protocols = spoken.iter().map(|protocol| protocol.alpn()).collect();
        tls.resumption = Resumption::disabled();
        let crypto =
            QuicClientConfig::try_from(tls).map_err(|error| Error::General(error.to_string()))?;
        Ok((quinn::ClientConfig::new(Arc::new(crypto)), mismatch))
    }
}

/// AES-128-GCM alone: with it a core moves the most, and QUIC's own first packets want it anyway.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    provider
}

#[derive(Debug)]
struct PinnedServer {
    fingerprint: [u8; 32],
    mismatch: Arc<AtomicBool>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if fingerprint(end_entity) == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        self.mismatch.store(true, Relaxed);
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct AnyClient(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn only_tls13() -> Error {
    Error::General("QUIC has no TLS below 1.3".to_owned())
}
