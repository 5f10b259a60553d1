//! Peers that speak QUIC, but not as the protocol wants it: typed errors, and others undisturbed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // These are tests.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use baton_arena::{Arena, ArenaLayout, Landing, Slot, SlotPool};
use baton_transfer::{
    BlockSink, Channel, Check, Ending, Ledger, PeerAddress, Pulled, QuicChannel, QuicConfig,
    Subscription, TransferError,
};
use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, VarInt};
use sha2::{Digest, Sha256};

mod raw;

use raw::Raw;

const EPOCH: Epoch = Epoch::from_u128(1);
const PROMPT: PromptDigest = PromptDigest([3; 32]);
const NEVER: Duration = Duration::from_secs(600);

/// The codes in `src/quic/code.rs`.
const STALLED: VarInt = VarInt::from_u32(3);
const PROTOCOL: VarInt = VarInt::from_u32(4);

fn bind(ledger: &Ledger, stall_timeout: Duration) -> Arc<QuicChannel> {
    bind_under(Check::Crc, ledger, stall_timeout)
}

fn bind_under(check: Check, ledger: &Ledger, stall_timeout: Duration) -> Arc<QuicChannel> {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = QuicConfig { listen, max_mtu_bytes: 6500, stall_timeout, check };
    QuicChannel::bind(config, Arc::new(ledger.clone())).unwrap()
}

fn ledger() -> Ledger {
    Ledger::new(EPOCH, [0; 32], NEVER)
}

fn subscription(id: HandoffId) -> Subscription {
    Subscription {
        handoff: HandoffKey { epoch: EPOCH, id, generation: Generation(0) },
        consumer_epoch: Epoch::from_u128(2),
        compatibility: [0; 32],
        first_block: 0,
        prompt_tokens: 5,
        prompt_digest: PROMPT,
    }
}

