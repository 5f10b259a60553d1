//! QUIC without our protocol: what a stranger can do with the same libraries.

use std::{future::Future, net::SocketAddr, sync::Arc};

use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream, ServerConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    version::TLS13,
};
use sha2::{Digest, Sha256};

pub(crate) struct Raw {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    presents_certificate: bool,
    protocol: Vec<u8>,
}

impl Raw {
    pub(crate) fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["raw".to_owned()]).unwrap();
        Self {
            certificate: made.cert.der().clone(),
            key: made.signing_key.serialize_der().into(),
            presents_certificate: true,
            protocol: b"baton-kv".to_vec(),
        }
    }

    pub(crate) fn without_certificate(self) -> Self {
        Self { presents_certificate: false, ..self }
    }

    pub(crate) fn speaking(self, protocol: &[u8]) -> Self {
        Self { protocol: protocol.to_vec(), ..self }
    }

    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(&self.certificate).into()
    }

    pub(crate) async fn connect(&self, to: SocketAddr) -> Result<Connection, ConnectionError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone));
        let mut tls = if self.presents_certificate {
            let chain = vec![self.certificate.clone()];
            builder.with_client_auth_cert(chain, self.key.clone_key().into()).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        tls.alpn_protocols = vec![self.protocol.clone()];
        let crypto = QuicClientConfig::try_from(tls).unwrap();
        let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let config = ClientConfig::new(Arc::new(crypto));
        endpoint.connect_with(config, to, "raw").unwrap().await
    }

    /// Listens for one stream.
    pub(crate) fn listen(
        &self,
    ) -> (SocketAddr, impl Future<Output = (SendStream, RecvStream)> + use<>) {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key().into())
            .unwrap();
        tls.alpn_protocols = vec![self.protocol.clone()];
        let crypto = QuicServerConfig::try_from(tls).unwrap();
        let config = ServerConfig::with_crypto(Arc::new(crypto));
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::server(config, listen).unwrap();
        let address = endpoint.local_addr().unwrap();
        let accepting = async move {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            connection.accept_bi().await.unwrap()
        };
        (address, accepting)
    }
}

#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
