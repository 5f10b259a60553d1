use std::sync::OnceLock;

/// Tokens of one byte each come first, then the words in each of their forms, then the end mark.
const BYTES: u32 = 256;

/// Splits text into the longest words it knows, and into bytes where it knows none. Every text comes
/// back as it was.
#[derive(Debug)]
pub(super) struct Tokenizer {
    /// The text of every token, by its id.
    texts: Vec<Box<[u8]>>,
    words: u32,
    trie: Trie,
}

/// How a word may stand in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// ` word`
    Spaced,
    /// ` Word`
    SpacedCapital,
    /// `Word`
    Capital,
    /// `word`
    Bare,
}

impl Form {
    const ALL: [Self; 4] = [Self::Spaced, Self::SpacedCapital, Self::Capital, Self::Bare];

    fn of(self, word: &str) -> String {
        let mut capital = word.to_owned();
        if let Some(first) = capital.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        match self {
            Self::Spaced => format!(" {word}"),
            Self::SpacedCapital => format!(" {capital}"),
            Self::Capital => capital,
            Self::Bare => word.to_owned(),
        }
    }
}

impl Tokenizer {
    pub(super) fn shared() -> &'static Self {
        static SHARED: OnceLock<Tokenizer> = OnceLock::new();
        SHARED.get_or_init(|| Self::new(include_str!("words.txt")))
    }

    fn new(word_list: &str) -> Self {
        let words: Vec<&str> = word_list.split_whitespace().collect();
        let mut texts: Vec<Box<[u8]>> = (0..=u8::MAX).map(|byte| Box::from([byte])).collect();
        for form in Form::ALL {
            texts.extend(words.iter().map(|word| form.of(word).into_bytes().into_boxed_slice()));
        }
        let mut trie = Trie::default();
        for (token, text) in (0..).zip(&texts).skip(BYTES as usize) {
            trie.insert(text, token);
        }
        texts.push(Box::from(*b"<|end|>"));
        Self { texts, words: u32::try_from(words.len()).unwrap_or(0), trie }
    }

    /// Ids are below this.
    pub(super) fn vocabulary_size(&self) -> u32 {
        self.end() + 1
    }

    /// The token that ends an answer; no text is ever split into it.
    pub(super) fn end(&self) -> u32 {
        BYTES + self.words * 4
    }

    pub(super) fn word(&self, form: Form, draw: u64) -> u32 {
        let word = u32::try_from(draw % u64::from(self.words.max(1))).unwrap_or(0);
        BYTES + self.words * form as u32 + word
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let bytes = text.as_bytes();
        let mut tokens = Vec::with_capacity(bytes.len() / 4);
        let mut position = 0;
        while position < bytes.len() {
            let rest = &bytes[position..];
            let (token, length) = self.trie.longest(rest).unwrap_or((u32::from(rest[0]), 1));
            tokens.push(token);
            position += length;
        }
        tokens
    }

    /// The bytes of one token; none of an id that is not in the vocabulary.
    pub(super) fn bytes(&self, token: u32) -> &[u8] {
        self.texts.get(token as usize).map_or(&[], |text| text)
    }

    pub(super) fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.bytes(*token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Letters, the space and nothing else: the alphabet of the words.
const SYMBOLS: usize = 53;

fn symbol(byte: u8) -> Option<usize> {
    match byte {
        b'a'..=b'z' => Some(usize::from(byte - b'a')),
        b'A'..=b'Z' => Some(usize::from(byte - b'A') + 26),
        b' ' => Some(52),
        _ => None,
    }
}

#[derive(Debug)]
struct Trie {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
struct Node {
    /// 0 where there is none: the root is nobody's child.
    children: [u32; SYMBOLS],
    token: Option<u32>,
}

impl Default for Trie {
    fn default() -> Self {
        Self { nodes: vec![Node { children: [0; SYMBOLS], token: None }] }
    }
}

impl Trie {
    fn insert(&mut self, text: &[u8], token: u32) {
        let mut at = 0;
        for symbol in text.iter().copied().filter_map(symbol) {
            if self.nodes[at].children[symbol] == 0 {
                self.nodes[at].children[symbol] = u32::try_from(self.nodes.len()).unwrap_or(0);
                self.nodes.push(Node { children: [0; SYMBOLS], token: None });
            }
            at = self.nodes[at].children[symbol] as usize;
        }
        self.nodes[at].token = Some(token);
    }

    /// The longest word at the start of `text`, and its length in bytes.
    fn longest(&self, text: &[u8]) -> Option<(u32, usize)> {
        let (mut at, mut longest) = (0, None);
        for (index, byte) in text.iter().enumerate() {
            let Some(symbol) = symbol(*byte) else { break };
            at = self.nodes[at].children[symbol] as usize;
            if at == 0 {
                break;
            }
            if let Some(token) = self.nodes[at].token {
                longest = Some((token, index + 1));
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_are_tokens() {
        let tokenizer = Tokenizer::shared();
        assert!(tokenizer.words > 1000);
        let tokens = tokenizer.encode("The river was warm.");
        let texts: Vec<_> = tokens.iter().map(|token| tokenizer.decode(&[*token])).collect();
        assert_eq!(texts, ["The", " river", " was", " warm", "."]);
        assert_eq!(tokens[0], tokenizer.encode("The")[0]);
        assert_ne!(tokenizer.encode(" the"), tokenizer.encode("the"));
    }

    #[test]
    fn the_word_list_is_lower_case_and_without_doubles() {
        let mut words: Vec<_> = include_str!("words.txt").split_whitespace().collect();
        assert!(words.iter().all(|word| word.bytes().all(|byte| byte.is_ascii_lowercase())));
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text in "(.|\\PC| [a-z]{1,8}|the |\n){0,40}") {
            let tokenizer = Tokenizer::shared();
            let tokens = tokenizer.encode(&text);
            prop_assert!(tokens.iter().all(|token| *token < tokenizer.end()));
            prop_assert_eq!(tokenizer.decode(&tokens), text);
        }
    }
}
