//! Held against vLLM's own encoder where there is a vLLM (`tests/`), and here against its wire form.

use baton_types::{BlockHasher, BlockScope, BlockUnit};

use super::*;

/// A batch as msgspec writes it, with the fields that vLLM 0.32 has.
fn batch(events: &serde_json::Value) -> Vec<u8> {
    rmp_serde::to_vec_named(&(12.5, events, 0)).unwrap()
}

fn stored(
    hashes: &[u64],
    parent: Option<u64>,
    tokens: &[u32],
    extra: &serde_json::Value,
) -> serde_json::Value {
    serde_json::json!({
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent,
        "token_ids": tokens, "block_size": 2, "lora_id": null, "medium": "GPU", "lora_name": null,
        "extra_keys": extra, "group_idx": 0, "session_id": "s",
    })
}

fn removed(hashes: &[u64]) -> serde_json::Value {
    serde_json::json!({
        "type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0,
    })
}

fn names(salt: &str, tokens: &[u32]) -> Vec<baton_types::BlockHash> {
    let scope = BlockScope { unit: BlockUnit::Tokens, model: "m", adapter: "", salt };
    BlockHasher::of_tokens(&scope, tokens, 2)
}

fn follower(log: &KvCacheLog) -> Follower {
    Follower {
        sockets: EventSockets { events: "e".into(), replay: "r".into() },
        translation: Translation::new("m".to_owned(), 2, log.clone()),
        next: 0,
    }
}

async fn held(log: &KvCacheLog) -> Vec<baton_types::BlockHash> {
    let mut held = log.follow().next(1000).await.stored;
    held.sort_unstable();
    held
}

fn sorted(mut names: Vec<baton_types::BlockHash>) -> Vec<baton_types::BlockHash> {
    names.sort_unstable();
    names
}

#[tokio::test]
async fn blocks_are_named_by_their_tokens() {
    let log = KvCacheLog::default();
    let mut follower = follower(&log);
    let none = serde_json::json!(null);
    let events = serde_json::json!([
        stored(&[u64::MAX, 2], None, &[1, 2, 3, 4], &none),
        stored(&[3], Some(2), &[5, 6], &serde_json::json!([null])),
        // Whose parent nobody knows.
        stored(&[9], Some(8), &[5, 6], &none),
        {"type": "SomethingNew", "of": [1]},
    ]);
    follower.take(0, &batch(&events)).unwrap();
    let whole = names("", &[1, 2, 3, 4, 5, 6]);
    assert_eq!(held(&log).await, sorted(whole.clone()));
    // Heard before.
    follower.take(0, &batch(&serde_json::json!([removed(&[2])]))).unwrap();
    follower.take(1, &batch(&serde_json::json!([removed(&[3, 77])]))).unwrap();
    assert_eq!(held(&log).await, sorted(whole[..2].to_vec()));
    follower.take(2, &batch(&serde_json::json!([{"type": "AllBlocksCleared"}]))).unwrap();
    assert!(log.is_empty());
}

#[tokio::test]
async fn what_shapes_the_kv_beside_the_tokens_is_in_the_name_or_nothing_is_told() {
    let log = KvCacheLog::default();
    let mut follower = follower(&log);
    let events = serde_json::json!([
        stored(&[1, 2], None, &[1, 2, 3, 4], &serde_json::json!([["pepper"], null])),
        // An image in the second block.
        stored(
            &[3, 4, 5],
            None,
            &[7, 8, 9, 9, 1, 1],
            &serde_json::json!([null, [["id", 0]], null])
        ),
        stored(&[6], Some(4), &[5, 6], &serde_json::json!(null)),
        stored(&[7], None, &[5, 6], &serde_json::json!([[["id", 0]]])),
    ]);
    follower.take(0, &batch(&events)).unwrap();
    let mut expected = names("pepper", &[1, 2, 3, 4]);
    expected.extend(names("", &[7, 8]));
    assert_eq!(held(&log).await, sorted(expected));
}

#[tokio::test]
async fn a_gap_that_cannot_be_closed_empties_the_log() {
    let log = KvCacheLog::default();
    let mut follower = follower(&log);
    let none = serde_json::json!(null);
    let first = serde_json::json!([stored(&[1], None, &[1, 2], &none)]);
    follower.take(0, &batch(&first)).unwrap();
    let later = serde_json::json!([stored(&[4], None, &[3, 4], &none)]);
    follower.take(2, &batch(&later)).unwrap();
    assert_eq!(held(&log).await, names("", &[3, 4]));
    assert!(follower.take(3, b"\x93").is_err());
    assert!(log.is_empty());
}

#[tokio::test]
async fn nothing_is_told_of_a_model_that_mixes_kinds_of_attention() {
    let log = KvCacheLog::default();
    let mut follower = follower(&log);
    let none = serde_json::json!(null);
    let mut other = stored(&[1], None, &[1, 2], &none);
    other["group_idx"] = 1.into();
    let events = serde_json::json!([stored(&[1], None, &[1, 2], &none), other]);
    follower.take(0, &batch(&events)).unwrap();
    assert!(log.is_empty());
    let more = serde_json::json!([stored(&[2], None, &[3, 4], &none)]);
    follower.take(1, &batch(&more)).unwrap();
    assert!(log.is_empty());
}

#[test]
fn a_hash_may_come_as_bytes() {
    let mut bytes = vec![0xc4, 10]; // bin 8
    bytes.extend([9, 9, 0, 0, 0, 0, 0, 0, 1, 2]);
    let hash: message::EngineHash = rmp_serde::from_slice(&bytes).unwrap();
    assert_eq!(hash, message::EngineHash(0x0102));
}

#[test]
fn paths_that_no_socket_can_have_are_not_asked_for() {
    let path = std::path::Path::new("/run/baton");
    let sockets = EventSockets::beside(path, "decode-0").unwrap();
    let argument: serde_json::Value = serde_json::from_str(&sockets.argument()).unwrap();
    assert_eq!(argument["endpoint"], "ipc:///run/baton/baton-decode-0.kv-events");
    assert_eq!(argument["replay_endpoint"], "ipc:///run/baton/baton-decode-0.kv-replay");
    assert_eq!(EventSockets::beside(path, &"d".repeat(100)), None);
}
