//! One streamed answer, with the time of each token.

use std::time::Instant;

use memchr::memchr;
use reqwest::StatusCode;
use serde::Deserialize;

use super::endpoint::Surface;
use crate::outcome::Gaps;

/// A line of a stream that is longer than this ends the answer.
const LINE_LIMIT_BYTES: usize = 16 << 20;

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// When tokens came, and how many there were then.
    pub arrivals: Vec<(Instant, u32)>,
    /// As the server counts.
    pub prompt_tokens: Option<u32>,
    pub cached_tokens: u32,
    pub disaggregated: bool,
    pub end: End,
}

impl Answer {
    /// When the first token came.
    pub fn first(&self) -> Option<Instant> {
        self.arrivals.first().map(|(at, _)| *at)
    }

    pub fn last(&self) -> Option<Instant> {
        self.arrivals.last().map(|(at, _)| *at)
    }

    pub fn tokens(&self) -> u32 {
        self.arrivals.last().map_or(0, |(_, tokens)| *tokens)
    }

    /// Between tokens; those that came together have none between them.
    pub fn gaps(&self) -> Gaps {
        let mut gaps = Gaps::default();
        let (mut last, mut tokens_before) = (None::<Instant>, 0);
        for (at, tokens) in &self.arrivals {
            if let Some(last) = last {
                gaps.push(at.saturating_duration_since(last).as_secs_f64() * 1000.0);
            }
            gaps.push_many(0.0, (tokens - tokens_before).saturating_sub(1));
            (last, tokens_before) = (Some(*at), *tokens);
        }
        gaps
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Complete,
    /// With an error, in the server's words.
    Refused(String),
    /// The connection, or the stream, ended too early.
    BrokeOff(String),
}

/// The part of an event that tells tokens.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<Text>,
    reasoning_content: Option<Text>,
    reasoning: Option<Text>,
    tool_calls: Option<serde::de::IgnoredAny>,
}

/// Whether there is any.
struct Text(bool);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Ok(Self(!text.is_empty()))
    }
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u32>,
}

/// An answer that is being read.
pub(super) struct Reading<F> {
    pub(super) answer: Answer,
    surface: Surface,
    on_first_token: Option<F>,
    /// The beginning of a line.
    held: Vec<u8>,
    is_done: bool,
    error: Option<String>,
}

impl<F: FnOnce()> Reading<F> {
    pub(super) fn new(surface: Surface, on_first_token: F) -> Self {
        let answer = Answer {
            arrivals: Vec::new(),
            prompt_tokens: None,
            cached_tokens: 0,
            disaggregated: false,
            end: End::Complete,
        };
        let on_first_token = Some(on_first_token);
        Self { answer, surface, on_first_token, held: Vec::new(), is_done: false, error: None }
    }

    /// Takes in what came at `now`.
    pub(super) fn take(&mut self, mut bytes: &[u8], now: Instant) {
        while let Some(end) = memchr(b'\n', bytes) {
            if self.held.is_empty() {
                self.line(&bytes[..end], now);
            } else {
                self.held.extend_from_slice(&bytes[..end]);
                let mut line = std::mem::take(&mut self.held);
                self.line(&line, now);
                line.clear();
                self.held = line;
            }
            bytes = &bytes[end + 1..];
        }
        if self.held.len() + bytes.len() > LINE_LIMIT_BYTES {
            self.error
                .get_or_insert_with(|| format!("a line of more than {LINE_LIMIT_BYTES} bytes"));
            self.held.clear();
        } else {
            self.held.extend_from_slice(bytes);
        }
    }

    fn line(&mut self, line: &[u8], now: Instant) {
        let Some(data) = line.strip_prefix(b"data:") else { return };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.is_done = true;
            return;
        }
        match serde_json::from_slice::<Event>(data) {
            Ok(Event { error: Some(error), .. }) => {
                self.error.get_or_insert_with(|| message_of(&error));
            }
            Ok(event) => self.event(&event, now),
            Err(error) => {
                self.error.get_or_insert_with(|| format!("an event that cannot be read: {error}"));
            }
        }
    }

    fn event(&mut self, event: &Event, now: Instant) {
        let counted = event.usage.as_ref().and_then(|usage| usage.completion_tokens);
        let tokens = match counted {
            Some(counted) => counted.saturating_sub(self.answer.tokens()),
            None => u32::from(event.choices.iter().any(|choice| choice.is_token(self.surface))),
        };
        if let Some(usage) = &event.usage {
            self.answer.prompt_tokens = usage.prompt_tokens.or(self.answer.prompt_tokens);
            let cached = usage.prompt_tokens_details.as_ref().and_then(|d| d.cached_tokens);
            self.answer.cached_tokens = cached.unwrap_or(self.answer.cached_tokens);
        }
        let before = self.answer.tokens();
        if tokens == 0 {
            return;
        }
        match self.answer.arrivals.last_mut() {
            // A last event may only count: what it counts came with what came last.
            Some((_, counted)) if event.choices.is_empty() => *counted += tokens,
            _ => self.answer.arrivals.push((now, before + tokens)),
        }
        if let Some(on_first_token) = self.on_first_token.take() {
            on_first_token();
        }
    }

    /// The server closed the stream.
    pub(super) fn ended(mut self) -> Answer {
        self.answer.end = match self.error.take() {
            Some(error) => End::BrokeOff(error),
            None if !self.is_done => End::BrokeOff("the stream ended before [DONE]".to_owned()),
            None if self.answer.arrivals.is_empty() => {
                End::BrokeOff("an answer of no token".to_owned())
            }
            None => End::Complete,
        };
        self.answer
    }

    pub(super) fn broke_off(mut self, reason: String) -> Answer {
        self.answer.end = End::BrokeOff(self.error.take().unwrap_or(reason));
        self.answer
    }

    pub(super) fn refused(mut self, status: StatusCode, body: &str) -> Answer {
        let error = serde_json::from_str::<serde_json::Value>(body).ok();
        let message = error.as_ref().and_then(|body| body.get("error")).map(message_of);
        self.answer.end = End::Refused(match message {
            Some(message) => format!("{}: {message}", status.as_u16()),
            None => status.to_string(),
        });
        self.answer
    }
}

