//! How much of a prompt's start each worker holds: what the workers tell of their prefix caches, and beside
//! it what they are about to compute, which they cannot tell yet.

use crate::{
    fleet::WorkerKey,
    prefix_index::{Heard, KvUpdate, PrefixIndex},
    request::{PromptBlocks, RequestShape},
};

/// Of a prompt that is not computed yet one block in so many tokens is noted: it stands for all before it.
const EXPECTED_EVERY_TOKENS: u32 = 512;

#[derive(Debug, Default)]
pub(crate) struct Caches {
    told: PrefixIndex<WorkerKey>,
    /// Blocks of prompts that are placed and not computed. Those that several share go with the first that is
    /// through, and are told then.
    expected: PrefixIndex<WorkerKey>,
    /// Counts the changes of both.
    changes: u64,
}

/// What was found of one prompt.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Of [`Caches::changes`].
    as_of: Option<u64>,
    prompt_tokens: u32,
    /// Tokens from the first on, in the workers' order.
    held: Vec<(WorkerKey, u32)>,
    /// The same of what is expected.
    expected: Vec<(WorkerKey, u32)>,
}

impl Found {
    /// What lies there now.
    pub(crate) fn held_by(&self, worker: WorkerKey) -> u32 {
        Walk::through(&self.held).to(worker)
    }

    /// What need not be computed there once it is this prompt's turn. Its last token always is.
    pub(crate) fn hit_tokens(&self, worker: WorkerKey) -> u32 {
        self.hits().tokens(worker)
    }

    /// The same of one worker after the other: fast where they come in their order.
    pub(crate) fn hits(&self) -> Hits<'_> {
        let most = self.prompt_tokens.saturating_sub(1);
        Hits { most, held: Walk::through(&self.held), expected: Walk::through(&self.expected) }
    }

    /// The most that any worker holds of use.
    pub(crate) fn most_tokens(&self) -> u32 {
        self.holders().map(|(_, tokens)| tokens).max().unwrap_or_default()
    }

    /// Whoever holds something, and what of it is of use.
    pub(crate) fn holders(&self) -> impl Iterator<Item = (WorkerKey, u32)> {
        let most = self.prompt_tokens.saturating_sub(1);
        self.held.iter().map(move |(worker, tokens)| (*worker, *tokens.min(&most)))
    }
}

/// See [`Found::hits`].
#[derive(Debug)]
pub(crate) struct Hits<'a> {
    most: u32,
    held: Walk<'a>,
    expected: Walk<'a>,
}

impl Hits<'_> {
    pub(crate) fn tokens(&mut self, worker: WorkerKey) -> u32 {
        self.held.to(worker).max(self.expected.to(worker)).min(self.most)
    }
}

/// A way through workers in their order.
#[derive(Debug)]
struct Walk<'a> {
    of: &'a [(WorkerKey, u32)],
    at: usize,
}

impl<'a> Walk<'a> {
    fn through(of: &'a [(WorkerKey, u32)]) -> Self {
        Self { of, at: 0 }
    }

    fn to(&mut self, worker: WorkerKey) -> u32 {
        let Self { of, at } = self;
        let is_ahead = *at > 0 && of[*at - 1].0 < worker;
        if !is_ahead {
            *at = of.partition_point(|(other, _)| *other < worker);
        }
        while of.get(*at).is_some_and(|(other, _)| *other < worker) {
            *at += 1;
        }
        of.get(*at).filter(|(other, _)| *other == worker).map_or(0, |(_, tokens)| *tokens)
    }
}

impl Caches {
    pub(crate) fn worker_joined(&mut self, worker: WorkerKey) {
        self.changes += 1;
        self.told.worker_joined(worker);
        self.expected.worker_joined(worker);
    }

    pub(crate) fn worker_gone(&mut self, worker: WorkerKey) {
        self.changes += 1;
        self.told.worker_gone(worker);
        self.expected.worker_gone(worker);
    }

    pub(crate) fn told(&self) -> &PrefixIndex<WorkerKey> {
        &self.told
    }

    pub(crate) fn hear(&mut self, worker: WorkerKey, update: &KvUpdate<'_>) -> Heard {
        self.changes += 1;
        self.told.apply(worker, update)
    }

    /// A worker will hold this prompt, as long as nothing comes between.
    pub(crate) fn expect(&mut self, worker: WorkerKey, shape: &RequestShape) {
        for blocks in shape.blocks.iter() {
            self.changes += 1;
            self.expected.stored(worker, &noted(blocks));
        }
    }

    /// It holds it, and tells, or it will not.
    pub(crate) fn expect_no_more(&mut self, worker: WorkerKey, shape: &RequestShape) {
        for blocks in shape.blocks.iter() {
            self.changes += 1;
            self.expected.removed(worker, &noted(blocks));
        }
    }

