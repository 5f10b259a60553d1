//! Answers in one piece.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

use super::{
    AnswerHead,
    choice::{Choice, FinishReason, StopStrings, TokenLogprobs},
    error::json_answer,
    generation::Generation,
    request::{GenerationRequest, Surface},
};
use crate::{
    contract::{Answer, EngineError},
    sim::core::{ChoiceEvent, ChoiceProgress},
};

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) total_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) prompt_tokens_details: Option<()>,
}

impl Usage {
    pub(super) fn new(asked: &GenerationRequest, choices: &[Choice]) -> Self {
        let completion_tokens = choices.iter().map(|choice| u64::from(choice.tokens)).sum();
        let prompt_tokens = asked.prompts.iter().map(|prompt| prompt.len() as u64).sum();
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: None,
        }
    }
}

/// A choice that has come to its end.
#[derive(Debug, Default)]
struct WholeChoice {
    progress: Choice,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
}

/// Waits for every choice's end.
pub(super) async fn answer(
    asked: &GenerationRequest,
    mut generation: Generation,
    head: AnswerHead,
) -> Result<Answer, EngineError> {
    let stops = StopStrings::new(asked.stop.clone(), asked.include_stop, asked.min_tokens);
    let mut choices: Vec<WholeChoice> =
        (0..generation.open_choices()).map(|_| WholeChoice::default()).collect();
    while generation.open_choices() > 0 {
        let (choice, drawn, finish) = match generation.next().await {
            Some(ChoiceEvent { choice, what: ChoiceProgress::Token { drawn, finish } }) => {
                (choice, drawn, finish)
            }
            Some(ChoiceEvent { what: ChoiceProgress::Failed(reason), .. }) => {
                return Err(EngineError::BrokeOff(reason));
            }
            None => return Err(EngineError::Ended("in the middle of an answer".to_owned())),
        };
        let Some(whole) = choices.get_mut(choice as usize) else { continue };
        let Some(delta) = whole.progress.push(drawn, finish, &stops) else { continue };
        whole.text.push_str(&delta.text);
        whole.token_ids.push(drawn.token);
        if let Some(alternatives) = asked.logprobs {
            whole.logprobs.push(TokenLogprobs::of(drawn, alternatives));
        }
        if delta.finish.is_some() {
            whole.finish = delta.finish;
            generation.end_choice(choice, finish.is_some());
        }
    }
    let progress: Vec<_> =
        choices.iter_mut().map(|whole| std::mem::take(&mut whole.progress)).collect();
    let usage = Usage::new(asked, &progress);
    Ok(match asked.surface {
        Surface::Chat => json_answer(StatusCode::OK, &chat(asked, choices, head, usage)),
        Surface::Completion => {
            json_answer(StatusCode::OK, &completion(asked, choices, head, usage))
        }
    })
}

#[derive(Serialize)]
struct ChatCompletion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    service_tier: Option<()>,
    system_fingerprint: Option<()>,
    usage: Usage,
    prompt_logprobs: Option<()>,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_text: Option<()>,
    kv_transfer_params: Option<()>,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: ChatMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    stop_reason: Value,
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct ChatMessage {
    role: &'static str,
    content: String,
    refusal: Option<()>,
    annotations: Option<()>,
    audio: Option<()>,
    function_call: Option<()>,
    reasoning: Option<()>,
}

fn chat(
    asked: &GenerationRequest,
    choices: Vec<WholeChoice>,
    head: AnswerHead,
    usage: Usage,
) -> ChatCompletion {
    let choices = choices.into_iter().enumerate().map(|(index, whole)| ChatChoice {
        index,
        message: ChatMessage {
            role: "assistant",
            content: whole.text,
            refusal: None,
            annotations: None,
            audio: None,
            function_call: None,
            reasoning: None,
        },
        logprobs: asked.logprobs.map(|_| chat_logprobs(&whole.logprobs)),
        finish_reason: whole.finish.as_ref().map_or("stop", FinishReason::as_str),
        stop_reason: whole.finish.as_ref().map_or(Value::Null, FinishReason::stop_reason),
        token_ids: asked.return_token_ids.then_some(whole.token_ids),
    });
    ChatCompletion {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        choices: choices.collect(),
        service_tier: None,
        system_fingerprint: None,
        usage,
        prompt_logprobs: None,
        prompt_token_ids: asked.prompts.first().filter(|_| asked.return_token_ids).cloned(),
        prompt_text: None,
        kv_transfer_params: None,
    }
}

