//! What is answered without generating anything.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

use super::{
    Api,
    error::{ApiError, json_answer},
    fields::Fields,
    request::{chat_prompt, prompts, room_for_output, token_ids},
};
use crate::{contract::Answer, sim::tokenizer::Tokenizer};

const EMBEDDING_DIMENSIONS: usize = 64;

impl Api {
    pub(super) fn models(&self) -> Answer {
        #[derive(Serialize)]
        struct List<'a> {
            object: &'static str,
            data: [Model<'a>; 1],
        }
        #[derive(Serialize)]
        struct Model<'a> {
            id: &'a str,
            object: &'static str,
            created: u64,
            owned_by: &'static str,
            root: &'a str,
            parent: Option<()>,
            max_model_len: u32,
        }
        let model = Model {
            id: &self.model,
            object: "model",
            created: self.started,
            owned_by: "baton",
            root: &self.model,
            parent: None,
            max_model_len: self.max_model_tokens,
        };
        json_answer(StatusCode::OK, &List { object: "list", data: [model] })
    }

    pub(super) fn version() -> Answer {
        #[derive(Serialize)]
        struct Version {
            version: &'static str,
        }
        json_answer(StatusCode::OK, &Version { version: env!("CARGO_PKG_VERSION") })
    }

    pub(super) fn tokenize(&self, mut fields: Fields) -> Result<Answer, ApiError> {
        #[derive(Serialize)]
        struct Tokenized {
            count: usize,
            max_model_len: u32,
            tokens: Vec<u32>,
            token_strs: Option<Vec<String>>,
        }
        self.check_model(&mut fields)?;
        let tokenizer = Tokenizer::shared();
        let tokens = if fields.has("messages") {
            chat_prompt(&mut fields)?
        } else {
            let prompt: String = fields.required("prompt")?;
            tokenizer.encode(&prompt)
        };
        let strings = || tokens.iter().map(|token| tokenizer.decode(&[*token])).collect();
        let token_strs = fields.flag("return_token_strs")?.then(strings);
        let max_model_len = self.max_model_tokens;
        let body = Tokenized { count: tokens.len(), max_model_len, tokens, token_strs };
        Ok(json_answer(StatusCode::OK, &body))
    }

    pub(super) fn detokenize(&self, mut fields: Fields) -> Result<Answer, ApiError> {
        #[derive(Serialize)]
        struct Detokenized {
            prompt: String,
        }
        self.check_model(&mut fields)?;
        let tokens = token_ids(fields.required("tokens")?, "tokens")?;
        let prompt = Tokenizer::shared().decode(&tokens);
        Ok(json_answer(StatusCode::OK, &Detokenized { prompt }))
    }

    /// Vectors that are equal for equal inputs, and mean nothing else.
    pub(super) fn embeddings(&self, mut fields: Fields) -> Result<Answer, ApiError> {
        #[derive(Serialize)]
        struct List {
            id: String,
            object: &'static str,
            created: u64,
            model: String,
            data: Vec<Embedding>,
            usage: EmbeddingUsage,
        }
        #[derive(Serialize)]
        struct Embedding {
            index: usize,
            object: &'static str,
            embedding: Value,
        }
        #[derive(Serialize)]
        struct EmbeddingUsage {
            prompt_tokens: usize,
            total_tokens: usize,
            completion_tokens: u32,
            prompt_tokens_details: Option<()>,
        }
        self.check_model(&mut fields)?;
        let inputs = prompts(fields.required("input")?, "input")?;
        let format: Option<String> = fields.optional("encoding_format")?;
        let is_base64 = match format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let message = "encoding_format: expected \"float\" or \"base64\"";
                return Err(ApiError::bad_field("encoding_format", message));
            }
        };
        for input in &inputs {
            room_for_output(input.len(), self.max_model_tokens)?;
        }
        let prompt_tokens = inputs.iter().map(Vec::len).sum();
        let data = inputs.iter().enumerate().map(|(index, input)| {
            let vector = embedding(input);
            let embedding = if is_base64 {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                Value::String(BASE64_STANDARD.encode(bytes))
            } else {
                vector.into()
            };
            Embedding { index, object: "embedding", embedding }
        });
        let body = List {
            id: format!("embd-{}", uuid::Uuid::new_v4().simple()),
            object: "list",
            created: super::unix_seconds(),
            data: data.collect(),
            model: self.model.clone(),
            usage: EmbeddingUsage {
                prompt_tokens,
                total_tokens: prompt_tokens,
                completion_tokens: 0,
                prompt_tokens_details: None,
            },
        };
        Ok(json_answer(StatusCode::OK, &body))
    }
}

/// Of length 1.
fn embedding(tokens: &[u32]) -> Vec<f32> {
    let mut hasher = blake3::Hasher::new();
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    let mut bytes = [0; 2 * EMBEDDING_DIMENSIONS];
    hasher.finalize_xof().fill(&mut bytes);
    let (pairs, _) = bytes.as_chunks();
    let values: Vec<f32> = pairs.iter().map(|pair| f32::from(i16::from_le_bytes(*pair))).collect();
    let length = values.iter().map(|value| value * value).sum::<f32>().sqrt().max(1.0);
    values.into_iter().map(|value| value / length).collect()
}
