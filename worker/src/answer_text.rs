//! What a worker reads in an answer, and the one thing that it changes there. Answers are searched,
//! never parsed: a quote inside a JSON string is escaped, so a name with its quotes around it is a
//! member's name.

use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::{self, Finder};

/// The way an engine's server tells of a failure after the stream's head has gone out.
const ERROR_EVENT: &[u8] = b"data: {\"error\":";

/// What is looked for in every event: made ready once, which costs more than to look.
static EMPTY_LINE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\n\n"));
static NO_CHOICES: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"choices\":[]"));
static OPENING: LazyLock<Finder<'static>> =
    LazyLock::new(|| Finder::new(b"\"delta\":{\"role\":\"assistant\""));
static LATER_ERROR: LazyLock<Finder<'static>> =
    LazyLock::new(|| Finder::new(b"\n\ndata: {\"error\":"));

/// What a part of an event stream says of the answer's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamedTokens {
    /// Events that carry text. vLLM joins the tokens that come while its server is busy: there may be
    /// more tokens than events.
    pub(crate) events: u32,
    /// All tokens of the answer, as its usage says at the end where the client asked for it.
    pub(crate) total: Option<u32>,
}

pub(crate) fn streamed_tokens(events: &[u8]) -> StreamedTokens {
    let mut streamed = StreamedTokens::default();
    for event in each_event(events) {
        if carries_token(event) {
            streamed.events += 1;
        } else if tells_usage(event) {
            streamed.total = Some(answered_tokens(event));
        }
    }
    streamed
}

/// The events without that of the stream's usage.
pub(crate) fn without_usage(events: &[u8]) -> Bytes {
    each_event(events).filter(|event| !tells_usage(event)).collect::<Vec<_>>().concat().into()
}

fn tells_usage(event: &[u8]) -> bool {
    event.starts_with(b"event: response.completed\n")
        || (event.starts_with(b"data: ") && NO_CHOICES.find(event).is_some())
}

fn each_event(events: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = events;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = EMPTY_LINE.find(rest).map_or(rest.len(), |at| at + 2);
        let (event, after) = rest.split_at(end);
        rest = after;
        Some(event)
    })
}

fn carries_token(event: &[u8]) -> bool {
    if let Some(name) = event.strip_prefix(b"event: ") {
        // The responses and messages APIs name their events: `response.output_text.delta`.
        let line = name.split(|byte| *byte == b'\n').next().unwrap_or_default();
        return line.ends_with(b"delta");
    }
    let Some(data) = event.strip_prefix(b"data: ") else { return false };
    !data.starts_with(b"[DONE]")
        && !data.starts_with(b"{\"error\":")
        && NO_CHOICES.find(data).is_none()
        && !opens_message(data)
}

/// The first chunk of a chat message says who speaks.
fn opens_message(data: &[u8]) -> bool {
    OPENING.find(data).is_some_and(|at| {
        let delta = &data[at..];
        let delta = &delta[..memchr::memchr(b'}', delta).unwrap_or(delta.len())];
        match memmem::find(delta, b"\"content\":\"") {
            None => true,
            Some(at) => delta.get(at + b"\"content\":\"".len()) == Some(&b'"'),
        }
    })
}

/// Output tokens that a whole answer says it has.
pub(crate) fn answered_tokens(body: &[u8]) -> u32 {
    [&b"\"completion_tokens\":"[..], b"\"output_tokens\":"]
        .into_iter()
        .find_map(|name| {
            let at = memmem::rfind(body, name)? + name.len();
            number(body, at).map(|(value, _)| value)
        })
        .unwrap_or(0)
}

/// Where an error event begins among these events, and its code: vLLM's server has to say HTTP 200
/// before it knows how a stream will go.
pub(crate) fn error_event(events: &[u8]) -> Option<(usize, u32)> {
    let at = if events.starts_with(ERROR_EVENT) { 0 } else { LATER_ERROR.find(events)? + 2 };
    let code = memmem::find(&events[at..], b"\"code\":")
        .and_then(|code| number(events, at + code + b"\"code\":".len()))
        .map_or(500, |(code, _)| code);
    Some((at, code))
}

/// Puts `cached_tokens` where the decode engine counts what was handed over to it as cached: the
/// client shall read what the engine that computed the prompt had in its cache.
pub(crate) fn with_cached_tokens(payload: Bytes, cached_tokens: u32) -> Bytes {
    const DETAILS: &[u8] = b"\"prompt_tokens_details\":{";
    const CACHED: &[u8] = b"\"cached_tokens\":";
    let mut rewritten = Vec::new();
    let mut done = 0;
    for details in memmem::find_iter(&payload, DETAILS) {
        let start = details + DETAILS.len();
        let end = memchr::memchr(b'}', &payload[start..]).map_or(payload.len(), |at| start + at);
        let Some(cached) = memmem::find(&payload[start..end], CACHED) else { continue };
        let digits = number(&payload, start + cached + CACHED.len()).map(|(_, digits)| digits);
        // One object within another has the same number.
        let Some(digits) = digits.filter(|digits| digits.start >= done) else { continue };
        rewritten.extend_from_slice(&payload[done..digits.start]);
        rewritten.extend_from_slice(cached_tokens.to_string().as_bytes());
        done = digits.end;
    }
    if done == 0 {
        return payload;
    }
    rewritten.extend_from_slice(&payload[done..]);
    rewritten.into()
}

