use std::{fmt::Write as _, ops::Range};

use fastrand::Rng;

use crate::trace::TraceRequest;

/// Makes prompts of a trace's lengths that share prefixes as its requests do.
///
/// The same seed makes the same prompts, which a server's prefix cache knows when it sees them again.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompts {
    pub seed: u64,
    /// Token ids are drawn from these.
    pub vocabulary: Range<u32>,
    /// Of the trace.
    pub prefix_block_tokens: u32,
}

/// Of most vocabularies one token each, with the space before it.
const WORDS: [&str; 32] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
];

impl Prompts {
    /// `index` tells apart what requests do not share.
    pub fn token_ids(&self, index: u64, request: &TraceRequest) -> impl Iterator<Item = u32> {
        let vocabulary = self.vocabulary.clone();
        self.draws(index, request, move |random| random.u32(vocabulary.clone()))
    }

    /// As `[1,2,3]`.
    pub(super) fn token_ids_json(&self, index: u64, request: &TraceRequest) -> String {
        let mut json = String::with_capacity(request.input_tokens as usize * 6 + 2);
        json.push('[');
        for (place, token) in self.token_ids(index, request).enumerate() {
            if place > 0 {
                json.push(',');
            }
            // Writing to a string does not fail.
            let _ = write!(json, "{token}");
        }
        json.push(']');
        json
    }

    /// As many words as the request has tokens: what they are to the server, its tokenizer decides.
    pub(super) fn words(&self, index: u64, request: &TraceRequest) -> String {
        let mut text = String::with_capacity(request.input_tokens as usize * 7);
        for word in self.draws(index, request, |random| WORDS[random.usize(..WORDS.len())]) {
            text.push_str(word);
            text.push(' ');
        }
        text
    }

    fn draws<T>(
        &self,
        index: u64,
        request: &TraceRequest,
        mut draw: impl FnMut(&mut Rng) -> T,
    ) -> impl Iterator<Item = T> {
        let mut shared = request.prefix_blocks.iter();
        let mut left_of_block = 0;
        let (seed, block_tokens) = (self.seed, self.prefix_block_tokens);
        // An index names no block.
        let mut own = Some(stream(!seed, index));
        let mut random = Rng::with_seed(0);
        (0..request.input_tokens).map(move |_| {
            if left_of_block == 0 {
                if let Some(block) = shared.next() {
                    random = stream(seed, *block);
                    left_of_block = block_tokens;
                } else if let Some(own) = own.take() {
                    random = own;
                    left_of_block = u32::MAX;
                }
            }
            left_of_block = left_of_block.saturating_sub(1);
            draw(&mut random)
        })
    }
}

/// Seeds that differ in few bits give streams that have nothing in common.
fn stream(seed: u64, name: u64) -> Rng {
    Rng::with_seed(Rng::with_seed(seed).u64(..) ^ Rng::with_seed(name).u64(..))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPTS: Prompts = Prompts { seed: 3, vocabulary: 100..5000, prefix_block_tokens: 16 };

    fn request(input_tokens: u32, blocks: &[u64]) -> TraceRequest {
        TraceRequest { input_tokens, prefix_blocks: blocks.into(), ..TraceRequest::default() }
    }

    fn shared(a: (u64, &TraceRequest), b: (u64, &TraceRequest)) -> usize {
        let b = PROMPTS.token_ids(b.0, b.1);
        PROMPTS.token_ids(a.0, a.1).zip(b).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn a_prompt_is_as_long_as_it_should_be() {
        for (tokens, blocks) in [(1, &[][..]), (40, &[1, 2]), (40, &[1, 2, 3]), (16, &[9])] {
            let request = request(tokens, blocks);
            let ids: Vec<_> = PROMPTS.token_ids(0, &request).collect();
            assert_eq!(ids.len(), tokens as usize);
            assert!(ids.iter().all(|id| PROMPTS.vocabulary.contains(id)));
            let json: Vec<u32> =
                serde_json::from_str(&PROMPTS.token_ids_json(0, &request)).unwrap();
            assert_eq!(json, ids);
            assert_eq!(PROMPTS.words(0, &request).split(' ').count(), tokens as usize + 1);
        }
    }

    #[test]
    fn prefixes_are_shared_block_by_block() {
        let (a, b) = (request(48, &[1, 2]), request(64, &[1, 2, 3]));
        assert_eq!(shared((0, &a), (1, &b)), 32);
        assert_eq!(shared((0, &a), (1, &request(48, &[1, 7]))), 16);
        assert_eq!(shared((0, &a), (1, &request(48, &[7, 2]))), 0);
        // Of two that share all blocks, the rest differs; the same request is the same.
        assert_eq!(shared((0, &a), (1, &a)), 32);
        assert_eq!(shared((5, &a), (5, &a)), 48);
        assert_eq!(shared((0, &request(9, &[])), (1, &request(9, &[]))), 0);
        // A block that ends with the prompt.
        assert_eq!(shared((0, &request(20, &[1, 2])), (1, &request(40, &[1, 2]))), 20);
    }

    #[test]
    fn another_seed_makes_other_prompts() {
        let other = Prompts { seed: 4, ..PROMPTS };
        let request = request(32, &[1]);
        let same = PROMPTS.token_ids(0, &request).zip(other.token_ids(0, &request));
        assert!(same.filter(|(a, b)| a == b).count() < 4);
    }
}
