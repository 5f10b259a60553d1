use std::ops::Range;

/// Prompts of every length at which something changes: around one block, around several, and beyond
/// the tokens that one step computes. Each begins otherwise.
pub fn edge_prompts(
    vocabulary: &Range<u32>,
    block_size_tokens: u32,
    max_step_tokens: u32,
) -> Vec<Vec<u32>> {
    let (block, step) = (block_size_tokens as usize, max_step_tokens as usize);
    let lengths = [
        1,
        2,
        block - 1,
        block,
        block + 1,
        3 * block - 1,
        3 * block,
        3 * block + 1,
        7 * block + block / 2,
        step - 1,
        step,
        step + 1,
        2 * step + block + 1,
    ];
    let prompt = |length: usize| some_tokens(vocabulary, &format!("edge {length}"), length);
    lengths.into_iter().filter(|length| *length > 0).map(prompt).collect()
}

/// `count` prompts of 1 to `longest` tokens, each of which begins like one of a few others for some
/// part of its way. The same for the same arguments.
pub fn prompts_with_shared_prefixes(
    vocabulary: &Range<u32>,
    count: usize,
    longest: usize,
) -> Vec<Vec<u32>> {
    let families: Vec<_> = (0..4)
        .map(|family| some_tokens(vocabulary, &format!("family {family}"), longest))
        .collect();
    let mut random = Random::new("shared prefixes");
    (0..count)
        .map(|index| {
            let length = 1 + random.below(longest);
            let shared = random.below(length + 1);
            let family = &families[random.below(families.len())];
            let own = some_tokens(vocabulary, &format!("own {index}"), length - shared);
            [&family[..shared], &own].concat()
        })
        .collect()
}

/// The same tokens for the same seed.
pub(super) fn some_tokens(vocabulary: &Range<u32>, seed: &str, count: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    let size = vocabulary.len();
    let token = |draw: usize| vocabulary.start + u32::try_from(draw).expect("it is below the end");
    (0..count).map(|_| token(random.below(size))).collect()
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn new(seed: &str) -> Self {
        // FNV-1a.
        let hash = seed.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        Self(hash)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).expect("it is below a usize")
    }
}
