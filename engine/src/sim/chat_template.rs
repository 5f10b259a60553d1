use std::fmt::Write;

use serde::Deserialize;
use serde_json::Value;

/// A message of a conversation, as far as it becomes text.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Value>>,
    #[serde(default)]
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Debug, Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

/// A message of a kind that there is no text for.
#[derive(Debug, thiserror::Error)]
#[error("content of type {0:?} is not supported: this model reads text")]
pub(super) struct UnsupportedContent(String);

/// The prompt of a conversation. The line that it ends with opens the answer.
pub(super) fn render(
    messages: &[Message],
    tools: Option<&Value>,
    opens_answer: bool,
) -> Result<String, UnsupportedContent> {
    let mut prompt = String::new();
    if let Some(tools) = tools {
        append(&mut prompt, "tools", &tools.to_string());
    }
    for message in messages {
        let mut head = message.role.clone();
        for extra in [&message.name, &message.tool_call_id].into_iter().flatten() {
            head.push(' ');
            head.push_str(extra);
        }
        let mut text = message.content.as_ref().map_or(Ok(String::new()), content_text)?;
        for call in message.tool_calls.iter().flatten() {
            text.push_str("\ncall ");
            text.push_str(&call.to_string());
        }
        append(&mut prompt, &head, &text);
    }
    if opens_answer {
        prompt.push_str("<|assistant|>\n");
    }
    Ok(prompt)
}

fn append(prompt: &mut String, head: &str, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(prompt, "<|{head}|>\n{text}");
}

fn content_text(content: &Content) -> Result<String, UnsupportedContent> {
    match content {
        Content::Text(text) => Ok(text.clone()),
        Content::Parts(parts) => {
            let texts: Result<Vec<_>, _> = parts
                .iter()
                .map(|part| match (part.kind.as_str(), &part.text) {
                    ("text" | "input_text" | "output_text" | "refusal", Some(text)) => {
                        Ok(text.as_str())
                    }
                    _ => Err(UnsupportedContent(part.kind.clone())),
                })
                .collect();
            Ok(texts?.join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(messages: Value, tools: Option<&Value>) -> Result<String, UnsupportedContent> {
        let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
        render(&messages, tools, true)
    }

    #[test]
    fn a_conversation_becomes_text() {
        let messages = json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c1"}]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ]);
        let expected = "<|tools|>\n[{\"type\":\"function\"}]\n<|system|>\nBe brief.\n<|user|>\nOne\ntwo\n\
            <|assistant|>\n\ncall {\"id\":\"c1\"}\n<|tool c1|>\n3\n<|assistant|>\n";
        let tools = json!([{"type": "function"}]);
        assert_eq!(rendered(messages, Some(&tools)).unwrap(), expected);
    }

    #[test]
    fn an_earlier_turn_is_a_prefix_of_a_later_one() {
        let first = rendered(json!([{"role": "user", "content": "a"}]), None).unwrap();
        let second = rendered(
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]),
            None,
        );
        assert!(second.unwrap().starts_with(&first));
    }

    #[test]
    fn pictures_are_refused() {
        let picture =
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
        assert!(rendered(picture, None).unwrap_err().to_string().contains("image_url"));
    }
}
