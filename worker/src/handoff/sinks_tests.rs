//! Pieces of blocks as a channel would bring them, in any order and not always right.

use std::sync::Arc;

use async_trait::async_trait;
use baton_arena::{Arena, ArenaLayout};
use baton_engine::{KvPort, RankPort, ToEngine};
use baton_transfer::{Channel, PeerAddress, Pulled, RankLedgers, Subscription};
use baton_types::{Compatibility, Epoch, Generation, HandoffId};
use tokio::sync::mpsc;

use super::{
    super::{Handoffs, Producer, Transfer, pieces::Pieces},
    *,
};

const STALL: std::time::Duration = std::time::Duration::from_secs(5);

struct NoChannel;

#[async_trait]
impl Channel for NoChannel {
    async fn pull(
        &self,
        _: &PeerAddress,
        _: Subscription,
        _: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        std::future::pending().await
    }

    fn transports(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Four heads of 3 layers × 2 × 2 tokens × 5 bytes.
fn engine(ranks: u32) -> Compatibility {
    let heads = 4 / ranks;
    Compatibility {
        model: "m".into(),
        revision: String::new(),
        kv_dtype: "float32".into(),
        kv_layout: format!("of {ranks}"),
        block_size_tokens: 2,
        block_bytes: u64::from(60 * heads),
        layer_groups: 1,
        tensor_parallel_rank: 0,
        tensor_parallel_size: ranks,
        connector_version: "1".into(),
        kv_heads: format!("F/4/3*k2.t2.h{heads}.5"),
    }
}

struct Fixture {
    handoffs: Handoffs,
    name: Name,
    reslicing: Arc<Reslicing>,
    arena: Arena,
    hear: Vec<mpsc::Receiver<ToEngine>>,
    carrying: tokio::task::JoinHandle<()>,
    _consuming: super::super::Consuming,
    _tell: Vec<mpsc::Sender<baton_engine::FromEngine>>,
    _dir: tempfile::TempDir,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.carrying.abort();
    }
}

/// A consumer of two ranks, with two import slots each, of a producer of four.
async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let layout = ArenaLayout { slot_bytes: 128, export_slots: 2, import_slots: 4 };
    let arena = Arena::create(&dir.path().join("arena"), layout).unwrap();
    let (mut ranks, mut tell, mut hear) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..2 {
        let (rank, teller, hearer) = RankPort::pair(16);
        ranks.push(rank);
        tell.push(teller);
        hear.push(hearer);
    }
    let port = KvPort { compatibility: engine(2), arena: arena.clone(), ranks };
    let ledgers = RankLedgers::new(STALL);
    let transfer = Transfer { ledgers, channel: Arc::new(NoChannel), stall_timeout: STALL };
    let (handoffs, carrying) = Handoffs::of_port(port, Epoch::random(), transfer, Arc::default());
    let address = PeerAddress {
        worker_name: "p0".into(),
        address: "127.0.0.1:1".into(),
        certificate_fingerprint: [1; 32],
    };
    let name = (HandoffId::random(), Generation(0));
    let producer = Producer { address, epoch: Epoch::random(), compatibility: Some(engine(4)) };
    let consuming = handoffs.consume(name, producer).unwrap();
    let reslicing = Pieces::beside(&arena).of_blocks_of(&engine(4), &engine(2)).await.unwrap();
    Fixture {
        handoffs,
        name,
        reslicing,
        arena,
        hear,
        carrying: tokio::spawn(carrying.run()),
        _consuming: consuming,
        _tell: tell,
        _dir: dir,
    }
}

/// What lies at each byte of a block of one of so many ranks: its layer, keys or values, token, head.
fn content(ranks: u8, rank: u8, index: u8) -> Vec<u8> {
    let heads = 4 / ranks;
    let mut bytes = Vec::new();
    for outer in 0..12 {
        for head in heads * rank..heads * (rank + 1) {
            bytes.extend_from_slice(&[100 * index + 8 * outer + head; 5]);
        }
    }
    bytes
}

