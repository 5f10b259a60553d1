//! By what names the workers' caches know a prompt, for the core, which follows what they tell; and the guess for
//! those that do not tell.

use std::{collections::HashMap, sync::Arc, time::Duration};

use baton_core::{KvUpdate, PrefixIndex, PromptBlocks, RoutedIndex, RoutedLimits, WorkerKey};
use baton_proto as wire;
use baton_types::{BlockHash, BlockHasher, BlockScope, BlockUnit};

use crate::prompt::{Prompt, PromptContent};

/// Blocks of a prompt whose tokens are not known have about as many bytes as an engine's have tokens,
/// times this: English text in a current vocabulary.
const BYTES_PER_TOKEN: u32 = 4;
/// Of engines that do not say: what vLLM takes where it is not told otherwise.
const USUAL_BLOCK_SIZE_TOKENS: u32 = 16;
/// What is guessed is guessed in coarser blocks than an engine's: fewer tokens say little.
const GUESSED_BLOCK_TOKENS: u32 = 64;
/// And not at the end of each, but so that a guess falls short by a sixteenth at most: a prompt of 256 KiB has 112 places,
/// not 1,024.
const GUESSED_PART: usize = 16;

#[derive(Debug)]
pub(crate) struct Prefixes {
    /// What workers tell is believed.
    precise: bool,
    routed: RoutedIndex<WorkerKey>,
    /// Each kind of worker once.
    families: Vec<Family>,
    members: HashMap<WorkerKey, usize>,
    updates: Updates,
    bytes_per_token: BytesPerToken,
}

/// Workers of equal blocks: a prompt is cut and named once for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Family {
    /// As in the hello: the base model first.
    models: Vec<String>,
    adapters: Vec<String>,
    block_size_tokens: u32,
    /// Its members tell of their caches.
    tells: bool,
}

/// Kept between messages for its memory.
#[derive(Debug, Default)]
struct Updates {
    removed: Vec<BlockHash>,
    stored: Vec<BlockHash>,
}

/// What one prompt is looked up by.
#[derive(Clone, Debug, Default)]
pub(crate) struct CachedPrefix {
    /// Of the whole prompt; a guess where its tokens are not known.
    pub(crate) prompt_tokens: u32,
    /// As those who tell of their caches name its blocks.
    pub(crate) blocks: Arc<[PromptBlocks]>,
    /// A guess at the tokens, from the first on, that each of the others holds.
    pub(crate) held_tokens: Arc<[(WorkerKey, u32)]>,
    /// Of a prompt whose tokens are not known.
    bytes: Option<usize>,
    /// Its [places](guessed_places) for the workers whose caches are guessed, by family: named once for all uses.
    guessed: Vec<(usize, Vec<BlockHash>)>,
}

impl Prefixes {
    /// Without `precise` nothing is believed of what workers tell, and all is guessed.
    pub(crate) fn new(precise: bool) -> Self {
        Self {
            precise,
            routed: RoutedIndex::new(RoutedLimits::default()),
            families: Vec::new(),
            members: HashMap::new(),
            updates: Updates::default(),
            bytes_per_token: BytesPerToken::default(),
        }
    }

    pub(crate) fn worker_attached(&mut self, worker: WorkerKey, hello: &wire::Hello) {
        let cache = hello.kv_cache.as_ref();
        let family = Family {
            models: hello.models.clone(),
            adapters: cache.map(|cache| cache.adapters.clone()).unwrap_or_default(),
            block_size_tokens: cache
                .map_or(USUAL_BLOCK_SIZE_TOKENS, |cache| cache.block_size_tokens.max(1)),
            tells: self.precise && cache.is_some(),
        };
        let known = self.families.iter().position(|known| *known == family);
        let family = known.unwrap_or_else(|| {
            self.families.push(family);
            self.families.len() - 1
        });
        self.members.insert(worker, family);
    }

    pub(crate) fn worker_gone(&mut self, worker: WorkerKey) {
        self.members.remove(&worker);
        self.routed.worker_gone(worker);
    }