/// The number at `at`, and where its digits are.
fn number(bytes: &[u8], at: usize) -> Option<(u32, std::ops::Range<usize>)> {
    let spaces = bytes[at..].iter().take_while(|byte| **byte == b' ').count();
    let start = at + spaces;
    let digits = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let end = start + digits;
    let value = std::str::from_utf8(&bytes[start..end]).ok()?.parse().ok()?;
    Some((value, start..end))
}

/// Whatever an engine answers, what is found lies in it, and only what is to be changed is.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Some((at, _)) = error_event(bytes) {
        assert!(bytes[at..].starts_with(ERROR_EVENT));
    }
    let events: Vec<&[u8]> = each_event(bytes).collect();
    assert_eq!(events.concat(), bytes);
    let streamed = streamed_tokens(bytes);
    assert!(streamed.events as usize <= events.len());
    let without = without_usage(bytes);
    assert_eq!(streamed_tokens(&without), StreamedTokens { total: None, ..streamed });
    let payload = Bytes::copy_from_slice(bytes);
    let rewritten = with_cached_tokens(payload, 7);
    assert_eq!(with_cached_tokens(rewritten.clone(), 7), rewritten);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_that_carry_text() {
        let chat = concat!(
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null}]}\n\n",
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"}}]}\n\n",
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\\\"choices\\\":[]\"}}]}\n\n",
            "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":3}}\n\n",
            "data: [DONE]\n\n",
        );
        assert_eq!(streamed_tokens(chat.as_bytes()), StreamedTokens { events: 3, total: Some(3) });
        let role_and_text =
            b"data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"a\"}}]}\n\n";
        let one = StreamedTokens { events: 1, total: None };
        assert_eq!(streamed_tokens(role_and_text), one);
        let responses = b"event: response.created\ndata: {}\n\n\
            event: response.output_text.delta\ndata: {\"delta\":\"a\"}\n\n";
        assert_eq!(streamed_tokens(responses), one);
        let completed = b"event: response.completed\n\
            data: {\"response\":{\"usage\":{\"output_tokens\":9,\"output_tokens_details\":{}}}}\n\n";
        assert_eq!(streamed_tokens(completed), StreamedTokens { events: 0, total: Some(9) });
        assert_eq!(streamed_tokens(b": a comment\n\n"), StreamedTokens::default());
    }

    #[test]
    fn a_whole_answer_says_its_tokens() {
        let body = br#"{"choices":[{"text":"\"completion_tokens\":9"}],"usage":{"prompt_tokens":2,"completion_tokens": 17}}"#;
        assert_eq!(answered_tokens(body), 17);
        assert_eq!(answered_tokens(br#"{"usage":{"output_tokens":4}}"#), 4);
        assert_eq!(answered_tokens(br#"{"data":[]}"#), 0);
        assert_eq!(answered_tokens(br#"{"completion_tokens":"#), 0);
    }

    #[test]
    fn an_error_event_is_found_with_its_code() {
        let failed =
            b"data: {\"a\":1}\n\ndata: {\"error\": {\"message\": \"m\", \"code\": 503}}\n\n";
        assert_eq!(error_event(failed), Some((15, 503)));
        assert_eq!(error_event(b"data: {\"error\":{\"message\":\"m\"}}\n\n"), Some((0, 500)));
        assert_eq!(error_event(b"data: {\"text\":\"data: {\\\"error\\\":\"}\n\n"), None);
    }

    #[test]
    fn cached_tokens_change_and_no_other_byte_does() {
        let change = |text: &str| {
            let bytes = with_cached_tokens(Bytes::copy_from_slice(text.as_bytes()), 32);
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        assert_eq!(
            change(
                r#"{"usage":{"prompt_tokens_details":{"audio":1,"cached_tokens":1000},"x":7}} z"#
            ),
            r#"{"usage":{"prompt_tokens_details":{"audio":1,"cached_tokens":32},"x":7}} z"#
        );
        for untouched in [
            r#"{"usage":{"prompt_tokens_details":null},"cached_tokens":5}"#,
            r#"{"text":"\"prompt_tokens_details\":{\"cached_tokens\":5}"}"#,
            r#"{"prompt_tokens_details":{"cached_tokens":null}}"#,
            r#"{"prompt_tokens_details":{"#,
        ] {
            assert_eq!(change(untouched), untouched);
        }
    }
}
