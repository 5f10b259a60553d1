//! The embedded engine against the suite that every engine must pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // What the tests share fails them.

use std::sync::Arc;

use baton_config::{ArenaConfig, SimConfig};
use baton_engine::{
    SimEngine,
    conformance::{
        Pair, Way, a_block_that_is_overwritten_before_it_is_loaded_is_seen,
        a_block_that_rots_in_the_arena_is_seen, a_cached_prefix_is_lent_and_no_other,
        a_failed_handoff_is_a_500, a_wrong_block_changes_the_answer,
        an_abort_at_any_stage_frees_everything, edge_prompts, everything_is_free,
        handed_over_equals_aggregated, prompts_with_shared_prefixes,
        second_turn_brings_only_what_is_new, several_choices_share_one_handoff,
    },
};

const BLOCK_TOKENS: u32 = 8;
const STEP_TOKENS: u32 = 64;
const SLOT_BYTES: u64 = 8 * 64;

struct Engines {
    pair: Pair,
    producer: Arc<SimEngine>,
    _directory: tempfile::TempDir,
}

/// Small enough that blocks, slots, seats and steps all run short at times.
async fn engines(export_slots: u64, import_slots: u64) -> Engines {
    engines_by(Way::Copied, 1, export_slots, import_slots).await
}

async fn engines_of_groups(layer_groups: u32, export_slots: u64, import_slots: u64) -> Engines {
    engines_by(Way::Copied, layer_groups, export_slots, import_slots).await
}

/// Whose blocks are handed over in so many layer groups. Slots are those of a whole block.
async fn engines_by(way: Way, layer_groups: u32, export_slots: u64, import_slots: u64) -> Engines {
    let directory = tempfile::tempdir().unwrap();
    let config = SimConfig {
        max_model_tokens: 512,
        block_size_tokens: BLOCK_TOKENS,
        kv_bytes_per_token: 64,
        layer_groups,
        kv_blocks: 128,
        max_seqs: 6,
        max_step_tokens: STEP_TOKENS,
        time_scale: 0.0,
        ..SimConfig::default()
    };
    let arena = ArenaConfig {
        directory: directory.path().to_owned(),
        export_bytes: export_slots * SLOT_BYTES,
        import_bytes: import_slots * SLOT_BYTES,
    };
    let start = |name| Arc::new(SimEngine::start(&config, &arena, name).unwrap());
    let producer = start("producer");
    let vocabulary = 256..SimEngine::vocabulary_size() - 1;
    let (consumer, reference) = (start("consumer"), start("reference"));
    let pair = Pair::attach(producer.clone(), consumer, reference, vocabulary, way).await;
    Engines { pair, producer, _directory: directory }
}

#[tokio::test]
async fn answers_are_equal_at_every_edge() {
    let Engines { pair, .. } = &engines(16, 16).await;
    let prompts = edge_prompts(&pair.vocabulary, BLOCK_TOKENS, STEP_TOKENS);
    handed_over_equals_aggregated(pair, prompts, 1).await;
}

#[tokio::test]
async fn hundreds_of_answers_with_shared_prefixes_are_equal() {
    let Engines { pair, producer, .. } = &engines(12, 5).await;
    let prompts = prompts_with_shared_prefixes(&pair.vocabulary, 300, 200);
    handed_over_equals_aggregated(pair, prompts, 9).await;
    let usage = producer.usage();
    assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
}

#[tokio::test]
async fn one_slot_on_each_side_is_enough() {
    let Engines { pair, .. } = &engines(1, 1).await;
    let prompts = prompts_with_shared_prefixes(&pair.vocabulary, 30, 200);
    handed_over_equals_aggregated(pair, prompts, 1).await;
}

#[tokio::test]
async fn a_second_turn_brings_less() {
    second_turn_brings_only_what_is_new(&engines(16, 16).await.pair).await;
}

#[tokio::test]
async fn a_cached_prefix_is_lent() {
    for slots in [16, 2] {
        a_cached_prefix_is_lent_and_no_other(&engines(slots, slots).await.pair).await;
    }
}

#[tokio::test]
async fn choices_share_a_handoff() {
    several_choices_share_one_handoff(&engines(16, 16).await.pair).await;
}

#[tokio::test]
async fn aborts_free_everything() {
    let Engines { pair, producer, .. } = &engines(4, 4).await;
    an_abort_at_any_stage_frees_everything(pair).await;
    everything_is_free(pair).await;
    let usage = producer.usage();
    assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
}

#[tokio::test]
async fn wrong_blocks_are_seen() {
    a_wrong_block_changes_the_answer(&engines(16, 16).await.pair).await;
}

