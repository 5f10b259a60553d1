//! The coordinator knows which blocks a real vLLM holds, and tokenizes prompts as it does.

use baton_tests::{Cluster, ClusterBuilder, Metrics, vllm_or_skip};
use baton_tokens::{Chat, PromptTokenizer};
use serde_json::{Value, json};

const BLOCK_SIZE_TOKENS: u32 = 32;

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length)
        .map(|i| 1000 + seed.wrapping_mul(31).wrapping_add(i.wrapping_mul(7)) % 2000)
        .collect()
}

fn known(metrics: &Metrics) -> f64 {
    metrics.sum("baton_worker_prefix_blocks", &["decode-0"])
}

/// One vLLM for both, since it takes a while to start.
#[tokio::test]
async fn what_a_real_vllm_holds_and_how_it_counts() {
    let Some(installation) = vllm_or_skip("what_a_real_vllm_holds_and_how_it_counts") else {
        return;
    };
    let tokenizer = PromptTokenizer::open(&installation.model).unwrap();
    let mut cluster = ClusterBuilder::vllm(&installation)
        .vllm_arguments(&["--trust-request-chat-template"])
        .pools(0, 1)
        .not_ready()
        .start()
        .await
        .unwrap();
    cluster.wait_for_workers(1, std::time::Duration::from_secs(300)).await.unwrap();
    followed_block_by_block(&cluster).await;
    tokenized_alike(&cluster, &tokenizer).await;
}

/// Writes out what it is given: tools, roles and calls, as text and as JSON.
const TALKATIVE_TEMPLATE: &str = "{{- bos_token }}{% if tools %}
    {{- '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}
    {%- endfor %}</tools>
{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}
    {{- '<|im_start|>' + message.role }}{{ ' ' ~ message.name if message.name is defined }}
{{ message['content'].strip() if message.content is string else message.content }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function %}
[{{ function.name }} {{ function.arguments | tojson }} {{ function.arguments }}]
        {%- for key, value in function.arguments.items() %} {{ key }}={{ value }};{% endfor %}
    {%- endfor %}
    {{- message.tool_call_id if message.role == 'tool' }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}";

/// Takes content in parts.
const TEMPLATE_OF_PARTS: &str = "{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message['content'] %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}";

fn chats() -> Vec<Value> {
    let long: String = (0..900).map(|i| format!("word{} and {i}, ", i % 7)).collect();
    let user = |content: Value| json!({"role": "user", "content": content});
    let tool = |name: &str| {
        json!({"type": "function", "function": {
            "name": name, "description": "Says \"hello\" / <b>é</b> & 'more'",
            "parameters": {"type": "object", "required": ["z"], "properties": {
                "z": {"type": "number", "default": 1e-7}, "a": {"enum": [1, 2.0, true, null]},
            }},
        }})
    };
    let called = json!([
        user("What is the weather?".into()),
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {
                "name": "weather", "arguments": "{\"city\": \"Zürich\", \"days\": [1, 2.5, null, true]}",
            }},
            {"id": "c2", "type": "function", "function": {"name": "none", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "assistant", "content": "It's sunny.", "tool_calls": []},
    ]);
    let conversations = [
        json!([user("Hello.".into())]),
        json!([{"role": "system", "content": "You are terse."}, user("Hi".into())]),
        json!([user("".into())]),
        json!([user("  \n\n  spaces \t and\r\nlines \u{a0}\u{2003} end  ".into())]),
        json!([user("日本語, 한국어, ملف, 🏃🏽‍♀️ e\u{301} é ﬁ \u{200b} \u{feff}x".into())]),
        json!([user("<|im_end|>\n<|im_start|>system\nno<|endoftext|> <|im_ start|>".into())]),
        json!([user(json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]))]),
        json!([user(json!([{"type": "text", "text": ""}, {"type": "text", "text": " two "}]))]),
        json!([user("1234567890 3.14159 1,000,000 0x1F 12:30".into())]),
        json!([{"role": "user", "name": "ann", "content": "I'm Ann; they'll, we'd, DON'T"}]),
        json!([user("fn main() {\n\tprintln!(\"{}\", 1_000);\n}\n\n\n".into())]),
        json!([user(long.clone().into())]),
        json!([user(format!("{long}and on").into()), {"role": "assistant", "content": "Yes."},
            user("On.".into())]),
        called,
    ];
    let mut chats = Vec::new();
    for messages in conversations {
        chats.push(json!({"messages": messages}));
        chats.push(json!({"messages": messages, "add_generation_prompt": false}));
        chats.push(json!({
            "messages": messages, "chat_template": TALKATIVE_TEMPLATE,
            "tools": [tool("f"), {"type": "function", "function": {"name": "bare"}}],
            "chat_template_kwargs": {"enable_thinking": false},
        }));
        chats.push(json!({"messages": messages, "chat_template": TEMPLATE_OF_PARTS}));
    }
    chats
}

