//! The few questions that this program asks a coordinator, in plain HTTP.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode, Uri,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

const TIMEOUT: Duration = Duration::from_secs(10);

/// One question on a connection of its own.
#[derive(Clone, Debug)]
pub(crate) struct Question<'a> {
    /// `http://HOST:PORT`.
    pub(crate) base: &'a str,
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
        let Self { base, path, token, body } = self;
        let uri: Uri = base.parse().with_context(|| format!("{base:?} is no URL"))?;
        anyhow::ensure!(
            uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/"),
            "{base:?} is not http://HOST:PORT"
        );
        let host = uri.host().with_context(|| format!("{base:?} names no host"))?;
        let port = uri.port_u16().unwrap_or(80);
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port))
            .await
            .with_context(|| format!("cannot reach {base}"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = match &body {
            None => Request::get(path),
            Some(_) => Request::post(path).header(CONTENT_TYPE, "application/json"),
        }
        .header(HOST, uri.authority().map_or(host, |authority| authority.as_str()));
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let response = sender.send_request(request.body(body)?).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}
