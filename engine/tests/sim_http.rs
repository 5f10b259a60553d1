//! The embedded engine's HTTP face: what clients of vLLM send, and what they expect back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // What the tests share fails them.

use baton_config::{ArenaConfig, SimConfig};
use baton_engine::{Answer, Engine, EngineRequest, SimEngine};
use bytes::Bytes;
use futures::TryStreamExt;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::{Value, json};

struct Served {
    engine: SimEngine,
    _directory: tempfile::TempDir,
}

impl Served {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = SimConfig {
            model: "m".to_owned(),
            max_model_tokens: 400,
            kv_blocks: 256,
            kv_bytes_per_token: 64,
            time_scale: 0.0,
            ..SimConfig::default()
        };
        let arena =
            ArenaConfig { directory: directory.path().to_owned(), ..ArenaConfig::default() };
        let engine = SimEngine::start(&config, &arena, "w").unwrap();
        Self { engine, _directory: directory }
    }

    async fn send(&self, method: Method, path: &str, body: &[u8]) -> Answer {
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("r1"));
        let body = Bytes::copy_from_slice(body);
        let request = EngineRequest { method, path: path.to_owned(), headers, body };
        self.engine.run(request).await.unwrap()
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        whole(self.send(Method::GET, path, b"").await).await
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let (status, text) =
            whole(self.send(Method::POST, path, body.to_string().as_bytes()).await).await;
        (status, serde_json::from_str(&text).unwrap())
    }

    async fn ok(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    /// The chunks of the body, as text.
    async fn stream(&self, path: &str, body: Value) -> Vec<String> {
        let answer = self.send(Method::POST, path, body.to_string().as_bytes()).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.headers["content-type"], "text/event-stream; charset=utf-8");
        let chunks: Vec<Bytes> = answer.body.try_collect().await.unwrap();
        chunks.iter().map(|chunk| String::from_utf8(chunk.to_vec()).unwrap()).collect()
    }
}

async fn whole(answer: Answer) -> (StatusCode, String) {
    let chunks: Vec<Bytes> = answer.body.try_collect().await.unwrap();
    (answer.status, String::from_utf8(chunks.concat()).unwrap())
}

