use baton_engine::EngineError;
use baton_proto::{Hello, worker_frame::Frame};
use futures::stream;

use super::*;
use crate::outbox::Frames;

const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";

fn answer(
    status: u16,
    content_type: &'static str,
    chunks: Vec<Result<&'static str, EngineError>>,
) -> Answer {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, content_type.parse().unwrap());
    headers.insert(header::DATE, "now".parse().unwrap());
    headers.insert("x-own", "y".parse().unwrap());
    let chunks = chunks.into_iter().map(|chunk| chunk.map(Bytes::from));
    Answer {
        status: StatusCode::from_u16(status).unwrap(),
        headers,
        body: stream::iter(chunks).boxed(),
    }
}

fn broke_off() -> Result<&'static str, EngineError> {
    Err(EngineError::BrokeOff("reset".into()))
}

async fn relay(answer: Answer) -> (Result<(), Fault>, Vec<Event>) {
    relay_as(answer, false).await
}

async fn relay_as(answer: Answer, hides_usage: bool) -> (Result<(), Fault>, Vec<Event>) {
    let (outbox, mut frames) = Outbox::open(Hello::default());
    let counters = Counters::default();
    let (outbox, counters) = (&outbox, &counters);
    let relay = Relay { job: 7, outbox, consuming: None, counters, hides_usage };
    let relayed = relay.stream(answer).await;
    (relayed, events(&mut frames).await)
}

async fn events(frames: &mut Frames) -> Vec<Event> {
    assert!(matches!(frames.next().await.unwrap().frame, Some(Frame::Hello(_))));
    let mut events = Vec::new();
    let quiet = std::time::Duration::from_millis(50);
    while let Ok(Some(frame)) = tokio::time::timeout(quiet, frames.next()).await {
        let Some(Frame::Events(batch)) = frame.frame else { panic!("{frame:?}") };
        events.extend(batch.events);
    }
    events
}

