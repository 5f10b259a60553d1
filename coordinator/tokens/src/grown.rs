//! Prompts that go on where earlier ones ended: a conversation's next turn, a long document with
//! another question. What they share is tokenized once.
//!
//! A text may be cut where tokenizing both sides apart gives what tokenizing the whole does. That holds
//! between a letter or digit and a space with a letter or digit behind it, all ASCII, in tokenizers
//! that first split a text by patterns which look no further than one character beyond a piece: the
//! piece before ends there whatever follows, and the one behind begins there whatever came before.
//! [`can_be_cut`] looks for all that could stand against it, and refuses what it does not know.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use serde_json::Value;
use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Texts are looked for by their first chunk, their first two, and so on.
const CHUNK_BYTES: usize = 1024;
/// A cut in this many bytes is enough.
const CUT_BYTES: usize = 256;

/// The tokens of a text, and where it may be cut.
#[derive(Debug)]
pub(crate) struct Encoded {
    text: Arc<str>,
    pub(crate) tokens: Vec<u32>,
    /// Places in the text, each with the number of tokens before it. Ascending.
    pub(crate) cuts: Vec<(usize, usize)>,
}

/// What is known of a text's beginning.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) earlier: Option<(Arc<Encoded>, usize)>,
}

/// The encoded texts of late; those that were used longest ago go first.
#[derive(Debug)]
pub(crate) struct GrownPrompts {
    room_bytes: usize,
    used_bytes: usize,
    /// Oldest use first.
    kept: VecDeque<(u64, Arc<Encoded>)>,
    /// By the hash of all chunks up to one: the last text that has them.
    by_prefix: HashMap<u64, u64>,
    next: u64,
}

impl GrownPrompts {
    pub(crate) fn new(room_bytes: usize) -> Self {
        Self {
            room_bytes,
            used_bytes: 0,
            kept: VecDeque::new(),
            by_prefix: HashMap::new(),
            next: 0,
        }
    }

    /// The earlier text that this one shares most with.
    pub(crate) fn longest(&mut self, text: &str) -> Known {
        let found = prefixes(text).map_while(|prefix| self.by_prefix.get(&prefix).copied()).last();
        let place = found.and_then(|number| self.kept.iter().position(|(kept, _)| *kept == number));
        let Some(entry) = place.and_then(|place| self.kept.remove(place)) else {
            return Known::default();
        };
        let encoded = entry.1.clone();
        self.kept.push_back(entry);
        let shared = shared_bytes(&encoded.text, text);
        Known { earlier: Some((encoded, shared)) }
    }

    pub(crate) fn keep(&mut self, encoded: Encoded) {
        self.next += 1;
        let number = self.next;
        self.used_bytes += encoded.bytes();
        self.by_prefix.extend(prefixes(&encoded.text).map(|prefix| (prefix, number)));
        self.kept.push_back((number, Arc::new(encoded)));
        while self.used_bytes > self.room_bytes
            && let Some((number, oldest)) = self.kept.pop_front()
        {
            self.used_bytes -= oldest.bytes();
            for prefix in prefixes(&oldest.text) {
                if self.by_prefix.get(&prefix) == Some(&number) {
                    self.by_prefix.remove(&prefix);
                }
            }
        }
    }
}

impl Encoded {
    pub(crate) fn bytes(&self) -> usize {
        let chunk = size_of::<(u64, u64)>();
        self.text.len()
            + self.tokens.len() * size_of::<u32>()
            + self.cuts.len() * size_of::<(usize, usize)>()
            + self.text.len() / CHUNK_BYTES * chunk
    }
}

impl Known {
    /// Tokenizes what is new.
    pub(crate) fn extend(
        self,
        text: &str,
        tokenizer: &Tokenizer,
    ) -> Result<Encoded, tokenizers::Error> {
        let mut tokens = Vec::new();
        let mut cuts = Vec::new();
        let mut from = 0;
        if let Some((earlier, shared)) = self.earlier {
            // The space and the character behind it are shared too.
            let count = earlier.cuts.partition_point(|(place, _)| place + 2 <= shared);
            if let Some((place, before)) = earlier.cuts[..count].last() {
                from = *place;
                tokens.reserve(before + (text.len() - from) / 3);
                tokens.extend_from_slice(&earlier.tokens[..*before]);
                cuts.extend_from_slice(&earlier.cuts[..count]);
            }
        }
        let rest = tokenizer.encode(&text[from..], false)?;
        let words = rest.get_word_ids();
        for (index, (begin, _)) in rest.get_offsets().iter().enumerate() {
            let is_word_start = index > 0 && words[index] != words[index - 1];
            let place = from + begin;
            if is_word_start
                && cuts.last().is_none_or(|(last, _)| place >= last + CUT_BYTES)
                && is_cut(text.as_bytes(), place)
            {
                cuts.push((place, tokens.len() + index));
            }
        }
        tokens.extend_from_slice(rest.get_ids());
        Ok(Encoded { text: text.into(), tokens, cuts })
    }
}

