//! What of a request's JSON is its prompt, for the prefix index. Payloads are not changed by it, and
//! whatever it cannot read is no error here: the engine says what is wrong with it.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

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
    Bytes(Vec<u8>),
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
}

/// Reads a request's prompt; `None` where it has none that could be compared.
pub(crate) fn read(body: &[u8]) -> Option<Prompt> {
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
                None => PromptContent::Bytes(prompt.get().as_bytes().to_vec()),
            }
        }
        (None, Some(messages)) => {
            // Tools come first in chat templates. The next turn goes on where the list ends.
            let messages = messages.get().trim_end().trim_end_matches(']').trim_end();
            let mut bytes = fields.tools.map_or(Vec::new(), |tools| tools.get().into());
            bytes.extend_from_slice(messages.as_bytes());
            PromptContent::Bytes(bytes)
        }
        _ => return None,
    };
    let cache_salt = fields.cache_salt.map(Cow::into_owned).unwrap_or_default();
    Some(Prompt { content, cache_salt })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(body: &str) -> Option<PromptContent> {
        read(body.as_bytes()).map(|prompt| prompt.content)
    }

    #[test]
    fn token_ids_are_taken_as_they_are() {
        let tokens = Some(PromptContent::Tokens(vec![1, 2, 3]));
        assert_eq!(content(r#"{"prompt":[1,2,3],"stream":true}"#), tokens);
        assert_eq!(content(r#"{"prompt":[[1,2,3]]}"#), tokens);
        assert_eq!(read(br#"{"prompt":[1],"cache_salt":"s"}"#).unwrap().cache_salt, "s");
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
        let prompt = read(br#"{"prompt":"a secret"}"#).unwrap();
        assert!(!format!("{prompt:?}").contains("97"));
        assert!(format!("{prompt:?}").contains("10 bytes"));
    }
}
