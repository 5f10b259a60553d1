//! A chat request, brought into the shape that chat templates expect, as vLLM does it
//! (`vllm/renderers/chat_utils.py`).

use minijinja::Value;
use serde::Deserialize;

use crate::Unknown;

/// What of a chat request its prompt is made from, by the names of the OpenAI API and vLLM's.
#[derive(Clone, Debug, Deserialize)]
pub struct Chat {
    messages: Vec<Value>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    pub(crate) documents: Option<Value>,
    #[serde(default = "yes")]
    pub(crate) add_generation_prompt: bool,
    #[serde(default)]
    pub(crate) continue_final_message: bool,
    #[serde(default)]
    pub(crate) add_special_tokens: bool,
    /// A template of the client's own.
    #[serde(default)]
    pub(crate) chat_template: Option<String>,
    #[serde(default)]
    pub(crate) chat_template_kwargs: Option<Value>,
    /// They change the prompt in ways that depend on the engine's settings.
    #[serde(default)]
    tool_choice: Option<Value>,
    #[serde(default)]
    reasoning_effort: Option<Value>,
}

fn yes() -> bool {
    true
}

/// How a template takes a message's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentFormat {
    String,
    /// A list of parts, each with its type.
    Parts,
}

impl Chat {
    /// Whether the client wants another template than the model's.
    pub fn brings_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// The messages as a template reads them.
    pub(crate) fn conversation(&self, format: ContentFormat) -> Result<Vec<Value>, Unknown> {
        if self.reasoning_effort.as_ref().is_some_and(|effort| !effort.is_none()) {
            return Err(Unknown::NotUnderstood("reasoning_effort"));
        }
        self.messages.iter().map(|message| read_message(message, format)).collect()
    }

    /// The tools as a template reads them: with the fields that vLLM has for them, in its order.
    pub(crate) fn tools(&self) -> Result<Option<Vec<Value>>, Unknown> {
        match self.tool_choice.as_ref().map(|choice| choice.as_str()) {
            None | Some(Some("auto" | "none")) => {}
            Some(_) => return Err(Unknown::NotUnderstood("tool_choice")),
        }
        let Some(tools) = &self.tools else { return Ok(None) };
        let read_tool = |tool: &Value| {
            if present(tool, "defer_loading").is_some() {
                return Err(Unknown::NotUnderstood("tools[].defer_loading"));
            }
            let function = present(tool, "function").ok_or(Unknown::NotUnderstood("tools"))?;
            let field = |name: &str| (Value::from(name), field(&function, name));
            let mut fields = vec![field("name"), field("description"), field("parameters")];
            fields
                .extend(present(&function, "strict").map(|strict| (Value::from("strict"), strict)));
            Ok(Value::from_iter([
                ("type", Value::from("function")),
                ("function", fields.into_iter().collect()),
            ]))
        };
        tools.iter().map(read_tool).collect::<Result<_, _>>().map(Some)
    }
}

fn read_message(message: &Value, format: ContentFormat) -> Result<Value, Unknown> {
    let role = present(message, "role");
    let role =
        role.as_ref().and_then(|role| role.as_str()).ok_or(Unknown::NotUnderstood("role"))?;
    if role == "developer" {
        return Err(Unknown::NotUnderstood("role = \"developer\""));
    }
    // A tool's answer is a text to every template.
    let format = if role == "tool" { ContentFormat::String } else { format };
    let mut fields = vec![
        (Value::from("role"), Value::from(role)),
        (Value::from("content"), content(present(message, "content").as_ref(), role, format)?),
    ];
    let mut push = |name: &str, value: Value| fields.push((Value::from(name), value));
    if role == "assistant" {
        if let Some(calls) = present(message, "tool_calls") {
            let calls =
                calls.try_iter()?.map(|call| tool_call(&call)).collect::<Result<Vec<_>, _>>()?;
            if !calls.is_empty() {
                push("tool_calls", calls.into());
            }
        }
        if let Some(reasoning) = present(message, "reasoning") {
            push("reasoning", reasoning.clone());
            push("reasoning_content", reasoning);
        }
    }
    if role == "tool"
        && let Some(id) = present(message, "tool_call_id")
    {
        push("tool_call_id", id);
    }
    for name in ["name", "task"] {
        if let Some(value) = present(message, name).filter(|value| value.as_str().is_some()) {
            push(name, value);
        }
    }
    Ok(fields.into_iter().collect())
}