fn subscription_bytes(id: HandoffId) -> Vec<u8> {
    let subscription = subscription(id);
    let mut bytes = b"BTKV\x05\0\0\0".to_vec();
    bytes.extend(EPOCH.as_bytes());
    bytes.extend(id.as_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(subscription.consumer_epoch.as_bytes());
    bytes.extend([0; 32]);
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(5_u32.to_le_bytes());
    bytes.extend(PROMPT.0);
    // No MAC, and no key for one.
    bytes.extend([0; 33]);
    bytes
}

struct OneSlot(Arena, SlotPool);

impl OneSlot {
    fn new(directory: &tempfile::TempDir) -> Self {
        let layout = ArenaLayout { slot_bytes: 4096, export_slots: 0, import_slots: 1 };
        let path = directory.path().join(HandoffId::random().to_string());
        Self(Arena::create(&path, layout).unwrap(), SlotPool::new([Slot(0)]))
    }
}

#[async_trait]
impl BlockSink for OneSlot {
    fn max_block_bytes(&self) -> u32 {
        4096
    }

    async fn reserve(&self, _index: u32, len: u32) -> Result<Landing, TransferError> {
        let slot = self.1.reserve().await.unwrap();
        Ok(self.0.landing(slot, u64::from(len)).unwrap())
    }

    async fn verified(
        &self,
        _index: u32,
        _block: Landing,
        _crc32: u32,
    ) -> Result<(), TransferError> {
        Ok(())
    }
}

/// A proper handoff from this worker works.
async fn serves(producer: &QuicChannel, ledger: &Ledger) {
    let directory = tempfile::tempdir().unwrap();
    let consumer = bind(&self::ledger(), NEVER);
    let id = HandoffId::random();
    ledger.expect(id, Generation(0), consumer.certificate_fingerprint()).unwrap();
    ledger.push(id, Generation(0), 0, "kv".into()).unwrap();
    ledger.seal(id, Generation(0), 5, PROMPT, 0).unwrap();
    let peer = PeerAddress {
        worker_name: "producer".into(),
        address: producer.local_address().to_string(),
        certificate_fingerprint: producer.certificate_fingerprint(),
    };
    let sink = OneSlot::new(&directory);
    assert_eq!(consumer.pull(&peer, subscription(id), &sink).await.unwrap().blocks, 1);
}

fn reset_code(error: &ReadExactError) -> VarInt {
    match error {
        ReadExactError::ReadError(ReadError::Reset(code)) => *code,
        other => panic!("not reset: {other}"),
    }
}

#[tokio::test]
async fn garbage_datagrams_are_passed_over() {
    let ledger = ledger();
    let producer = bind(&ledger, NEVER);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..2000_usize {
        let garbage: Vec<u8> = (0..n % 1400).map(|at| (at * n * 31).to_le_bytes()[0]).collect();
        socket.send_to(&garbage, producer.local_address()).await.unwrap();
    }
    serves(&producer, &ledger).await;
}

#[tokio::test]
async fn who_proves_no_identity_or_speaks_something_else_is_not_let_in() {
    let ledger = ledger();
    let producer = bind(&ledger, NEVER);
    for client in [Raw::new().without_certificate(), Raw::new().speaking(b"h3")] {
        let met = client.connect(producer.local_address()).await;
        // The client's half of a handshake may be through before the server's says no.
        if let Ok(connection) = met {
            let closed = connection.closed().await;
            assert!(matches!(closed, quinn::ConnectionError::ConnectionClosed(_)), "{closed}");
        }
    }
    serves(&producer, &ledger).await;
}

#[tokio::test]
async fn what_is_no_subscription_is_reset() {
    let ledger = ledger();
    let producer = bind(&ledger, Duration::from_secs(1));
    let client = Raw::new();
    let connection = client.connect(producer.local_address()).await.unwrap();
    let whole = subscription_bytes(HandoffId::random());
    let (truncated, _) = whole.split_at(100);
    for (bytes, ends, code) in [
        (&b"GET / HTTP/1.1\r\nHost: baton\r\n\r\n"[..], false, PROTOCOL),
        (truncated, true, PROTOCOL),
        (&[], true, PROTOCOL),
        (truncated, false, STALLED),
    ] {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        if ends {
            send.finish().unwrap();
        }
        // A stream is not seen before something comes over it.
        let answer = recv.read_exact(&mut [0]).await.unwrap_err();
        assert_eq!(reset_code(&answer), code, "{bytes:?}");
    }
    serves(&producer, &ledger).await;
}

#[tokio::test]
async fn another_version_is_told_ours() {
    let ledger = ledger();
    let producer = bind(&ledger, NEVER);
    let client = Raw::new();
    let connection = client.connect(producer.local_address()).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(b"BTKV\x06\0\0\0 whatever comes in version 6").await.unwrap();
    let answer = recv.read_to_end(100).await.unwrap();
    assert_eq!(answer, [5, 5, 0, 0, 0]);
}

#[tokio::test]
async fn an_acknowledgement_before_the_seal_acknowledges_nothing() {
    let ledger = ledger();
    let producer = bind(&ledger, NEVER);
    let client = Raw::new();
    let connection = client.connect(producer.local_address()).await.unwrap();
    for word in [1, 9] {
        let id = HandoffId::random();
        let ending = ledger.expect(id, Generation(0), client.fingerprint()).unwrap();
        ledger.push(id, Generation(0), 0, "kv".into()).unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        send.write_all(&subscription_bytes(id)).await.unwrap();
        send.write_all(&[word]).await.unwrap();
        let ended = ending.await.unwrap();
        assert!(matches!(ended, Ending::Broken(TransferError::Protocol(_))), "{ended:?}");
    }
    assert_eq!(ledger.open_handoffs(), 0);
}

/// The handoff that every made-up answer is about.
const ANSWERED: HandoffId = HandoffId::from_u128(4);

fn block_head(index: u32, len: u32, crc: u64) -> Vec<u8> {
    let mut bytes = vec![1];
    bytes.extend(EPOCH.as_bytes());
    bytes.extend(ANSWERED.as_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(index.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(crc.to_le_bytes());
    bytes
}

fn block(index: u32, content: &[u8]) -> Vec<u8> {
    let len = u32::try_from(content.len()).unwrap();
    let mut bytes = block_head(index, len, crc_fast::crc64_nvme(content));
    bytes.extend(content);
    bytes
}

fn seal(blocks: u32, blocks_sent: u32, digest: [u8; 32]) -> Vec<u8> {
    let mut bytes = vec![2];
    bytes.extend(blocks.to_le_bytes());
    bytes.extend(5_u32.to_le_bytes());
    bytes.extend(PROMPT.0);
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(blocks_sent.to_le_bytes());
    bytes.extend(digest);
    bytes
}

fn digest(blocks: &[&[u8]]) -> [u8; 32] {
    let mut digest = Sha256::new();
    for (index, block) in (0_u32..).zip(blocks) {
        digest.update(index.to_le_bytes());
        digest.update(crc_fast::crc64_nvme(block).to_le_bytes());
    }
    digest.finalize().into()
}

/// How a made-up answer ends.
#[derive(Clone, Copy)]
enum Then {
    Finish,
    Reset(u32),
    Silence,
}

async fn answer((mut send, mut recv): (SendStream, RecvStream), bytes: Vec<u8>, then: Then) {
    let mut asked = [0; 165];
    recv.read_exact(&mut asked).await.unwrap();
    // The consumer may have heard enough.
    let _ = send.write_all(&bytes).await;
    match then {
        Then::Finish => send.finish().unwrap(),
        Then::Reset(code) => send.reset(VarInt::from_u32(code)).unwrap(),
        Then::Silence => {}
    }
    let _ = recv.read_to_end(1000).await;
}

/// What a consumer makes of it.
async fn pulled(bytes: Vec<u8>, then: Then) -> Result<Pulled, TransferError> {
    pulled_under(Check::Crc, bytes, then).await
}

async fn pulled_under(check: Check, bytes: Vec<u8>, then: Then) -> Result<Pulled, TransferError> {
    let directory = tempfile::tempdir().unwrap();
    let consumer = bind_under(check, &ledger(), Duration::from_secs(1));
    let producer = Raw::new();
    let (address, accepting) = producer.listen();
    tokio::spawn(async move { answer(accepting.await, bytes, then).await });
    let peer = PeerAddress {
        worker_name: "raw".into(),
        address: address.to_string(),
        certificate_fingerprint: producer.fingerprint(),
    };
    let sink = OneSlot::new(&directory);
    consumer.pull(&peer, subscription(ANSWERED), &sink).await
}

#[tokio::test]
async fn a_right_answer_is_taken() {
    let digest = digest(&[b"k", b"", b"v"]);
    let bytes =
        [block(0, b"k"), vec![4], block(1, b""), block(2, b"v"), seal(3, 3, digest)].concat();
    let pulled = pulled(bytes, Then::Finish).await.unwrap();
    assert_eq!((pulled.blocks, pulled.bytes), (3, 2));
}

#[tokio::test]
async fn a_truncated_answer_is_broken_off() {
    let whole = [block(0, &[7; 100]), seal(1, 1, digest(&[&[7; 100]]))].concat();
    for end in [0, 1, 16, 52, 53, 100, 153, 154, whole.len() - 1] {
        let cut = pulled(whole[..end].to_vec(), Then::Finish).await;
        assert!(matches!(cut, Err(TransferError::BrokeOff(_))), "{end} bytes: {cut:?}");
    }
    let reset = pulled(block(0, b"kv"), Then::Reset(77)).await;
    assert!(matches!(reset, Err(TransferError::BrokeOff(_))), "{reset:?}");
}

#[tokio::test]
async fn silence_is_a_stall() {
    for bytes in [vec![], block(0, b"kv"), block_head(0, 100, 0)] {
        let stalled = pulled(bytes, Then::Silence).await;
        assert_eq!(stalled, Err(TransferError::Stalled { seconds: 1 }));
    }
}

#[tokio::test]
async fn what_the_protocol_does_not_allow_is_not_taken() {
    for bytes in [
        vec![0],
        b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        vec![3, 0],
        vec![3, 200],
        block_head(0, u32::MAX, 0),
        block_head(0, 4097, 0),
    ] {
        let refused = pulled(bytes.clone(), Then::Silence).await;
        assert!(matches!(refused, Err(TransferError::Protocol(_))), "{bytes:?}: {refused:?}");
    }
    let theirs = pulled(vec![5, 9, 0, 0, 0], Then::Finish).await;
    assert_eq!(theirs, Err(TransferError::Version { ours: 5, theirs: 9 }));
}

#[tokio::test]
async fn who_does_not_know_the_key_sends_no_block_under_a_mac() {
    // A right checksum is what everybody can make.
    let mut forged = block_head(0, 2, crc_fast::crc64_nvme(b"kv"));
    forged[0] = 8;
    forged.extend([0; 32]);
    forged.extend(b"kv");
    let taken = pulled_under(Check::Blake3, forged.clone(), Then::Silence).await;
    assert_eq!(taken, Err(TransferError::Forged { index: 0 }));
    // None is no way around it, and one that was not asked for is not passed over.
    let without = pulled_under(Check::Blake3, block(0, b"kv"), Then::Silence).await;
    assert!(matches!(without, Err(TransferError::Protocol(_))), "{without:?}");
    let unasked = pulled_under(Check::Crc, forged, Then::Silence).await;
    assert!(matches!(unasked, Err(TransferError::Protocol(_))), "{unasked:?}");
}

#[tokio::test]
async fn a_seal_that_counts_or_digests_others_is_not_taken() {
    let (right, other) = (digest(&[b"k", b"v"]), digest(&[b"v", b"k"]));
    for (bytes, named) in [
        (seal(2, 3, right), "blocks"),
        (seal(2, 1, right), "blocks"),
        (seal(3, 2, right), "the prompt's blocks"),
        (seal(2, 2, other), "the blocks' digest"),
    ] {
        let bytes = [block(0, b"k"), block(1, b"v"), bytes].concat();
        match pulled(bytes, Then::Finish).await {
            Err(TransferError::SealMismatch { field, .. }) => assert_eq!(field, named),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn no_noise_is_taken_for_a_handoff() {
    let mut state = 88_172_645_463_325_252_u64;
    for _ in 0..40 {
        let mut noise = Vec::new();
        while noise.len() < 300 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            noise.extend(state.to_le_bytes());
        }
        // Kinds that exist, so that it gets somewhere.
        noise[0] = noise[0] % 5 + 1;
        pulled(noise, Then::Finish).await.unwrap_err();
    }
}
