use std::{sync::Arc, time::Duration};

use baton_core::{HandoffMode, WorkerDescription, WorkerKey};
use baton_proto::{self as wire, WireError, fleet_server::Fleet};
use baton_types::{Compatibility, Role};
use futures::{Stream, TryStreamExt as _};
use tonic::{
    Request, Response, Status, Streaming,
    transport::server::{TcpConnectInfo, TlsConnectInfo},
};
use tracing::{debug, warn};

use super::link::{Link, LinkStream};
use crate::{
    shell::{Shell, usable_model},
    tls::worker_names,
};

const REPORT_INTERVAL_MS: u32 = 500;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// More than any engine has room for, and little enough to be added up.
const MOST_KV_TOKENS: u64 = 1 << 40;

/// How other workers reach a worker, as it said itself.
#[derive(Clone, Debug)]
pub(crate) struct PeerInfo {
    pub(crate) wire: wire::Peer,
    pub(crate) compatibility: Compatibility,
}

impl PeerInfo {
    /// As another worker is told of it, which need not hear that both are alike.
    pub(crate) fn told_to(&self, other: Option<&Self>) -> wire::Peer {
        let differs = other.is_none_or(|other| other.compatibility != self.compatibility);
        let compatibility = differs.then(|| (&self.compatibility).into());
        wire::Peer { compatibility, ..self.wire.clone() }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct FleetService {
    pub(crate) shell: Shell,
}

#[tonic::async_trait]
impl Fleet for FleetService {
    type AttachStream = LinkStream;

    async fn attach(
        &self,
        request: Request<Streaming<wire::WorkerFrame>>,
    ) -> Result<Response<LinkStream>, Status> {
        let names = names_of_certificate(&request);
        self.take_in(request.into_inner(), &names).await.map(Response::new)
    }
}

impl FleetService {
    /// Those of this process, until there are no more.
    pub(crate) async fn take_in_all(self, mut workers: wire::WorkersHere) {
        while let Some(wire::Attachment { frames, answer }) = workers.recv().await {
            let service = self.clone();
            tokio::spawn(async move {
                let taken = service.take_in(frames, &[]).await;
                let _ = answer.send(taken.map(|stream| Box::pin(stream) as _));
            });
        }
    }

    /// A worker that may have one of these `names`, or any where there are none.
    async fn take_in(
        &self,
        mut frames: impl Stream<Item = Result<wire::WorkerFrame, Status>> + Send + Unpin + 'static,
        names: &[String],
    ) -> Result<LinkStream, Status> {
        let hello = tokio::time::timeout(HELLO_TIMEOUT, frames.try_next())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(wire::worker_frame::Frame::Hello(hello)) = hello.and_then(|frame| frame.frame)
        else {
            return Err(Status::invalid_argument("the first frame must be a hello"));
        };
        let (description, peer) = match introduce(&hello, names) {
            Ok(introduced) => introduced,
            Err(refusal) => {
                let reason = refusal.to_string();
                warn!(worker = hello.worker_name, reason, "worker refused");
                return Ok(LinkStream(Link::refusal(reason)));
            }
        };
        let link = Link::welcome(wire::Welcome {
            report_interval_ms: REPORT_INTERVAL_MS,
            itl_target_ms: self.shell.itl_target_ms(),
        });
        let worker = self.shell.attach(description, link.clone(), peer, &hello);
        tokio::spawn(read(self.shell.clone(), worker, frames, link.clone()));
        Ok(LinkStream(link))
    }
}

/// Hears a worker out until its stream ends, by whichever side.
async fn read(
    shell: Shell,
    worker: WorkerKey,
    mut frames: impl Stream<Item = Result<wire::WorkerFrame, Status>> + Unpin,
    link: Arc<Link>,
) {
    loop {
        match frames.try_next().await {
            Ok(Some(wire::WorkerFrame { frame })) => match frame {
                Some(wire::worker_frame::Frame::Events(batch)) => shell.events(worker, batch),
                Some(wire::worker_frame::Frame::Report(report)) => shell.report(worker, report),
                Some(wire::worker_frame::Frame::KvEvents(events)) => {
                    shell.kv_events(worker, &events);
                }
                Some(wire::worker_frame::Frame::Leaving(_)) => shell.worker_leaves(worker),
                Some(wire::worker_frame::Frame::Hello(_)) | None => {
                    warn!("a worker sent a frame that has no place here: its stream is closed");
                    break;
                }
            },
            Ok(None) => break,
            Err(status) => {
                debug!(%status, "a worker's stream broke");
                break;
            }
        }
    }
    link.close();
    shell.worker_lost(worker);
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("this coordinator speaks protocol {}, the worker {theirs}", wire::PROTOCOL_VERSION)]
    Protocol { theirs: u32 },
    #[error("Hello.{field} is empty")]
    Empty { field: &'static str },
    #[error("Hello.worker_name has {0} bytes: at most 128, printable ASCII, are taken")]
    Name(usize),
    #[error("the certificate of worker {name:?} is for {}", names.join(", "))]
    Certificate { name: String, names: Vec<String> },
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// The workers that the peer of a stream may be; none where it may be any.
fn names_of_certificate<T>(request: &Request<T>) -> Vec<String> {
    let tls = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = tls.and_then(TlsConnectInfo::peer_certs);
    certificates.and_then(|chain| chain.first().map(worker_names)).unwrap_or_default()
}

pub(crate) fn introduce(
    hello: &wire::Hello,
    names: &[String],
) -> Result<(WorkerDescription, Option<PeerInfo>), Refused> {
    if hello.protocol_version != wire::PROTOCOL_VERSION {
        return Err(Refused::Protocol { theirs: hello.protocol_version });
    }
    for (field, empty) in
        [("worker_name", hello.worker_name.is_empty()), ("models", hello.models.is_empty())]
    {
        if empty {
            return Err(Refused::Empty { field });
        }
    }
    // It goes into response headers and metric labels.
    if hello.worker_name.len() > 128 || !hello.worker_name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Refused::Name(hello.worker_name.len()));
    }
    if !names.is_empty() && !names.contains(&hello.worker_name) {
        let (name, names) = (hello.worker_name.clone(), names.to_vec());
        return Err(Refused::Certificate { name, names });
    }
    let (handoff, peer) = handoff_of(hello)?;
    let description = WorkerDescription {
        name: hello.worker_name.clone(),
        epoch: wire::epoch("Hello", &hello.epoch)?,
        role: Role::try_from(hello.role())?,
        models: hello.models.clone(),
        handoff,
        model: hello.step_model.as_ref().and_then(usable_model),
        kv_capacity_tokens: hello
            .kv_cache
            .as_ref()
            .map(|cache| cache.capacity_tokens.min(MOST_KV_TOKENS))
            .filter(|capacity| *capacity > 0),
        pulls_prefixes: hello.pulls_prefixes,
    };
    Ok((description, peer))
}

fn handoff_of(hello: &wire::Hello) -> Result<(HandoffMode, Option<PeerInfo>), WireError> {
    let missing = |field| WireError::Missing { message: "Hello", field };
    match hello.handoff_mode() {
        wire::HandoffMode::None => Ok((HandoffMode::None, None)),
        wire::HandoffMode::Engine => Ok((HandoffMode::Engine, None)),
        wire::HandoffMode::Fenced => {
            let compatibility = hello.compatibility.clone().ok_or(missing("compatibility"))?;
            let peer = hello.peer.clone().ok_or(missing("peer"))?;
            wire::epoch("Peer", &peer.epoch)?;
            wire::fingerprint("Peer", &peer.certificate_fingerprint)?;
            let engine = Compatibility::from(compatibility);
            let compatibility = engine.pairing_digest();
            let peer = PeerInfo { wire: peer, compatibility: engine };
            Ok((HandoffMode::Fenced { compatibility }, Some(peer)))
        }
        wire::HandoffMode::Unspecified => Err(missing("handoff_mode")),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn hello() -> wire::Hello {
        wire::Hello {
            protocol_version: wire::PROTOCOL_VERSION,
            worker_name: "prefill-0".into(),
            epoch: Bytes::from_static(&[1; 16]),
            role: wire::Role::Prefill.into(),
            models: vec!["m".into()],
            handoff_mode: wire::HandoffMode::None.into(),
            ..wire::Hello::default()
        }
    }

    #[test]
    fn a_worker_that_introduces_itself_badly_hears_what_is_wrong() {
        assert!(introduce(&hello(), &[]).is_ok());
        let names = ["prefill-1", "prefill-0"].map(str::to_owned);
        assert!(introduce(&hello(), &names).is_ok());
        let refused = introduce(&hello(), &names[..1]).unwrap_err().to_string();
        assert_eq!(refused, "the certificate of worker \"prefill-0\" is for prefill-1");
        type Spoil = fn(&mut wire::Hello);
        let cases: [(Spoil, &str); 7] = [
            (|h| h.protocol_version = 9, "speaks protocol 1, the worker 9"),
            (|h| h.worker_name.clear(), "Hello.worker_name is empty"),
            (|h| h.worker_name = "a\nb".into(), "printable ASCII"),
            (|h| h.models.clear(), "Hello.models is empty"),
            (|h| h.epoch.clear(), "Hello.epoch is 0 bytes: expected 16 bytes"),
            (|h| h.role = 77, "Hello.role is missing"),
            (
                |h| h.handoff_mode = wire::HandoffMode::Fenced.into(),
                "Hello.compatibility is missing",
            ),
        ];
        for (spoil, expected) in cases {
            let mut hello = hello();
            spoil(&mut hello);
            let refused = introduce(&hello, &[]).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
