use std::{borrow::Cow, fmt};

use baton_config::MAX_PRIORITY;
use baton_core::RequestShape;
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::prompt::PromptFields;

/// Reads from a request's JSON what placement needs, and nothing more: everything else is the
/// engine's business and passes through untouched. Once, however long it is.
pub(crate) fn peek(endpoint: Endpoint, body: &Bytes) -> Result<Peeked, PeekError> {
    match endpoint {
        Endpoint::Generation => {
            let fields: GenerationFields<'_> = parse(body)?;
            fields.vllm_xargs.refuse_reserved(fields.kv_transfer_params)?;
            let part = |field: Option<&RawValue>| {
                field.map(|field| body.slice_ref(field.get().as_bytes()))
            };
            Ok(Peeked {
                prompt: PromptFields {
                    prompt: part(fields.prompt),
                    messages: part(fields.messages),
                    tools: part(fields.tools),
                    cache_salt: part(fields.cache_salt),
                    add_special_tokens: part(fields.add_special_tokens),
                },
                streams: fields.stream.unwrap_or(false),
                shape: RequestShape {
                    max_output_tokens: fields.max_completion_tokens.or(fields.max_tokens),
                    unsplittable: fields.unsplittable()?,
                    model: fields.model.map(Cow::into_owned),
                    priority: clamped(fields.priority.unwrap_or_default()),
                    answers_whole: fields.stream != Some(true),
                    ..RequestShape::default()
                },
            })
        }
        Endpoint::Whole => {
            let fields: WholeFields<'_> = parse(body)?;
            fields.vllm_xargs.refuse_reserved(fields.kv_transfer_params)?;
            Ok(Peeked {
                prompt: PromptFields::default(),
                streams: fields.stream.unwrap_or(false),
                shape: RequestShape {
                    max_output_tokens: None,
                    unsplittable: Some("endpoint"),
                    // Not read further: its first token shows where a stream's head comes, if at all.
                    answers_whole: true,
                    model: fields.model.map(Cow::into_owned),
                    ..RequestShape::default()
                },
            })
        }
    }
}

/// Clients' numbers are without bounds; the classes are few.
pub(super) fn clamped(priority: i64) -> i32 {
    let most = i64::from(MAX_PRIORITY);
    i32::try_from(priority.clamp(-most, most)).unwrap_or_default()
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, PeekError> {
    // Serde would take a list for the fields in their order.
    if body.trim_ascii_start().first() == Some(&b'[') {
        let message = "invalid type: list, expected an object".to_owned();
        return Err(PeekError::Malformed { message });
    }
    serde_json::from_slice(body).map_err(|error| malformed(&error))
}

fn malformed(error: &serde_json::Error) -> PeekError {
    PeekError::Malformed { message: error.to_string() }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// Chat and completions: may be split.
    Generation,
    /// Anything else: passed whole to one worker.
    Whole,
}

#[derive(Debug)]
pub(crate) struct Peeked {
    pub(super) streams: bool,
    pub(super) shape: RequestShape,
    pub(crate) prompt: PromptFields,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PeekError {
    #[error("the request body is not what this endpoint takes: {message}")]
    Malformed { message: String },
    #[error(
        "kv_transfer_params is set by the server: it names memory of its workers. Remove it from \
         the request."
    )]
    Reserved,
}

#[derive(Debug, Deserialize)]
struct WholeFields<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    kv_transfer_params: bool,
    #[serde(default)]
    vllm_xargs: ExtraArguments,
}

#[derive(Debug, Deserialize)]
struct GenerationFields<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    max_tokens: Option<u64>,
    #[serde(default)]
    max_completion_tokens: Option<u64>,
    /// vLLM's: smaller numbers first.
    #[serde(default)]
    priority: Option<i64>,
    #[serde(default)]
    n: Option<u64>,
    #[serde(default)]
    best_of: Option<u64>,
    #[serde(default)]
    use_beam_search: Option<bool>,
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    prompt_logprobs: Option<IgnoredAny>,
    #[serde(default)]
    prompt_embeds: Option<IgnoredAny>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cache_salt: Option<&'a RawValue>,
    #[serde(borrow, default)]
    add_special_tokens: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "present")]
    kv_transfer_params: bool,
    #[serde(default)]
    vllm_xargs: ExtraArguments,
}

impl GenerationFields<'_> {
    /// The parameter that keeps the request on one worker, if there is one:
    /// - several answers to one prompt (`n`, `best_of`, beam search) or several prompts are several
    ///   sequences in the engine, and a handoff names one;
    /// - log probabilities or an echo of the prompt need its logits, which the decode leg does not
    ///   compute;
    /// - embeddings as prompt have no token ids to compare.
    fn unsplittable(&self) -> Result<Option<&'static str>, PeekError> {
        let more_than_one = |count: Option<u64>| count.is_some_and(|count| count > 1);
        let prompts = match self.prompt.map(RawValue::get) {
            // A text is one, and may be long.
            None => Prompts::One,
            Some(text) if text.starts_with('"') => Prompts::One,
            Some(list) => serde_json::from_str(list).map_err(|error| malformed(&error))?,
        };
        let found = [
            (more_than_one(self.n), "n"),
            (more_than_one(self.best_of), "best_of"),
            (self.use_beam_search == Some(true), "use_beam_search"),
            (self.echo == Some(true), "echo"),
            (self.prompt_logprobs.is_some(), "prompt_logprobs"),
            (self.prompt_embeds.is_some(), "prompt_embeds"),
            (prompts == Prompts::Several, "prompts"),
        ];
        Ok(found.into_iter().find_map(|(applies, name)| applies.then_some(name)))
    }
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<IgnoredAny>::deserialize(deserializer)?.is_some())
}

