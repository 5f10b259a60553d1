use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use crate::kv_cache::KvCacheLog;

/// One block of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockId(pub u32);

/// Names a full block by its tokens and those of every block before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub u64);

impl BlockHash {
    /// As others know it.
    fn to_tell(self) -> Option<baton_types::BlockHash> {
        baton_types::BlockHash::new(self.0)
    }
}

/// Counts who uses each block. A block that nobody uses keeps its contents, and can be found by its
/// hash, until it is the one that was not used for the longest time and somebody needs a block.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    by_hash: HashMap<BlockHash, BlockId, BuildHasherDefault<HashOfHash>>,
    /// Ends of the list of unused blocks: taken from the front.
    front: Option<BlockId>,
    back: Option<BlockId>,
    free: u32,
    /// Where it is told which blocks can be found.
    log: Option<KvCacheLog>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    users: u32,
    hash: Option<BlockHash>,
    previous: Option<BlockId>,
    next: Option<BlockId>,
}

impl BlockPool {
    pub(super) fn new(blocks: u32) -> Self {
        let mut pool = Self {
            blocks: vec![Block::default(); blocks as usize],
            by_hash: HashMap::default(),
            front: None,
            back: None,
            free: 0,
            log: None,
        };
        for index in 0..blocks {
            pool.push_back(BlockId(index));
        }
        pool
    }

    /// Tells from now on which blocks can be found.
    pub(super) fn tell(&mut self, log: KvCacheLog) {
        self.log = Some(log);
    }

    pub(super) fn total(&self) -> u32 {
        u32::try_from(self.blocks.len()).unwrap_or(u32::MAX)
    }

    /// Blocks that nobody uses, those that are kept for their contents included.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    pub(super) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).copied()
    }

    pub(super) fn is_used(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].users > 0
    }

    /// A block whose contents nobody needs, for one user.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.front?;
        self.unlink(block);
        let entry = &mut self.blocks[block.0 as usize];
        entry.users = 1;
        if let Some(hash) = entry.hash.take() {
            self.by_hash.remove(&hash);
            if let Some((log, hash)) = self.log.as_ref().zip(hash.to_tell()) {
                log.removed(hash);
            }
        }
        Some(block)
    }

    /// One more user.
    pub(super) fn retain(&mut self, block: BlockId) {
        if !self.is_used(block) {
            self.unlink(block);
        }
        self.blocks[block.0 as usize].users += 1;
    }

    /// One user less.
    pub(super) fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        debug_assert!(entry.users > 0, "a block is released once for each use");
        entry.users = entry.users.saturating_sub(1);
        if entry.users == 0 {
            match entry.hash {
                Some(_) => self.push_back(block),
                // Nobody can find it any more: the first to be used again.
                None => self.push_front(block),
            }
        }
    }

    /// Lets a full block be found by what it holds. Of two blocks with equal contents the first
    /// keeps the name.
    pub(super) fn name(&mut self, block: BlockId, hash: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_hash.entry(hash) {
            vacant.insert(block);
            self.blocks[block.0 as usize].hash = Some(hash);
            if let Some((log, hash)) = self.log.as_ref().zip(hash.to_tell()) {
                log.stored(hash);
            }
        }
    }

    fn push_back(&mut self, block: BlockId) {
        let previous = self.back.replace(block);
        self.blocks[block.0 as usize].previous = previous;
        match previous {
            Some(previous) => self.blocks[previous.0 as usize].next = Some(block),
            None => self.front = Some(block),
        }
        self.free += 1;
    }

    fn push_front(&mut self, block: BlockId) {
        let next = self.front.replace(block);
        self.blocks[block.0 as usize].next = next;
        match next {
            Some(next) => self.blocks[next.0 as usize].previous = Some(block),
            None => self.back = Some(block),
        }
        self.free += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        let (previous, next) = (entry.previous.take(), entry.next.take());
        match previous {
            Some(previous) => self.blocks[previous.0 as usize].next = next,
            None => self.front = next,
        }
        match next {
            Some(next) => self.blocks[next.0 as usize].previous = previous,
            None => self.back = previous,
        }
        self.free -= 1;
    }
}

/// A block's hash is one already: hashing it again would only cost time.
#[derive(Clone, Copy, Debug, Default)]
struct HashOfHash(u64);

impl Hasher for HashOfHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_named_block_is_evicted_last_of_all_unnamed() {
        let mut pool = BlockPool::new(3);
        let [a, b, c] = [0; 3].map(|_| pool.allocate().unwrap());
        pool.name(a, BlockHash(1));
        pool.name(b, BlockHash(2));
        for block in [a, b, c] {
            pool.release(block);
        }
        assert_eq!(pool.free(), 3);
        assert_eq!(pool.allocate(), Some(c), "it holds nothing");
        assert_eq!(pool.find(BlockHash(1)), Some(a));
        assert_eq!(pool.allocate(), Some(a), "unused for longer than b");
        assert_eq!(pool.find(BlockHash(1)), None);
        assert_eq!(pool.find(BlockHash(2)), Some(b));
    }

    #[test]
    fn a_found_block_is_nobody_elses() {
        let mut pool = BlockPool::new(2);
        let a = pool.allocate().unwrap();
        pool.name(a, BlockHash(1));
        pool.release(a);
        pool.retain(a);
        pool.retain(a);
        assert_eq!(pool.free(), 1);
        let b = pool.allocate().unwrap();
        assert_ne!(a, b);
        assert_eq!(pool.allocate(), None);
        pool.release(a);
        assert_eq!(pool.allocate(), None, "one user is left");
        pool.release(a);
        assert_eq!(pool.allocate(), Some(a));
    }

    #[test]
    fn equal_contents_are_found_once() {
        let mut pool = BlockPool::new(2);
        let [a, b] = [0; 2].map(|_| pool.allocate().unwrap());
        pool.name(a, BlockHash(1));
        pool.name(b, BlockHash(1));
        pool.release(b);
        assert_eq!(pool.allocate(), Some(b), "the nameless twin goes first");
        assert_eq!(pool.find(BlockHash(1)), Some(a));
    }
}