#[tokio::test]
async fn blocks_that_change_in_the_arena_are_seen() {
    a_block_that_rots_in_the_arena_is_seen(&engines(16, 16).await.pair).await;
}

#[tokio::test]
async fn failures_are_told() {
    a_failed_handoff_is_a_500(&engines(16, 16).await.pair).await;
}

#[tokio::test]
async fn answers_are_equal_at_every_edge_layer_group_by_layer_group() {
    for groups in [2, 16] {
        let Engines { pair, .. } = &engines_of_groups(groups, 16, 16).await;
        let prompts = edge_prompts(&pair.vocabulary, BLOCK_TOKENS, STEP_TOKENS);
        handed_over_equals_aggregated(pair, prompts, 1).await;
    }
}

#[tokio::test]
async fn hundreds_of_answers_are_equal_layer_group_by_layer_group() {
    let Engines { pair, producer, .. } = &engines_of_groups(4, 12, 5).await;
    let prompts = prompts_with_shared_prefixes(&pair.vocabulary, 200, 200);
    handed_over_equals_aggregated(pair, prompts, 9).await;
    let usage = producer.usage();
    assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
}

#[tokio::test]
async fn what_is_cached_aborted_or_wrong_is_so_layer_group_by_layer_group() {
    // Fewer slots than a block has layer groups.
    let few = engines_of_groups(4, 1, 1).await;
    let prompts = prompts_with_shared_prefixes(&few.pair.vocabulary, 30, 200);
    handed_over_equals_aggregated(&few.pair, prompts, 1).await;
    a_cached_prefix_is_lent_and_no_other(&few.pair).await;

    second_turn_brings_only_what_is_new(&engines_of_groups(4, 16, 16).await.pair).await;
    several_choices_share_one_handoff(&engines_of_groups(4, 16, 16).await.pair).await;
    a_wrong_block_changes_the_answer(&engines_of_groups(4, 16, 16).await.pair).await;
    a_block_that_rots_in_the_arena_is_seen(&engines_of_groups(4, 16, 16).await.pair).await;
    let Engines { pair, producer, .. } = &engines_of_groups(4, 4, 4).await;
    an_abort_at_any_stage_frees_everything(pair).await;
    let usage = producer.usage();
    assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
}

/// Blocks that stay in the producer's arena until they are loaded. One import slot is none too few: it has no use.
mod mapped {
    use super::*;

    async fn engines(export_slots: u64) -> Engines {
        engines_by(Way::Mapped, 1, export_slots, 1).await
    }

    #[tokio::test]
    async fn answers_are_equal_at_every_edge() {
        let Engines { pair, .. } = &engines(16).await;
        let prompts = edge_prompts(&pair.vocabulary, BLOCK_TOKENS, STEP_TOKENS);
        handed_over_equals_aggregated(pair, prompts, 1).await;
    }

    #[tokio::test]
    async fn hundreds_of_answers_with_shared_prefixes_are_equal() {
        for (slots, prompts, at_once) in [(12, 300, 9), (1, 30, 1)] {
            let Engines { pair, producer, .. } = &engines(slots).await;
            let prompts = prompts_with_shared_prefixes(&pair.vocabulary, prompts, 200);
            handed_over_equals_aggregated(pair, prompts, at_once).await;
            let usage = producer.usage();
            assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
        }
    }

    #[tokio::test]
    async fn layer_group_by_layer_group() {
        let Engines { pair, .. } = &engines_by(Way::Mapped, 4, 12, 1).await;
        let prompts = prompts_with_shared_prefixes(&pair.vocabulary, 60, 200);
        handed_over_equals_aggregated(pair, prompts, 9).await;
        a_wrong_block_changes_the_answer(pair).await;
        a_block_that_is_overwritten_before_it_is_loaded_is_seen(pair).await;
    }

    #[tokio::test]
    async fn a_cached_prefix_is_lent() {
        a_cached_prefix_is_lent_and_no_other(&engines(16).await.pair).await;
    }

    #[tokio::test]
    async fn aborts_free_everything() {
        let Engines { pair, producer, .. } = &engines(4).await;
        an_abort_at_any_stage_frees_everything(pair).await;
        let usage = producer.usage();
        assert_eq!((usage.blocks_used, usage.export_slots_used), (0, 0));
    }

    #[tokio::test]
    async fn wrong_blocks_are_seen() {
        a_wrong_block_changes_the_answer(&engines(16).await.pair).await;
    }

    #[tokio::test]
    async fn blocks_that_change_where_they_lie_are_seen() {
        let Engines { pair, .. } = &engines(16).await;
        a_block_that_rots_in_the_arena_is_seen(pair).await;
        a_block_that_is_overwritten_before_it_is_loaded_is_seen(pair).await;
    }
}
