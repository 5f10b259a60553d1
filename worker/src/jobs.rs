use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_engine::{Answer, EngineRequest};
use baton_proto::{Event, Handoff, HandoffMode, Header, StartJob, WireError};
use baton_transfer::{Ending, PeerAddress};
use baton_types::{Fault, FaultKind, Leg, Origin};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use parking_lot::Mutex;
use tokio::{task::AbortHandle, time::MissedTickBehavior};
use tracing::Instrument;

use crate::{
    counters::Running,
    handoff::{Consuming, Producer, Producing},
    legs::{self, Asked, KvParameters, Part},
    life::{KvSide, Life, engine_fault},
    outbox::{Outbox, Pace},
    prefix,
    relay::{self, Relay},
};

/// A handoff whose prefill waits for its turn in the engine is kept by saying so this often.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);

/// The jobs of one coordinator's stream. Dropping it cancels them all.
#[derive(Debug)]
pub(crate) struct Jobs {
    life: Arc<Life>,
    outbox: Outbox,
    running: Arc<Mutex<HashMap<u64, AbortHandle>>>,
    own: Arc<Running>,
}

impl Drop for Jobs {
    fn drop(&mut self) {
        for (_, job) in self.running.lock().drain() {
            job.abort();
        }
    }
}

impl Jobs {
    pub(crate) fn new(life: Arc<Life>, outbox: Outbox) -> Self {
        Self { life, outbox, running: Arc::default(), own: Arc::default() }
    }

    /// How many there are.
    pub(crate) fn own(&self) -> &Running {
        &self.own
    }

    pub(crate) fn start(&self, start: StartJob) {
        let mut running = self.running.lock();
        if running.contains_key(&start.job) {
            tracing::error!(job = start.job, "the coordinator used a job's number twice");
            return;
        }
        let job = start.job;
        let span = tracing::info_span!(
            "job",
            request_id = %request_id(&start),
            job,
            leg = start.leg().as_str_name()
        );
        let entry = Entry { job, running: self.running.clone() };
        let (life, outbox, own) = (self.life.clone(), self.outbox.clone(), self.own.clone());
        // The task is as large as all that it may come to hold, and there is one for each request.
        let start = Box::new(start);
        let task = async move {
            let _entry = entry;
            let _open = life.counters.jobs_open.one();
            run(start, &life, &outbox, &own).await;
        };
        running.insert(job, tokio::spawn(task.instrument(span)).abort_handle());
    }

    /// Aborts the job in its engine and its handoff. A prefill that has answered counts until its
    /// blocks are gone, so that cancelling it frees them.
    pub(crate) fn cancel(&self, job: u64) {
        // Not under the lock: the task takes itself out.
        let task = self.running.lock().remove(&job);
        if let Some(task) = task {
            task.abort();
        }
    }
}

/// As the coordinator writes it down; a client's own may be no text.
pub(crate) fn request_id(start: &StartJob) -> String {
    let mut headers = start.headers.iter();
    headers
        .find(|header| header.name.eq_ignore_ascii_case("x-request-id"))
        .map(|header| String::from_utf8_lossy(&header.value).into_owned())
        .unwrap_or_default()
}

/// A job's place in the table.
struct Entry {
    job: u64,
    running: Arc<Mutex<HashMap<u64, AbortHandle>>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.running.lock().remove(&self.job);
    }
}

async fn run(start: Box<StartJob>, life: &Life, outbox: &Outbox, own: &Running) {
    let job = start.job;
    let ran = match Leg::try_from(start.leg()) {
        Ok(Leg::Aggregated) => aggregated(start, life, outbox, own).await,
        Ok(Leg::Decode) => decode(start, life, outbox, own).await,
        Ok(Leg::Prefill) => prefill(start, life, outbox, own).await,
        Ok(Leg::Lend) => Box::pin(prefix::lend(start, life, outbox)).await,
        Err(error) => Err(refused(&error)),
    };
    if let Err(fault) = ran {
        tracing::info!(%fault, "the job failed");
        let fault = Some((&fault).into());
        outbox.push(Event { job, end: true, fault, ..Event::default() }, Pace::AtOnce);
    }
}

async fn aggregated(
    mut start: Box<StartJob>,
    life: &Life,
    outbox: &Outbox,
    own: &Running,
) -> Result<(), Fault> {
    let _counted = (life.counters.running.decodes.one(), own.decodes.one());
    let job = start.job;
    prefix::pull(&mut start, life, outbox).await;
    let (body, hides_usage) = asking(life, &start, &start.body, true)?;
    let answer = ask_engine(life, start, body).await?;
    let relay = Relay { job, outbox, consuming: None, counters: &life.counters, hides_usage };
    relay.stream(answer).await
}