fn payloads(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| std::str::from_utf8(&event.payload).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_whole_answer_is_one_event() {
    let chunks = vec![Ok("{\"usage\":{\"compl"), Ok("etion_tokens\":3}}")];
    let (relayed, events) = relay(answer(200, "application/json", chunks)).await;
    relayed.unwrap();
    let [event] = &events[..] else { panic!("{events:?}") };
    assert_eq!((event.job, event.status, event.end, event.tokens), (7, 200, true, 3));
    assert_eq!(payloads(&events), ["{\"usage\":{\"completion_tokens\":3}}"]);
    let names: Vec<_> = event.headers.iter().map(|header| header.name.as_str()).collect();
    assert_eq!(names, ["content-type", "x-own"]);
}

#[tokio::test(start_paused = true)]
async fn a_large_answer_comes_in_parts() {
    let part: &'static str = Box::leak("x".repeat(WHOLE_BYTES + 1).into_boxed_str());
    let (relayed, events) = relay(answer(200, "application/json", vec![Ok(part), Ok("end")])).await;
    relayed.unwrap();
    let shape: Vec<_> =
        events.iter().map(|event| (event.status, event.payload.len(), event.end)).collect();
    assert_eq!(shape, [(200, part.len(), false), (0, 3, true)]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_passes_as_it_comes_and_its_last_chunk_ends_it() {
    let chunks = vec![
        Ok("data: {\"choices\":[{\"text\":\"a\"}]}\n\n"),
        Ok("data: {\"choices\":[{\"text\":\"b\"}]}\n\ndata: {\"choices\":[{\"text\":\"c\"}]}\n\n"),
        Ok("data: [DONE]\n\n"),
    ];
    let expected: Vec<_> = chunks.iter().map(|chunk| *chunk.as_ref().unwrap()).collect();
    let (relayed, events) = relay(answer(200, EVENT_STREAM, chunks)).await;
    relayed.unwrap();
    assert_eq!(payloads(&events), expected);
    let shape: Vec<_> =
        events.iter().map(|event| (event.status, event.tokens, event.end)).collect();
    assert_eq!(shape, [(200, 1, false), (0, 2, false), (0, 0, true)]);

    let (relayed, events) = relay(answer(200, EVENT_STREAM, vec![])).await;
    relayed.unwrap();
    assert_eq!((events.len(), events[0].status, events[0].end), (1, 200, true));
}

#[tokio::test(start_paused = true)]
async fn refusals_are_answers_and_failures_are_faults() {
    let refusal = answer(400, "application/json", vec![Ok("{\"error\":1}")]);
    let (relayed, events) = relay(refusal).await;
    relayed.unwrap();
    assert_eq!((events[0].status, events[0].end), (400, true));
    assert_eq!(payloads(&events), ["{\"error\":1}"]);

    let failure = answer(500, "application/json", vec![Ok("{\"error\":\"of the prompt\"}")]);
    let (relayed, events) = relay(failure).await;
    let fault = relayed.unwrap_err();
    assert_eq!((fault.origin, fault.kind), (Origin::Engine, FaultKind::Failed));
    assert!(!fault.message.contains("prompt") && events.is_empty());

    // Nothing was answered before it broke off.
    for content_type in [EVENT_STREAM, "application/json"] {
        let (relayed, events) = relay(answer(200, content_type, vec![broke_off()])).await;
        assert_eq!(relayed.unwrap_err().kind, FaultKind::Unavailable);
        assert!(events.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_inside_a_stream_is_a_fault_and_what_came_before_it_stands() {
    let failed = "data: {\"error\":{\"message\":\"m\",\"code\":500}}\n\n";
    let (relayed, events) = relay(answer(200, EVENT_STREAM, vec![Ok(failed)])).await;
    assert_eq!(relayed.unwrap_err().origin, Origin::Engine);
    assert!(events.is_empty(), "an error alone is no answer");

    let both = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n\
        data: {\"error\":{\"message\":\"m\",\"code\":500}}\n\ndata: [DONE]\n\n";
    let (relayed, events) = relay(answer(200, EVENT_STREAM, vec![Ok(both)])).await;
    relayed.unwrap_err();
    assert_eq!(payloads(&events), ["data: {\"choices\":[{\"text\":\"a\"}]}\n\n"]);
    assert!(!events[0].end);

    // The client's own mistake is its to read.
    let mistake = "data: {\"error\":{\"message\":\"m\",\"code\":400}}\n\n";
    let (relayed, events) = relay(answer(200, EVENT_STREAM, vec![Ok(mistake)])).await;
    relayed.unwrap();
    assert_eq!(payloads(&events), [mistake]);
}

#[tokio::test]
async fn a_prefills_answer_is_thrown_away_and_its_refusal_is_not() {
    let body = "{\"choices\":[1],\"kv_transfer_params\":{\"remote_host\": \"h\"}}";
    let done = answer(200, "application/json", vec![Ok(body)]);
    let event = prefill_answer(7, done, false).await.unwrap();
    assert_eq!(event, Event { job: 7, status: 200, end: true, ..Event::default() });

    let done = answer(200, "application/json", vec![Ok(body)]);
    let event = prefill_answer(7, done, true).await.unwrap();
    assert_eq!(event.engine_handoff_params, "{\"remote_host\": \"h\"}");
    let without = answer(200, "application/json", vec![Ok("{}")]);
    assert!(prefill_answer(7, without, true).await.is_err());

    let refusal = answer(400, "application/json", vec![Ok("too "), Ok("long")]);
    let event = prefill_answer(7, refusal, true).await.unwrap();
    assert_eq!((event.status, event.end, &event.payload[..]), (400, true, &b"too long"[..]));
    for failed in [answer(503, "text/plain", vec![]), answer(200, "text/plain", vec![broke_off()])]
    {
        assert!(prefill_answer(7, failed, false).await.unwrap_err().is_retryable());
    }
}

/// As vLLM does it where its server is busy: three events, and seven tokens.
#[tokio::test(start_paused = true)]
async fn tokens_that_were_joined_are_counted_by_the_usage_at_the_end() {
    let text = "data: {\"choices\":[{\"text\":\"a b\"}]}\n\n";
    let usage = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":7}}\n\n";
    let done = "data: [DONE]\n\n";
    let last: &'static str = [text, usage, done].concat().leak();
    for (hides_usage, told) in [
        (false, [text, text, text, usage, done].concat()),
        (true, [text, text, text, done].concat()),
    ] {
        let chunks = vec![Ok(text), Ok(text), Ok(last)];
        let (relayed, events) = relay_as(answer(200, EVENT_STREAM, chunks), hides_usage).await;
        relayed.unwrap();
        assert_eq!(events.iter().map(|event| event.tokens).sum::<u32>(), 7, "{events:?}");
        assert_eq!(payloads(&events).concat(), told);
    }
}
