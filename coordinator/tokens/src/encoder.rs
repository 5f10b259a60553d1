use std::path::Path;

use parking_lot::Mutex;
use tokenizers::Tokenizer;

use crate::{OpenError, Unknown, grown::GrownPrompts};

/// Text to token ids; what was seen before is not computed again.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// Without what it puts around a text: that is added to the whole.
    tokenizer: Tokenizer,
    /// Before and after a text; `None` where they depend on it.
    around: Option<(Vec<u32>, Vec<u32>)>,
    /// As it was read, for where they do.
    whole: Option<Box<Tokenizer>>,
    /// Absent where a text cannot be cut for certain.
    grown: Option<Mutex<GrownPrompts>>,
}

/// Texts and tokens that are kept.
const KEPT_BYTES: usize = 64 << 20;
/// A shorter text is not worth looking for.
const SHORTEST_GROWN_BYTES: usize = 4096;

impl Encoder {
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let wrong = |reason: String| OpenError::Tokenizer { path: path.to_owned(), reason };
        let json = std::fs::read(path)
            .map_err(|source| OpenError::Read { path: path.to_owned(), source })?;
        Self::new(&json).map_err(wrong)
    }

    fn new(json: &[u8]) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
        // A prompt is never cut short or filled up: an engine that did would say so.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        let around = around(&tokenizer).map_err(|error| error.to_string())?;
        let whole = around.is_none().then(|| Box::new(tokenizer.clone()));
        tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let parsed: serde_json::Value =
            serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let grown =
            crate::grown::can_be_cut(&parsed).then(|| Mutex::new(GrownPrompts::new(KEPT_BYTES)));
        Ok(Self { tokenizer, around, whole, grown })
    }

    pub(crate) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Unknown> {
        let failed = |error: tokenizers::Error| Unknown::Tokenizer(error.to_string());
        let (before, after) = match (&self.around, &self.whole) {
            (Some((before, after)), _) if add_special_tokens => (&before[..], &after[..]),
            (None, Some(whole)) if add_special_tokens => {
                return Ok(whole.encode_fast(text, true).map_err(failed)?.get_ids().to_vec());
            }
            _ => (&[][..], &[][..]),
        };
        let tokens = match &self.grown {
            Some(grown) if text.len() >= SHORTEST_GROWN_BYTES => {
                // Found under the lock, computed without it.
                let known = grown.lock().longest(text);
                let encoded = known.extend(text, &self.tokenizer).map_err(failed)?;
                let tokens = encoded.tokens.clone();
                grown.lock().keep(encoded);
                tokens
            }
            _ => self.tokenizer.encode_fast(text, false).map_err(failed)?.get_ids().to_vec(),
        };
        if before.is_empty() && after.is_empty() {
            return Ok(tokens);
        }
        Ok([before, &tokens, after].concat())
    }
}

/// What the tokenizer puts before and after any text.
fn around(tokenizer: &Tokenizer) -> Result<Option<(Vec<u32>, Vec<u32>)>, tokenizers::Error> {
    let mut found = None;
    for text in ["a", "b c"] {
        let with = tokenizer.encode_fast(text, true)?.get_ids().to_vec();
        let without = tokenizer.encode_fast(text, false)?.get_ids().to_vec();
        let place = with.windows(without.len().max(1)).position(|window| window == without);
        let Some(place) = place else { return Ok(None) };
        let around = (with[..place].to_vec(), with[place + without.len()..].to_vec());
        if *found.get_or_insert_with(|| around.clone()) != around {
            return Ok(None);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
