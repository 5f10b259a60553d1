use baton_types::{BlockScope, BlockUnit, Generation, HandoffId, PromptDigest};
use sha2::{Digest, Sha256};

use super::block_pool::BlockHash;

/// The part of a handoff's fence that an engine knows: its own epoch is the worker's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HandoffName {
    pub(super) handoff: HandoffId,
    pub(super) generation: Generation,
}

/// What a request does for a handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Produce,
    Consume,
    /// Produce what is cached, all of the prompt but its last token; nothing where it is not.
    Lend,
}

impl Part {
    pub(super) fn exports(self) -> bool {
        matches!(self, Self::Produce | Self::Lend)
    }
}

/// SHA-256 over the token ids, then the cache salt if there is one.
pub(super) fn prompt_digest(tokens: &[u32], cache_salt: Option<&str>) -> PromptDigest {
    let mut hasher = Sha256::new();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    hasher.update(&bytes);
    if let Some(salt) = cache_salt {
        hasher.update(salt.as_bytes());
    }
    PromptDigest(hasher.finalize().into())
}

/// Names full blocks as a coordinator does, which is told of them.
#[derive(Clone, Debug)]
pub(super) struct BlockHasher(baton_types::BlockHasher);

impl BlockHasher {
    /// Prompts of different salts share no blocks.
    pub(super) fn new(model: &str, cache_salt: Option<&str>) -> Self {
        Self(baton_types::BlockHasher::new(&BlockScope {
            unit: BlockUnit::Tokens,
            model,
            adapter: "",
            salt: cache_salt.unwrap_or_default(),
        }))
    }

    pub(super) fn next(&mut self, tokens: &[u32]) -> BlockHash {
        BlockHash(self.0.tokens(tokens).get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_sha256_of_little_endian_ids() {
        // printf '\x01\0\0\0\x02\x01\0\0' | sha256sum
        let expected = "fb8bbe2ad3ab5292f19bc5d75bbab9b5fbddc5a78ce47ab41b2d3d59bca08596";
        let digest = prompt_digest(&[1, 258], None);
        assert_eq!(digest.to_string(), expected);
        assert_ne!(digest, prompt_digest(&[258, 1], None));
        assert_ne!(digest, prompt_digest(&[1, 258], Some("salt")));
    }

    #[test]
    fn a_block_is_named_by_all_before_it_too() {
        let name = |salt, blocks: &[&[u32]]| {
            let mut hasher = BlockHasher::new("m", salt);
            blocks.iter().map(|block| hasher.next(block)).last()
        };
        assert_eq!(name(None, &[&[1, 2], &[3, 4]]), name(None, &[&[1, 2], &[3, 4]]));
        assert_ne!(name(None, &[&[1, 2], &[3, 4]]), name(None, &[&[2, 1], &[3, 4]]));
        assert_ne!(name(None, &[&[1, 2]]), name(Some("salt"), &[&[1, 2]]));
    }
}
