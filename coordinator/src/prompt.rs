//! What of a request's JSON is its prompt, for the prefix index. Payloads are not changed by it, and
//! whatever it cannot read is no error here: the engine says what is wrong with it.

use std::{borrow::Cow, sync::Arc};

use baton_tokens::{Chat, PromptTokenizer};
use bytes::Bytes;
use tracing::debug;

/// Tokenizing more than this would hold up the streams that share the thread: about a millisecond.
const SHORT_BODY_BYTES: usize = 8192;

/// A prompt, as far as it is known before an engine has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) content: PromptContent,
    /// Prompts of different salts share no blocks.
    pub(crate) cache_salt: String,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) enum PromptContent {
    Tokens(Vec<u32>),
    /// What the prompt is made from: the same beginning gives the same tokens, mostly.
    Bytes(Bytes),
}

impl std::fmt::Debug for PromptContent {
    /// Prompts are not logged.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tokens(tokens) => write!(f, "{} tokens", tokens.len()),
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
        }
    }
}

/// The fields of a request's JSON that its prompt is made from, as they stand in its body.
#[derive(Clone, Default)]
pub(crate) struct PromptFields {
    pub(crate) prompt: Option<Bytes>,
    pub(crate) messages: Option<Bytes>,
    pub(crate) tools: Option<Bytes>,
    pub(crate) cache_salt: Option<Bytes>,
    pub(crate) add_special_tokens: Option<Bytes>,
}

impl std::fmt::Debug for PromptFields {
    /// Prompts are not logged.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PromptFields").finish_non_exhaustive()
    }
}

/// Reads a request's prompt; `None` where it has none that could be compared. A long one is tokenized
/// on another thread.
pub(crate) async fn read(
    body: &Bytes,
    fields: PromptFields,
    tokenizer: Option<&Arc<PromptTokenizer>>,
) -> Option<Prompt> {
    match tokenizer {
        Some(tokenizer) if body.len() > SHORT_BODY_BYTES => {
            let (body, tokenizer) = (body.clone(), tokenizer.clone());
            let read =
                tokio::task::spawn_blocking(move || read_now(&body, &fields, Some(&tokenizer)));
            // It could only have panicked: the request goes on without.
            read.await.ok().flatten()
        }
        tokenizer => read_now(body, &fields, tokenizer.map(Arc::as_ref)),
    }
}

pub(crate) fn read_now(
    body: &[u8],
    fields: &PromptFields,
    tokenizer: Option<&PromptTokenizer>,
) -> Option<Prompt> {
    let content = match (&fields.prompt, &fields.messages) {
        (Some(prompt), None) => match token_ids(prompt) {
            Some(tokens) => PromptContent::Tokens(tokens),
            None => tokenizer
                .and_then(|tokenizer| text(prompt, fields, tokenizer))
                .unwrap_or_else(|| PromptContent::Bytes(prompt.clone())),
        },
        (None, Some(messages)) => {
            tokenizer.and_then(|tokenizer| chat(body, tokenizer)).unwrap_or_else(|| {
                let messages = without_end(messages);
                // Tools come first in chat templates.
                PromptContent::Bytes(match &fields.tools {
                    None => messages,
                    Some(tools) => [&tools[..], &messages].concat().into(),
                })
            })
        }
        _ => return None,
    };
    let salt = fields.cache_salt.as_ref().and_then(|salt| serde_json::from_slice(salt).ok());
    Some(Prompt { content, cache_salt: salt.unwrap_or_default() })
}

/// A prompt of token ids, or a list of one such prompt.
fn token_ids(prompt: &[u8]) -> Option<Vec<u32>> {
    if !prompt.starts_with(b"[") {
        return None;
    }
    serde_json::from_slice(prompt)
        .or_else(|_| serde_json::from_slice::<[Vec<u32>; 1]>(prompt).map(|[tokens]| tokens))
        .ok()
}