    /// A worker's news, as the core takes them; none of one that is not believed.
    pub(crate) fn news(
        &mut self,
        worker: WorkerKey,
        events: &wire::KvEvents,
    ) -> Option<KvUpdate<'_>> {
        if !self.tells(worker) {
            return None;
        }
        let Updates { removed, stored } = &mut self.updates;
        for (names, numbers) in [(&mut *removed, &events.removed), (&mut *stored, &events.stored)] {
            names.clear();
            names.extend(numbers.iter().copied().filter_map(BlockHash::new));
        }
        Some(KvUpdate { sequence: events.sequence, restart: events.restart, removed, stored })
    }

    /// Whether a worker tells of its cache and was not heard: it is to be asked again.
    pub(crate) fn is_unheard(&self, worker: WorkerKey, told: &PrefixIndex<WorkerKey>) -> bool {
        self.tells(worker) && !told.is_heard(worker)
    }

    fn tells(&self, worker: WorkerKey) -> bool {
        self.members.get(&worker).is_some_and(|family| self.families[*family].tells)
    }

    /// What the prompt is looked up by at the workers that serve the model.
    pub(crate) fn cached(
        &mut self,
        model: Option<&str>,
        prompt: &Prompt,
        now: Duration,
    ) -> CachedPrefix {
        let prompt_tokens = self.prompt_tokens(&prompt.content);
        let (mut told, mut held_tokens) = (Vec::<PromptBlocks>::new(), Vec::new());
        let mut held = Vec::new();
        let mut guessed = Vec::new();
        for (index, family) in self.families.iter().enumerate() {
            if !family.serves(model) {
                continue;
            }
            let names = family.blocks(model, prompt);
            let tokens = family.known_by_tokens(&prompt.content);
            if family.follows(&prompt.content) {
                let is_known = |blocks: &PromptBlocks| *blocks.names == *names;
                if !told.iter().any(is_known) {
                    told.push(PromptBlocks { tokens, names: names.into() });
                }
                continue;
            }
            held.clear();
            let places: Vec<usize> = guessed_places(names.len()).collect();
            let names: Vec<BlockHash> = places.iter().map(|block| names[block - 1]).collect();
            self.routed.matched(&names, now, &mut held);
            guessed.push((index, names));
            let members =
                held.iter().filter(|(worker, _)| self.members.get(worker) == Some(&index));
            held_tokens.extend(members.filter_map(|(worker, matched)| {
                let blocks = places.get((*matched as usize).checked_sub(1)?)?;
                let tokens = u32::try_from(*blocks).ok()?.saturating_mul(tokens);
                Some((*worker, tokens.min(prompt_tokens)))
            }));
        }
        let bytes = match &prompt.content {
            PromptContent::Tokens(_) => None,
            PromptContent::Bytes(bytes) => Some(bytes.len()),
        };
        let (blocks, held_tokens) = (told.into(), held_tokens.into());
        CachedPrefix { prompt_tokens, blocks, held_tokens, bytes, guessed }
    }

    fn prompt_tokens(&self, content: &PromptContent) -> u32 {
        match content {
            PromptContent::Tokens(tokens) => u32::try_from(tokens.len()).unwrap_or(u32::MAX),
            PromptContent::Bytes(bytes) => self.bytes_per_token.tokens(bytes.len()),
        }
    }

    /// A handoff to this worker had so many blocks: now it is known how many tokens a prompt had that
    /// was not tokenized here.
    pub(crate) fn prompt_had_blocks(
        &mut self,
        worker: WorkerKey,
        prompt: &CachedPrefix,
        blocks: u32,
    ) {
        let family = self.members.get(&worker).map(|family| &self.families[*family]);
        if let (Some(family), Some(bytes)) = (family, prompt.bytes) {
            self.bytes_per_token.learn(bytes, blocks, family.block_size_tokens);
        }
    }

    /// A prompt went to a worker.
    pub(crate) fn routed(&mut self, worker: WorkerKey, prompt: &CachedPrefix, now: Duration) {
        let Some(family) = self.members.get(&worker) else { return };
        if let Some((_, names)) = prompt.guessed.iter().find(|(of, _)| of == family) {
            let blocks = |names| guessed_places(usize::MAX).take(names).last().unwrap_or(0);
            self.routed.routed(worker, names, blocks, now);
        }
    }

    /// Gives back what is no longer needed, a little at a time.
    pub(crate) fn tidy(&mut self, now: Duration) {
        self.routed.tidy(now);
    }
}

