use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::grown::Known;

/// GPT-4's way to split, which Llama 3 and Qwen share with small changes.
const GPT4_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The characters that stand for bytes in byte-level vocabularies: GPT-2's `bytes_to_unicode`.
fn byte_characters() -> Vec<char> {
    let shown =
        |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || byte >= 174;
    let mut hidden = 256..;
    (0..256_u32)
        .map(|byte| {
            char::from_u32(if shown(byte) { byte } else { hidden.next().unwrap() }).unwrap()
        })
        .collect()
}

/// A byte-level BPE of few merges.
pub(crate) fn tokenizer_json(pattern: Option<&str>) -> Value {
    let mut vocabulary: Vec<String> = byte_characters().iter().map(char::to_string).collect();
    let merges = [
        "t h",
        "th e",
        "Ġ the",
        "i n",
        "in g",
        "e r",
        "Ġ a",
        "o n",
        "a l",
        "Ġ w",
        "Ġw o",
        "Ċ Ċ",
        "Ġ Ġ",
        "ĠĠ ĠĠ",
        "0 0",
        "l l",
        "' ll",
        "Ã ©",
        "o r",
        "or d",
    ];
    vocabulary.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let vocab: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex,
        })
    };
    let pre_tokenizer = match pattern {
        None => byte_level(true),
        Some(pattern) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]}),
    };
    let added = |id: usize, content: &str, special: bool| {
        json!({
            "id": vocabulary.len() + id, "content": content, "special": special,
            "normalized": false, "single_word": false, "lstrip": false, "rstrip": false,
        })
    };
    let start = vocabulary.len();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            added(0, "<s>", true), added(1, "<|end|>", true), added(2, "<tool>", false),
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [start], "tokens": ["<s>"]}},
        },
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": merges,
        },
    })
}

fn encoder(pattern: Option<&str>) -> Encoder {
    Encoder::new(tokenizer_json(pattern).to_string().as_bytes()).unwrap()
}

fn fresh(pattern: Option<&str>) -> Tokenizer {
    Tokenizer::from_bytes(tokenizer_json(pattern).to_string()).unwrap()
}

/// What stands between words is what splitting depends on.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => "[a-z]{1,7}",
        6 => Just(" ".to_owned()),
        1 => "[ \n\r\t]{1,5}",
        2 => "[0-9]{1,5}",
        1 => "[.,!?'_-]{1,3}",
        1 => prop_oneof![
            Just("'ll"), Just("<|end|>"), Just("<s>"), Just("<tool>"), Just("<|en"), Just("é"),
            Just("e\u{301}"), Just("日本語"), Just("🏃🏽‍♀️"), Just("\u{a0}"), Just("\u{2003}"),
            Just("the word "),
        ].prop_map(str::to_owned),
    ]
}

fn text(pieces: usize) -> impl Strategy<Value = String> {
    prop::collection::vec(piece(), 0..pieces).prop_map(|pieces| pieces.concat())
}

/// A text that goes on otherwise from some place.
fn other(text: &str, place: &prop::sample::Index, more: &str) -> String {
    let places: Vec<_> = text.char_indices().map(|(place, _)| place).chain([text.len()]).collect();
    format!("{}{more}", &text[..*place.get(&places)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_was_seen_before_changes_nothing(
        stem in text(60),
        repeats in 20_usize..60,
        turns in prop::collection::vec((any::<prop::sample::Index>(), text(40)), 1..8),
        gpt4 in any::<bool>(),
    ) {
        let pattern = gpt4.then_some(GPT4_PATTERN);
        let (encoder, fresh) = (encoder(pattern), fresh(pattern));
        prop_assert!(encoder.grown.is_some());
        let mut texts = vec![stem.repeat(repeats)];
        for (place, more) in turns {
            let before = texts.last().cloned().unwrap_or_default();
            texts.push(other(&before, &place, &more));
            // On from its end, too.
            texts.push(format!("{before}{more}"));
        }
        for text in &texts {
            for special in [false, true] {
                let expected = fresh.encode(text.as_str(), special).unwrap();
                prop_assert_eq!(&encoder.encode(text, special).unwrap()[..], expected.get_ids());
            }
        }
    }
}

#[test]
fn only_what_is_new_is_computed() {
    let encoder = encoder(None);
    let text = "the word is a thing, and 12 more of them. ".repeat(1000);
    let whole = encoder.encode(&text, false).unwrap();
    let longer = format!("{text}and on");
    let known = encoder.grown.as_ref().unwrap().lock().longest(&longer);
    let (earlier, shared) = known.earlier.as_ref().unwrap();
    assert_eq!((*shared, earlier.tokens.len()), (text.len(), whole.len()));
    let (last_cut, _) = *earlier.cuts.last().unwrap();
    assert!(last_cut + 1000 > text.len(), "{last_cut} of {}", text.len());
}

#[test]
fn memory_is_bounded_and_the_longest_unused_text_goes_first() {
    let tokenizer = fresh(None);
    let text = |name: &str| format!("{name} {}", "a word and another ".repeat(300));
    let one = Known::default().extend(&text("a"), &tokenizer).unwrap().bytes();
    let mut grown = GrownPrompts::new(3 * one + one / 2);
    let keep = |grown: &mut GrownPrompts, name: &str| {
        grown.keep(Known::default().extend(&text(name), &tokenizer).unwrap());
    };
    let is_known =
        |grown: &mut GrownPrompts, name: &str| grown.longest(&text(name)).earlier.is_some();
    for name in ["a", "b", "c"] {
        keep(&mut grown, name);
    }
    assert!(is_known(&mut grown, "a"));
    keep(&mut grown, "d");
    assert_eq!(
        ["a", "b", "c", "d"].map(|name| is_known(&mut grown, name)),
        [true, false, true, true]
    );
}

#[test]
fn a_tokenizer_that_might_look_further_is_not_cut() {
    let with = |change: fn(&mut Value)| {
        let mut json = tokenizer_json(Some(GPT4_PATTERN));
        change(&mut json);
        crate::grown::can_be_cut(&json)
    };
    assert!(with(|_| {}));
    assert!(!with(|json| json["normalizer"] = json!({"type": "Prepend", "prepend": "▁"})));
    assert!(!with(|json| json["normalizer"] = json!({"type": "Replace"})));
    assert!(!with(|json| json["pre_tokenizer"] = json!({"type": "Metaspace"})));
    assert!(!with(|json| json["pre_tokenizer"] = Value::Null));
    assert!(!with(
        |json| json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into()
    ));
    for pattern in ["\\w+(?=,)", "^a", "a$", "(?<=a)b", "\\bword"] {
        let mut json = tokenizer_json(Some(pattern));
        assert!(!crate::grown::can_be_cut(&json), "{pattern}");
        json["added_tokens"] = json!([]);
    }
    assert!(!with(|json| json["added_tokens"][0]["content"] = "a b".into()));
    assert!(!with(|json| json["added_tokens"][0]["content"] = " ".into()));
    assert!(!with(|json| json["added_tokens"][0]["lstrip"] = true.into()));
    assert!(with(|json| json["added_tokens"][0]["content"] = "    ".into()));
}

#[test]
fn what_the_tokenizer_puts_before_a_text_is_put_there() {
    let encoder = encoder(None);
    let start = encoder.tokenizer.token_to_id("<s>").unwrap();
    assert_eq!(encoder.encode("", true).unwrap(), [start]);
    assert_eq!(encoder.encode("", false).unwrap(), [0; 0]);
    assert_eq!(encoder.encode("the", true).unwrap()[0], start);
}
