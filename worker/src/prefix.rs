//! The start of a prompt, out of one worker's prefix cache into another's. The lender's engine exports what it
//! has, the puller's loads it, before it is asked for what the client wants and finds it cached: a handoff like
//! any other, of the prompt cut off behind the last block that is copied. Both engines compute one token of
//! it. Nothing but the copy is lost where it fails.

use std::time::{Duration, Instant};

use baton_proto::{Event, HandoffResult, Header, PrefixPull, PullResult, StartJob};
use baton_types::{Fault, FaultKind, Origin};
use bytes::Bytes;
use http::StatusCode;
use tokio::time::timeout;

use crate::{
    handoff::{Progress, Received},
    jobs::{consume, missing, post, produce, until_answered},
    legs::{KvParameters, Part, prefix_body},
    life::Life,
    outbox::{Outbox, Pace},
    relay,
};

/// Every engine takes a prompt of token ids here.
const PATH: &str = "/v1/completions";
/// Why a copy came to nothing, where no fault is to blame.
const TOO_SLOW: &str = "too_slow";

/// Has the engine export what it has cached, and keeps it until the other worker has it.
pub(crate) async fn lend(start: Box<StartJob>, life: &Life, outbox: &Outbox) -> Result<(), Fault> {
    let StartJob { job, deadline_ms, headers, pull, .. } = *start;
    let pull = pull.ok_or_else(|| missing("StartJob", "pull"))?;
    let (mut producing, kv) = produce(Part::Lend, pull.handoff.as_ref(), deadline_ms, life)?;
    let event = until_answered(&mut producing, ask(job, &pull, headers, &kv, life)).await?;
    let ending = producing.ended().await;
    tracing::debug!(?ending, "what was lent");
    outbox.push(event, Pace::AtOnce);
    Ok(())
}

/// Copies what a peer lends of the prompt, if that is to be done, and tells what became of it.
pub(crate) async fn pull(start: &mut StartJob, life: &Life, outbox: &Outbox) {
    let Some(pull) = start.pull.take() else { return };
    let began = Instant::now();
    let give_up = Duration::from_millis(pull.give_up_ms.into());
    // Few requests have one: the others' tasks need no room for it.
    let copying = Box::pin(copy(start.job, &pull, start.headers.clone(), life));
    let result = match timeout(give_up, copying).await {
        Ok(Ok(received)) => copied(&pull, received, life),
        Ok(Err(fault)) => {
            tracing::info!(%fault, "a prefix was not copied");
            PullResult { failure: fault.kind.as_str().to_owned(), ..PullResult::default() }
        }
        Err(_) => {
            tracing::info!(?give_up, "a prefix was not copied in time");
            PullResult { failure: TOO_SLOW.to_owned(), ..PullResult::default() }
        }
    };
    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    let result = Some(PullResult { micros, ..result });
    outbox.push(Event { job: start.job, pull: result, ..Event::default() }, Pace::AtOnce);
}

fn copied(pull: &PrefixPull, received: Option<Received>, life: &Life) -> PullResult {
    let Some(received) = received else { return PullResult::default() };
    let copied = pull.prompt.len().saturating_sub(1);
    let copied = u32::try_from(copied).unwrap_or(u32::MAX);
    let reused = received.blocks_reused.saturating_mul(life.block_size_tokens());
    PullResult {
        tokens: copied.saturating_sub(reused),
        handoff: Some(HandoffResult::from(received)),
        ..PullResult::default()
    }
}

/// Nothing where it was all there.
async fn copy(
    job: u64,
    pull: &PrefixPull,
    headers: Vec<Header>,
    life: &Life,
) -> Result<Option<Received>, Fault> {
    let (consuming, kv) = consume(pull.handoff.as_ref(), life)?;
    tokio::select! {
        biased;
        fault = consuming.failed() => return Err(fault),
        asked = ask(job, pull, headers, &kv, life) => asked?,
    };
    match consuming.progress() {
        Progress::Complete(received) => Ok(Some(received)),
        Progress::NotNeeded => Ok(None),
        Progress::Failed(fault) => Err(fault),
        Progress::Waiting => {
            let message = "the engine did not wait for the prefix that it was to be given";
            Err(Fault::new(Origin::Engine, FaultKind::Failed, message))
        }
    }
}

/// One token over the prefix. Its last is all that the engine has to compute: it goes before all that waits.
async fn ask(
    job: u64,
    pull: &PrefixPull,
    mut headers: Vec<Header>,
    kv: &KvParameters,
    life: &Life,
) -> Result<Event, Fault> {
    let priority = life.engine.takes_priority().then(|| life.due_ms(0));
    // The request's own name is that of its legs in the engines, and the body is not the client's.
    let replaced = ["x-request-id", "content-type"];
    headers.retain(|header| !replaced.iter().any(|name| header.name.eq_ignore_ascii_case(name)));
    let value = Bytes::from_static(b"application/json");
    headers.push(Header { name: "content-type".to_owned(), value });
    let body = prefix_body(pull, priority, kv);
    let answer = post(life, PATH.to_owned(), headers, body).await?;
    let event = relay::prefill_answer(job, answer, false).await?;
    if event.status == u32::from(StatusCode::OK.as_u16()) {
        return Ok(event);
    }
    let message = format!("the engine answered {} to the start of a prompt", event.status);
    Err(Fault::new(Origin::Engine, FaultKind::Refused, message))
}
