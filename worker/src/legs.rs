//! What each leg of a split request asks of its engine: the client's own JSON, of which only those
//! members change that must. The others stay byte for byte, in their order.

use std::{borrow::Cow, fmt};

use baton_proto::PrefixPull;
use baton_types::{Generation, HandoffId};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

const KV_PARAMETERS: &str = "kv_transfer_params";
const PRIORITY: &str = "priority";
const STREAM_OPTIONS: &str = "stream_options";
/// Those of the engine's paths whose JSON has a priority and stream options.
const PATHS_OF_TEXT: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];
/// One step of a client's own priority outweighs any deadline: 34 years.
const CLIENT_PRIORITY_MS: i64 = 1 << 40;
const CLIENT_PRIORITIES: i64 = 1 << 20;

/// Of no use to a leg whose single token nobody sees, or refused together with `"stream": false`.
const NOT_FOR_PREFILL: [&str; 6] =
    ["stream_options", "min_tokens", "n", "logprobs", "top_logprobs", KV_PARAMETERS];

/// Asks vLLM's own connectors to keep the prompt's KV for a decode elsewhere, and to say where it is.
const ENGINE_PREFILL: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    // serde_json's own words can quote the body, which is the client's business alone.
    #[error("the request's body is not a JSON object: line {line}, column {column}")]
    NotAnObject { line: usize, column: usize },
}

/// One part in a fenced handoff.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Produce,
    Consume,
    /// Produce, of what is cached alone.
    Lend,
}

/// What the engine is to be told about the handoff.
#[derive(Clone, Debug)]
pub(crate) enum KvParameters {
    Fenced {
        part: Part,
        id: HandoffId,
        generation: Generation,
    },
    /// The engines' own, on their prefill side.
    EngineProduce,
    /// What the engine on the prefill side answered: JSON.
    EngineConsume(Bytes),
}

impl KvParameters {
    fn append_to(&self, json: &mut Vec<u8>) {
        match self {
            Self::Fenced { part, id, generation } => {
                let role = match part {
                    Part::Produce => "produce",
                    Part::Consume => "consume",
                    Part::Lend => "lend",
                };
                let parameters = format!(
                    r#"{{"baton":{{"role":"{role}","handoff":"{id}","generation":{generation}}}}}"#
                );
                json.extend_from_slice(parameters.as_bytes());
            }
            Self::EngineProduce => json.extend_from_slice(ENGINE_PREFILL.as_bytes()),
            Self::EngineConsume(parameters) => json.extend_from_slice(parameters),
        }
    }
}

/// What an engine is to be asked beyond what the client asks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    /// When the first token is due, on a clock that is the same for all requests to this engine: of two
    /// that their clients gave the same priority, the one that is due first goes first.
    pub(crate) due_ms: Option<i64>,
    /// How many tokens a stream had, at its end.
    pub(crate) usage: bool,
}

