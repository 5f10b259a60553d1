use std::collections::HashMap;

use baton_types::{BlockHash, BlockHasher, BlockScope, BlockUnit};

use super::message::{BlockStored, EngineHash, Event, ExtraKey};
use crate::kv_cache::KvCacheLog;

/// Where the engine itself keeps KV; other places (host memory, a store) are not its prefix cache.
const DEVICE: &str = "GPU";

/// vLLM's names of the blocks that it holds, in ours.
#[derive(Debug)]
pub(super) struct Translation {
    model: String,
    block_size_tokens: u32,
    ours: HashMap<EngineHash, BlockHash>,
    log: KvCacheLog,
    /// The model mixes kinds of attention: a block may be gone for one of them and there for another.
    is_hybrid: bool,
}

impl Translation {
    pub(super) fn new(model: String, block_size_tokens: u32, log: KvCacheLog) -> Self {
        Self { model, block_size_tokens, ours: HashMap::new(), log, is_hybrid: false }
    }

    /// Blocks that have a name of ours.
    #[cfg(feature = "fuzzing")]
    pub(super) fn len(&self) -> usize {
        self.ours.len()
    }

    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::BlockStored(stored) if is_device(stored.medium.as_deref()) => {
                if self.is_one_kind(stored.group_idx) {
                    self.stored(stored);
                }
            }
            Event::BlockRemoved(removed) if is_device(removed.medium.as_deref()) => {
                if self.is_one_kind(removed.group_idx) {
                    for hash in &removed.block_hashes {
                        if let Some(block) = self.ours.remove(hash) {
                            self.log.removed(block);
                        }
                    }
                }
            }
            Event::AllBlocksCleared => self.cleared(),
            Event::BlockStored(_) | Event::BlockRemoved(_) | Event::Unknown => {}
        }
    }

    pub(super) fn cleared(&mut self) {
        self.ours.clear();
        self.log.cleared();
    }

    /// False of a hybrid model, of whose blocks nothing is told.
    fn is_one_kind(&mut self, group: Option<u32>) -> bool {
        if !self.is_hybrid && group.is_some_and(|group| group > 0) {
            tracing::warn!("the model mixes kinds of attention: its prefix cache is not followed");
            self.is_hybrid = true;
            self.cleared();
        }
        !self.is_hybrid
    }

    fn stored(&mut self, stored: &BlockStored) {
        let block_size = self.block_size_tokens as usize;
        // Part of a block, or blocks of another size, have no name that a prompt's blocks could have.
        if stored.block_size != self.block_size_tokens
            || stored.token_ids.len() != stored.block_hashes.len() * block_size
        {
            return;
        }
        let adapter = stored.lora_name.as_deref().unwrap_or_default();
        let first_is_root = stored.parent_block_hash.is_none();
        let mut hasher = match stored.parent_block_hash {
            // Where the parent has no name of ours, its children have none.
            Some(parent) => match self.ours.get(&parent) {
                Some(parent) => BlockHasher::after(*parent),
                None => return,
            },
            None => {
                let salt = match others_than(adapter, keys(stored, 0)).as_deref() {
                    Some([]) => "",
                    Some([salt]) => salt,
                    _ => return,
                };
                BlockHasher::new(&BlockScope {
                    unit: BlockUnit::Tokens,
                    model: &self.model,
                    adapter,
                    salt,
                })
            }
        };
        let blocks = stored.token_ids.chunks_exact(block_size).zip(&stored.block_hashes);
        for (index, (tokens, theirs)) in blocks.enumerate() {
            let is_root = first_is_root && index == 0;
            let depends_on_more =
                others_than(adapter, keys(stored, index)).is_none_or(|keys| !keys.is_empty());
            if depends_on_more && !is_root {
                return;
            }
            let block = hasher.tokens(tokens);
            // A name of theirs that changes its meaning would leave the former behind.
            if let Some(former) = self.ours.insert(*theirs, block)
                && former != block
            {
                self.log.removed(former);
            }
            self.log.stored(block);
        }
    }
}

fn is_device(medium: Option<&str>) -> bool {
    medium.is_none_or(|medium| medium == DEVICE)
}

fn keys(stored: &BlockStored, block: usize) -> &[ExtraKey] {
    let keys = stored.extra_keys.as_ref().and_then(|keys| keys.get(block)?.as_deref());
    keys.unwrap_or_default()
}

/// The texts beside the adapter's name; `None` where there are other keys than texts.
fn others_than<'a>(adapter: &str, keys: &'a [ExtraKey]) -> Option<Vec<&'a str>> {
    let texts: Option<Vec<&str>> = keys
        .iter()
        .map(|key| match key {
            ExtraKey::Text(text) => Some(text.as_str()),
            ExtraKey::Other(_) => None,
        })
        .collect();
    let mut texts = texts?;
    if !adapter.is_empty() && texts.first() == Some(&adapter) {
        texts.remove(0);
    }
    Some(texts)
}
