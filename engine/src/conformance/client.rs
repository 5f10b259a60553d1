use baton_types::HandoffId;
use bytes::Bytes;
use futures::TryStreamExt;
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use crate::contract::{Answer, Engine, EngineRequest};

/// An answer in one piece.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    /// Null where the body is not JSON.
    pub body: Value,
}

impl Reply {
    /// Of the first choice.
    pub fn tokens(&self) -> Vec<u64> {
        let tokens = self.body["choices"][0]["token_ids"].as_array();
        let tokens = tokens.unwrap_or_else(|| panic!("an answer without tokens: {self:?}"));
        tokens.iter().map(|token| token.as_u64().expect("token ids are numbers")).collect()
    }

    /// Of the first choice.
    pub fn text(&self) -> &str {
        let text = self.body["choices"][0]["text"].as_str();
        text.unwrap_or_else(|| panic!("an answer without text: {self:?}"))
    }

    pub fn usage(&self) -> &Value {
        &self.body["usage"]
    }
}

/// POSTs to `/v1/completions` and waits for all of the answer.
pub async fn ask(engine: &dyn Engine, body: Value) -> Reply {
    let answer = ask_streaming(engine, body).await;
    let status = answer.status;
    let chunks: Vec<Bytes> = answer.body.try_collect().await.expect("the answer comes whole");
    let body = serde_json::from_slice(&chunks.concat()).unwrap_or_default();
    Reply { status, body }
}

/// POSTs to `/v1/completions`; whether the answer comes as events is the body's affair.
pub async fn ask_streaming(engine: &dyn Engine, body: Value) -> Answer {
    let request = EngineRequest {
        method: Method::POST,
        path: "/v1/completions".to_owned(),
        headers: HeaderMap::from_iter([(
            http::header::CONTENT_TYPE,
            http::HeaderValue::from_static("application/json"),
        )]),
        body: Bytes::from(body.to_string()),
    };
    engine.run(request).await.expect("the engine answers")
}

pub(super) fn completion(model: &str, prompt: &[u32], tokens: u32) -> Value {
    json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    })
}

pub(super) fn with_handoff(body: Value, role: &str, handoff: HandoffId) -> Value {
    let params = json!({"baton": {"role": role, "handoff": handoff, "generation": 0}});
    with(body, [("kv_transfer_params", params)])
}

pub(super) fn with<const N: usize>(mut body: Value, fields: [(&str, Value); N]) -> Value {
    for (field, value) in fields {
        body[field] = value;
    }
    body
}
