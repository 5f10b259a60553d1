use std::time::Instant;

use bytes::Bytes;
use reqwest::{
    Client, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Reading},
    prompts::Prompts,
};
use crate::trace::TraceRequest;

/// An OpenAI-compatible server, and how to ask it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    http: Client,
    url: Url,
    surface: Surface,
    /// What every body holds besides prompt and lengths, without its braces.
    common: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `/v1/completions`, with prompts of token ids: lengths are exact.
    Completions,
    /// `/v1/chat/completions`, with prompts of words: lengths are about right.
    Chat,
}

#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("the URL {url:?} is not one: {reason}")]
    Url { url: String, reason: String },
    #[error("the API key holds characters that no HTTP header can")]
    ApiKey,
    #[error("no HTTP client: {0}")]
    Http(#[from] reqwest::Error),
    #[error("no answer from {url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{url} serves no model")]
    NoModel { url: String },
}

impl Endpoint {
    /// `url` is what `/v1/completions` is appended to, with or without a `/v1` of its own. Fields of
    /// `more` go into every body, over those of ours; a null removes one.
    ///
    /// # Errors
    /// What cannot be asked at all. Nothing is sent yet.
    pub fn new(
        url: &str,
        model: &str,
        surface: Surface,
        api_key: Option<&str>,
        more: Map<String, Value>,
    ) -> Result<Self, EndpointError> {
        let url = surface_url(
            url,
            match surface {
                Surface::Completions => "completions",
                Surface::Chat => "chat/completions",
            },
        )?;
        // The second is vLLM's: tokens that come together can be counted then.
        let stream_options = json!({"include_usage": true, "continuous_usage_stats": true});
        let ours = [
            ("model", json!(model)),
            ("stream", json!(true)),
            ("stream_options", stream_options),
            ("ignore_eos", json!(true)),
            ("temperature", json!(0)),
        ];
        let mut fields: Map<_, _> =
            ours.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        fields.extend(more);
        fields.retain(|_, value| !value.is_null());
        let common = Value::Object(fields).to_string();
        let common = common.trim_start_matches('{').trim_end_matches('}').to_owned();
        Ok(Self { http: client(api_key)?, url, surface, common })
    }

    /// The first model that the server lists.
    ///
    /// # Errors
    /// Where it cannot be asked, or lists none.
    pub async fn first_model(url: &str, api_key: Option<&str>) -> Result<String, EndpointError> {
        let url = surface_url(url, "models")?;
        let unreachable = |error: reqwest::Error| EndpointError::Unreachable {
            url: url.to_string(),
            reason: reason_of(&error),
        };
        let answer = client(api_key)?.get(url.clone()).send().await.map_err(unreachable)?;
        let models: Value =
            answer.error_for_status().map_err(unreachable)?.json().await.map_err(unreachable)?;
        let model = models.pointer("/data/0/id").and_then(Value::as_str);
        model.map(str::to_owned).ok_or_else(|| EndpointError::NoModel { url: url.to_string() })
    }

    /// The body that asks for `request`.
    pub fn body(&self, prompts: &Prompts, index: u64, request: &TraceRequest) -> Bytes {
        let prompt = match self.surface {
            Surface::Completions => {
                format!(r#""prompt":{}"#, prompts.token_ids_json(index, request))
            }
            // Words need no escaping.
            Surface::Chat => format!(
                r#""messages":[{{"role":"user","content":"{}"}}]"#,
                prompts.words(index, request).trim_end()
            ),
        };
        let max_tokens = request.output_tokens;
        format!(r#"{{{},"max_tokens":{max_tokens},{prompt}}}"#, self.common).into()
    }

    /// Sends a body and takes times until the answer ends. Whatever goes wrong is in the answer.
    pub async fn ask(&self, body: Bytes, on_first_token: impl FnOnce()) -> Answer {
        let mut reading = Reading::new(self.surface, on_first_token);
        let sent = self.http.post(self.url.clone()).body(body).send().await;
        let mut response = match sent {
            Ok(response) => response,
            Err(error) => return reading.broke_off(reason_of(&error)),
        };
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_default();
            return reading.refused(status, &text);
        }
        reading.answer.disaggregated = response
            .headers()
            .get("x-baton-path")
            .is_some_and(|path| path.as_bytes() == b"disaggregated");
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => reading.take(&chunk, Instant::now()),
                Ok(None) => return reading.ended(),
                Err(error) => return reading.broke_off(reason_of(&error)),
            }
        }
    }
}

fn client(api_key: Option<&str>) -> Result<Client, EndpointError> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(key) = api_key {
        let mut value =
            HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| EndpointError::ApiKey)?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    Ok(Client::builder().default_headers(headers).build()?)
}

fn surface_url(base: &str, surface: &str) -> Result<Url, EndpointError> {
    let wrong = |reason: String| EndpointError::Url { url: base.to_owned(), reason };
    let trimmed = base.trim_end_matches('/').trim_end_matches("/v1");
    let url: Url = format!("{trimmed}/v1/{surface}")
        .parse()
        .map_err(|error| wrong(format!("{error}; expected something like http://host:port")))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        scheme => Err(wrong(format!("its scheme is {scheme}, expected http or https"))),
    }
}

/// The innermost cause says most; the URL stands elsewhere.
fn reason_of(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPTS: Prompts = Prompts { seed: 0, vocabulary: 7..8, prefix_block_tokens: 512 };

    fn endpoint(surface: Surface, more: Value) -> Endpoint {
        let Value::Object(more) = more else { panic!("an object") };
        Endpoint::new("http://host:1/v1/", "m", surface, Some("secret"), more).unwrap()
    }

    #[test]
    fn bodies_ask_for_what_the_trace_says() {
        let request = TraceRequest { input_tokens: 3, output_tokens: 5, ..TraceRequest::default() };
        let more = json!({"temperature": 0.5, "ignore_eos": null, "seed": 1});
        let body = endpoint(Surface::Completions, more).body(&PROMPTS, 0, &request);
        let body: Value = serde_json::from_slice(&body).unwrap();
        let expected = json!({
            "model": "m", "stream": true, "temperature": 0.5, "seed": 1, "max_tokens": 5,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
            "prompt": [7, 7, 7],
        });
        assert_eq!(body, expected);
        let chat = endpoint(Surface::Chat, json!({}));
        let body: Value = serde_json::from_slice(&chat.body(&PROMPTS, 0, &request)).unwrap();
        let content = body.pointer("/messages/0/content").and_then(Value::as_str).unwrap();
        assert_eq!(content.split(' ').count(), 3);
        assert_eq!(chat.url.as_str(), "http://host:1/v1/chat/completions");
    }

    #[test]
    fn keys_are_not_shown() {
        assert!(!format!("{:?}", endpoint(Surface::Chat, json!({}))).contains("secret"));
    }

    #[test]
    fn urls_are_checked() {
        let said = |url: &str| {
            let made = Endpoint::new(url, "m", Surface::Chat, None, Map::new());
            made.unwrap_err().to_string()
        };
        assert!(said("host").starts_with("the URL \"host\" is not one: "), "{}", said("host"));
        assert!(said("ftp://host").contains("its scheme is ftp, expected http or https"));
    }
}