impl Family {
    fn serves(&self, model: Option<&str>) -> bool {
        model.is_none_or(|model| self.models.iter().any(|name| name == model))
    }

    /// Whether the prompt's blocks can be found among those that its members tell of.
    fn follows(&self, content: &PromptContent) -> bool {
        self.tells && matches!(content, PromptContent::Tokens(_))
    }

    /// The tokens of a block by which the prompt is looked up.
    fn known_by_tokens(&self, content: &PromptContent) -> u32 {
        if self.follows(content) { self.block_size_tokens } else { GUESSED_BLOCK_TOKENS }
    }

    fn blocks(&self, model: Option<&str>, prompt: &Prompt) -> Vec<BlockHash> {
        let adapter = model.filter(|model| self.adapters.iter().any(|adapter| adapter == model));
        let scope = BlockScope {
            unit: BlockUnit::Tokens,
            model: self.models.first().map_or("", String::as_str),
            adapter: adapter.unwrap_or_default(),
            salt: &prompt.cache_salt,
        };
        let size = self.known_by_tokens(&prompt.content) as usize;
        match &prompt.content {
            PromptContent::Tokens(tokens) => BlockHasher::of_tokens(&scope, tokens, size),
            PromptContent::Bytes(bytes) => {
                let scope = BlockScope { unit: BlockUnit::Bytes, ..scope };
                BlockHasher::of_bytes(&scope, bytes, size * BYTES_PER_TOKEN as usize)
            }
        }
    }
}

/// After which of so many blocks it is noted what was routed where: names tell of all that lies before them, so that
/// some can be left out, and the more of them the further they are from the start.
fn guessed_places(blocks: usize) -> impl Iterator<Item = usize> {
    let next = |block: &usize| {
        let step = (1 << block.ilog2()) / GUESSED_PART;
        Some(block + step.max(1))
    };
    std::iter::successors(Some(1), next).take_while(move |block| *block <= blocks)
}

/// How many bytes of a request's prompt make a token of it, as far as that was seen.
#[derive(Clone, Copy, Debug)]
struct BytesPerToken(f64);

impl Default for BytesPerToken {
    fn default() -> Self {
        Self(f64::from(BYTES_PER_TOKEN))
    }
}

impl BytesPerToken {
    /// Of the last observation. One prompt in French or in Base64 shall not count for all.
    const WEIGHT: f64 = 0.1;
    /// Shorter prompts say little: of their last block nobody knows how full it is.
    const FEWEST_BLOCKS: u32 = 4;

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    fn tokens(self, bytes: usize) -> u32 {
        // Saturates.
        (bytes as f64 / self.0).ceil() as u32
    }

    #[allow(clippy::cast_precision_loss)]
    fn learn(&mut self, bytes: usize, blocks: u32, block_size_tokens: u32) {
        if blocks < Self::FEWEST_BLOCKS {
            return;
        }
        // The last one is half full, on average.
        let tokens = (f64::from(blocks) - 0.5) * f64::from(block_size_tokens);
        let seen = (bytes as f64 / tokens).clamp(0.25, 64.0);
        self.0 += Self::WEIGHT * (seen - self.0);
    }
}

#[cfg(test)]
mod tests {
    use baton_core::{Core, HandoffMode, Heard, RequestShape, Settings, WorkerDescription};
    use baton_types::{Epoch, HandoffId, Role};

    use super::*;

    /// A core, and the keys of workers that are attached to it.
    fn workers(names: &[&str]) -> (Core, Vec<WorkerKey>) {
        let mut core = Core::new(Settings::default());
        let mut actions = Vec::new();
        let workers = names
            .iter()
            .map(|name| {
                let description = WorkerDescription {
                    name: (*name).to_owned(),
                    epoch: Epoch::random(),
                    role: Role::Decode,
                    models: vec!["m".into()],
                    handoff: HandoffMode::None,
                    model: None,
                    kv_capacity_tokens: None,
                    pulls_prefixes: false,
                };
                core.attach(description, Duration::ZERO, &mut actions)
            })
            .collect();
        (core, workers)
    }

