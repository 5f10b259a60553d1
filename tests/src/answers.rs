use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use reqwest::header::HeaderMap;
use serde_json::Value;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Result<Self> {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Self { status, headers, text: response.text().await? })
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub fn path(&self) -> &str {
        self.header("x-baton-path")
    }

    /// The text that was generated, of whichever endpoint.
    pub fn generated(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.text);
        let json = self.json();
        let choice = &json["choices"][0];
        let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
        text.unwrap_or_else(|| panic!("no text: {json}")).to_owned()
    }

    /// Whether an error has OpenAI's shape, and names no machine.
    pub fn assert_error(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{}", self.text);
        let json = self.json();
        for field in ["message", "type"] {
            assert!(json["error"][field].is_string(), "{field}: {json}");
        }
        assert_eq!(json["error"]["code"], code, "{json}");
        for inner in ["127.0.0.1", "prefill-", "decode-", ".sock"] {
            assert!(!self.text.contains(inner), "{inner} leaks: {}", self.text);
        }
    }
}

/// One event of a stream, with the time of its arrival.
#[derive(Clone, Debug)]
pub struct StreamEvent {
    pub data: String,
    pub at: Instant,
}

/// Reads a stream of server-sent events to its end.
pub async fn read_events(response: reqwest::Response) -> Result<Vec<StreamEvent>> {
    ensure!(response.status().is_success(), "{}", response.text().await?);
    let mut chunks = response.bytes_stream();
    let (mut events, mut pending) = (Vec::new(), String::new());
    while let Some(chunk) = chunks.next().await {
        pending.push_str(std::str::from_utf8(&chunk?)?);
        while let Some((event, rest)) = pending.split_once("\n\n") {
            let data = event.strip_prefix("data: ").context("an event without data")?.to_owned();
            events.push(StreamEvent { data, at: Instant::now() });
            pending = rest.to_owned();
        }
    }
    ensure!(pending.is_empty(), "the stream ended inside an event: {pending}");
    Ok(events)
}

/// The text that a stream's events make together.
pub fn streamed_text(events: &[StreamEvent]) -> String {
    let text = |event: &StreamEvent| {
        let json: Value = serde_json::from_str(&event.data).ok()?;
        let choice = &json["choices"][0];
        let text = choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str())?;
        Some(text.to_owned())
    };
    events.iter().filter_map(text).collect()
}