async fn bring(piece: &Piece<'_>, index: u8, rank: u8) -> Result<(), TransferError> {
    let bytes = content(4, rank, index);
    let landing = piece.reserve(index.into(), 60).await?;
    landing.write(&[&bytes]).unwrap();
    piece.verified(index.into(), landing, BlockToLoad::checksum(&bytes)).await
}

#[tokio::test]
async fn a_block_is_loaded_when_its_last_piece_was_laid_into_it() {
    let mut fixture = fixture().await;
    let mut hear = std::mem::take(&mut fixture.hear);
    let verified = Mutex::new(Instant::now());
    let Fixture { handoffs, name, reslicing, .. } = &fixture;
    let assembly = Assembly::new(&handoffs.imports, *name, reslicing, &verified);
    let pieces = [0, 1, 2, 3].map(|source| assembly.piece(source));
    // Two ranks are a block ahead of the two others.
    for (index, rank) in [(0, 3), (1, 3), (0, 0), (1, 0), (0, 1)] {
        bring(&pieces[usize::from(rank)], index, rank).await.unwrap();
    }
    tokio::task::yield_now().await;
    assert!(hear[0].try_recv().is_err(), "a piece is missing");
    bring(&pieces[2], 0, 2).await.unwrap();
    let arena = fixture.arena.clone();
    for (rank, hear) in (0..).zip(&mut hear) {
        let Some(ToEngine::Load { blocks, .. }) = hear.recv().await else {
            panic!("a load is due")
        };
        let [BlockToLoad { index: 0, slot, crc32 }] = blocks[..] else { panic!("{blocks:?}") };
        let view = arena.view(slot, 120).unwrap();
        assert_eq!(view.as_ref(), content(2, rank, 0), "rank {rank}");
        assert_eq!(crc32, BlockToLoad::checksum(view.as_ref()));
        let (_, own) = arena.layout().of_rank(rank.into(), 2);
        assert!(own.contains(&slot.0));
    }
}

#[tokio::test]
async fn a_piece_that_changed_after_its_checksum_reaches_no_rank() {
    for spoilt in [0, 59] {
        let mut fixture = fixture().await;
        let mut hear = std::mem::take(&mut fixture.hear);
        let verified = Mutex::new(Instant::now());
        let Fixture { handoffs, name, reslicing, .. } = &fixture;
        let assembly = Assembly::new(&handoffs.imports, *name, reslicing, &verified);
        let pieces = [0, 1, 2, 3].map(|source| assembly.piece(source));
        for rank in [0, 1, 3] {
            bring(&pieces[usize::from(rank)], 0, rank).await.unwrap();
        }
        let mut bytes = content(4, 2, 0);
        let checksum = BlockToLoad::checksum(&bytes);
        bytes[spoilt] ^= 1;
        let landing = pieces[2].reserve(0, 60).await.unwrap();
        landing.write(&[&bytes]).unwrap();
        let rotten = pieces[2].verified(0, landing, checksum).await;
        assert_eq!(rotten, Err(TransferError::Rotten { index: 0 }));
        tokio::task::yield_now().await;
        assert!(hear.iter_mut().all(|hear| hear.try_recv().is_err()));
    }
}

#[tokio::test]
async fn a_piece_of_another_length_is_no_piece() {
    let fixture = fixture().await;
    let verified = Mutex::new(Instant::now());
    let Fixture { handoffs, name, reslicing, .. } = &fixture;
    let assembly = Assembly::new(&handoffs.imports, *name, reslicing, &verified);
    let refused = assembly.piece(1).reserve(0, 120).await.err();
    assert_eq!(refused, Some(TransferError::Truncated { index: 0, bytes: 120, expected: 60 }));
    assert_eq!(handoffs.slots().used, 0, "before anything is reserved");
}