impl Choice {
    fn is_token(&self, surface: Surface) -> bool {
        match (surface, &self.delta) {
            // A token may be the first half of a character, and have no text yet.
            (Surface::Completions, _) => true,
            (Surface::Chat, Some(delta)) => {
                let texts = [&delta.content, &delta.reasoning_content, &delta.reasoning];
                texts.into_iter().flatten().any(|text| text.0) || delta.tool_calls.is_some()
            }
            (Surface::Chat, None) => false,
        }
    }
}

fn message_of(error: &serde_json::Value) -> String {
    let message = error.get("message").and_then(serde_json::Value::as_str);
    message.map_or_else(|| error.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(surface: Surface, pieces: &[&str]) -> Answer {
        let start = Instant::now();
        let mut reading = Reading::new(surface, || ());
        for (piece, index) in pieces.iter().zip(0_u32..) {
            reading.take(piece.as_bytes(), start + index * Duration::from_millis(10));
        }
        reading.ended()
    }

    fn gaps_ms(answer: &Answer) -> (u64, f64) {
        let mut gaps = answer.gaps();
        (gaps.len(), gaps.tbt_ms())
    }

    const TOKEN: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";

    #[test]
    fn each_token_has_its_time() {
        let answer = read(Surface::Completions, &[TOKEN, TOKEN, "", TOKEN, "data: [DONE]\n\n"]);
        assert_eq!((&answer.end, answer.tokens()), (&End::Complete, 3));
        let between = answer.last().unwrap() - answer.first().unwrap();
        assert_eq!(between, Duration::from_millis(30));
        assert_eq!(gaps_ms(&answer), (2, 20.0));
    }

    #[test]
    fn tokens_come_in_pieces_and_together() {
        let (head, tail) = TOKEN.split_at(9);
        let both = format!("{tail}{TOKEN}{head}");
        let answer =
            read(Surface::Completions, &[head, &both, &format!("{tail}data: [DONE]\r\n\r\n")]);
        assert_eq!((&answer.end, answer.tokens()), (&End::Complete, 3));
        assert_eq!(gaps_ms(&answer), (2, 10.0));
    }

    #[test]
    fn usage_counts_what_came_together() {
        let event = |tokens| {
            format!(
                "data: {{\"choices\":[{{\"text\":\"ab\"}}],\"usage\":{{\"prompt_tokens\":7,\
                 \"completion_tokens\":{tokens}}}}}\n\n"
            )
        };
        let last = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":6,\
                    \"prompt_tokens_details\":{\"cached_tokens\":4}}}\n\ndata: [DONE]\n\n";
        let answer = read(Surface::Completions, &[&event(1), &event(4), last]);
        assert_eq!((answer.tokens(), answer.prompt_tokens, answer.cached_tokens), (6, Some(7), 4));
        // One gap of 10 ms; four more tokens came with another.
        assert_eq!(gaps_ms(&answer), (5, 10.0));
        assert_eq!(answer.last().unwrap() - answer.first().unwrap(), Duration::from_millis(10));
    }

    #[test]
    fn a_role_is_no_token() {
        let role =
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        let token = "data: {\"choices\":[{\"delta\":{\"content\":\"\\u00e4\"}}]}\n\n";
        let stop = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
        let answer = read(Surface::Chat, &[role, token, token, stop, "data: [DONE]\n\n"]);
        assert_eq!(answer.tokens(), 2);
        assert_eq!(gaps_ms(&answer), (1, 10.0));
    }

    #[test]
    fn what_breaks_off_is_not_complete() {
        let broke_off = |pieces: &[&str]| match read(Surface::Completions, pieces).end {
            End::BrokeOff(reason) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(broke_off(&[TOKEN]), "the stream ended before [DONE]");
        assert_eq!(broke_off(&["data: [DONE]\n"]), "an answer of no token");
        let error = "data: {\"error\":{\"message\":\"worker lost\"}}\n\ndata: [DONE]\n\n";
        assert_eq!(broke_off(&[TOKEN, error]), "worker lost");
        assert!(broke_off(&["data: {\n"]).starts_with("an event that cannot be read: "));
    }

    #[test]
    fn refusals_are_in_the_servers_words() {
        let refused = |body| {
            Reading::new(Surface::Chat, || ()).refused(StatusCode::TOO_MANY_REQUESTS, body).end
        };
        assert_eq!(
            refused(r#"{"error":{"message":"too many"}}"#),
            End::Refused("429: too many".into())
        );
        assert_eq!(refused("<html>"), End::Refused("429 Too Many Requests".into()));
    }
}
