use baton_types::{Generation, HandoffId};
use serde::Deserialize;
use serde_json::Value;

use super::{error::ApiError, fields::Fields};
use crate::sim::{
    chat_template::{self, Message},
    handoff::{HandoffName, Part},
    tokenizer::Tokenizer,
};

const DEFAULT_COMPLETION_TOKENS: u32 = 16;
/// A chat that does not say how long its answer may be gets one that ends while somebody watches.
const DEFAULT_CHAT_TOKENS: u32 = 256;
const MOST_CHOICES: u32 = 128;
const MOST_LOGPROBS: u32 = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface {
    Chat,
    Completion,
}

/// A request to generate text, read and checked.
#[derive(Debug)]
pub(super) struct GenerationRequest {
    pub(super) surface: Surface,
    pub(super) prompts: Vec<Vec<u32>>,
    /// Choices a prompt.
    pub(super) n: u32,
    pub(super) max_tokens: u32,
    pub(super) min_tokens: u32,
    pub(super) stop: Vec<String>,
    pub(super) include_stop: bool,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) is_random: bool,
    pub(super) seed: Option<i64>,
    /// Alternatives to tell of each token, besides itself.
    pub(super) logprobs: Option<u32>,
    pub(super) return_token_ids: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) cache_salt: Option<String>,
    pub(super) handoff: Option<(HandoffName, Part)>,
    pub(super) request_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
struct KvTransferParams {
    baton: Option<HandoffParams>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HandoffParams {
    role: HandoffRole,
    handoff: HandoffId,
    generation: Generation,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum HandoffRole {
    Produce,
    Consume,
    Lend,
}

impl GenerationRequest {
    pub(super) fn read(
        surface: Surface,
        mut fields: Fields,
        max_model_tokens: u32,
    ) -> Result<Self, ApiError> {
        let fields = &mut fields;
        let prompts = match surface {
            Surface::Chat => vec![chat_prompt(fields)?],
            Surface::Completion => completion_prompts(fields)?,
        };
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let most_output = room_for_output(longest, max_model_tokens)?;
        let max_tokens = max_tokens(surface, fields, longest, most_output, max_model_tokens)?;
        let min_tokens = fields.optional("min_tokens")?.unwrap_or(0);
        if min_tokens > max_tokens {
            let message =
                format!("min_tokens must be at most max_tokens={max_tokens}, got {min_tokens}.");
            return Err(ApiError::bad_field("min_tokens", message));
        }
        let handoff = handoff(fields)?;
        if handoff.is_some() && prompts.len() > 1 {
            let message = "a handoff is of one prompt";
            return Err(ApiError::bad_field("kv_transfer_params", message));
        }
        let stream_options: Option<StreamOptions> = fields.optional("stream_options")?;
        let stream = fields.flag("stream")?;
        if stream_options.is_some() && !stream {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(ApiError::bad_field("stream_options", message));
        }
        Ok(Self {
            surface,
            prompts,
            n: choices(fields)?,
            max_tokens,
            min_tokens,
            stop: stop(fields)?,
            include_stop: fields.flag("include_stop_str_in_output")?,
            stop_token_ids: fields.optional("stop_token_ids")?.unwrap_or_default(),
            ignore_eos: fields.flag("ignore_eos")?,
            is_random: is_random(fields)?,
            seed: fields.optional("seed")?,
            logprobs: logprobs(surface, fields)?,
            return_token_ids: fields.flag("return_token_ids")?,
            stream,
            include_usage: stream_options.unwrap_or_default().include_usage.unwrap_or(false),
            cache_salt: fields.optional("cache_salt")?,
            handoff,
            request_id: fields.optional("request_id")?,
        })
    }
}

/// The tokens of `messages`, as the model sees them.
pub(super) fn chat_prompt(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let messages: Vec<Message> = fields.required("messages")?;
    if messages.is_empty() {
        return Err(ApiError::bad_field("messages", "messages: at least one is needed"));
    }
    let tools: Option<Value> = fields.optional("tools")?;
    let opens_answer = fields.optional("add_generation_prompt")?.unwrap_or(true);
    let text = chat_template::render(&messages, tools.as_ref(), opens_answer)
        .map_err(|error| ApiError::bad_field("messages", error.to_string()))?;
    Ok(Tokenizer::shared().encode(&text))
}

fn completion_prompts(fields: &mut Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    for unsupported in ["echo", "prompt_logprobs", "suffix"] {
        if fields.has(unsupported) && fields.optional(unsupported)? != Some(Value::Bool(false)) {
            let message = format!("{unsupported} is not supported by the embedded engine");
            return Err(ApiError::bad_field(unsupported, message));
        }
    }
    prompts(fields.required("prompt")?, "prompt")
}

/// One or several prompts, each a text or a list of token ids.
pub(super) fn prompts(value: Value, field: &str) -> Result<Vec<Vec<u32>>, ApiError> {
    let prompts = match value {
        Value::Array(items) if items.first().is_some_and(Value::is_number) => {
            vec![token_ids(Value::Array(items), field)?]
        }
        Value::Array(items) => {
            let prompts: Result<_, _> = items.into_iter().map(|item| prompt(item, field)).collect();
            prompts?
        }
        one => vec![prompt(one, field)?],
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(ApiError::bad_field(field, "The decoder prompt cannot be empty"));
    }
    Ok(prompts)
}

fn prompt(value: Value, field: &str) -> Result<Vec<u32>, ApiError> {
    match value {
        Value::String(text) => Ok(Tokenizer::shared().encode(&text)),
        ids => token_ids(ids, field),
    }
}

pub(super) fn token_ids(value: Value, field: &str) -> Result<Vec<u32>, ApiError> {
    let ids: Vec<u32> = serde_json::from_value(value).map_err(|_| {
        let message = format!("{field}: expected text, a list of texts, or lists of token ids");
        ApiError::bad_field(field, message)
    })?;
    let vocabulary = Tokenizer::shared().vocabulary_size();
    match ids.iter().find(|id| **id >= vocabulary) {
        Some(id) => Err(ApiError::bad_field(field, format!("Token id {id} is out of vocabulary"))),
        None => Ok(ids),
    }
}

/// Tokens that an answer to a prompt of this length may have.
pub(super) fn room_for_output(
    prompt_tokens: usize,
    max_model_tokens: u32,
) -> Result<u32, ApiError> {
    let prompt = u32::try_from(prompt_tokens).unwrap_or(u32::MAX);
    match max_model_tokens.checked_sub(prompt) {
        Some(room) if room > 0 => Ok(room),
        _ => Err(ApiError::bad_field(
            "input_tokens",
            format!(
                "This model's maximum context length is {max_model_tokens} tokens. However, your \
                 request has {prompt_tokens} input tokens. Please reduce the length of the input \
                 messages."
            ),
        )),
    }
}

fn max_tokens(
    surface: Surface,
    fields: &mut Fields,
    prompt_tokens: usize,
    most_output: u32,
    max_model_tokens: u32,
) -> Result<u32, ApiError> {
    let newer: Option<u32> = match surface {
        Surface::Chat => fields.optional("max_completion_tokens")?,
        Surface::Completion => None,
    };
    let older: Option<u32> = fields.optional("max_tokens")?;
    match newer.or(older) {
        Some(0) => Err(ApiError::bad_field("max_tokens", "max_tokens must be at least 1, got 0.")),
        Some(asked) if asked > most_output => Err(ApiError::bad_field(
            "max_tokens",
            format!(
                "'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's \
                 maximum context length is {max_model_tokens} tokens and your request has \
                 {prompt_tokens} input tokens ({asked} > {max_model_tokens} - {prompt_tokens})."
            ),
        )),
        Some(asked) => Ok(asked),
        None => Ok(most_output.min(match surface {
            Surface::Chat => DEFAULT_CHAT_TOKENS,
            Surface::Completion => DEFAULT_COMPLETION_TOKENS,
        })),
    }
}

fn choices(fields: &mut Fields) -> Result<u32, ApiError> {
    let n = fields.optional("n")?.unwrap_or(1);
    if (1..=MOST_CHOICES).contains(&n) {
        Ok(n)
    } else {
        let message = format!("n must be between 1 and {MOST_CHOICES}, got {n}.");
        Err(ApiError::bad_field("n", message))
    }
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stop = match fields.optional("stop")? {
        None => Vec::new(),
        Some(OneOrMany::One(stop)) => vec![stop],
        Some(OneOrMany::Many(stop)) => stop,
    };
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::bad_field("stop", "stop cannot contain an empty string."));
    }
    Ok(stop)
}