fn is_cut(text: &[u8], place: usize) -> bool {
    let around = place.checked_sub(1).and_then(|before| text.get(before..place + 2));
    around.is_some_and(|around| {
        around[0].is_ascii_alphanumeric() && around[1] == b' ' && around[2].is_ascii_alphanumeric()
    })
}

/// The hashes of the text's first chunk, its first two, and so on.
fn prefixes(text: &str) -> impl Iterator<Item = u64> {
    text.as_bytes().chunks_exact(CHUNK_BYTES).scan(0, |hash, chunk| {
        *hash = xxh3_64_with_seed(chunk, *hash);
        Some(*hash)
    })
}

fn shared_bytes(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    // Chunks first: they are compared many bytes at once.
    let whole = a.chunks_exact(64).zip(b.chunks_exact(64)).take_while(|(a, b)| a == b).count() * 64;
    let rest = a[whole..].iter().zip(&b[whole..]).take_while(|(a, b)| a == b).count();
    whole + rest
}

/// Whether a `tokenizer.json` is of a kind whose texts may be cut.
pub(crate) fn can_be_cut(tokenizer: &Value) -> bool {
    normalizer_is_local(&tokenizer["normalizer"])
        && pre_tokenizer_is_local(&tokenizer["pre_tokenizer"])
        && added_tokens_hold_no_cut(&tokenizer["added_tokens"])
}

/// Changes characters one by one, or only those that are not ASCII.
fn normalizer_is_local(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        None => normalizer.is_null(),
        Some("NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase") => true,
        Some("Sequence") => {
            let all = normalizer["normalizers"].as_array();
            all.is_some_and(|all| all.iter().all(normalizer_is_local))
        }
        Some(_) => false,
    }
}

/// Splits before a space, and looks no further.
fn pre_tokenizer_is_local(pre_tokenizer: &Value) -> bool {
    let is_byte_level = |part: &Value| {
        part["type"] == "ByteLevel" && part["add_prefix_space"] == Value::Bool(false)
    };
    let is_split = |part: &Value| {
        part["type"] == "Split"
            && part["behavior"] == "Isolated"
            && part["pattern"]["Regex"].as_str().is_some_and(looks_at_most_one_further)
    };
    let is_digits = |part: &Value| part["type"] == "Digits";
    if is_byte_level(pre_tokenizer) {
        return true;
    }
    let Some(parts) = pre_tokenizer["pretokenizers"].as_array() else { return false };
    pre_tokenizer["type"] == "Sequence"
        && parts.iter().all(|part| is_byte_level(part) || is_split(part) || is_digits(part))
        // Without bytes the vocabulary may have tokens for what is missing.
        && parts.iter().any(is_byte_level)
}

/// Groups, classes and repetitions, and of what looks around only the one that ends a run of spaces.
fn looks_at_most_one_further(pattern: &str) -> bool {
    let known = pattern.replace("(?!\\S)", "").replace("(?i:", "").replace("(?:", "");
    !["(?", "^", "$", "\\b", "\\B", "\\A", "\\z", "\\Z", "\\G", "\\K"]
        .iter()
        // `[^` is a class.
        .any(|unknown| known.replace("[^", "[").contains(unknown))
}

/// No added token has a space between other characters, is one, or takes spaces from its neighbours.
fn added_tokens_hold_no_cut(added: &Value) -> bool {
    let Some(added) = added.as_array() else { return added.is_null() };
    added.iter().all(|token| {
        let text = token["content"].as_str().unwrap_or(" ");
        let takes_more = ["lstrip", "rstrip", "single_word"].iter().any(|flag| token[flag] == true);
        let is_spaces = text.len() > 1 && text.bytes().all(|byte| byte == b' ');
        !takes_more && (is_spaces || !text.contains(' '))
    })
}
