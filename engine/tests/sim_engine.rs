//! The embedded engine as a whole: its start, its time, its load and its end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // What the tests share fails them.

use std::{sync::Arc, time::Duration};

use baton_config::{ArenaConfig, SimConfig};
use baton_engine::{Answer, Engine, EngineRequest, SimEngine, sim::StartError};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

fn arena(directory: &tempfile::TempDir) -> ArenaConfig {
    ArenaConfig {
        directory: directory.path().to_owned(),
        export_bytes: 1 << 20,
        import_bytes: 1 << 20,
    }
}

fn small() -> SimConfig {
    SimConfig { kv_blocks: 2048, kv_bytes_per_token: 64, time_scale: 0.0, ..SimConfig::default() }
}

async fn complete(engine: &SimEngine, body: Value) -> Answer {
    let request = EngineRequest {
        method: Method::POST,
        path: "/v1/completions".to_owned(),
        headers: HeaderMap::new(),
        body: Bytes::from(body.to_string()),
    };
    engine.run(request).await.unwrap()
}

async fn until(what: impl Fn() -> bool) {
    let waiting = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it happens");
}

#[tokio::test]
async fn what_cannot_be_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |config: SimConfig| {
        let error = SimEngine::start(&config, &arena(&directory), "w").unwrap_err();
        match error {
            StartError::Config { field, .. } => field,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(SimConfig { kv_blocks: 4, ..small() }), "max_model_tokens");
    assert_eq!(refused(SimConfig { max_seqs: 0, ..small() }), "max_seqs");
    assert_eq!(refused(SimConfig { kv_bytes_per_token: 7, ..small() }), "kv_bytes_per_token");
    assert_eq!(refused(SimConfig { time_scale: -1.0, ..small() }), "time_scale");
    assert_eq!(refused(SimConfig { time_scale: f64::NAN, ..small() }), "time_scale");
    assert_eq!(refused(SimConfig { kv_bytes_per_token: 1 << 20, ..small() }), "export_bytes");

    let profile = directory.path().join("profile.json");
    std::fs::write(
        &profile,
        r#"{"name":"x","source":"y","prefill_ms":[-1,0,0],"decode_ms":[0,0,0]}"#,
    )
    .unwrap();
    let config = SimConfig { profile: Some(profile), ..small() };
    let error = SimEngine::start(&config, &arena(&directory), "w").unwrap_err();
    assert!(error.to_string().contains("prefill_ms[0]"), "{error}");
}

#[tokio::test]
async fn two_engines_of_one_name_have_an_arena_each_and_leave_none_behind() {
    let directory = tempfile::tempdir().unwrap();
    let files = || std::fs::read_dir(directory.path()).unwrap().count();
    let engines = [1, 2].map(|_| SimEngine::start(&small(), &arena(&directory), "a/b").unwrap());
    assert_eq!(files(), 2);
    drop(engines);
    until(|| files() == 0).await;
}

#[tokio::test]
async fn what_a_killed_engine_left_behind_is_removed_by_the_next_of_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let engine = SimEngine::start(&small(), &arena(&directory), "w").unwrap();
    let entry = std::fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap();
    let name = entry.file_name().into_string().unwrap();
    // No process has this number: it is beyond the largest that Linux gives.
    let dead = name.replacen(&std::process::id().to_string(), "4194305", 1);
    let dead = directory.path().join(dead);
    std::fs::write(&dead, b"kv").unwrap();
    let another = SimEngine::start(&small(), &arena(&directory), "w").unwrap();
    assert!(!dead.exists());
    assert!(entry.path().exists(), "its owner lives");
    drop((engine, another));
}

#[tokio::test]
async fn the_port_is_given_once_and_its_channel_stays_open() {
    let directory = tempfile::tempdir().unwrap();
    let engine = SimEngine::start(&small(), &arena(&directory), "w").unwrap();
    let mut ports = engine.kv_ports().unwrap();
    assert!(engine.kv_ports().is_none());
    let port = ports.recv().await.unwrap();
    assert_eq!(port.compatibility.block_bytes, 16 * 64);
    let layout = port.arena.layout();
    assert_eq!((layout.slot_bytes, layout.export_slots, layout.import_slots), (1024, 1024, 1024));
    let another = tokio::time::timeout(Duration::from_millis(20), ports.recv()).await;
    assert!(another.is_err(), "it has one life");
}

/// A step of the profile that this test gives takes an hour: nothing can end by itself.
#[tokio::test]
async fn who_hangs_up_in_the_middle_of_a_step_frees_its_blocks_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let profile = directory.path().join("profile.json");
    let hour = 3_600_000;
    let text = json!({"name": "slow", "source": "made up", "prefill_ms": [hour, 0, 0],
        "decode_ms": [hour, 0, 0]});
    std::fs::write(&profile, text.to_string()).unwrap();
    let config = SimConfig { profile: Some(profile), time_scale: 1.0, ..small() };
    let engine = Arc::new(SimEngine::start(&config, &arena(&directory), "w").unwrap());
    let asking: Vec<_> = ["one", "two"]
        .map(|prompt| {
            let engine = engine.clone();
            tokio::spawn(async move { complete(&engine, json!({"prompt": prompt})).await })
        })
        .into_iter()
        .collect();
    until(|| engine.usage().requests_running == 2).await;
    let load = engine.load().await.unwrap();
    assert_eq!((load.requests_running, load.requests_waiting), (2, 0));
    assert!(load.kv_used_ratio > 0.0);
    asking[0].abort();
    until(|| engine.usage().blocks_used == 1).await;
    asking[1].abort();
    until(|| engine.usage().blocks_used == 0 && engine.usage().requests_running == 0).await;
}

