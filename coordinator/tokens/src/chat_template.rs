use minijinja::{Environment, Error, ErrorKind, Value};

use crate::{
    TokenizerConfig, Unknown,
    conversation::{Chat, ContentFormat},
    python_text,
};

/// A model's chat templates, in the environment that Hugging Face's are written for
/// (`transformers/utils/chat_template_utils.py`).
#[derive(Debug)]
pub(crate) struct ChatTemplates {
    environment: Environment<'static>,
    default: Option<ContentFormat>,
    /// Of its own for conversations with tools.
    tool_use: Option<ContentFormat>,
    special_tokens: Vec<(String, Value)>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl ChatTemplates {
    /// From a file beside the configuration, or from the configuration. `None` where there is none.
    pub(crate) fn new(config: &TokenizerConfig, file: Option<&str>) -> Result<Option<Self>, Error> {
        let mut sources = Vec::new();
        match (file, &config.chat_template) {
            (Some(file), _) => sources.push((DEFAULT.to_owned(), file.to_owned())),
            (None, Some(template)) => match template.as_str() {
                Some(template) => sources.push((DEFAULT.to_owned(), template.to_owned())),
                None => {
                    for named in template.try_iter()? {
                        let text = |name| Ok::<_, Error>(named.get_attr(name)?.to_string());
                        sources.push((text("name")?, text("template")?));
                    }
                }
            },
            (None, None) => return Ok(None),
        }
        let mut templates = Self {
            environment: environment(),
            default: None,
            tool_use: None,
            special_tokens: special_tokens(config),
        };
        for (name, source) in sources {
            let format = content_format(&source);
            match name.as_str() {
                DEFAULT => templates.default = Some(format),
                TOOL_USE => templates.tool_use = Some(format),
                _ => continue,
            }
            templates.environment.add_template_owned(name, without_generation_tags(&source))?;
        }
        Ok(Some(templates))
    }

    pub(crate) fn render(&self, chat: &Chat) -> Result<String, Unknown> {
        if chat.continue_final_message {
            return Err(Unknown::NotUnderstood("continue_final_message"));
        }
        let tools = chat.tools()?;
        let own;
        let (template, format) = match (&chat.chat_template, self.default, self.tool_use) {
            (Some(source), ..) => {
                own = without_generation_tags(source);
                (self.environment.template_from_str(&own)?, content_format(source))
            }
            (None, _, Some(format)) if tools.is_some() => {
                (self.environment.get_template(TOOL_USE)?, format)
            }
            (None, Some(format), _) => (self.environment.get_template(DEFAULT)?, format),
            (None, None, _) => return Err(Unknown::NoTemplate),
        };
        let mut variables: Vec<(String, Value)> = self.special_tokens.clone();
        let documents = chat.documents.clone().unwrap_or_else(|| Value::from(()));
        variables.extend([
            ("messages".to_owned(), chat.conversation(format)?.into()),
            ("tools".to_owned(), tools.map_or_else(|| Value::from(()), Value::from)),
            ("documents".to_owned(), documents),
            ("add_generation_prompt".to_owned(), chat.add_generation_prompt.into()),
        ]);
        if let Some(arguments) = &chat.chat_template_kwargs
            && !arguments.is_none()
        {
            for name in arguments.try_iter()? {
                let value = arguments.get_item(&name)?;
                variables.push((name.to_string(), value));
            }
        }
        Ok(template.render(variables.into_iter().collect::<Value>())?)
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(python_text::write);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_text::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        jiff::fmt::strtime::format(format.as_bytes(), &jiff::Zoned::now())
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment
}

/// A token stands there as a text, or as an object with its text.
fn special_tokens(config: &TokenizerConfig) -> Vec<(String, Value)> {
    let text = |name: &&str| {
        let token = config.others.get(*name)?;
        let token = match token.as_str() {
            Some(text) => text.to_owned(),
            None => token.get_attr("content").ok()?.as_str()?.to_owned(),
        };
        Some(((*name).to_owned(), Value::from(token)))
    };
    SPECIAL_TOKENS.iter().filter_map(text).collect()
}

/// Marks of what the model wrote, which matter only in training.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + length + 2]);
        text.push_str(before);
        let word = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        match word {
            "generation" => text.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => text.push_str(&tag.replacen(word, "endif", 1)),
            _ => text.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    text.push_str(rest);
    text
}

/// A template that loops over a message's content takes parts, any other a text: vLLM's rule.
fn content_format(source: &str) -> ContentFormat {
    let loops_over_content = source.split("{%").skip(1).any(|tag| {
        let tag = tag.split("%}").next().unwrap_or_default();
        let tag = tag.trim_matches(['-', '+']).trim();
        let over = tag.strip_prefix("for ").and_then(|tag| tag.split_once(" in "));
        let over = over.map_or("", |(_, over)| over);
        let over = over.split([' ', '|']).next().unwrap_or_default();
        over == "content"
            || [".content", "['content']", "[\"content\"]"].iter().any(|end| over.ends_with(end))
    });
    if loops_over_content { ContentFormat::Parts } else { ContentFormat::String }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, chat: &str) -> Result<String, Unknown> {
        let config = r#"{"bos_token":{"content":"<s>"},"eos_token":"</s>","pad_token":null}"#;
        let config = serde_json::from_str(config).unwrap();
        let templates = ChatTemplates::new(&config, Some(template)).unwrap().unwrap();
        templates.render(&serde_json::from_str(chat).unwrap())
    }

    #[test]
    fn templates_are_rendered_as_jinja2_does() {
        let template = "{{ bos_token }}{% for message in messages %}
            {%- if loop.first %}{{ '[' ~ message['role'].upper() ~ ']' }}{% endif %}
            {%- generation -%} {{ message['content'].strip() + '|' }} {% endgeneration -%}
            {% endfor %}{{ tools | tojson }}{{ none }}{{ add_generation_prompt }}{{ eos_token }}";
        let chat = r#"{"messages":[{"role":"user","content":" a "},
            {"role":"user","content":[{"type":"text","text":"b"},{"type":"text","text":""},"c"]}],
            "tools":[{"function":{"parameters":{"z":1,"a":2},"name":"f"},"type":"function"}]}"#;
        assert_eq!(
            render(template, chat).unwrap(),
            "<s>[USER]a| b\nc| [{\"type\": \"function\", \"function\": {\"name\": \"f\", \
             \"description\": null, \"parameters\": {\"z\": 1, \"a\": 2}}}]NoneTrue</s>"
        );
    }

    #[test]
    fn a_template_that_reads_parts_is_given_parts() {
        let template = "{% for m in messages %}{% for part in m.content %}{{ part }}{% endfor %}\
                        {% for call in m.tool_calls %}{{ call.function.arguments }}{% endfor %}\
                        {% endfor %}";
        let chat = r#"{"messages":[{"role":"assistant","content":"a","tool_calls":[
            {"id":"1","type":"function","function":{"name":"f","arguments":"{\"x\":[1]}"}},
            {"id":"2","type":"function","function":{"name":"g","arguments":"no JSON"}}]}]}"#;
        assert_eq!(render(template, chat).unwrap(), "{'type': 'text', 'text': 'a'}{'x': [1]}{}");
    }

    #[test]
    fn what_is_not_certain_is_not_said() {
        let template = "{{ messages[0].content }}";
        for chat in [
            r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":"x"}]}]}"#,
            r#"{"messages":[{"role":"developer","content":"x"}]}"#,
            r#"{"messages":[{"role":"user","content":"x"}],"continue_final_message":true}"#,
            r#"{"messages":[{"role":"user","content":"x"}],"tool_choice":"required"}"#,
        ] {
            assert!(matches!(render(template, chat), Err(Unknown::NotUnderstood(_))), "{chat}");
        }
        let failed = render("{{ raise_exception('no') }}", r#"{"messages":[]}"#);
        assert!(matches!(failed, Err(Unknown::Template(_))));
    }
}
