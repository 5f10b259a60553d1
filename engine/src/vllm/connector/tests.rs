//! A fake connector speaks the protocol over a real socket.

use baton_arena::{ArenaFile, Slot};
use baton_types::{Generation, HandoffId, PromptDigest, StepModel};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::UnixStream};

use super::*;
use crate::{BlockInSlot, BlockToLoad, MappedBlockToLoad};

const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    dir: tempfile::TempDir,
    ports: mpsc::Receiver<KvPort>,
    pacing: Pacing,
    _listener: ConnectorListener,
}

impl Fixture {
    fn new() -> Self {
        Self::with_import_slots(3)
    }

    fn with_import_slots(slots: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let arena = ArenaConfig {
            directory: dir.path().into(),
            export_bytes: 4 * 8192,
            import_bytes: slots * 8192,
        };
        let (sender, ports) = mpsc::channel(1);
        let socket = dir.path().join("kv.sock");
        let pacing = Pacing::new(None);
        let listener =
            ConnectorListener::bind(&socket, &arena, "p0", sender, pacing.clone()).unwrap();
        Self { dir, ports, pacing, _listener: listener }
    }

    async fn connect(&self) -> FakeConnector {
        FakeConnector(UnixStream::connect(self.dir.path().join("kv.sock")).await.unwrap())
    }

    async fn port(&mut self) -> KvPort {
        timeout(self.ports.recv()).await.unwrap()
    }
}

struct FakeConnector(UnixStream);

impl FakeConnector {
    async fn send(&mut self, message: &Value) {
        let mut frame = Vec::new();
        frames::append(message, &mut frame).unwrap();
        self.0.write_all(&frame).await.unwrap();
    }

    async fn receive(&mut self) -> Option<Value> {
        timeout(frames::read(&mut self.0, &mut Vec::new())).await.unwrap()
    }

    async fn is_closed(&mut self) -> bool {
        matches!(timeout(self.0.read(&mut [0; 64])).await, Ok(0) | Err(_))
    }
}

async fn timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

fn hello() -> Value {
    json!({
        "type": "hello",
        "protocol": 5,
        "connector_version": "0.1.0",
        "vllm_version": "0.32.0",
        "compatibility": {
            "model": "m", "revision": "r", "kv_dtype": "float32", "kv_layout": "NHD",
            "block_size_tokens": 32, "layer_groups": 2, "block_bytes": 5000,
            "tensor_parallel_rank": 0, "tensor_parallel_size": 1, "connector_version": "0.1.0",
        },
    })
}