fn content(content: Option<&Value>, role: &str, format: ContentFormat) -> Result<Value, Unknown> {
    let texts = match content {
        None => Vec::new(),
        Some(content) => match content.as_str() {
            Some(text) => vec![text.to_owned()],
            None => content.try_iter()?.map(|part| text_of(&part)).collect::<Result<_, _>>()?,
        },
    };
    // vLLM drops the first line of such a text, which is other in every request.
    if role == "system" && texts.iter().any(|text| text.starts_with("x-anthropic-billing-header")) {
        return Err(Unknown::NotUnderstood("x-anthropic-billing-header"));
    }
    Ok(match format {
        ContentFormat::String => {
            // Empty parts leave no line behind.
            let texts: Vec<_> = texts.into_iter().filter(|text| !text.is_empty()).collect();
            texts.join("\n").into()
        }
        ContentFormat::Parts => texts
            .into_iter()
            .map(|text| Value::from_iter([("type", Value::from("text")), ("text", text.into())]))
            .collect::<Vec<_>>()
            .into(),
    })
}

/// A part that is text and nothing else.
fn text_of(part: &Value) -> Result<String, Unknown> {
    if let Some(text) = part.as_str() {
        return Ok(text.to_owned());
    }
    const FIELDS: [&str; 2] = ["type", "text"];
    let is_text = present(part, "type").is_some_and(|kind| kind.as_str() == Some("text"));
    let is_plain =
        part.try_iter()?.all(|field| field.as_str().is_some_and(|name| FIELDS.contains(&name)));
    let text = present(part, "text").filter(|_| is_text && is_plain);
    let text = text.as_ref().and_then(|text| text.as_str()).map(str::to_owned);
    text.ok_or(Unknown::NotUnderstood("a message's content"))
}

/// With its arguments as an object: clients send the JSON text that the model wrote.
fn tool_call(call: &Value) -> Result<Value, Unknown> {
    let function = present(call, "function").ok_or(Unknown::NotUnderstood("tool_calls"))?;
    let written = present(&function, "arguments");
    let arguments = match written.as_ref().and_then(|written| written.as_str()) {
        Some(text) => serde_json::from_str::<Value>(text).ok(),
        None => written,
    };
    let is_object = |value: &Value| value.kind() == minijinja::value::ValueKind::Map;
    let arguments = arguments.filter(is_object).unwrap_or_else(|| Value::from_iter([("", ""); 0]));
    let function = with(&function, "arguments", arguments)?;
    with(call, "function", function)
}

/// The object with one field replaced in its place, or added at the end.
fn with(object: &Value, name: &str, value: Value) -> Result<Value, Unknown> {
    let mut fields = Vec::new();
    for key in object.try_iter()? {
        let old = object.get_item(&key)?;
        let is_it = key.as_str() == Some(name);
        fields.push((key, if is_it { value.clone() } else { old }));
    }
    if !fields.iter().any(|(key, _)| key.as_str() == Some(name)) {
        fields.push((Value::from(name), value));
    }
    Ok(fields.into_iter().collect())
}

fn field(object: &Value, name: &str) -> Value {
    present(object, name).unwrap_or_else(|| Value::from(()))
}

/// A field that is there and not null.
fn present(object: &Value, name: &str) -> Option<Value> {
    let value = object.get_attr(name).ok()?;
    (!value.is_undefined() && !value.is_none()).then_some(value)
}