#[tokio::test(start_paused = true)]
async fn steps_take_the_profiles_time() {
    let directory = tempfile::tempdir().unwrap();
    let profile = directory.path().join("profile.json");
    let text = json!({"name": "round", "source": "made up", "prefill_ms": [1000, 0, 0],
        "decode_ms": [100, 0, 0]});
    std::fs::write(&profile, text.to_string()).unwrap();
    let config = SimConfig { profile: Some(profile), time_scale: 0.5, ..small() };
    let engine = SimEngine::start(&config, &arena(&directory), "w").unwrap();
    for prompt in ["one two three", "after a short while"] {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let began = tokio::time::Instant::now();
        let body = json!({"prompt": prompt, "stream": true, "max_tokens": 5, "ignore_eos": true});
        let mut answer = complete(&engine, body).await;
        let mut times = Vec::new();
        while let Some(chunk) = answer.body.next().await {
            chunk.unwrap();
            times.push(began.elapsed().as_millis());
        }
        assert_eq!(times.len(), 5);
        for (time, expected) in times.iter().zip([500, 550, 600, 650, 700]) {
            assert!(time.abs_diff(expected) <= 2, "{times:?}");
        }
    }
}

#[tokio::test]
async fn more_requests_than_seats_and_blocks_are_all_answered() {
    let directory = tempfile::tempdir().unwrap();
    let config = SimConfig { max_model_tokens: 256, kv_blocks: 40, max_seqs: 8, ..small() };
    let engine = SimEngine::start(&config, &arena(&directory), "w").unwrap();
    let answers = stream::iter(0..120_u32).map(|index| {
        let prompt: Vec<u32> = (300..300 + 20 + index % 90).collect();
        let body = json!({"prompt": prompt, "max_tokens": 60, "ignore_eos": true});
        let engine = &engine;
        async move {
            let answer = complete(engine, body).await;
            assert_eq!(answer.status, StatusCode::OK);
            let chunks: Vec<Bytes> = answer.body.try_collect().await.unwrap();
            let whole: Value = serde_json::from_slice(&chunks.concat()).unwrap();
            (index % 90, whole["choices"][0]["text"].as_str().unwrap().to_owned())
        }
    });
    let answers: Vec<_> = answers.buffer_unordered(64).collect().await;
    assert_eq!(answers.len(), 120);
    for (length, text) in &answers {
        let twin = answers.iter().find(|(other, _)| other == length).unwrap();
        assert_eq!(text, &twin.1, "equal prompts, equal answers, whatever went on around them");
    }
    until(|| engine.usage().blocks_used == 0).await;
}

#[tokio::test]
async fn a_dropped_stream_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let engine = SimEngine::start(&small(), &arena(&directory), "w").unwrap();
    let body =
        json!({"prompt": "x", "stream": true, "max_tokens": 20_000, "ignore_eos": true, "n": 2});
    let mut answer = complete(&engine, body).await;
    answer.body.next().await.unwrap().unwrap();
    assert!(engine.usage().blocks_used > 0);
    drop(answer);
    until(|| engine.usage().blocks_used == 0 && engine.usage().requests_running == 0).await;
}

/// A decode is given one token with each step: those that it gets while a prompt is computed beside it
/// tell how many steps the prompt took.
#[tokio::test]
async fn a_prompt_beside_decodes_takes_what_the_target_leaves() {
    let directory = tempfile::tempdir().unwrap();
    let config = SimConfig { time_scale: 0.05, kv_blocks: 4096, ..small() };
    let engine = Arc::new(SimEngine::start(&config, &arena(&directory), "w").unwrap());
    let decode =
        json!({"prompt": [1, 2, 3], "max_tokens": 5000, "stream": true, "ignore_eos": true});
    let mut decode = complete(&engine, decode).await.body;
    let prompt: Vec<u32> = (0..2000).collect();
    let prompt = json!({"prompt": prompt, "max_tokens": 1});
    // Less than any step takes: the prompt gets on all the same.
    engine.pacing().unwrap().set_itl_target_ms(1e-6);
    decode.next().await.unwrap().unwrap();
    let prompt = tokio::spawn({
        let engine = engine.clone();
        async move { complete(&engine, prompt).await.body.try_collect::<Vec<_>>().await.unwrap() }
    });
    let tokens = |events: Option<Result<Bytes, _>>| {
        let events = events.unwrap().unwrap();
        events.windows(6).filter(|window| *window == b"data: ").count()
    };
    let mut steps = 0;
    while !prompt.is_finished() {
        steps += tokens(decode.next().await);
    }
    // What was told by then, and not read yet.
    while let Some(events) = decode.next().now_or_never() {
        steps += tokens(events);
    }
    // 32 tokens with each. Without a target it takes one step.
    assert!(steps >= 2000 / 64, "{steps} steps");
    prompt.await.unwrap();
}