/// The data of each event but the last, which must be `[DONE]`.
fn events(chunks: &[String]) -> Vec<Value> {
    assert!(chunks.iter().all(|chunk| chunk.ends_with("\n\n")), "a chunk ends between events");
    let all = chunks.concat();
    let mut data: Vec<_> = all
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").expect("only data lines"))
        .collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn chat(fields: Value) -> Value {
    let body = json!({
        "model": "m",
        "messages": [{"role": "user", "content": "How does a lantern work?"}],
        "ignore_eos": true,
        "max_tokens": 10,
    });
    match (body, fields) {
        (Value::Object(body), Value::Object(fields)) => body.into_iter().chain(fields).collect(),
        other => panic!("{other:?}"),
    }
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_answer_has_the_shape_of_vllms() {
    let served = Served::start();
    let answer = served.ok(CHAT, chat(json!({}))).await;
    assert_eq!(answer["id"], "chatcmpl-r1");
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "m");
    let choice = &answer["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["stop_reason"], Value::Null);
    assert_eq!(choice["logprobs"], Value::Null);
    assert_eq!(choice["message"]["role"], "assistant");
    let content = choice["message"]["content"].as_str().unwrap();
    assert!(content.starts_with(|first: char| first.is_ascii_uppercase()), "{content}");
    assert!(content.split(' ').count() >= 7, "words: {content}");
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 10);
    assert_eq!(usage["prompt_tokens_details"], Value::Null);
    let prompt_tokens = usage["prompt_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], prompt_tokens + 10);
    let tokenized = served.ok("/tokenize", chat(json!({}))).await;
    assert_eq!(tokenized["count"], prompt_tokens);
}

#[tokio::test]
async fn a_streamed_chat_says_the_same_piece_by_piece() {
    let served = Served::start();
    let whole = served.ok(CHAT, chat(json!({}))).await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = served.stream(CHAT, chat(options)).await;
    assert_eq!(chunks.len(), 10, "one for each token");
    let events = events(&chunks);
    assert_eq!(events.len(), 1 + 10 + 1);
    let delta = |index: usize| &events[index]["choices"][0]["delta"];
    assert_eq!(*delta(0), json!({"role": "assistant", "content": ""}));
    assert_eq!(keys(delta(1)), ["content"]);
    let said: String = (1..=10).map(|index| delta(index)["content"].as_str().unwrap()).collect();
    assert_eq!(said, whole["choices"][0]["message"]["content"]);
    for event in &events {
        assert_eq!(event["id"], "chatcmpl-r1");
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["created"], events[0]["created"]);
    }
    assert_eq!(events[9]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(events[10]["choices"][0]["finish_reason"], "length");
    let usage = &events[11];
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
}

#[tokio::test]
async fn without_being_asked_for_usage_there_is_none() {
    let chunks = Served::start().stream(CHAT, chat(json!({"stream": true}))).await;
    assert!(events(&chunks).iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn completions_take_texts_and_token_ids() {
    let served = Served::start();
    let tokens = served.ok("/tokenize", json!({"prompt": "The river"})).await["tokens"].clone();
    let other = served.ok("/tokenize", json!({"prompt": "A lamp"})).await["tokens"].clone();
    let ask = |prompt: Value| json!({"prompt": prompt, "max_tokens": 6, "ignore_eos": true});
    let text = served.ok(COMPLETIONS, ask(json!("The river"))).await;
    assert_eq!(text["id"], "cmpl-r1");
    assert_eq!(text["object"], "text_completion");
    let said = text["choices"][0]["text"].clone();
    assert!(said.as_str().unwrap().starts_with(' '), "{said}");
    let ids = served.ok(COMPLETIONS, ask(tokens.clone())).await;
    assert_eq!(ids["choices"][0]["text"], said);

    for prompts in [json!(["The river", "A lamp"]), json!([tokens, other])] {
        let both = served.ok(COMPLETIONS, ask(prompts)).await;
        assert_eq!(both["choices"][0]["text"], said);
        assert_eq!(both["choices"][1]["index"], 1);
        assert_ne!(both["choices"][1]["text"], said);
        assert_eq!(both["usage"]["completion_tokens"], 12);
        assert_eq!(both["usage"]["prompt_tokens"], 4);
    }
    let default = served.ok(COMPLETIONS, json!({"prompt": "x", "ignore_eos": true})).await;
    assert_eq!(default["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn a_streamed_completion_says_the_same() {
    let served = Served::start();
    let body = json!({"prompt": "The river", "max_tokens": 6, "ignore_eos": true, "n": 2,
        "logprobs": 2, "return_token_ids": true});
    let whole = served.ok(COMPLETIONS, body.clone()).await;
    let mut body = body;
    body["stream"] = true.into();
    let events = events(&served.stream(COMPLETIONS, body).await);
    assert_eq!(events.len(), 12);
    for index in [0, 1] {
        let of_choice: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        let choice = &whole["choices"][index];
        let said: String = of_choice.iter().map(|of| of["text"].as_str().unwrap()).collect();
        assert_eq!(said, choice["text"]);
        for (name, lists) in [("tokens", "tokens"), ("text_offset", "offsets")] {
            let pieces: Vec<&Value> =
                of_choice.iter().flat_map(|of| of["logprobs"][name].as_array().unwrap()).collect();
            let all: Vec<&Value> = choice["logprobs"][name].as_array().unwrap().iter().collect();
            assert_eq!(pieces, all, "{lists}");
        }
        let ids: Vec<&Value> =
            of_choice.iter().flat_map(|of| of["token_ids"].as_array().unwrap()).collect();
        assert_eq!(ids, choice["token_ids"].as_array().unwrap().iter().collect::<Vec<_>>());
        assert!(of_choice[0]["prompt_token_ids"].is_array());
    }
}

#[tokio::test]
async fn several_choices_differ_and_a_seed_repeats_them() {
    let served = Served::start();
    let texts = |answer: Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().clone();
        choices.iter().map(|of| of["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let seeded = |seed: i64| chat(json!({"n": 3, "temperature": 0.8, "seed": seed}));
    let first = texts(served.ok(CHAT, seeded(1)).await);
    assert_eq!(first.len(), 3);
    assert_ne!(first[0], first[1]);
    assert_ne!(first[1], first[2]);
    assert_eq!(texts(served.ok(CHAT, seeded(1)).await), first);
    assert_ne!(texts(served.ok(CHAT, seeded(2)).await), first);

    let unseeded = || chat(json!({"temperature": 0.8}));
    let one = texts(served.ok(CHAT, unseeded()).await);
    assert_ne!(texts(served.ok(CHAT, unseeded()).await), one);
    let greedy = || chat(json!({"temperature": 0}));
    let one = texts(served.ok(CHAT, greedy()).await);
    assert_eq!(texts(served.ok(CHAT, greedy()).await), one);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_before_itself() {
    let served = Served::start();
    let whole = served.ok(CHAT, chat(json!({"max_tokens": 30}))).await;
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let word = text.split(' ').nth(5).unwrap();
    let stop = format!("{} ", &word[1..].trim_end_matches('.'));
    let before = text.find(&stop).map(|at| text[..at].to_owned()).unwrap_or(text.clone());
    for stop in [json!(stop), json!(["never said", stop])] {
        let stopped = served.ok(CHAT, chat(json!({"max_tokens": 30, "stop": stop}))).await;
        let choice = &stopped["choices"][0];
        assert_eq!(choice["message"]["content"], before);
        assert_eq!(choice["finish_reason"], "stop");
        assert!(choice["stop_reason"].is_string());
        assert!(stopped["usage"]["completion_tokens"].as_u64().unwrap() < 30);

        let body = chat(json!({"max_tokens": 30, "stop": stop, "stream": true}));
        let events = events(&served.stream(CHAT, body).await);
        let said: String = events
            .iter()
            .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap())
            .collect();
        assert_eq!(said, before);
    }
}

#[tokio::test]
async fn an_answer_may_end_by_itself() {
    let served = Served::start();
    let body =
        chat(json!({"max_tokens": 300, "ignore_eos": false, "temperature": 1, "n": 8, "seed": 3}));
    let answer = served.ok(CHAT, body).await;
    let ended =
        |choice: &&Value| choice["finish_reason"] == "stop" && choice["stop_reason"].is_null();
    let ended: Vec<&Value> = answer["choices"].as_array().unwrap().iter().filter(ended).collect();
    assert!(!ended.is_empty());
    for choice in ended {
        assert!(choice["message"]["content"].as_str().unwrap().ends_with('.'));
    }
}

#[tokio::test]
async fn chat_logprobs_have_openais_shape() {
    let served = Served::start();
    let body = chat(json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 4}));
    let answer = served.ok(CHAT, body.clone()).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 4);
    let said: String = content.iter().map(|of| of["token"].as_str().unwrap()).collect();
    assert_eq!(said, answer["choices"][0]["message"]["content"]);
    for of in content {
        assert_eq!(of["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(of["top_logprobs"][0]["logprob"], of["logprob"]);
        assert!(of["logprob"].as_f64().unwrap() < 0.0);
        assert!(of["bytes"].is_array());
    }
    assert_eq!(served.ok(CHAT, body).await["choices"], answer["choices"]);
}

#[tokio::test]
async fn the_length_may_be_given_in_either_way() {
    let served = Served::start();
    let newer =
        served.ok(CHAT, chat(json!({"max_tokens": null, "max_completion_tokens": 3}))).await;
    assert_eq!(newer["usage"]["completion_tokens"], 3);
    let neither = served.ok(CHAT, chat(json!({"max_tokens": null}))).await;
    assert_eq!(neither["usage"]["completion_tokens"], 256);
}

#[tokio::test]
async fn tools_and_content_parts_are_part_of_the_prompt() {
    let served = Served::start();
    let plain = served.ok("/tokenize", chat(json!({}))).await;
    let parts = json!({"messages": [{"role": "user",
        "content": [{"type": "text", "text": "How does a lantern work?"}]}]});
    assert_eq!(served.ok("/tokenize", chat(parts)).await["tokens"], plain["tokens"]);
    let tools = json!({"tools": [{"type": "function", "function": {"name": "light"}}]});
    let with_tools = served.ok("/tokenize", chat(tools)).await;
    assert!(with_tools["count"].as_u64() > plain["count"].as_u64());
}

#[tokio::test]
async fn tokens_go_there_and_back() {
    let served = Served::start();
    let text = "The river was warm. Größe 漢字 {\"json\": [1]}\n";
    let tokenized = served.ok("/tokenize", json!({"model": "m", "prompt": text})).await;
    assert_eq!(tokenized["max_model_len"], 400);
    assert_eq!(tokenized["token_strs"], Value::Null);
    let tokens = &tokenized["tokens"];
    assert_eq!(tokenized["count"], tokens.as_array().unwrap().len());
    let back = served.ok("/detokenize", json!({"model": "m", "tokens": tokens})).await;
    assert_eq!(back, json!({"prompt": text}));
}

#[tokio::test]
async fn embeddings_are_vectors_of_length_one() {
    let served = Served::start();
    let ask = |input: Value| json!({"model": "m", "input": input});
    let answer = served.ok("/v1/embeddings", ask(json!(["one", "two"]))).await;
    let vector = |index: usize| -> Vec<f64> {
        let embedding = answer["data"][index]["embedding"].as_array().unwrap();
        embedding.iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let length: f64 = vector(0).iter().map(|value| value * value).sum();
    assert!((length - 1.0).abs() < 1e-3, "{length}");
    assert_ne!(vector(0), vector(1));
    let mut base64 = ask(json!("one"));
    base64["encoding_format"] = "base64".into();
    let encoded = served.ok("/v1/embeddings", base64).await;
    assert_eq!(
        encoded["data"][0]["embedding"].as_str().unwrap().len(),
        (64 * 4_usize).div_ceil(3) * 4
    );
}

#[tokio::test]
async fn small_questions_are_answered() {
    let served = Served::start();
    assert_eq!(served.get("/health").await, (StatusCode::OK, String::new()));
    let (status, models) = served.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(status, StatusCode::OK);
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "m");
    assert_eq!(models["data"][0]["max_model_len"], 400);
    let (_, version) = served.get("/version").await;
    assert!(serde_json::from_str::<Value>(&version).unwrap()["version"].is_string());
}

#[tokio::test]
async fn bad_requests_get_errors_in_openais_shape() {
    let served = Served::start();
    let long = vec![300; 400];
    let cases = [
        (
            COMPLETIONS,
            json!({"model": "other", "prompt": "x"}),
            404,
            "The model `other` does not exist.",
        ),
        (COMPLETIONS, json!([1]), 400, "not a JSON object"),
        (COMPLETIONS, json!({"model": "m"}), 400, "prompt: field required"),
        (COMPLETIONS, json!({"prompt": ""}), 400, "cannot be empty"),
        (COMPLETIONS, json!({"prompt": []}), 400, "cannot be empty"),
        (COMPLETIONS, json!({"prompt": {"a": 1}}), 400, "prompt: expected text"),
        (COMPLETIONS, json!({"prompt": [1, "a"]}), 400, "prompt: expected text"),
        (COMPLETIONS, json!({"prompt": [99_999_999]}), 400, "99999999 is out of vocabulary"),
        (
            COMPLETIONS,
            json!({"prompt": long}),
            400,
            "This model's maximum context length is 400 tokens. However, your request has 400 input tokens.",
        ),
        (COMPLETIONS, json!({"prompt": "x", "max_tokens": 400}), 400, "is too large: 400."),
        (
            COMPLETIONS,
            json!({"prompt": "x", "max_tokens": "many"}),
            400,
            "max_tokens: invalid type",
        ),
        (COMPLETIONS, json!({"prompt": "x", "max_tokens": 0}), 400, "at least 1"),
        (COMPLETIONS, json!({"prompt": "x", "n": 0}), 400, "n must be"),
        (COMPLETIONS, json!({"prompt": "x", "stop": [""]}), 400, "empty string"),
        (COMPLETIONS, json!({"prompt": "x", "temperature": -1}), 400, "non-negative"),
        (COMPLETIONS, json!({"prompt": "x", "top_p": 0}), 400, "top_p must be in (0, 1]"),
        (COMPLETIONS, json!({"prompt": "x", "logprobs": 21}), 400, "max allowed: 20"),
        (COMPLETIONS, json!({"prompt": "x", "echo": true}), 400, "echo is not supported"),
        (COMPLETIONS, json!({"prompt": "x", "stream_options": {}}), 400, "Stream options"),
        (
            COMPLETIONS,
            json!({"prompt": "x", "kv_transfer_params": {"baton": {"role": "watch"}}}),
            400,
            "kv_transfer_params",
        ),
        (CHAT, json!({"messages": []}), 400, "messages"),
        (CHAT, json!({"messages": "hello"}), 400, "messages: invalid type"),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            "image_url",
        ),
        ("/detokenize", json!({"tokens": ["a"]}), 400, "tokens"),
        ("/v1/embeddings", json!({"input": "x", "encoding_format": "csv"}), 400, "encoding_format"),
        ("/v1/nothing", json!({}), 404, "Not Found"),
        ("/health", json!({}), 405, "Method Not Allowed"),
    ];
    for (path, body, status, message) in cases {
        let (found, answer) = served.post(path, &body).await;
        assert_eq!(found.as_u16(), status, "{path} {body}: {answer}");
        assert_eq!(keys(&answer), ["error"]);
        assert_eq!(keys(&answer["error"]), ["code", "message", "param", "type"]);
        assert_eq!(answer["error"]["code"], status);
        let said = answer["error"]["message"].as_str().unwrap();
        assert!(said.contains(message), "{path} {body}: {said}");
    }
    let (status, _) = whole(served.send(Method::POST, CHAT, b"{\"messages\": [").await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(served.engine.usage().blocks_used, 0);
}
