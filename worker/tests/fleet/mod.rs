//! A coordinator that does what a test says, and workers with the embedded engine to be told.
#![allow(dead_code, unreachable_pub)] // Each test file uses its part.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use baton_config::{ArenaConfig, EngineConfig, SimConfig, TransferConfig, WorkerConfig};
use baton_proto::{
    Commands, CoordinatorFrame, Event, Handoff, Hello, Leg, Peer, PrefixPull, PullResult, Report,
    StartJob, Welcome, WorkerFrame, coordinator_frame, fleet_server, worker_frame,
};
use baton_transfer::faults::Faults;
use baton_types::{HandoffId, Role};
use bytes::Bytes;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(60);

pub async fn timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("within a minute")
}

struct Service {
    attached: mpsc::Sender<Attached>,
    itl_target_ms: f32,
}

#[tonic::async_trait]
impl fleet_server::Fleet for Service {
    type AttachStream = ReceiverStream<Result<CoordinatorFrame, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<WorkerFrame>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let itl_target_ms = self.itl_target_ms;
        let mut stream = request.into_inner();
        let first = stream.message().await?.and_then(|frame| frame.frame);
        let Some(worker_frame::Frame::Hello(hello)) = first else { panic!("{first:?}") };
        let (commands, receiver) = mpsc::channel(16);
        let welcome =
            coordinator_frame::Frame::Welcome(Welcome { report_interval_ms: 20, itl_target_ms });
        commands.send(Ok(CoordinatorFrame { frame: Some(welcome) })).await.unwrap();
        let (events_in, events) = mpsc::unbounded_channel();
        let (reports_in, reports) = tokio::sync::watch::channel(Report::default());
        let (leaving_in, leaving) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            while let Ok(Some(frame)) = stream.message().await {
                match frame.frame {
                    Some(worker_frame::Frame::Events(batch)) => {
                        for event in batch.events {
                            let _ = events_in.send(event);
                        }
                    }
                    Some(worker_frame::Frame::Report(report)) => {
                        reports_in.send_replace(report);
                    }
                    Some(worker_frame::Frame::Leaving(_)) => {
                        leaving_in.send_replace(true);
                    }
                    // What the engine's prefix cache holds.
                    Some(worker_frame::Frame::KvEvents(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        let attached = Attached { hello, commands: Some(commands), events, reports, leaving };
        self.attached.send(attached).await.map_err(|_| Status::cancelled("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// One worker's stream, as its coordinator has it.
pub struct Attached {
    pub hello: Hello,
    commands: Option<mpsc::Sender<Result<CoordinatorFrame, Status>>>,
    events: mpsc::UnboundedReceiver<Event>,
    reports: tokio::sync::watch::Receiver<Report>,
    leaving: tokio::sync::watch::Receiver<bool>,
}

impl Attached {
    pub async fn command(&self, cancel: Vec<u64>, start: Vec<StartJob>) {
        self.commands(Commands { cancel, start, ..Commands::default() }).await;
    }

    pub async fn commands(&self, commands: Commands) {
        let frame = coordinator_frame::Frame::Commands(commands);
        let frame = Ok(CoordinatorFrame { frame: Some(frame) });
        self.commands.as_ref().unwrap().send(frame).await.unwrap();
    }

    /// Ends the stream, as a coordinator does that stops.
    pub fn close(&mut self) {
        self.commands = None;
    }

    /// Waits until the worker has said that it leaves.
    pub async fn leaving(&mut self) {
        timeout(self.leaving.wait_for(|leaving| *leaving)).await.unwrap();
    }

    /// Waits until the worker has closed the stream.
    pub async fn closed(&self) {
        let mut reports = self.reports.clone();
        while reports.changed().await.is_ok() {}
    }

    pub async fn event(&mut self) -> Event {
        timeout(self.events.recv()).await.expect("the stream is open")
    }

    /// All events of the one job under way.
    pub async fn whole(&mut self) -> Whole {
        let mut first = self.event().await;
        let mut payload = first.payload.to_vec();
        let mut tokens = first.tokens;
        let mut ended = first.end;
        while !ended {
            let event = self.event().await;
            assert_eq!(event.status, 0);
            payload.extend_from_slice(&event.payload);
            tokens += event.tokens;
            ended = event.end;
            first.fault = event.fault;
        }
        Whole { text: String::from_utf8(payload).unwrap(), tokens, first }
    }

    /// The payloads of so many jobs, each to its end, by number.
    pub async fn all(&mut self, jobs: usize) -> HashMap<u64, String> {
        let (mut payloads, mut ended) = (HashMap::<u64, String>::new(), 0);
        while ended < jobs {
            let event = self.event().await;
            assert_eq!(event.fault, None);
            let text = std::str::from_utf8(&event.payload).unwrap();
            payloads.entry(event.job).or_default().push_str(text);
            ended += usize::from(event.end);
        }
        payloads
    }

    pub async fn report(&mut self, what: impl FnMut(&Report) -> bool) -> Report {
        timeout(self.reports.wait_for(what)).await.unwrap().clone()
    }
}

/// An answer, put together.
#[derive(Debug)]
pub struct Whole {
    pub first: Event,
    pub text: String,
    pub tokens: u32,
}

pub struct Fleet {
    pub dir: tempfile::TempDir,
    address: SocketAddr,
    attached: mpsc::Receiver<Attached>,
    server: JoinHandle<()>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub struct Worker {
    pub attached: Attached,
    pub running: Running,
}

impl Worker {
    pub async fn stop(self) {
        self.running.stop().await;
    }
}

/// A worker that may not have attached yet.
pub struct Running {
    pub running: JoinHandle<Result<(), baton_worker::WorkerError>>,
    stop: Arc<tokio::sync::Notify>,
}

impl Running {
    pub fn order_to_stop(&self) {
        self.stop.notify_one();
    }

    pub async fn stop(self) {
        self.stop.notify_one();
        timeout(self.running).await.unwrap().unwrap();
    }
}

impl Fleet {
    pub async fn start() -> Self {
        Self::start_with_target(0.0).await
    }

    /// Whose workers are told a time between two tokens.
    pub async fn start_with_target(itl_target_ms: f32) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, attached) = mpsc::channel(4);
        let service = Service { attached: sender, itl_target_ms };
        let server = tonic::transport::Server::builder()
            .add_service(fleet_server::FleetServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { server.await.unwrap() });
        Self { dir: tempfile::tempdir().unwrap(), address, attached, server }
    }

    pub async fn worker(&mut self, name: &str, role: Role, sim: SimConfig) -> Worker {
        let running = self.spawn(name, role, EngineConfig::Sim(sim));
        let attached = self.next_attached().await;
        Worker { attached, running }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    pub fn spawn(&self, name: &str, role: Role, engine: EngineConfig) -> Running {
        self.spawn_as(self.config(vec![self.address()], name, role, engine))
    }

    /// A worker of several coordinators.
    pub fn spawn_for(
        &self,
        coordinators: &[&String],
        name: &str,
        role: Role,
        sim: SimConfig,
    ) -> Running {
        let coordinators = coordinators.iter().map(ToString::to_string).collect();
        self.spawn_as(self.config(coordinators, name, role, EngineConfig::Sim(sim)))
    }

    pub fn config(
        &self,
        coordinators: Vec<String>,
        name: &str,
        role: Role,
        engine: EngineConfig,
    ) -> WorkerConfig {
        WorkerConfig {
            name: name.into(),
            role,
            coordinators,
            every_address: false,
            health_listen: None,
            drain_timeout: Duration::from_secs(5),
            tls: None,
            engine,
            arena: ArenaConfig {
                directory: self.dir.path().into(),
                export_bytes: 1 << 20,
                import_bytes: 1 << 20,
            },
            transfer: TransferConfig {
                stall_timeout: Duration::from_secs(5),
                ..TransferConfig::default()
            },
        }
    }

    pub fn spawn_as(&self, config: WorkerConfig) -> Running {
        let stop = Arc::new(tokio::sync::Notify::new());
        let stopped = stop.clone();
        let running =
            tokio::spawn(baton_worker::run(config, async move { stopped.notified().await }));
        Running { running, stop }
    }

    /// Whose handoffs are disturbed.
    pub async fn disturbed(&mut self, faults: &Faults, config: WorkerConfig) -> Worker {
        let stop = Arc::new(tokio::sync::Notify::new());
        let (stopped, faults) = (stop.clone(), faults.clone());
        let running = tokio::spawn(async move {
            baton_worker::run_through(&faults, config, async move { stopped.notified().await })
                .await
        });
        let attached = self.next_attached().await;
        Worker { attached, running: Running { running, stop } }
    }

    pub async fn next_attached(&mut self) -> Attached {
        timeout(self.attached.recv()).await.unwrap()
    }

    /// The same, of a worker whose engine takes its time to start.
    pub async fn next_attached_within(&mut self, patience: Duration) -> Attached {
        tokio::time::timeout(patience, self.attached.recv()).await.expect("it attaches").unwrap()
    }

    /// A prefill and a decode worker.
    pub async fn pair(&mut self, sim: &SimConfig) -> (Worker, Worker) {
        let prefill = self.worker("p0", Role::Prefill, sim.clone()).await;
        let decode = self.worker("d0", Role::Decode, sim.clone()).await;
        (prefill, decode)
    }
}

/// As fast as the machine can.
pub fn fast() -> SimConfig {
    SimConfig { time_scale: 0.0, ..SimConfig::default() }
}

pub fn completion(prompt: impl IntoIterator<Item = u32>, stream: bool, max_tokens: u32) -> Bytes {
    let prompt: Vec<u32> = prompt.into_iter().collect();
    let mut body = serde_json::json!({
        "model": "baton-sim", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "stream": stream, "ignore_eos": true,
    });
    if stream {
        body["stream_options"] = serde_json::json!({"include_usage": true});
    }
    body.to_string().into()
}

pub fn job(number: u64, leg: Leg, body: &Bytes) -> StartJob {
    StartJob {
        job: number,
        leg: leg.into(),
        path: "/v1/completions".into(),
        body: body.clone(),
        ..StartJob::default()
    }
}

/// Both legs of a request under one handoff.
pub fn split(number: u64, body: &Bytes, prefill: &Hello, decode: &Hello) -> (StartJob, StartJob) {
    let id = HandoffId::random();
    let differs = prefill.compatibility != decode.compatibility;
    let leg = |leg, peer: &Hello| StartJob {
        handoff: Some(Handoff {
            id: Bytes::copy_from_slice(id.as_bytes()),
            generation: 0,
            peer: peer.peer.clone().map(|known| Peer {
                compatibility: peer.compatibility.clone().filter(|_| differs),
                ..known
            }),
        }),
        ..job(number, leg, body)
    };
    (leg(Leg::Prefill, decode), leg(Leg::Decode, prefill))
}

/// The lender's job, and what the puller is told, of the start of a prompt.
pub fn pull(number: u64, start: &[u32], from: &Hello, to: &Hello) -> (StartJob, PrefixPull) {
    let id = HandoffId::random();
    let told = |peer: &Hello| PrefixPull {
        handoff: Some(Handoff {
            id: Bytes::copy_from_slice(id.as_bytes()),
            generation: 0,
            peer: peer
                .peer
                .clone()
                .map(|known| Peer { compatibility: peer.compatibility.clone(), ..known }),
        }),
        prompt: start.to_vec(),
        model: from.models[0].clone(),
        give_up_ms: 30_000,
        ..PrefixPull::default()
    };
    let lend = StartJob { pull: Some(told(to)), ..job(number, Leg::Lend, &Bytes::new()) };
    (StartJob { path: String::new(), ..lend }, told(from))
}

/// What became of a copy: an event of its own.
pub fn pulled(event: &Event) -> PullResult {
    assert_eq!((event.status, event.end, event.payload.len()), (0, false, 0), "{event:?}");
    event.pull.clone().expect("what became of the copy comes first")
}