    /// Brings what was found of a prompt up to date.
    pub(crate) fn find(&self, shape: &RequestShape, found: &mut Found) {
        if found.as_of == Some(self.changes) {
            return;
        }
        found.as_of = Some(self.changes);
        found.prompt_tokens = shape.prompt_tokens;
        let most = shape.prompt_tokens;
        let Found { held, expected, .. } = found;
        held.clear();
        held.extend(shape.held_tokens.iter().map(|(worker, tokens)| (*worker, *tokens.min(&most))));
        expected.clear();
        for blocks in shape.blocks.iter() {
            look_up(&self.told, &blocks.names, blocks.tokens, most, held);
            let tokens = blocks.tokens.saturating_mul(noted_every(blocks));
            look_up(&self.expected, &noted(blocks), tokens, most, expected);
        }
        settle(held);
        settle(expected);
    }

    /// Nothing is expected of anybody.
    #[cfg(test)]
    pub(crate) fn expects_nothing(&self) -> bool {
        self.expected.is_empty()
    }

    /// Gives back some of what workers left behind that are gone.
    pub(crate) fn tidy(&mut self) {
        self.told.tidy();
        self.expected.tidy();
    }
}

fn look_up(
    index: &PrefixIndex<WorkerKey>,
    names: &[baton_types::BlockHash],
    block_tokens: u32,
    most_tokens: u32,
    found: &mut Vec<(WorkerKey, u32)>,
) {
    let from = found.len();
    index.matched(names, found);
    for (_, blocks) in &mut found[from..] {
        *blocks = blocks.saturating_mul(block_tokens).min(most_tokens);
    }
}

/// Each worker once, with the most that was found, in their order.
fn settle(found: &mut Vec<(WorkerKey, u32)>) {
    found.sort_unstable();
    found.dedup_by(|more, kept| {
        let is_same = more.0 == kept.0;
        if is_same {
            kept.1 = more.1;
        }
        is_same
    });
}

fn noted_every(blocks: &PromptBlocks) -> u32 {
    (EXPECTED_EVERY_TOKENS / blocks.tokens.max(1)).max(1)
}

fn noted(blocks: &PromptBlocks) -> Vec<baton_types::BlockHash> {
    let every = noted_every(blocks) as usize;
    blocks.names.iter().skip(every - 1).step_by(every).copied().collect()
}

#[cfg(test)]
mod tests {
    use baton_types::BlockHash;

    use super::*;

    fn names(prompt: u64, blocks: u64) -> Vec<BlockHash> {
        (1..=blocks).map(|block| BlockHash::new(prompt << 32 | block).expect("not 0")).collect()
    }

    fn shape(prompt: u64, blocks: u64, block_tokens: u32) -> RequestShape {
        let names = names(prompt, blocks).into();
        let prompt_tokens = block_tokens * u32::try_from(blocks).expect("a few") + 1;
        let blocks = [PromptBlocks { tokens: block_tokens, names }].into();
        RequestShape { prompt_tokens, blocks, ..RequestShape::default() }
    }

    fn told(caches: &mut Caches, worker: WorkerKey, stored: &[BlockHash]) {
        let update = KvUpdate { sequence: 1, restart: true, removed: &[], stored };
        assert_eq!(caches.hear(worker, &update), Heard::Applied);
    }

    #[test]
    fn what_is_told_counts_from_then_on_and_what_is_expected_cannot_be_read() {
        let [a, b] = [WorkerKey(1), WorkerKey(2)];
        let mut caches = Caches::default();
        for worker in [a, b] {
            caches.worker_joined(worker);
        }
        let (shape, mut found) = (shape(7, 100, 16), Found::default());
        caches.find(&shape, &mut found);
        assert_eq!([a, b].map(|worker| found.hit_tokens(worker)), [0, 0]);

        told(&mut caches, a, &names(7, 40));
        caches.expect(b, &shape);
        assert_eq!(found.hit_tokens(a), 0, "nobody looked");
        caches.find(&shape, &mut found);
        assert_eq!([a, b].map(|worker| found.held_by(worker)), [640, 0]);
        // Of 1600 tokens, in steps of 512.
        assert_eq!([a, b].map(|worker| found.hit_tokens(worker)), [640, 1536]);
        assert!(found.holders().eq([(a, 640)]));

        caches.expect_no_more(b, &shape);
        assert!(caches.expects_nothing());
        told(&mut caches, b, &names(7, 100));
        caches.find(&shape, &mut found);
        assert_eq!([a, b].map(|worker| found.hit_tokens(worker)), [640, 1600]);
        caches.worker_gone(b);
        caches.find(&shape, &mut found);
        assert_eq!([a, b].map(|worker| found.hit_tokens(worker)), [640, 0]);
    }

    #[test]
    fn the_last_token_is_always_computed_and_the_most_that_is_known_counts() {
        let worker = WorkerKey(1);
        let mut caches = Caches::default();
        caches.worker_joined(worker);
        let mut shape = shape(7, 4, 512);
        shape.prompt_tokens = 4 * 512;
        shape.held_tokens = [(worker, 100)].into();
        let mut found = Found::default();
        caches.find(&shape, &mut found);
        assert_eq!(found.held_by(worker), 100, "a guess");
        told(&mut caches, worker, &names(7, 4));
        caches.find(&shape, &mut found);
        assert_eq!((found.held_by(worker), found.hit_tokens(worker)), (2048, 2047));
    }
}
