//! The bytes of the KV cache.
//!
//! State flows through them as it does through attention: the entry of a token is expanded from the
//! stored entry of the token before it and the token's own id, and what is sampled depends on every
//! byte of the sequence. Whoever computes on after a prefix hit or a handoff computes from the bytes
//! that are there, right or wrong.

use crc_fast::CrcAlgorithm::Crc64Nvme;

use super::block_pool::BlockId;

#[derive(Debug)]
pub(super) struct KvStore {
    bytes: Vec<u8>,
    block_tokens: usize,
    entry_bytes: usize,
    /// Stands for the model's weights.
    root: [u8; 32],
}

impl KvStore {
    pub(super) fn new(model: &str, blocks: u32, block_tokens: u32, entry_bytes: u32) -> Self {
        let (block_tokens, entry_bytes) = (block_tokens as usize, entry_bytes as usize);
        Self {
            bytes: vec![0; blocks as usize * block_tokens * entry_bytes],
            block_tokens,
            entry_bytes,
            root: *blake3::hash(model.as_bytes()).as_bytes(),
        }
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.block_tokens * self.entry_bytes
    }

    pub(super) fn block(&self, block: BlockId) -> &[u8] {
        let start = block.0 as usize * self.block_bytes();
        &self.bytes[start..start + self.block_bytes()]
    }

    pub(super) fn block_mut(&mut self, block: BlockId) -> &mut [u8] {
        let length = self.block_bytes();
        let start = block.0 as usize * length;
        &mut self.bytes[start..start + length]
    }

    /// The bytes of a block's first `tokens` entries.
    pub(super) fn entries(&self, block: BlockId, tokens: usize) -> &[u8] {
        &self.block(block)[..tokens.min(self.block_tokens) * self.entry_bytes]
    }

    /// Computes the KV of the token at `position` of a sequence that lies in `blocks`.
    pub(super) fn compute(&mut self, blocks: &[BlockId], position: usize, token: u32) {
        let mut hasher = blake3::Hasher::new();
        match position.checked_sub(1).and_then(|before| self.entry(blocks, before)) {
            Some(range) => {
                let before = &self.bytes[range];
                hasher.update(&before[..before.len().min(32)]);
                hasher.update(&crc(before).to_le_bytes());
            }
            None => {
                hasher.update(&self.root);
            }
        }
        hasher.update(&token.to_le_bytes());
        if let Some(range) = self.entry(blocks, position) {
            hasher.finalize_xof().fill(&mut self.bytes[range]);
        }
    }

    fn entry(&self, blocks: &[BlockId], position: usize) -> Option<std::ops::Range<usize>> {
        let block = blocks.get(position / self.block_tokens)?;
        let start =
            block.0 as usize * self.block_bytes() + position % self.block_tokens * self.entry_bytes;
        Some(start..start + self.entry_bytes)
    }
}

/// What a sequence's KV comes to. Full blocks are read once, when they are full or when decode
/// begins; each step reads the last block, and two of the others in turn, as they lie there then.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Attention {
    full_blocks: usize,
    of_full_blocks: u64,
}

impl Attention {
    /// Over the first `tokens` tokens, not fewer than at the last call. Depends on nothing but the
    /// bytes, so that a sequence that was computed in other portions comes to the same.
    pub(super) fn read(&mut self, store: &KvStore, blocks: &[BlockId], tokens: usize) -> u64 {
        let full_blocks = (tokens / store.block_tokens).min(blocks.len());
        for block in &blocks[self.full_blocks.min(full_blocks)..full_blocks] {
            self.of_full_blocks = mix(self.of_full_blocks, crc(store.block(*block)));
        }
        self.full_blocks = full_blocks;

        let mut state = mix(self.of_full_blocks, tokens as u64);
        let in_last = tokens % store.block_tokens;
        if let Some(last) = blocks.get(full_blocks).filter(|_| in_last > 0) {
            state = mix(state, crc(store.entries(*last, in_last)));
        }
        for turn in turns(tokens, full_blocks) {
            if let Some(block) = blocks[..full_blocks].get(turn) {
                state = mix(state, crc(store.block(*block)));
            }
        }
        state
    }
}

/// Which of the full blocks are read again at this length: one of the first 2ᵏ and one of the last
/// 2ᵏ, for the largest 2ᵏ that there are. Every block has its turn within 2ᵏ steps, though their
/// number grows meanwhile, or soon after k does.
fn turns(tokens: usize, full_blocks: usize) -> [usize; 2] {
    let span = full_blocks.checked_ilog2().map_or(1, |power| 1 << power);
    let turn = tokens % span;
    [turn, full_blocks.saturating_sub(1 + turn)]
}

fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(Crc64Nvme, bytes)
}

/// The finisher of SplitMix64 over both values.
pub(super) fn mix(state: u64, value: u64) -> u64 {
    let mut mixed = state.rotate_left(23).wrapping_add(0x9E37_79B9_7F4A_7C15) ^ value;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: [BlockId; 3] = [BlockId(2), BlockId(0), BlockId(3)];

    fn filled(tokens: usize) -> KvStore {
        let mut store = KvStore::new("m", 4, 4, 40);
        for position in 0..tokens {
            store.compute(&BLOCKS, position, 7 + u32::try_from(position).unwrap());
        }
        store
    }

    #[test]
    fn every_byte_of_the_sequence_counts_and_no_other() {
        for tokens in [3, 10] {
            let whole = Attention::default().read(&filled(tokens), &BLOCKS, tokens);
            for block in 0..4 {
                let index = BLOCKS.iter().position(|of| of.0 == block);
                let entries = index.map_or(0, |index| tokens.saturating_sub(index * 4).min(4));
                for byte in 0..4 * 40 {
                    let mut flipped = filled(tokens);
                    flipped.block_mut(BlockId(block))[byte] ^= 1;
                    let read = Attention::default().read(&flipped, &BLOCKS, tokens);
                    assert_eq!(read != whole, byte < entries * 40, "byte {byte} of block {block}");
                }
            }
        }
    }

    #[test]
    fn what_follows_a_wrong_byte_is_wrong_too() {
        let right = filled(10);
        let mut wrong = filled(9);
        wrong.block_mut(BLOCKS[2])[39] ^= 1;
        wrong.compute(&BLOCKS, 9, 16);
        assert_ne!(right.block(BLOCKS[2])[40..80], wrong.block(BLOCKS[2])[40..80]);
    }

    #[test]
    fn reading_step_by_step_comes_to_the_same_as_at_once() {
        let store = filled(12);
        let mut stepwise = Attention::default();
        for tokens in 1..=12 {
            let at_once = Attention::default().read(&store, &BLOCKS, tokens);
            assert_eq!(stepwise.read(&store, &BLOCKS, tokens), at_once, "{tokens}");
        }
    }

    #[test]
    fn every_block_has_its_turn_while_their_number_grows() {
        for prompt in [4, 8, 64, 180, 500] {
            let mut unseen: std::collections::BTreeSet<_> = (0..prompt / 4).collect();
            for tokens in prompt..prompt + prompt / 4 {
                for turn in turns(tokens, tokens / 4) {
                    unseen.remove(&turn);
                }
            }
            assert_eq!(unseen.len(), 0, "of a prompt of {prompt}: {unseen:?}");
        }
    }
}