fn is_random(fields: &mut Fields) -> Result<bool, ApiError> {
    let temperature: Option<f64> = fields.optional("temperature")?;
    let top_p: Option<f64> = fields.optional("top_p")?;
    if let Some(top_p) = top_p.filter(|top_p| !(*top_p > 0.0 && *top_p <= 1.0)) {
        let message = format!("top_p must be in (0, 1], got {top_p}.");
        return Err(ApiError::bad_field("top_p", message));
    }
    match temperature {
        Some(negative) if negative < 0.0 => Err(ApiError::bad_field(
            "temperature",
            format!("temperature must be non-negative, got {negative}."),
        )),
        temperature => Ok(temperature.is_some_and(|temperature| temperature > 0.0)),
    }
}

fn logprobs(surface: Surface, fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let asked = match surface {
        Surface::Completion => fields.optional("logprobs")?,
        Surface::Chat => {
            let others: Option<u32> = fields.optional("top_logprobs")?;
            let is_asked = fields.flag("logprobs")?;
            is_asked.then_some(others.unwrap_or(0))
        }
    };
    match asked {
        Some(asked) if asked > MOST_LOGPROBS => Err(ApiError::bad_field(
            "logprobs",
            format!(
                "Requested sample logprobs of {asked}, which is greater than max allowed: {MOST_LOGPROBS}"
            ),
        )),
        asked => Ok(asked),
    }
}

fn handoff(fields: &mut Fields) -> Result<Option<(HandoffName, Part)>, ApiError> {
    let params: Option<KvTransferParams> = fields.optional("kv_transfer_params")?;
    Ok(params.and_then(|params| params.baton).map(|params| {
        let name = HandoffName { handoff: params.handoff, generation: params.generation };
        match params.role {
            HandoffRole::Produce => (name, Part::Produce),
            HandoffRole::Consume => (name, Part::Consume),
            HandoffRole::Lend => (name, Part::Lend),
        }
    }))
}
