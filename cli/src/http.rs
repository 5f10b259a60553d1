//! The few questions that this program asks a coordinator.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode, Uri,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

const TIMEOUT: Duration = Duration::from_secs(10);

/// One question on a connection of its own.
#[derive(Clone, Debug)]
pub(crate) struct Question<'a> {
    /// `http://HOST:PORT`, or `https://HOST:PORT`.
    pub(crate) base: &'a str,
    /// Whose certificates are trusted, with https: a file in PEM.
    pub(crate) ca: Option<&'a Path>,
    pub(crate) path: &'a str,
    /// Shown as a bearer's.
    pub(crate) token: Option<&'a str>,
    /// JSON to be posted; without it this is a GET.
    pub(crate) body: Option<String>,
}

impl Question<'_> {
    pub(crate) async fn ask(self) -> anyhow::Result<(StatusCode, String)> {
        let base = self.base;
        timeout(TIMEOUT, self.exchange())
            .await
            .with_context(|| format!("{base} does not answer in time"))?
    }

    async fn exchange(self) -> anyhow::Result<(StatusCode, String)> {
        let base = self.base;
        let uri: Uri = base.parse().with_context(|| format!("{base:?} is no URL"))?;
        let tls = match (uri.scheme_str(), uri.path()) {
            (Some("http"), "" | "/") => None,
            (Some("https"), "" | "/") => {
                let ca = self.ca.with_context(|| {
                    format!("{base}: give --ca FILE, with the certificates to be trusted")
                })?;
                Some(connector(ca).with_context(|| format!("--ca: {}", ca.display()))?)
            }
            _ => anyhow::bail!("{base:?} is not http://HOST:PORT or https://HOST:PORT"),
        };
        let host = uri.host().with_context(|| format!("{base:?} names no host"))?;
        let host = host.trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let unreachable = || format!("cannot reach {base}");
        let stream = TcpStream::connect((host, port)).await.with_context(unreachable)?;
        let authority = uri.authority().map_or(host, |authority| authority.as_str());
        match tls {
            None => self.over(stream, authority).await,
            Some(tls) => {
                let name = ServerName::try_from(host.to_owned())?;
                let stream = tls.connect(name, stream).await.with_context(unreachable)?;
                self.over(stream, authority).await
            }
        }
    }

    async fn over<S>(self, stream: S, authority: &str) -> anyhow::Result<(StatusCode, String)>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = match &self.body {
            None => Request::get(self.path),
            Some(_) => Request::post(self.path).header(CONTENT_TYPE, "application/json"),
        }
        .header(HOST, authority);
        if let Some(token) = self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = Full::new(Bytes::from(self.body.unwrap_or_default()));
        let response = sender.send_request(request.body(body)?).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

fn connector(ca: &Path) -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    anyhow::ensure!(!roots.is_empty(), "it holds no certificate in PEM");
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