async fn tokenized_alike(cluster: &Cluster, tokenizer: &PromptTokenizer) {
    let engine = format!("http://127.0.0.1:{}/tokenize", cluster.engine_port("decode-0"));
    let theirs = async |body: &Value| -> Result<Vec<u32>, String> {
        let answer = cluster.http.post(&engine).json(body).send().await.unwrap();
        if !answer.status().is_success() {
            return Err(answer.text().await.unwrap());
        }
        let answer: Value = answer.json().await.unwrap();
        Ok(serde_json::from_value(answer["tokens"].clone()).unwrap())
    };
    let mut alike = 0;
    for body in chats() {
        let chat: Chat = serde_json::from_value(body.clone()).unwrap();
        match (theirs(&body).await, tokenizer.chat(&chat)) {
            (Ok(theirs), Ok(ours)) => {
                assert_eq!(ours, theirs, "{body}");
                alike += 1;
            }
            (Err(_), Err(_)) => {}
            (theirs, ours) => panic!("vLLM: {theirs:?}\nhere: {ours:?}\n{body}"),
        }
    }
    assert_eq!(alike, chats().len(), "all of them are understood");
    for text in ["", "Hello", " a  b ", "<|im_start|>x", "日本語 1234 it's\n\n\tx", "e\u{301}"] {
        let body = json!({"prompt": text});
        assert_eq!(tokenizer.text(text, true).unwrap(), theirs(&body).await.unwrap(), "{text:?}");
    }
}

async fn followed_block_by_block(cluster: &Cluster) {
    // 320 tokens of prompt and one block of output.
    let first = prompt(1, 10 * BLOCK_SIZE_TOKENS);
    cluster.complete(first.clone(), BLOCK_SIZE_TOKENS + 1).await.generated();
    cluster.eventually("the blocks are known", |metrics| known(metrics) == 11.0).await;

    // What is predicted is what vLLM then finds.
    let second: Vec<u32> = first[..200].iter().copied().chain(prompt(2, 100)).collect();
    let answer = cluster.complete(second, 1).await;
    let cached = &answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached.as_f64(), Some(192.0), "{}", answer.json()["usage"]);
    let metrics = cluster
        .eventually("more blocks are known, as many as vLLM told of", |metrics| {
            let told = metrics.sum("baton_worker_engine_kv_blocks_cached", &["decode-0"]);
            known(metrics) == 14.0 && told == 14.0
        })
        .await;
    assert_eq!(metrics.sum("baton_prefix_hit_tokens_total", &[]), 192.0);

    // vLLM forgets everything.
    let engine = format!("http://127.0.0.1:{}", cluster.engine_port("decode-0"));
    let reset = cluster.http.post(format!("{engine}/reset_prefix_cache")).send().await.unwrap();
    assert!(reset.status().is_success());
    // It tells with its next step.
    cluster.complete(prompt(3, 2 * BLOCK_SIZE_TOKENS), 1).await.generated();
    cluster.eventually("only what came since is known", |metrics| known(metrics) == 2.0).await;
}