/// A list without its end: the next turn goes on there.
fn without_end(messages: &Bytes) -> Bytes {
    let mut left = messages.trim_ascii_end();
    while let Some(shorter) = left.strip_suffix(b"]") {
        left = shorter;
    }
    messages.slice_ref(left.trim_ascii_end())
}

/// A completion's prompt, or a list of one.
fn text(
    prompt: &[u8],
    fields: &PromptFields,
    tokenizer: &PromptTokenizer,
) -> Option<PromptContent> {
    let text = serde_json::from_slice::<Cow<'_, str>>(prompt)
        .or_else(|_| serde_json::from_slice::<[Cow<'_, str>; 1]>(prompt).map(|[text]| text));
    let special = fields.add_special_tokens.as_ref();
    let special = special.and_then(|special| serde_json::from_slice(special).ok()).unwrap_or(true);
    tokenizer.text(&text.ok()?, special).map(PromptContent::Tokens).ok()
}

fn chat(body: &[u8], tokenizer: &PromptTokenizer) -> Option<PromptContent> {
    match tokenizer.chat(&conversation(body)?) {
        Ok(tokens) => Some(PromptContent::Tokens(tokens)),
        Err(error) => {
            // Its text may hold some of the prompt.
            debug!(kind = error.kind(), "a conversation is not tokenized here");
            None
        }
    }
}

/// A client's own template is a program that could take any time and memory. vLLM runs none either unless it is told
/// to trust them; the prompt is compared by its bytes then.
fn conversation(body: &[u8]) -> Option<Chat> {
    serde_json::from_slice(body).ok().filter(|chat: &Chat| !chat.brings_template())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Endpoint, peek};

    fn prompt(body: &str) -> Option<Prompt> {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let fields = peek(Endpoint::Generation, &body).ok()?.prompt;
        read_now(&body, &fields, None)
    }

    fn content(body: &str) -> Option<PromptContent> {
        prompt(body).map(|prompt| prompt.content)
    }

    #[test]
    fn token_ids_are_taken_as_they_are() {
        let tokens = Some(PromptContent::Tokens(vec![1, 2, 3]));
        assert_eq!(content(r#"{"prompt":[1,2,3],"stream":true}"#), tokens);
        assert_eq!(content(r#"{"prompt":[[1,2,3]]}"#), tokens);
        assert_eq!(prompt(r#"{"prompt":[1],"cache_salt":"s"}"#).unwrap().cache_salt, "s");
        for none in ["", "{}", "[]", r#"{"prompt":"a","messages":[]}"#, r#"{"prompt":"a"#] {
            assert_eq!(content(none), None, "{none}");
        }
    }

    #[test]
    fn a_conversation_that_goes_on_begins_as_it_did() {
        let bytes = |body: &str| match content(body) {
            Some(PromptContent::Bytes(bytes)) => bytes,
            other => panic!("{other:?}"),
        };
        let first = bytes(r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"x":1}]}"#);
        let second = bytes(
            r#"{"tools":[{"x":1}],"model":"m",
                "messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        );
        assert!(second.starts_with(&first), "{first:?} {second:?}");
    }

    #[test]
    fn templates_of_clients_are_not_run() {
        let body =
            |more: &str| format!(r#"{{"messages":[{{"role":"user","content":"a"}}]{more}}}"#);
        assert!(conversation(body("").as_bytes()).is_some());
        assert!(conversation(body(r#","chat_template":null"#).as_bytes()).is_some());
        let endless = r#","chat_template":"{% for i in range(99999) %}{{ i }}{% endfor %}""#;
        assert!(conversation(body(endless).as_bytes()).is_none());
    }

    #[test]
    fn a_prompt_is_not_shown() {
        let prompt = prompt(r#"{"prompt":"a secret"}"#).unwrap();
        assert!(!format!("{prompt:?}").contains("97"));
        assert!(format!("{prompt:?}").contains("10 bytes"));
    }
}