/// vLLM's free-form engine arguments, through which `kv_transfer_params` would reach it too.
#[derive(Debug, Default)]
struct ExtraArguments {
    carries_kv_transfer_params: bool,
}

impl ExtraArguments {
    fn refuse_reserved(&self, at_top_level: bool) -> Result<(), PeekError> {
        let carried = at_top_level || self.carries_kv_transfer_params;
        if carried { Err(PeekError::Reserved) } else { Ok(()) }
    }
}

impl<'de> Deserialize<'de> for ExtraArguments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = ExtraArguments;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_unit<E: Error>(self) -> Result<ExtraArguments, E> {
                Ok(ExtraArguments::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ExtraArguments, A::Error> {
                let mut found = ExtraArguments::default();
                while let Some((key, IgnoredAny)) = map.next_entry::<Cow<'de, str>, _>()? {
                    found.carries_kv_transfer_params |= key == "kv_transfer_params";
                }
                Ok(found)
            }
        }
        deserializer.deserialize_any(Keys)
    }
}

/// `prompt` of the completions endpoint: text, token ids, or a list of either.
#[derive(Debug, PartialEq, Eq)]
enum Prompts {
    One,
    Several,
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, token ids, or a list of either")
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<Prompts, E> {
                Ok(Prompts::One)
            }

            fn visit_unit<E: Error>(self) -> Result<Prompts, E> {
                Ok(Prompts::One)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Prompts, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Prompts::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let mut whole_prompts = 0;
                while let Some(element) = seq.next_element::<Element>()? {
                    whole_prompts += usize::from(element == Element::Prompt);
                }
                Ok(if whole_prompts > 1 { Prompts::Several } else { Prompts::One })
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

#[derive(PartialEq, Eq)]
enum Element {
    Token,
    Prompt,
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Kind;
        impl<'de> Visitor<'de> for Kind {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, a token id, or a list of token ids")
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Element, E> {
                Ok(Element::Token)
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<Element, E> {
                Ok(Element::Token)
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<Element, E> {
                Ok(Element::Prompt)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Element, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Element::Prompt)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Element::Prompt)
            }
        }
        deserializer.deserialize_any(Kind)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peek(endpoint: Endpoint, body: &[u8]) -> Result<Peeked, PeekError> {
        super::peek(endpoint, &Bytes::copy_from_slice(body))
    }

    fn shape(body: &str) -> RequestShape {
        peek(Endpoint::Generation, body.as_bytes()).unwrap().shape
    }

    #[test]
    fn placement_learns_what_it_needs() {
        let peeked = peek(
            Endpoint::Generation,
            br#"{"messages":[{"role":"user","content":"hi \ud83d\ude00"}],"model":"m\u0031",
                "stream":true,"max_tokens":5,"max_completion_tokens":7,"temperature":0.0}"#,
        )
        .unwrap();
        assert!(peeked.streams && !peeked.shape.answers_whole);
        assert_eq!(
            [0, 3, -70].map(|n| shape(&format!(r#"{{"priority":{n}}}"#)).priority),
            [0, 3, -10]
        );
        assert_eq!(peeked.shape.model.as_deref(), Some("m1"));
        assert_eq!(peeked.shape.max_output_tokens, Some(7));
        assert_eq!(peeked.shape.unsplittable, None);
    }

    #[test]
    fn what_cannot_be_split_is_named() {
        for (body, expected) in [
            (r#"{"n":2}"#, Some("n")),
            (r#"{"n":1,"best_of":null}"#, None),
            (r#"{"best_of":2}"#, Some("best_of")),
            (r#"{"use_beam_search":true}"#, Some("use_beam_search")),
            (r#"{"echo":true}"#, Some("echo")),
            (r#"{"echo":false}"#, None),
            (r#"{"prompt_logprobs":0}"#, Some("prompt_logprobs")),
            (r#"{"prompt":"a"}"#, None),
            (r#"{"prompt":["a"]}"#, None),
            (r#"{"prompt":["a","b"]}"#, Some("prompts")),
            (r#"{"prompt":[1,2,3]}"#, None),
            (r#"{"prompt":[[1,2,3]]}"#, None),
            (r#"{"prompt":[[1],[2]]}"#, Some("prompts")),
        ] {
            assert_eq!(shape(body).unsplittable, expected, "{body}");
        }
        let whole = peek(Endpoint::Whole, b"{}").unwrap();
        assert_eq!(whole.shape.unsplittable, Some("endpoint"));
    }

    #[test]
    fn a_client_cannot_name_our_workers_memory() {
        for body in [
            r#"{"kv_transfer_params":{}}"#,
            r#"{"kv_transfer_params":1,"prompt":"x"}"#,
            r#"{"kv\u005ftransfer_params":{"a":1}}"#,
            r#"{"vllm_xargs":{"a":1,"kv_transfer_params":{}}}"#,
        ] {
            let peeked = peek(Endpoint::Generation, body.as_bytes());
            assert_eq!(peeked.unwrap_err(), PeekError::Reserved, "{body}");
        }
        assert!(peek(Endpoint::Generation, br#"{"kv_transfer_params":null}"#).is_ok());
    }

    #[test]
    fn malformed_bodies_say_where() {
        for (body, expected) in [
            ("", "EOF while parsing"),
            ("[]", "invalid type"),
            (r#"{"stream":"yes"}"#, "invalid type: string \"yes\", expected a boolean"),
            (r#"{"max_tokens":-1}"#, "invalid value: integer `-1`, expected u64"),
            (r#"{"model":"a","model":"b"}"#, "duplicate field `model`"),
            (r#"{"prompt":[true]}"#, "invalid type: boolean `true`"),
        ] {
            let error = peek(Endpoint::Generation, body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{body}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = peek(Endpoint::Generation, &body);
        }
    }
}