#[tokio::test]
async fn a_connector_is_welcomed_and_messages_pass_both_ways() {
    let mut fixture = Fixture::new();
    let mut connector = fixture.connect().await;
    connector.send(&hello()).await;
    let mut port = fixture.port().await;
    let welcome = connector.receive().await.unwrap();
    assert_eq!(
        welcome,
        json!({
            "type": "welcome", "protocol": 5, "arena": port.arena.path(),
            "slot_bytes": 8192, "first_export_slot": 0, "export_slots": 4,
            "first_import_slot": 4, "import_slots": 3,
        })
    );
    assert_eq!(port.compatibility.block_bytes, 5000);
    let socket = fs::metadata(fixture.dir.path().join("kv.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    let handoff = HandoffId::random();
    let generation = Generation(2);
    connector
        .send(&json!({
            "type": "exported", "handoff": handoff, "generation": 2,
            "blocks": [{"index": 0, "slot": 3}],
        }))
        .await;
    connector
        .send(&json!({
            "type": "sealed", "handoff": handoff, "generation": 2, "prompt_tokens": 7,
            "prompt_digest": "ab".repeat(32), "cached_tokens": 0,
        }))
        .await;
    let blocks = vec![BlockInSlot { index: 0, slot: Slot(3) }];
    assert_eq!(
        timeout(port.ranks[0].from_engine.recv()).await.unwrap(),
        FromEngine::Exported { handoff, generation, blocks: blocks.clone() }
    );
    assert_eq!(
        timeout(port.ranks[0].from_engine.recv()).await.unwrap(),
        FromEngine::Sealed {
            handoff,
            generation,
            prompt_tokens: 7,
            prompt_digest: PromptDigest([0xab; 32]),
            cached_tokens: 0
        }
    );

    port.ranks[0].to_engine.send(ToEngine::Release { slots: vec![Slot(3)] }).await.unwrap();
    let blocks = vec![BlockToLoad { index: 0, slot: Slot(3), crc32: 7 }];
    port.ranks[0].to_engine.send(ToEngine::Load { handoff, generation, blocks }).await.unwrap();
    assert_eq!(connector.receive().await.unwrap(), json!({"type": "release", "slots": [3]}));
    assert_eq!(connector.receive().await.unwrap()["type"], "load");

    // Another worker's arena, and a block in it.
    let file = ArenaFile { path: "/dev/shm/p1".into(), device: 1, inode: 2, len_bytes: 1 << 40 };
    let to_engine = &port.ranks[0].to_engine;
    to_engine.send(ToEngine::Map { arena: 3, file }).await.unwrap();
    let blocks = vec![MappedBlockToLoad { index: 4, offset: 1 << 33, crc32: u32::MAX }];
    let load = ToEngine::LoadMapped { handoff, generation, arena: 3, blocks };
    to_engine.send(load).await.unwrap();
    to_engine.send(ToEngine::Unmap { arena: 3 }).await.unwrap();
    assert_eq!(
        connector.receive().await.unwrap(),
        json!({
            "type": "map", "arena": 3,
            "file": {"path": "/dev/shm/p1", "device": 1, "inode": 2, "len_bytes": 1_u64 << 40},
        })
    );
    assert_eq!(
        connector.receive().await.unwrap(),
        json!({
            "type": "load_mapped", "handoff": handoff, "generation": 2, "arena": 3,
            "blocks": [{"index": 4, "offset": 1_u64 << 33, "crc32": u32::MAX}],
        })
    );
    assert_eq!(connector.receive().await.unwrap(), json!({"type": "unmap", "arena": 3}));
    connector.send(&json!({"type": "mapped", "arena": 3})).await;
    connector.send(&json!({"type": "mapped", "arena": 4, "refused": "no"})).await;
    connector
        .send(&json!({
            "type": "loaded_mapped", "handoff": handoff, "generation": 2, "indices": [4],
        }))
        .await;
    for expected in [
        FromEngine::Mapped { arena: 3, refused: None },
        FromEngine::Mapped { arena: 4, refused: Some("no".into()) },
        FromEngine::LoadedMapped { handoff, generation, indices: vec![4] },
    ] {
        assert_eq!(timeout(port.ranks[0].from_engine.recv()).await.unwrap(), expected);
    }

    drop(connector);
    assert_eq!(timeout(port.ranks[0].from_engine.recv()).await, None);
}

#[tokio::test]
async fn a_newer_connector_ends_the_older() {
    let mut fixture = Fixture::new();
    let mut older = fixture.connect().await;
    older.send(&hello()).await;
    let mut older_port = fixture.port().await;
    let older_arena = older_port.arena.path().to_owned();
    older.receive().await.unwrap();

    let mut newer = fixture.connect().await;
    newer.send(&hello()).await;
    let newer_port = fixture.port().await;
    assert_eq!(timeout(older_port.ranks[0].from_engine.recv()).await, None);
    assert!(older.is_closed().await);
    drop(older_port);
    assert!(!older_arena.exists() && newer_port.arena.path().exists());
}

fn rank_of_two(rank: u32) -> Value {
    let mut hello = hello();
    hello["compatibility"]["block_bytes"] = json!(4000);
    hello["compatibility"]["tensor_parallel_size"] = json!(2);
    hello["compatibility"]["tensor_parallel_rank"] = json!(rank);
    hello
}

#[tokio::test]
async fn ranks_are_one_port_and_have_slots_of_their_own() {
    let mut fixture = Fixture::with_import_slots(4);
    let (mut first, mut second) = (fixture.connect().await, fixture.connect().await);
    second.send(&rank_of_two(1)).await;
    let welcome = second.receive().await.unwrap();
    assert!(fixture.ports.try_recv().is_err(), "the other is missing");
    first.send(&rank_of_two(0)).await;
    let mut port = fixture.port().await;
    assert_eq!((port.ranks.len(), port.compatibility.tensor_parallel_rank), (2, 0));
    let other = first.receive().await.unwrap();
    assert_eq!(welcome["arena"], other["arena"]);
    let slots = |welcome: &Value| {
        ["first_export_slot", "export_slots", "first_import_slot", "import_slots"]
            .map(|field| welcome[field].as_u64().unwrap())
    };
    // Eight blocks of a page for export, and as many for import.
    assert_eq!((slots(&other), slots(&welcome)), ([0, 4, 8, 4], [4, 4, 12, 4]));

    let handoff = HandoffId::random();
    let aborted = FromEngine::Aborted { handoff, generation: Generation(0) };
    second.send(&serde_json::to_value(&aborted).unwrap()).await;
    assert_eq!(timeout(port.ranks[1].from_engine.recv()).await, Some(aborted));
    port.ranks[0].to_engine.send(ToEngine::Release { slots: vec![Slot(3)] }).await.unwrap();
    assert_eq!(first.receive().await.unwrap()["slots"], json!([3]));

    // One that is not like the others is refused, and one that goes takes all with it.
    let mut unlike = rank_of_two(1);
    unlike["compatibility"]["kv_layout"] = json!("HND");
    drop(second);
    assert_eq!(timeout(port.ranks[0].from_engine.recv()).await, None);
    assert!(first.is_closed().await);
    let (mut first, mut second) = (fixture.connect().await, fixture.connect().await);
    first.send(&rank_of_two(0)).await;
    assert_eq!(first.receive().await.unwrap()["type"], "welcome");
    second.send(&unlike).await;
    let refused = second.receive().await.unwrap()["reason"].to_string();
    assert!(refused.contains("kv_layout differs: NHD here, HND at the peer"), "{refused}");
    let mut second = fixture.connect().await;
    second.send(&rank_of_two(1)).await;
    assert_eq!(fixture.port().await.ranks.len(), 2);
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_a_reason() {
    let mut fixture = Fixture::new();
    let change = |field: &str, value: Value| {
        let mut hello = hello();
        *hello.pointer_mut(field).unwrap() = value;
        hello
    };
    for (hello, reason) in [
        (change("/protocol", json!(9)), "protocol 9"),
        (change("/compatibility/block_bytes", json!(0)), "block_bytes"),
        (change("/compatibility/tensor_parallel_size", json!(0)), "tensor_parallel_size"),
        (change("/compatibility/layer_groups", json!(0)), "layer_groups"),
        (change("/compatibility/tensor_parallel_rank", json!(1)), "rank is 1, of 1"),
        (change("/compatibility/block_bytes", json!(16_000)), "arena.import_bytes"),
        (change("/compatibility/block_bytes", json!(u64::MAX)), "arena.export_bytes"),
    ] {
        let mut connector = fixture.connect().await;
        connector.send(&hello).await;
        let answer = connector.receive().await.unwrap();
        assert_eq!(answer["type"], "refused");
        assert!(answer["reason"].as_str().unwrap().contains(reason), "{answer}");
        assert!(connector.is_closed().await);
    }
    assert!(fixture.ports.try_recv().is_err());
}

#[tokio::test]
async fn garbage_closes_the_connection_and_disturbs_nobody_after() {
    let mut fixture = Fixture::new();
    for garbage in [&b"\xff\xff\xff\xff????"[..], b"\x02\0\0\0{}", b"\x05\0\0\0hello"] {
        let mut connector = fixture.connect().await;
        connector.0.write_all(garbage).await.unwrap();
        assert!(connector.is_closed().await);
    }
    let mut connector = fixture.connect().await;
    connector.send(&hello()).await;
    let mut port = fixture.port().await;
    connector.receive().await.unwrap();
    connector.send(&json!({"type": "exported", "handoff": "no id"})).await;
    assert_eq!(timeout(port.ranks[0].from_engine.recv()).await, None);
    assert!(connector.is_closed().await);
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/kv.sock");
    let bind = || {
        let (ports, _) = mpsc::channel(1);
        ConnectorListener::bind(&path, &ArenaConfig::default(), "p0", ports, Pacing::new(None))
    };
    fs::create_dir(dir.path().join("new")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = bind().unwrap();
    let error = bind().unwrap_err().to_string();
    assert!(error.contains("another worker"), "{error}");
    assert!(path.exists(), "the refused one must not take the socket away");
    drop(live);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_scheduler_tells_its_steps_and_is_told_its_pace() {
    let mut fixture = Fixture::new();
    // Both come at once, and neither ends the other.
    let (mut connector, mut scheduler) = (fixture.connect().await, fixture.connect().await);
    scheduler.send(&json!({"type": "scheduler", "protocol": 5})).await;
    connector.send(&hello()).await;
    let _port = fixture.port().await;
    assert_eq!(scheduler.receive().await.unwrap(), json!({"type": "attached", "protocol": 5}));

    fixture.pacing.set_itl_target_ms(40.0);
    let step = json!({
        "ms": 12.0, "prompts_begun": 0, "prompts": 0, "prefill_tokens": 0, "prefill_squares": 0.0,
        "decode_sequences": 3, "decode_context_tokens": 300,
    });
    scheduler.send(&json!({"type": "steps", "steps": vec![step.clone(); 40]})).await;
    let paced = scheduler.receive().await.unwrap();
    assert_eq!((&paced["type"], &paced["pace"]["step_ms"]), (&json!("pace"), &json!(39.2)));
    let model: StepModel = serde_json::from_value(paced["pace"]["model"].clone()).unwrap();
    assert!((model.decode_step_ms(3, 300) - 12.0).abs() < 1.0, "{model:?}");
    assert_eq!(fixture.pacing.fitted().unwrap().samples, 40);

    // Where one step of five takes half as long again, all are planned shorter.
    let steps = (0..3000).map(|place| {
        let mut step = step.clone();
        step["ms"] = json!(if place % 5 == 0 { 18.0 } else { 12.0 });
        step
    });
    scheduler.send(&json!({"type": "steps", "steps": steps.collect::<Vec<_>>()})).await;
    let paced = scheduler.receive().await.unwrap();
    let step_ms = paced["pace"]["step_ms"].as_f64().unwrap();
    assert!((24.0..35.0).contains(&step_ms), "{step_ms}");

    fixture.pacing.set_itl_target_ms(0.0);
    assert_eq!(scheduler.receive().await.unwrap(), json!({"type": "pace", "pace": null}));
    connector.send(&json!({"type": "exported", "handoff": "no id"})).await;
    assert!(connector.receive().await.is_some(), "the welcome");
    assert!(connector.is_closed().await);

    let mut other = fixture.connect().await;
    other.send(&json!({"type": "scheduler", "protocol": 9})).await;
    assert_eq!(other.receive().await.unwrap()["type"], "refused");
}