#[derive(Serialize)]
struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    service_tier: Option<()>,
    system_fingerprint: Option<()>,
    usage: Usage,
    kv_transfer_params: Option<()>,
}

#[derive(Serialize)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: &'static str,
    stop_reason: Value,
    token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<()>,
    prompt_token_ids: Option<Vec<u32>>,
}

fn completion(
    asked: &GenerationRequest,
    choices: Vec<WholeChoice>,
    head: AnswerHead,
    usage: Usage,
) -> Completion {
    let choices = choices.into_iter().enumerate().map(|(index, whole)| CompletionChoice {
        index,
        text: whole.text,
        logprobs: asked.logprobs.map(|_| completion_logprobs(&whole.logprobs, 0)),
        finish_reason: whole.finish.as_ref().map_or("stop", FinishReason::as_str),
        stop_reason: whole.finish.as_ref().map_or(Value::Null, FinishReason::stop_reason),
        token_ids: asked.return_token_ids.then_some(whole.token_ids),
        prompt_logprobs: None,
        prompt_token_ids: asked
            .prompts
            .get(index / asked.n as usize)
            .filter(|_| asked.return_token_ids)
            .cloned(),
    });
    Completion {
        id: head.id,
        object: "text_completion",
        created: head.created,
        model: head.model,
        choices: choices.collect(),
        service_tier: None,
        system_fingerprint: None,
        usage,
        kv_transfer_params: None,
    }
}

#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatTokenLogprobs>,
}

#[derive(Serialize)]
struct ChatTokenLogprobs {
    #[serde(flatten)]
    token: ChatLogprob,
    top_logprobs: Vec<ChatLogprob>,
}

#[derive(Serialize)]
struct ChatLogprob {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl ChatLogprob {
    fn new(token: &str, logprob: f64) -> Self {
        Self { token: token.to_owned(), logprob, bytes: token.as_bytes().to_vec() }
    }
}

pub(super) fn chat_logprobs(tokens: &[TokenLogprobs]) -> ChatLogprobs {
    let content = tokens.iter().map(|of| ChatTokenLogprobs {
        token: ChatLogprob::new(&of.token, of.logprob),
        top_logprobs: of.others.iter().map(|(text, p)| ChatLogprob::new(text, *p)).collect(),
    });
    ChatLogprobs { content: content.collect() }
}

#[derive(Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f64>,
    tokens: Vec<String>,
    top_logprobs: Vec<serde_json::Map<String, Value>>,
}

/// The first of the tokens begins at `first_offset` of its choice's text.
pub(super) fn completion_logprobs(
    tokens: &[TokenLogprobs],
    first_offset: usize,
) -> CompletionLogprobs {
    let mut offset = first_offset;
    let mut logprobs = CompletionLogprobs {
        text_offset: Vec::new(),
        token_logprobs: Vec::new(),
        tokens: Vec::new(),
        top_logprobs: Vec::new(),
    };
    for of in tokens {
        logprobs.text_offset.push(offset);
        offset += of.token.len();
        logprobs.token_logprobs.push(of.logprob);
        logprobs.tokens.push(of.token.clone());
        let own = (of.token.clone(), of.logprob);
        let top = of.others.iter().cloned().chain([own]);
        logprobs.top_logprobs.push(top.map(|(text, p)| (text, p.into())).collect());
    }
    logprobs
}