/// A body, and whether it asks for a stream's usage although the client did not.
pub(crate) fn asking(path: &str, body: &Bytes, asked: Asked) -> Result<(Bytes, bool), BodyError> {
    let path = path.split('?').next().unwrap_or_default();
    if !PATHS_OF_TEXT.contains(&path) || (asked.due_ms.is_none() && !asked.usage) {
        return Ok((body.clone(), false));
    }
    let members = Members::of(body)?;
    let priority = asked.due_ms.and_then(|due_ms| priority(members.last(PRIORITY), due_ms));
    let streams = members.last("stream").is_some_and(|value| value.get() == "true");
    let options =
        (asked.usage && streams).then(|| with_usage(members.last(STREAM_OPTIONS))).flatten();
    if priority.is_none() && options.is_none() {
        return Ok((body.clone(), false));
    }
    let mut rewritten = Object::with_capacity(body.len() + 96);
    for (name, key, value) in &members.0 {
        let is_replaced = match name.as_ref() {
            PRIORITY => priority.is_some(),
            STREAM_OPTIONS => options.is_some(),
            _ => false,
        };
        if !is_replaced {
            rewritten.member(key.get(), value.get().as_bytes());
        }
    }
    if let Some(priority) = priority {
        rewritten.member(r#""priority""#, priority.to_string().as_bytes());
    }
    if let Some(options) = &options {
        rewritten.member(r#""stream_options""#, options.as_bytes());
    }
    Ok((rewritten.end(), options.is_some()))
}

fn priority(clients: Option<&RawValue>, due_ms: i64) -> Option<i64> {
    let clients: i64 = match clients {
        None => 0,
        // What is no number is for the engine to refuse.
        Some(value) => serde_json::from_str(value.get()).ok()?,
    };
    let clients = clients.clamp(-CLIENT_PRIORITIES, CLIENT_PRIORITIES);
    Some(clients * CLIENT_PRIORITY_MS + due_ms)
}

/// `None` where the client asks for it, or for what the engine is to refuse.
fn with_usage(clients: Option<&RawValue>) -> Option<String> {
    let mut options: serde_json::Map<String, Value> = match clients.map(RawValue::get) {
        None | Some("null") => serde_json::Map::new(),
        Some(options) => serde_json::from_str(options).ok()?,
    };
    let asks = options.get("include_usage").is_some_and(|value| *value != Value::Bool(false));
    // Without the other it has no effect, which must stay so.
    options.remove("continuous_usage_stats");
    options.insert("include_usage".to_owned(), Value::Bool(true));
    (!asks).then(|| Value::Object(options).to_string())
}

/// The body that computes the prompt and one token, which is thrown away.
pub(crate) fn prefill_body(body: &[u8], kv: &KvParameters) -> Result<Bytes, BodyError> {
    let members = Members::of(body)?;
    let mut rewritten = Object::with_capacity(body.len() + 192);
    for (name, key, value) in &members.0 {
        match name.as_ref() {
            "max_tokens" | "stream" => {}
            "max_completion_tokens" => rewritten.member(key.get(), b"1"),
            dropped if NOT_FOR_PREFILL.contains(&dropped) => {}
            _ => rewritten.member(key.get(), value.get().as_bytes()),
        }
    }
    rewritten.member(r#""max_tokens""#, b"1");
    rewritten.member(r#""stream""#, b"false");
    Ok(rewritten.finish(kv))
}

/// The client's body, and where the prompt's KV comes from.
pub(crate) fn decode_body(body: &[u8], kv: &KvParameters) -> Result<Bytes, BodyError> {
    let members = Members::of(body)?;
    let mut rewritten = Object::with_capacity(body.len() + 192);
    for (name, key, value) in &members.0 {
        if name != KV_PARAMETERS {
            rewritten.member(key.get(), value.get().as_bytes());
        }
    }
    Ok(rewritten.finish(kv))
}

/// The start of a prompt, and one token of an answer to it that nobody reads.
pub(crate) fn prefix_body(pull: &PrefixPull, priority: Option<i64>, kv: &KvParameters) -> Bytes {
    let mut body = Object::with_capacity(7 * pull.prompt.len() + 256);
    for (key, text) in [(r#""model""#, &pull.model), (r#""cache_salt""#, &pull.cache_salt)] {
        if !text.is_empty() {
            body.member(key, Value::from(text.as_str()).to_string().as_bytes());
        }
    }
    body.key(r#""prompt""#);
    body.numbers(&pull.prompt);
    body.member(r#""max_tokens""#, b"1");
    body.member(r#""temperature""#, b"0");
    if let Some(priority) = priority {
        body.member(r#""priority""#, priority.to_string().as_bytes());
    }
    body.finish(kv)
}

struct Object(Vec<u8>);

impl Object {
    fn with_capacity(bytes: usize) -> Self {
        let mut json = Vec::with_capacity(bytes);
        json.push(b'{');
        Self(json)
    }

    fn member(&mut self, key: &str, value: &[u8]) {
        self.key(key);
        self.0.extend_from_slice(value);
    }

    fn numbers(&mut self, numbers: &[u32]) {
        for (place, number) in numbers.iter().enumerate() {
            self.0.push(if place == 0 { b'[' } else { b',' });
            self.0.extend_from_slice(number.to_string().as_bytes());
        }
        self.0.push(b']');
    }

    fn key(&mut self, key: &str) {
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b':');
    }

    fn finish(mut self, kv: &KvParameters) -> Bytes {
        self.key(r#""kv_transfer_params""#);
        kv.append_to(&mut self.0);
        self.end()
    }

    fn end(mut self) -> Bytes {
        self.0.push(b'}');
        self.0.into()
    }
}

/// The members of an object in their order: the name, and the bytes of key and value as they came.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue, &'a RawValue)>);

impl<'a> Members<'a> {
    fn of(body: &'a [u8]) -> Result<Self, BodyError> {
        serde_json::from_slice(body)
            .map_err(|error| BodyError::NotAnObject { line: error.line(), column: error.column() })
    }

    /// Of several members of one name the last counts.
    fn last(&self, wanted: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(name, ..)| name == wanted).map(|(.., value)| *value)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut members = Vec::new();
                while let Some((key, value)) = map.next_entry::<&RawValue, &RawValue>()? {
                    members.push((name(key).map_err(M::Error::custom)?, key, value));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

/// What a key's bytes spell: any of its characters may be escaped.
fn name(key: &RawValue) -> serde_json::Result<Cow<'_, str>> {
    let quoted = key.get();
    match quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(plain) if !plain.contains('\\') => Ok(Cow::Borrowed(plain)),
        _ => serde_json::from_str(quoted).map(Cow::Owned),
    }
}

/// Of a body that is one, all that it is made into are too: what must change has, and nothing else.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(body: &Bytes) {
    let part = Part::Consume;
    let kv = KvParameters::Fenced { part, id: HandoffId::from_u128(1), generation: Generation(2) };
    let mut parameters = Vec::new();
    kv.append_to(&mut parameters);
    let before = Members::of(body);
    let (prefill, decode) = (prefill_body(body, &kv), decode_body(body, &kv));
    assert_eq!((prefill.is_ok(), decode.is_ok()), (before.is_ok(), before.is_ok()));
    let (Ok(before), Ok(prefill), Ok(decode)) = (before, prefill, decode) else { return };
    for rewritten in [&prefill, &decode] {
        let after = Members::of(rewritten);
        assert!(after.is_ok(), "it is an object still");
        let Ok(after) = after else { return };
        let named = after.0.iter().filter(|(name, ..)| name == KV_PARAMETERS);
        assert!(named.map(|(.., value)| value.get().as_bytes()).eq([&parameters[..]]));
    }
    let others = |members: &Members<'_>| -> Vec<(String, String)> {
        let members = members.0.iter().filter(|(name, ..)| name != KV_PARAMETERS);
        members.map(|(_, key, value)| (key.get().to_owned(), value.get().to_owned())).collect()
    };
    assert!(Members::of(&decode).is_ok_and(|after| others(&after) == others(&before)));
    for path in PATHS_OF_TEXT {
        for (due_ms, usage) in [(None, true), (Some(i64::MAX >> 1), false), (Some(7), true)] {
            let asked = asking(path, body, Asked { due_ms, usage });
            assert!(asked.is_ok_and(|(body, _)| Members::of(&body).is_ok()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fenced(part: Part) -> KvParameters {
        KvParameters::Fenced { part, id: HandoffId::from_u128(7), generation: Generation(2) }
    }

    fn text(bytes: &Bytes) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn decode_changes_nothing_but_where_the_kv_comes_from() {
        let body = "{ \"z\" : 1.50, \"messages\":[{\"content\":\"a\\u00e9 \\\"} \"} ] ,\n \"n\":2,\
            \"stream_options\":{\"include_usage\":true},\"kv_transfer_params\":{\"x\":1}}";
        let decode = decode_body(body.as_bytes(), &fenced(Part::Consume)).unwrap();
        assert_eq!(
            text(&decode),
            "{\"z\":1.50,\"messages\":[{\"content\":\"a\\u00e9 \\\"} \"} ],\"n\":2,\
             \"stream_options\":{\"include_usage\":true},\"kv_transfer_params\":{\"baton\":\
             {\"role\":\"consume\",\"handoff\":\"00000000000000000000000000000007\",\"generation\":2}}}"
        );
    }

    #[test]
    fn prefill_asks_for_one_token_without_a_stream() {
        let body = r#"{"model":"m","stream":true,"stream_options":{},"max_tokens":50,"min_tokens":3,
            "n":2,"logprobs":true,"top_logprobs":3,"tools":[1, 2],"max_completion_tokens":9}"#;
        let prefill = prefill_body(body.as_bytes(), &fenced(Part::Produce)).unwrap();
        assert_eq!(
            text(&prefill),
            "{\"model\":\"m\",\"tools\":[1, 2],\"max_completion_tokens\":1,\"max_tokens\":1,\
             \"stream\":false,\"kv_transfer_params\":{\"baton\":{\"role\":\"produce\",\
             \"handoff\":\"00000000000000000000000000000007\",\"generation\":2}}}"
        );
    }

    #[test]
    fn a_name_counts_however_it_is_written_and_however_often() {
        let body =
            r#"{"max_tok\u0065ns":5,"max_tokens":6,"kv_transfer\u005fparams":1,"caf\u00e9":2}"#;
        let prefill = prefill_body(body.as_bytes(), &KvParameters::EngineProduce).unwrap();
        let json: Value = serde_json::from_slice(&prefill).unwrap();
        assert_eq!(json["max_tokens"], 1);
        assert_eq!(json["kv_transfer_params"]["do_remote_decode"], true);
        assert!(text(&prefill).starts_with(r#"{"caf\u00e9":2,"max_tokens":1"#));
        assert_eq!(text(&prefill).matches("max_tok").count(), 1);
    }

    fn ask(body: &'static str, asked: Asked) -> (Value, bool) {
        let body = Bytes::from_static(body.as_bytes());
        let (body, added) = asking("/v1/completions?x", &body, asked).unwrap();
        (serde_json::from_slice(&body).unwrap(), added)
    }

    #[test]
    fn the_first_due_goes_first_among_those_of_one_priority() {
        let priority = |body, due_ms| {
            let asked = Asked { due_ms: Some(due_ms), usage: false };
            ask(body, asked).0["priority"].clone()
        };
        let number = |body, due_ms| priority(body, due_ms).as_i64().unwrap();
        assert_eq!(number(r#"{"prompt":"x"}"#, 1500), 1500);
        assert!(number("{}", 1500) < number("{}", 1501));
        assert!(number(r#"{"priority":-1}"#, 1 << 39) < number("{}", 0));
        assert!(number(r#"{"priority":1}"#, 0) > number("{}", 1 << 39));
        assert!(number(r#"{"priority":9223372036854775807}"#, 7) > 0);
        assert_eq!(priority(r#"{"priority":"high"}"#, 7), "high");
        let asked = Asked { due_ms: Some(3), usage: true };
        let body = Bytes::from_static(br#"{"a": 1.50,"priority":0}"#);
        let (other, _) = asking("/v1/chat/completions", &body, asked).unwrap();
        assert_eq!(text(&other), r#"{"a":1.50,"priority":3}"#);
        assert_eq!(asking("/v1/responses", &body, asked).unwrap(), (body, false));
    }

    #[test]
    fn a_stream_says_its_usage_asked_or_not() {
        let asked = Asked { due_ms: None, usage: true };
        for (body, options) in [
            (r#"{"stream":true}"#, r#"{"include_usage":true}"#),
            (r#"{"stream":true,"stream_options":null}"#, r#"{"include_usage":true}"#),
            (
                r#"{"stream":true,"stream_options":{"include_usage":false,"continuous_usage_stats":true,"x":1}}"#,
                r#"{"include_usage":true,"x":1}"#,
            ),
        ] {
            let (body, added) = ask(body, asked);
            assert!(added);
            assert_eq!(body["stream_options"], serde_json::from_str::<Value>(options).unwrap());
        }
        for body in [
            "{}",
            r#"{"stream":false}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            r#"{"stream":true,"stream_options":7}"#,
        ] {
            let same: Value = serde_json::from_str(body).unwrap();
            assert_eq!(ask(body, asked), (same, false));
        }
    }

    #[test]
    fn the_engines_own_parameters_are_given_as_they_came() {
        let answered = Bytes::from_static(b"{\"remote_host\": \"h\"}");
        let kv = KvParameters::EngineConsume(answered);
        let decode = decode_body(b"{}", &kv).unwrap();
        assert_eq!(text(&decode), "{\"kv_transfer_params\":{\"remote_host\": \"h\"}}");
    }

    #[test]
    fn a_prefix_is_asked_for_by_its_tokens() {
        let mut pull = PrefixPull { prompt: vec![7, 300, 0], ..PrefixPull::default() };
        let body = prefix_body(&pull, None, &fenced(Part::Lend));
        assert_eq!(
            text(&body),
            "{\"prompt\":[7,300,0],\"max_tokens\":1,\"temperature\":0,\"kv_transfer_params\":{\"baton\":\
             {\"role\":\"lend\",\"handoff\":\"00000000000000000000000000000007\",\"generation\":2}}}"
        );
        (pull.model, pull.cache_salt) = ("a \"b\"".to_owned(), "s".to_owned());
        let body = prefix_body(&pull, Some(-4), &fenced(Part::Consume));
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["model"], &body["cache_salt"]), (&"a \"b\"".into(), &"s".into()));
        assert_eq!(
            (&body["priority"], body["prompt"].as_array().unwrap().len()),
            (&(-4).into(), 3)
        );
    }

    #[test]
    fn what_is_no_object_is_refused_without_quoting_it() {
        for body in
            ["", "[1]", "\"secret\"", "{\"a\":1} x", "{\"secret\"", "nul", "{\"a\":}", "{1:2}"]
        {
            let error = decode_body(body.as_bytes(), &fenced(Part::Consume)).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert!(prefill_body(b"\xff\xfe", &fenced(Part::Produce)).is_err());
    }
}