    /// What the core finds of a prompt on each of these workers.
    fn held<const N: usize>(
        core: &mut Core,
        workers: [WorkerKey; N],
        prompt: &CachedPrefix,
    ) -> [u32; N] {
        let shape = RequestShape {
            prompt_tokens: prompt.prompt_tokens,
            blocks: prompt.blocks.clone(),
            held_tokens: prompt.held_tokens.clone(),
            ..RequestShape::default()
        };
        let request = core.arrive(shape, HandoffId::random(), Duration::ZERO, &mut Vec::new());
        workers.map(|worker| core.held_tokens(request, worker))
    }

    fn hello(models: &[&str], block_size_tokens: Option<u32>, adapters: &[&str]) -> wire::Hello {
        let strings = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        wire::Hello {
            models: strings(models),
            kv_cache: block_size_tokens.map(|block_size_tokens| wire::KvCache {
                block_size_tokens,
                adapters: strings(adapters),
                capacity_tokens: 0,
            }),
            ..wire::Hello::default()
        }
    }

    fn tokens(tokens: impl IntoIterator<Item = u32>) -> Prompt {
        let content = PromptContent::Tokens(tokens.into_iter().collect());
        Prompt { content, cache_salt: String::new() }
    }

    fn told(adapter: &str, block_size: usize, prompt: &[u32]) -> wire::KvEvents {
        let scope = BlockScope { unit: BlockUnit::Tokens, model: "m", adapter, salt: "" };
        let stored = BlockHasher::of_tokens(&scope, prompt, block_size);
        wire::KvEvents {
            sequence: 1,
            restart: true,
            removed: Vec::new(),
            stored: stored.into_iter().map(BlockHash::get).collect(),
        }
    }

    #[test]
    fn what_workers_tell_is_found_whatever_their_block_size() {
        let (mut core, workers) = workers(&["a", "b", "c"]);
        let all @ [a, b, c] = <[_; 3]>::try_from(workers).unwrap();
        let mut prefixes = Prefixes::new(true);
        prefixes.worker_attached(a, &hello(&["m", "alias", "lora"], Some(16), &["lora"]));
        prefixes.worker_attached(b, &hello(&["m"], Some(32), &[]));
        prefixes.worker_attached(c, &hello(&["m"], None, &[]));
        let unheard = all.map(|worker| prefixes.is_unheard(worker, core.told()));
        assert_eq!(unheard, [true, true, false]);
        let prompt: Vec<u32> = (0..100).collect();
        for (worker, block_size) in [(a, 16), (b, 32)] {
            let events = told("", block_size, &prompt);
            let news = prefixes.news(worker, &events).unwrap();
            assert_eq!(core.kv_told(worker, &news), Heard::Applied);
        }
        assert!(prefixes.news(c, &told("", 16, &prompt)).is_none(), "it said that it does not");
        assert_eq!((core.told().blocks_of(a), core.told().blocks_of(b)), (6, 3));

        let longer = tokens(0..1000);
        let cached = prefixes.cached(Some("m"), &longer, Duration::ZERO);
        assert_eq!(cached.prompt_tokens, 1000);
        assert_eq!(held(&mut core, all, &cached), [96, 96, 0]);
        let cached = prefixes.cached(Some("alias"), &longer, Duration::ZERO);
        assert_eq!(held(&mut core, [a, c], &cached), [96, 0]);
        // What was computed without the adapter is of no use with it.
        let cached = prefixes.cached(Some("lora"), &longer, Duration::ZERO);
        assert_eq!(held(&mut core, all, &cached), [0, 0, 0]);

        // c does not tell: what was routed to it is there.
        let of_m = prefixes.cached(Some("m"), &longer, Duration::ZERO);
        prefixes.routed(a, &of_m, Duration::ZERO);
        prefixes.routed(c, &of_m, Duration::ZERO);
        let cached = prefixes.cached(Some("m"), &longer, Duration::ZERO);
        assert_eq!(held(&mut core, all, &cached), [96, 96, 960]);

        // A gap.
        let mut later = told("", 16, &prompt);
        (later.sequence, later.restart) = (3, false);
        let news = prefixes.news(a, &later).unwrap();
        assert_eq!(core.kv_told(a, &news), Heard::NeedsRestart);
        assert!(prefixes.is_unheard(a, core.told()));
        let cached = prefixes.cached(Some("m"), &longer, Duration::ZERO);
        assert_eq!(held(&mut core, all, &cached), [0, 96, 960]);
    }

