//! A prompt's token ids, as the engine that serves it counts them: the model's own chat template and
//! tokenizer, read from the directory that the engine reads them from.
//!
//! What cannot be said for certain is not said: a conversation with images, a template that needs what
//! is not here. The caller then goes without tokens.

mod chat_template;
mod conversation;
mod encoder;
mod grown;
mod python_text;

use std::{fs, io, path::Path, path::PathBuf};

use serde::Deserialize;

pub use crate::conversation::Chat;
use crate::{chat_template::ChatTemplates, encoder::Encoder};

/// One model's tokenizer and chat template. Cheap to share; calls from several threads are fine.
#[derive(Debug)]
pub struct PromptTokenizer {
    encoder: Encoder,
    /// Absent where the model has none: it serves completions alone.
    templates: Option<ChatTemplates>,
}

/// A model's directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is no tokenizer: {reason}", path = path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error("{path} cannot be read: {source}", path = path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("the chat template of {path} cannot be used: {reason}", path = path.display())]
    Template { path: PathBuf, reason: String },
}

/// Why a prompt's tokens are not known here. None of it is the client's fault for certain.
#[derive(Debug, thiserror::Error)]
pub enum Unknown {
    #[error("the model has no chat template")]
    NoTemplate,
    #[error("{0} is not understood here")]
    NotUnderstood(&'static str),
    #[error("the chat template failed: {0}")]
    Template(#[from] minijinja::Error),
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
}

impl Unknown {
    /// A name for logs, in which nothing of the prompt stands.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoTemplate => "no chat template",
            Self::NotUnderstood(what) => what,
            Self::Template(_) => "chat template",
            Self::Tokenizer(_) => "tokenizer",
        }
    }
}

/// What is used of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    #[serde(default)]
    pub(crate) chat_template: Option<minijinja::Value>,
    /// Everything else: special tokens are among it.
    #[serde(flatten)]
    pub(crate) others: std::collections::BTreeMap<String, minijinja::Value>,
}

impl PromptTokenizer {
    /// Reads `tokenizer.json`, and where they are there `tokenizer_config.json` and
    /// `chat_template.jinja`. Takes a second or so.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        let encoder = Encoder::open(&directory.join("tokenizer.json"))?;
        let path = directory.join("tokenizer_config.json");
        let config = match read(&path)? {
            Some(text) => {
                serde_json::from_str(&text).map_err(|source| OpenError::Config { path, source })?
            }
            None => TokenizerConfig::default(),
        };
        let file = read(&directory.join("chat_template.jinja"))?;
        let templates = ChatTemplates::new(&config, file.as_deref()).map_err(|error| {
            OpenError::Template { path: directory.to_owned(), reason: error.to_string() }
        })?;
        Ok(Self { encoder, templates })
    }

    /// The tokens of a conversation.
    pub fn chat(&self, chat: &Chat) -> Result<Vec<u32>, Unknown> {
        let templates = self.templates.as_ref().ok_or(Unknown::NoTemplate)?;
        let prompt = templates.render(chat)?;
        self.encoder.encode(&prompt, chat.add_special_tokens)
    }

    /// The tokens of a text, with those that the tokenizer puts before and after one, or without.
    pub fn text(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Unknown> {
        self.encoder.encode(text, add_special_tokens)
    }
}

fn read(path: &Path) -> Result<Option<String>, OpenError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(OpenError::Read { path: path.to_owned(), source }),
    }
}
