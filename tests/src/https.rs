use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A client of one coordinator, with an API key. Each request is a connection of its own, which
/// trusts what the CA's file says then.
#[derive(Clone, Debug)]
pub struct HttpsClient {
    pub address: SocketAddr,
    pub ca: PathBuf,
    pub key: Option<String>,
}

impl HttpsClient {
    /// The answer, whole. An error where none came, or where it broke off.
    pub async fn post(&self, path: &str, body: &Value) -> Result<(StatusCode, HeaderMap, String)> {
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
        self.send(request, body.to_string()).await
    }

    pub async fn get(&self, path: &str) -> Result<(StatusCode, HeaderMap, String)> {
        self.send(Request::get(path), String::new()).await
    }

    async fn send(
        &self,
        mut request: http::request::Builder,
        body: String,
    ) -> Result<(StatusCode, HeaderMap, String)> {
        let tcp = TcpStream::connect(self.address).await.context("cannot connect")?;
        let name = ServerName::IpAddress(self.address.ip().into());
        let tls = self.connector()?.connect(name, tcp).await.context("no TLS")?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
        let connection = tokio::spawn(connection);
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request
            .header(header::HOST, self.address.to_string())
            .header(header::CONNECTION, "close")
            .body(Full::new(Bytes::from(body)))?;
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await.context("the answer broke off")?.to_bytes();
        connection.abort();
        Ok((head.status, head.headers, String::from_utf8(body.to_vec())?))
    }

    fn connector(&self) -> Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(&self.ca)? {
            roots.add(certificate?)?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
