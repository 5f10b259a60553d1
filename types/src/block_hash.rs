//! Names of KV blocks that every part of Baton computes alike, wherever it learns the tokens: from a
//! prompt, or from an engine that tells what it stored. An engine's own names depend on its version
//! and on a seed of its process.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Names a full block by its content and that of every block before it, within its [`BlockScope`].
///
/// 64 bits of XXH3 (<https://github.com/Cyan4973/xxHash>, `doc/xxhash_spec.md`), chained: a block's
/// seed is its parent's name. With 10 million blocks, two share a name with a probability of 3 in a
/// million; the price would be a request that finds fewer cached tokens than was predicted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(u64);

impl BlockHash {
    /// From a peer, or from [`Self::get`]. Zero is nobody's name.
    pub fn new(value: u64) -> Option<Self> {
        (value != 0).then_some(Self(value))
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What blocks are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockUnit {
    /// Token ids, as the engine counts them.
    Tokens,
    /// Bytes of a prompt whose tokenizer is not at hand. Such blocks compare with their like alone.
    Bytes,
}

/// What must be equal, beside the tokens, for one block's KV to be another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockScope<'a> {
    pub unit: BlockUnit,
    /// The base model, by the first name that its worker serves it under.
    pub model: &'a str,
    /// The LoRA adapter's name; empty for none.
    pub adapter: &'a str,
    /// What a client keeps its prefixes apart by (vLLM's `cache_salt`); empty for none.
    pub salt: &'a str,
}

impl BlockScope<'_> {
    /// The parent of a prompt's first block.
    fn root(&self) -> BlockHash {
        let unit: &[u8] = match self.unit {
            BlockUnit::Tokens => b"tokens",
            BlockUnit::Bytes => b"bytes",
        };
        // Each name is hashed on its own, so that none runs into the next.
        [unit, self.model.as_bytes(), self.adapter.as_bytes(), self.salt.as_bytes()]
            .into_iter()
            .fold(BlockHash(1), |parent, name| chain(parent, name))
    }
}

fn chain(parent: BlockHash, content: &[u8]) -> BlockHash {
    BlockHash(xxh3_64_with_seed(content, parent.0).max(1))
}

/// Names the blocks of one sequence, one after the other.
#[derive(Clone, Debug)]
pub struct BlockHasher {
    parent: BlockHash,
    /// Kept between blocks for its memory.
    bytes: Vec<u8>,
}

impl BlockHasher {
    /// Starts with a sequence's first block.
    pub fn new(scope: &BlockScope<'_>) -> Self {
        Self::after(scope.root())
    }

    /// Goes on after a block that is known.
    pub fn after(parent: BlockHash) -> Self {
        Self { parent, bytes: Vec::new() }
    }

    /// The name of the block that holds these tokens.
    pub fn tokens(&mut self, block: &[u32]) -> BlockHash {
        self.bytes.clear();
        self.bytes.extend(block.iter().flat_map(|token| token.to_le_bytes()));
        self.parent = chain(self.parent, &self.bytes);
        self.parent
    }

    /// The name of the block that holds these bytes.
    pub fn bytes(&mut self, block: &[u8]) -> BlockHash {
        self.parent = chain(self.parent, block);
        self.parent
    }

    /// The names of all full blocks of a prompt.
    pub fn of_tokens(
        scope: &BlockScope<'_>,
        prompt: &[u32],
        block_size_tokens: usize,
    ) -> Vec<BlockHash> {
        let mut hasher = Self::new(scope);
        prompt.chunks_exact(block_size_tokens.max(1)).map(|block| hasher.tokens(block)).collect()
    }

    /// The names of all full blocks of a prompt whose tokens are not known.
    pub fn of_bytes(
        scope: &BlockScope<'_>,
        prompt: &[u8],
        block_size_bytes: usize,
    ) -> Vec<BlockHash> {
        let mut hasher = Self::new(scope);
        prompt.chunks_exact(block_size_bytes.max(1)).map(|block| hasher.bytes(block)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCOPE: BlockScope<'_> =
        BlockScope { unit: BlockUnit::Tokens, model: "m", adapter: "", salt: "" };

    #[test]
    fn names_are_the_same_in_every_build() {
        // Coordinators and workers of different versions compare them.
        let names = BlockHasher::of_tokens(&SCOPE, &[1, 2, 3, 4, 5], 2);
        assert_eq!(format!("{names:?}"), "[03f55e2ee478d1ed, d9c7f337b1d5739e]");
    }

    #[test]
    fn whatever_shapes_the_kv_is_in_the_name() {
        let name = |scope: &BlockScope<'_>| BlockHasher::of_tokens(scope, &[7; 4], 4)[0];
        let scopes = [
            SCOPE,
            BlockScope { unit: BlockUnit::Bytes, ..SCOPE },
            BlockScope { model: "n", ..SCOPE },
            BlockScope { adapter: "m", ..SCOPE },
            BlockScope { salt: "m", ..SCOPE },
            BlockScope { model: "mm", ..SCOPE },
            BlockScope { model: "", adapter: "m", salt: "m", ..SCOPE },
        ];
        let mut names: Vec<_> = scopes.iter().map(name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), scopes.len());
    }

    proptest! {
        #[test]
        fn equal_names_are_equal_prefixes(
            a in prop::collection::vec(0_u32..3, 0..40),
            b in prop::collection::vec(0_u32..3, 0..40),
            block_size in 1_usize..5,
        ) {
            let [names_a, names_b] =
                [&a, &b].map(|tokens| BlockHasher::of_tokens(&SCOPE, tokens, block_size));
            prop_assert_eq!(names_a.len(), a.len() / block_size);
            for (index, (name_a, name_b)) in names_a.iter().zip(&names_b).enumerate() {
                let end = (index + 1) * block_size;
                prop_assert_eq!(name_a == name_b, a[..end] == b[..end]);
            }
        }

        #[test]
        fn a_sequence_that_grows_keeps_its_names(
            tokens in prop::collection::vec(any::<u32>(), 0..60), cut in 0_usize..15,
        ) {
            let whole = BlockHasher::of_tokens(&SCOPE, &tokens, 4);
            let cut = cut.min(whole.len());
            let mut grown = whole[..cut].to_vec();
            let mut hasher = match grown.last() {
                Some(last) => BlockHasher::after(*last),
                None => BlockHasher::new(&SCOPE),
            };
            grown.extend(tokens[4 * cut..].chunks_exact(4).map(|block| hasher.tokens(block)));
            prop_assert_eq!(grown, whole);
        }
    }
}