async fn decode(
    start: Box<StartJob>,
    life: &Life,
    outbox: &Outbox,
    own: &Running,
) -> Result<(), Fault> {
    let _counted = (life.counters.running.decodes.one(), own.decodes.one());
    let job = start.job;
    let (consuming, kv) = match handoff_mode(life) {
        HandoffMode::Engine => {
            (None, KvParameters::EngineConsume(json_object(&start.engine_handoff_params)?))
        }
        _ => {
            let (consuming, kv) = consume(start.handoff.as_ref(), life)?;
            (Some(consuming), kv)
        }
    };
    let body = legs::decode_body(&start.body, &kv).map_err(|error| not_an_object(&error))?;
    let (body, hides_usage) = asking(life, &start, &body, true)?;
    let (consumed, counters) = (consuming.as_ref(), &life.counters);
    let relay = Relay { job, outbox, consuming: consumed, counters, hides_usage };
    let answering = async {
        let answer = ask_engine(life, start, body).await?;
        relay.stream(answer).await
    };
    match &consuming {
        None => answering.await,
        Some(consuming) => tokio::select! {
            biased;
            // The engine would say it too, less clearly, and in a stream only after HTTP 200.
            fault = consuming.failed() => Err(fault),
            answered = answering => answered,
        },
    }
}

async fn prefill(
    mut start: Box<StartJob>,
    life: &Life,
    outbox: &Outbox,
    own: &Running,
) -> Result<(), Fault> {
    let counted = (life.counters.running.prefills.one(), own.prefills.one());
    let job = start.job;
    let (mut producing, kv) = match handoff_mode(life) {
        HandoffMode::Engine => (None, KvParameters::EngineProduce),
        _ => {
            let handoff = start.handoff.as_ref();
            let (producing, kv) = produce(Part::Produce, handoff, start.deadline_ms, life)?;
            (Some(producing), kv)
        }
    };
    let body = legs::prefill_body(&start.body, &kv).map_err(|error| not_an_object(&error))?;
    let answering = async {
        prefix::pull(&mut start, life, outbox).await;
        let (body, _) = asking(life, &start, &body, false)?;
        let answer = ask_engine(life, start, body).await?;
        relay::prefill_answer(job, answer, producing_of_engine(life)).await
    };
    let event = match &mut producing {
        None => answering.await?,
        Some(producing) => until_answered(producing, answering).await?,
    };
    let succeeded = event.status == u32::from(http::StatusCode::OK.as_u16());
    outbox.push(event, Pace::AtOnce);
    drop(counted);
    if let Some(producing) = &mut producing
        && succeeded
    {
        let ending = producing.ended().await;
        tracing::debug!(?ending, "the handoff ended");
    }
    Ok(())
}

/// Drives the prefill, keeping its handoff meanwhile; a handoff that ends first needs no prefill.
pub(crate) async fn until_answered(
    producing: &mut Producing,
    answering: impl Future<Output = Result<Event, Fault>>,
) -> Result<Event, Fault> {
    let mut answering = std::pin::pin!(answering);
    let mut renew = tokio::time::interval(RENEW_INTERVAL);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut acknowledged = false;
    loop {
        tokio::select! {
            biased;
            answered = &mut answering => return answered,
            ending = producing.ended(), if !acknowledged => match ending {
                // The consumer can be faster than the end of our own engine's step.
                Ending::Acked => acknowledged = true,
                Ending::Aborted => return Err(handoff_failed("it was taken back")),
                Ending::Expired => return Err(handoff_failed("its lease ran out")),
                Ending::Broken(error) => return Err(handoff_failed(&error.to_string())),
            },
            _ = renew.tick() => producing.renew(),
        }
    }
}

fn handoff_failed(reason: &str) -> Fault {
    Fault::new(Origin::Handoff, FaultKind::Failed, format!("the handoff ended first: {reason}"))
}

fn handoff_mode(life: &Life) -> HandoffMode {
    match &life.kv {
        KvSide::Fenced(_) => HandoffMode::Fenced,
        KvSide::Engine => HandoffMode::Engine,
        KvSide::None => HandoffMode::None,
    }
}

fn producing_of_engine(life: &Life) -> bool {
    matches!(life.kv, KvSide::Engine)
}

