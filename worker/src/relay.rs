use std::time::Instant;

use baton_engine::Answer;
use baton_proto::{Event, HandoffResult, Header};
use baton_types::{Fault, FaultKind, Origin};
use bytes::{Bytes, BytesMut};
use futures::{FutureExt, StreamExt};
use http::{HeaderMap, HeaderName, StatusCode, header};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    answer_text,
    counters::Counters,
    handoff::{Consuming, Progress, Received},
    life::engine_fault,
    outbox::{Outbox, Pace},
};

/// A whole answer up to this size is one event.
const WHOLE_BYTES: usize = 1 << 20;
/// No prefill answers more: one token, or an error.
const PREFILL_BYTES: usize = 16 << 20;

/// Of the engine's own connection, or for the coordinator to say.
const NOT_RELAYED: [HeaderName; 6] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::DATE,
    HeaderName::from_static("keep-alive"),
    header::SERVER,
    header::TRANSFER_ENCODING,
];

/// An engine's answer on its way to the coordinator.
#[derive(Debug)]
pub(crate) struct Relay<'a> {
    pub(crate) job: u64,
    pub(crate) outbox: &'a Outbox,
    /// Of a decode leg.
    pub(crate) consuming: Option<&'a Consuming>,
    pub(crate) counters: &'a Counters,
    /// The engine was asked for the stream's usage, and the client did not ask.
    pub(crate) hides_usage: bool,
}

impl Relay<'_> {
    /// Sends the answer on as it comes. The head goes with the first of the body, so that an engine
    /// which accepts a request and then fails it has answered nothing yet.
    pub(crate) async fn stream(&self, answer: Answer) -> Result<(), Fault> {
        let is_events = answer
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if answer.status.is_server_error() {
            return Err(server_error(&answer));
        }
        if is_events { self.events(answer).await } else { self.whole(answer).await }
    }

    async fn events(&self, answer: Answer) -> Result<(), Fault> {
        let mut head = Some((answer.status, answer.headers));
        let mut body = answer.body;
        let mut tokens_told = 0;
        let mut last = Instant::now();
        let mut next = body.next().await;
        while let Some(chunk) = next {
            let mut chunk = chunk.map_err(|error| engine_fault(&error))?;
            let failed = answer_text::error_event(&chunk).filter(|(_, code)| *code >= 500);
            if let Some((at, _)) = failed {
                chunk.truncate(at);
            }
            if !chunk.is_empty() {
                // The last chunk and the end of the answer come together most of the time.
                let after = body.next().now_or_never().filter(|_| failed.is_none());
                let ends = matches!(after, Some(None));
                let streamed = answer_text::streamed_tokens(&chunk);
                let rest = streamed.total.map_or(0, |total: u32| total.saturating_sub(tokens_told));
                let tokens = streamed.events.max(rest);
                if streamed.total.is_some() && self.hides_usage {
                    chunk = answer_text::without_usage(&chunk);
                }
                let first_token = tokens > 0 && tokens_told == 0;
                tokens_told += tokens;
                let at_once = head.is_some() || first_token || ends;
                let event = self.event(head.take(), chunk, tokens, ends);
                let now = Instant::now();
                let pace = if at_once { Pace::AtOnce } else { Pace::after(now - last) };
                last = now;
                self.outbox.push(event, pace);
                if ends {
                    return Ok(());
                }
                if failed.is_none() {
                    self.outbox.room().await;
                    next = match after {
                        Some(next) => next,
                        None => body.next().await,
                    };
                    continue;
                }
            }
            if let Some((_, code)) = failed {
                let message = format!("the engine broke its stream off with error {code}");
                return Err(Fault::new(Origin::Engine, FaultKind::Failed, message));
            }
            next = body.next().await;
        }
        self.outbox.push(self.event(head.take(), Bytes::new(), 0, true), Pace::AtOnce);
        Ok(())
    }

    async fn whole(&self, answer: Answer) -> Result<(), Fault> {
        let mut head = Some((answer.status, answer.headers));
        let mut body = answer.body;
        let mut held = BytesMut::new();
        while let Some(chunk) = body.next().await {
            held.extend_from_slice(&chunk.map_err(|error| engine_fault(&error))?);
            if held.len() > WHOLE_BYTES {
                let chunk = held.split().freeze();
                self.outbox.push(self.event(head.take(), chunk, 0, false), Pace::AtOnce);
                self.outbox.room().await;
            }
        }
        let rest = held.freeze();
        let tokens = answer_text::answered_tokens(&rest);
        self.outbox.push(self.event(head.take(), rest, tokens, true), Pace::AtOnce);
        Ok(())
    }

    fn event(
        &self,
        head: Option<(StatusCode, HeaderMap)>,
        payload: Bytes,
        tokens: u32,
        end: bool,
    ) -> Event {
        let received = self.received();
        let payload = match received {
            Some(received) => answer_text::with_cached_tokens(payload, received.cached_tokens),
            None => payload,
        };
        let mut event = Event { job: self.job, payload, tokens, end, ..Event::default() };
        if let Some((status, headers)) = head {
            event.status = status.as_u16().into();
            event.headers = relayed_headers(&headers);
            event.handoff = self.handoff_result(status);
        }
        event
    }

    fn received(&self) -> Option<Received> {
        match self.consuming?.progress() {
            Progress::Complete(received) => Some(received),
            _ => None,
        }
    }

    /// What the first event says of the handoff. Nothing where there was none, whatever the engine
    /// was asked.
    fn handoff_result(&self, status: StatusCode) -> Option<HandoffResult> {
        match self.consuming?.progress() {
            Progress::Complete(received) => Some(received.into()),
            Progress::NotNeeded => Some(HandoffResult::default()),
            Progress::Waiting | Progress::Failed(_) => {
                if status.is_success() {
                    self.counters.handoffs_bypassed.add(1);
                    tracing::warn!("the engine answered without waiting for its handoff");
                }
                None
            }
        }
    }
}

