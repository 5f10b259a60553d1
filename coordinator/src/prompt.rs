//! What of a request's JSON is its prompt, for the prefix index. Payloads are not changed by it, and
//! whatever it cannot read is no error here: the engine says what is wrong with it.

use std::{borrow::Cow, sync::Arc};

use baton_tokens::{Chat, PromptTokenizer};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
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

/// What a prompt is made from.
#[derive(Debug, Deserialize)]
struct PromptFields<'a> {
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cache_salt: Option<Cow<'a, str>>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
}

/// Reads a request's prompt; `None` where it has none that could be compared. A long one is tokenized
/// on another thread.
pub(crate) async fn read(body: &Bytes, tokenizer: Option<&Arc<PromptTokenizer>>) -> Option<Prompt> {
    match tokenizer {
        Some(tokenizer) if body.len() > SHORT_BODY_BYTES => {
            let (body, tokenizer) = (body.clone(), tokenizer.clone());
            let read = tokio::task::spawn_blocking(move || read_now(&body, Some(&tokenizer)));
            // It could only have panicked: the request goes on without.
            read.await.ok().flatten()
        }
        tokenizer => read_now(body, tokenizer.map(Arc::as_ref)),
    }
}

fn read_now(body: &Bytes, tokenizer: Option<&PromptTokenizer>) -> Option<Prompt> {
    let fields: PromptFields<'_> = serde_json::from_slice(body).ok()?;
    let content = match (fields.prompt, fields.messages) {
        (Some(prompt), None) => {
            let tokens = serde_json::from_str::<Vec<u32>>(prompt.get()).ok();
            let tokens = tokens.or_else(|| {
                // A list of one prompt.
                let [tokens] = serde_json::from_str::<[Vec<u32>; 1]>(prompt.get()).ok()?;
                Some(tokens)
            });
            match tokens {
                Some(tokens) => PromptContent::Tokens(tokens),
                None => tokenizer
                    .and_then(|tokenizer| text(prompt, fields.add_special_tokens, tokenizer))
                    .unwrap_or_else(|| {
                        PromptContent::Bytes(body.slice_ref(prompt.get().as_bytes()))
                    }),
            }
        }
        (None, Some(messages)) => {
            if let Some(content) = tokenizer.and_then(|tokenizer| chat(body, tokenizer)) {
                return Some(Prompt { content, cache_salt: salt(fields.cache_salt) });
            }
            // Tools come first in chat templates. The next turn goes on where the list ends.
            let messages = messages.get().trim_end().trim_end_matches(']').trim_end();
            PromptContent::Bytes(match fields.tools {
                None => body.slice_ref(messages.as_bytes()),
                Some(tools) => [tools.get(), messages].concat().into(),
            })
        }
        _ => return None,
    };
    Some(Prompt { content, cache_salt: salt(fields.cache_salt) })
}

fn salt(salt: Option<Cow<'_, str>>) -> String {
    salt.map(Cow::into_owned).unwrap_or_default()
}

/// A completion's prompt, or a list of one.
fn text(
    prompt: &RawValue,
    add_special_tokens: Option<bool>,
    tokenizer: &PromptTokenizer,
) -> Option<PromptContent> {
    let text = serde_json::from_str::<Cow<'_, str>>(prompt.get())
        .or_else(|_| serde_json::from_str::<[Cow<'_, str>; 1]>(prompt.get()).map(|[text]| text));
    let tokens = tokenizer.text(&text.ok()?, add_special_tokens.unwrap_or(true));
    tokens.map(PromptContent::Tokens).ok()
}

fn chat(body: &[u8], tokenizer: &PromptTokenizer) -> Option<PromptContent> {
    let chat: Chat = serde_json::from_slice(body).ok()?;
    match tokenizer.chat(&chat) {
        Ok(tokens) => Some(PromptContent::Tokens(tokens)),
        Err(error) => {
            // Its text may hold some of the prompt.
            debug!(kind = error.kind(), "a conversation is not tokenized here");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(body: &str) -> Option<PromptContent> {
        read_now(&Bytes::copy_from_slice(body.as_bytes()), None).map(|prompt| prompt.content)
    }

    #[test]
    fn token_ids_are_taken_as_they_are() {
        let tokens = Some(PromptContent::Tokens(vec![1, 2, 3]));
        assert_eq!(content(r#"{"prompt":[1,2,3],"stream":true}"#), tokens);
        assert_eq!(content(r#"{"prompt":[[1,2,3]]}"#), tokens);
        assert_eq!(
            read_now(&Bytes::from_static(br#"{"prompt":[1],"cache_salt":"s"}"#), None)
                .unwrap()
                .cache_salt,
            "s"
        );
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
    fn a_prompt_is_not_shown() {
        let prompt = read_now(&Bytes::from_static(br#"{"prompt":"a secret"}"#), None).unwrap();
        assert!(!format!("{prompt:?}").contains("97"));
        assert!(format!("{prompt:?}").contains("10 bytes"));
    }
}