/// Opens a handoff that this worker's engine shall produce.
pub(crate) fn produce(
    part: Part,
    handoff: Option<&Handoff>,
    deadline_ms: u32,
    life: &Life,
) -> Result<(Producing, KvParameters), Fault> {
    let (name, peer) = named(handoff)?;
    let consumer = baton_proto::fingerprint("Peer", &peer.certificate_fingerprint)
        .map_err(|error| refused(&error))?;
    let due_in = Duration::from_millis(deadline_ms.into());
    let due = (!due_in.is_zero()).then(|| Instant::now() + due_in);
    let producing = life.handoffs()?.produce(name, consumer, due)?;
    Ok((producing, KvParameters::Fenced { part, id: name.0, generation: name.1 }))
}

/// Expects this worker's engine to ask for a handoff.
pub(crate) fn consume(
    handoff: Option<&Handoff>,
    life: &Life,
) -> Result<(Consuming, KvParameters), Fault> {
    let (name, peer) = named(handoff)?;
    let certificate_fingerprint = baton_proto::fingerprint("Peer", &peer.certificate_fingerprint)
        .map_err(|error| refused(&error))?;
    let producer = Producer {
        address: PeerAddress {
            worker_name: peer.worker_name.clone(),
            address: peer.address.clone(),
            certificate_fingerprint,
        },
        epoch: baton_proto::epoch("Peer", &peer.epoch).map_err(|error| refused(&error))?,
        compatibility: peer.compatibility.clone().map(Into::into),
    };
    let consuming = life.handoffs()?.consume(name, producer)?;
    let kv = KvParameters::Fenced { part: Part::Consume, id: name.0, generation: name.1 };
    Ok((consuming, kv))
}

pub(crate) fn named(
    handoff: Option<&Handoff>,
) -> Result<(crate::handoff::Name, &baton_proto::Peer), Fault> {
    let handoff = handoff.ok_or_else(|| missing("StartJob", "handoff"))?;
    let peer = handoff.peer.as_ref().ok_or_else(|| missing("Handoff", "peer"))?;
    Ok((handoff.name().map_err(|error| refused(&error))?, peer))
}

pub(crate) fn missing(message: &'static str, field: &'static str) -> Fault {
    refused(&WireError::Missing { message, field })
}

/// What goes into a request's body must be one JSON object, whoever sent it.
pub(crate) fn json_object(bytes: &Bytes) -> Result<Bytes, Fault> {
    let is_object = serde_json::from_slice::<serde_json::Map<_, serde_json::Value>>(bytes).is_ok();
    if is_object {
        Ok(bytes.clone())
    } else {
        Err(Fault::new(
            Origin::Coordinator,
            FaultKind::Refused,
            "StartJob.engine_handoff_params is not a JSON object",
        ))
    }
}

/// The coordinator sent something that another try would not better.
fn refused(error: &WireError) -> Fault {
    Fault::new(Origin::Coordinator, FaultKind::Refused, error.to_string())
}

fn not_an_object(error: &legs::BodyError) -> Fault {
    Fault::new(Origin::Client, FaultKind::Refused, error.to_string())
}

/// The body that this engine is to be given: see [`legs::asking`].
fn asking(
    life: &Life,
    start: &StartJob,
    body: &Bytes,
    streams: bool,
) -> Result<(Bytes, bool), Fault> {
    let engine = &life.engine;
    let due_ms = engine.takes_priority().then(|| life.due_ms(start.deadline_ms));
    let asked = Asked { due_ms, usage: streams && engine.wants_usage_asked() };
    legs::asking(&start.path, body, asked).map_err(|error| not_an_object(&error))
}

async fn ask_engine(life: &Life, start: Box<StartJob>, body: Bytes) -> Result<Answer, Fault> {
    let StartJob { path, headers, .. } = *start;
    post(life, path, headers, body).await
}

pub(crate) async fn post(
    life: &Life,
    path: String,
    headers: Vec<Header>,
    body: Bytes,
) -> Result<Answer, Fault> {
    let headers = header_map(headers);
    let request = EngineRequest { method: Method::POST, path, headers, body };
    life.engine.run(request).await.map_err(|error| engine_fault(&error))
}

pub(crate) fn header_map(headers: Vec<Header>) -> HeaderMap {
    headers
        .into_iter()
        .filter_map(|header| {
            // The coordinator took them from a request that was parsed: others cannot be.
            let name = HeaderName::try_from(header.name).ok()?;
            Some((name, HeaderValue::from_maybe_shared(header.value).ok()?))
        })
        .collect()
}