/// The one event of a prefill leg: success without a payload, or the engine's refusal whole.
/// `with_engine_parameters` asks for what the engine's own connector says of where the KV is.
pub(crate) async fn prefill_answer(
    job: u64,
    answer: Answer,
    with_engine_parameters: bool,
) -> Result<Event, Fault> {
    if answer.status.is_server_error() {
        return Err(server_error(&answer));
    }
    let Answer { status, headers, mut body } = answer;
    let mut held = BytesMut::new();
    while let Some(chunk) = body.next().await {
        held.extend_from_slice(&chunk.map_err(|error| engine_fault(&error))?);
        if held.len() > PREFILL_BYTES {
            let message = format!("the engine answered a prefill with over {PREFILL_BYTES} bytes");
            return Err(Fault::new(Origin::Engine, FaultKind::Failed, message));
        }
    }
    let mut event = Event { job, status: status.as_u16().into(), end: true, ..Event::default() };
    if !status.is_success() {
        event.headers = relayed_headers(&headers);
        event.payload = held.freeze();
        return Ok(event);
    }
    event.status = StatusCode::OK.as_u16().into();
    if with_engine_parameters {
        event.engine_handoff_params = engine_parameters(&held)?;
    }
    Ok(event)
}

pub(crate) fn engine_parameters(body: &[u8]) -> Result<Bytes, Fault> {
    #[derive(Deserialize)]
    struct Answered<'a> {
        #[serde(borrow)]
        kv_transfer_params: Option<&'a RawValue>,
    }

    let answered: Option<Answered<'_>> = serde_json::from_slice(body).ok();
    answered
        .and_then(|answered| answered.kv_transfer_params)
        .map(|parameters| Bytes::copy_from_slice(parameters.get().as_bytes()))
        .ok_or_else(|| {
            Fault::new(
                Origin::Engine,
                FaultKind::Failed,
                "the engine's answer says nothing of where its KV is (kv_transfer_params)",
            )
        })
}

/// The engine's own failure. What it wrote may quote the prompt, and stays with it.
fn server_error(answer: &Answer) -> Fault {
    Fault::new(Origin::Engine, FaultKind::Failed, format!("the engine answered {}", answer.status))
}

fn relayed_headers(headers: &HeaderMap) -> Vec<Header> {
    headers
        .iter()
        .filter(|(name, _)| !NOT_RELAYED.contains(name))
        .map(|(name, value)| Header {
            name: name.as_str().to_owned(),
            value: Bytes::copy_from_slice(value.as_bytes()),
        })
        .collect()
}

#[cfg(test)]
mod tests;