    #[test]
    fn where_it_is_not_to_be_precise_what_was_routed_stands_in() {
        let (mut core, workers) = workers(&["a", "b"]);
        let both @ [a, b] = <[_; 2]>::try_from(workers).unwrap();
        let mut prefixes = Prefixes::new(false);
        prefixes.worker_attached(a, &hello(&["m"], Some(16), &[]));
        prefixes.worker_attached(b, &hello(&["m"], Some(16), &[]));
        let prompt: Vec<u32> = (0..320).collect();
        assert!(prefixes.news(a, &told("", 16, &prompt)).is_none());
        assert!(!prefixes.is_unheard(a, core.told()), "nobody asks it to tell");
        let cached = prefixes.cached(Some("m"), &tokens(0..320), Duration::ZERO);
        assert_eq!(held(&mut core, both, &cached), [0, 0]);
        prefixes.routed(b, &cached, Duration::ZERO);
        let cached = prefixes.cached(Some("m"), &tokens(0..400), Duration::ZERO);
        assert_eq!(held(&mut core, both, &cached), [0, 320]);
    }

    #[test]
    fn a_guess_falls_short_by_a_sixteenth_at_most() {
        assert!(guessed_places(40).take(31).eq(1..=31));
        assert_eq!((guessed_places(0).count(), guessed_places(1_024).count()), (0, 112));
        for blocks in 1..5_000 {
            let last = guessed_places(blocks).last().unwrap();
            assert!(last <= blocks && (blocks - last) * 16 < blocks, "{last} of {blocks}");
        }

        let (mut core, workers) = workers(&["a"]);
        let a = workers[0];
        let mut prefixes = Prefixes::new(true);
        prefixes.worker_attached(a, &hello(&["m"], None, &[]));
        let first = prefixes.cached(Some("m"), &tokens(0..50_000), Duration::ZERO);
        prefixes.routed(a, &first, Duration::ZERO);
        for turn in [50_000, 20_000, 64] {
            let cached = prefixes.cached(Some("m"), &tokens(0..turn), Duration::ZERO);
            let [held] = held(&mut core, [a], &cached);
            assert!(held <= turn && held + turn / 16 + 64 > turn, "{held} of {turn}");
        }
    }

    #[test]
    fn bytes_stand_in_for_tokens() {
        let (mut core, workers) = workers(&["a", "b"]);
        let both @ [a, b] = <[_; 2]>::try_from(workers).unwrap();
        let mut prefixes = Prefixes::new(true);
        prefixes.worker_attached(a, &hello(&["m"], Some(16), &[]));
        prefixes.worker_attached(b, &hello(&["m"], Some(16), &[]));
        let prompt = |text: &str| Prompt {
            content: PromptContent::Bytes(text.as_bytes().to_vec().into()),
            cache_salt: String::new(),
        };
        let text = "All work and no play makes Jack a dull boy. ".repeat(10);
        let cached = prefixes.cached(None, &prompt(&text), Duration::ZERO);
        prefixes.routed(a, &cached, Duration::ZERO);
        let more = prompt(&format!("{text} And so on."));
        let cached = prefixes.cached(None, &more, Duration::ZERO);
        assert_eq!(cached.prompt_tokens, 113);
        assert_eq!(held(&mut core, both, &cached), [64, 0]);

        // They turn out to be a third as many.
        let long = prefixes.cached(None, &prompt(&"x".repeat(1200)), Duration::ZERO);
        for _ in 0..100 {
            prefixes.prompt_had_blocks(a, &long, 7);
        }
        let cached = prefixes.cached(None, &more, Duration::ZERO);
        assert!((35..=41).contains(&cached.prompt_tokens), "{}", cached.prompt_tokens);
        let short = prefixes.cached(None, &prompt("x"), Duration::ZERO);
        prefixes.prompt_had_blocks(a, &short, 1);
        assert_eq!(
            prefixes.cached(None, &more, Duration::ZERO).prompt_tokens,
            cached.prompt_tokens
        );
    }
}
