//! Every decoder of what a peer sends, held against what must be true whatever comes: none panics, none
//! takes what its encoder does not give, and no block is taken that is not what its producer named.

use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use crc_fast::{CrcAlgorithm, checksum};

use crate::{
    arrivals::Arrivals,
    channel::Subscription,
    frame::{
        Asked, ConsumerWord, FrameError, PRELUDE_BYTES, ProducerFrame, decode_prelude,
        decode_subscription, encode_subscription,
    },
    shm, ucx,
};

/// The longest block that [`pulled_handoff`] takes.
const LONGEST_BLOCK_BYTES: u32 = 4096;

/// What a consumer opens a stream with, and its words after it.
pub fn subscription(bytes: &[u8]) {
    let prelude = decode_prelude(bytes);
    assert!(bytes.len() == PRELUDE_BYTES || prelude.is_err());
    if let Ok(Asked { subscription, key }) = decode_subscription(bytes) {
        assert_eq!(&encode_subscription(&subscription, key.as_ref())[PRELUDE_BYTES..], bytes);
    }
    if let Some((prelude, body)) = bytes.split_at_checked(PRELUDE_BYTES)
        && decode_prelude(prelude).is_ok()
        && let Ok(Asked { subscription, key }) = decode_subscription(body)
    {
        assert_eq!(encode_subscription(&subscription, key.as_ref()), bytes);
    }
    for &byte in bytes {
        if let Ok(word) = ConsumerWord::decode(byte) {
            assert_eq!(&word.encode()[..], &[byte]);
        }
    }
}

/// One frame of a producer: its kind, then its body.
pub fn producer_frame(bytes: &[u8]) {
    let Some((&kind, body)) = bytes.split_first() else { return };
    let body_bytes = ProducerFrame::body_bytes(kind);
    match ProducerFrame::decode(kind, body) {
        Ok(frame) => {
            assert_eq!(body_bytes, Ok(body.len()));
            assert_eq!(frame.encode(), bytes);
        }
        Err(error) => assert!(
            body_bytes != Ok(body.len())
                || matches!(error, FrameError::RefusalCode(_) | FrameError::Flag(_)),
            "{error} of {bytes:?}"
        ),
    }
}

/// All that a producer sends for one handoff, as a consumer takes it. The first byte's lowest bit has the
/// names and sums of blocks put right, so that what comes behind them is reached too.
pub fn pulled_handoff(bytes: &[u8]) {
    let Some((&how, mut rest)) = bytes.split_first() else { return };
    let handoff = HandoffKey {
        epoch: Epoch::from_u128(1),
        id: HandoffId::from_u128(2),
        generation: Generation(3),
    };
    let subscription = Subscription {
        handoff,
        consumer_epoch: Epoch::from_u128(4),
        compatibility: [5; 32],
        first_block: 6,
        prompt_tokens: 7,
        prompt_digest: PromptDigest([8; 32]),
    };
    let mut arrivals = Arrivals::new(&subscription, "none", None, 1);
    let (mut taken_blocks, mut taken_bytes) = (0, 0);
    while let Some((&kind, after)) = rest.split_first() {
        let Ok(body_bytes) = ProducerFrame::body_bytes(kind) else { return };
        let Some((body, after)) = after.split_at_checked(body_bytes) else { return };
        rest = after;
        match ProducerFrame::decode(kind, body) {
            Ok(ProducerFrame::Block(mut head)) => {
                if how & 1 == 1 {
                    head.handoff = handoff;
                    head.index = subscription.first_block + taken_blocks;
                }
                if arrivals.announced(&head, LONGEST_BLOCK_BYTES).is_err() {
                    return;
                }
                let Some((block, after)) = rest.split_at_checked(head.len as usize) else { return };
                rest = after;
                let crc = checksum(CrcAlgorithm::Crc64Nvme, block);
                if how & 1 == 1 {
                    head.crc = crc;
                }
                let Ok(crc32) = arrivals.placed(&head, block) else { return };
                assert_eq!(head.crc, crc);
                assert_eq!(u64::from(crc32), checksum(CrcAlgorithm::Crc32IsoHdlc, block));
                taken_blocks += 1;
                taken_bytes += u64::from(head.len);
            }
            Ok(ProducerFrame::Sealed(sealed)) => {
                if let Ok(pulled) = arrivals.sealed(&sealed) {
                    assert_eq!((pulled.blocks, pulled.bytes), (taken_blocks, taken_bytes));
                    assert_eq!(sealed.blocks_sent, taken_blocks);
                    assert_eq!(pulled.seal.prompt_blocks, subscription.first_block + taken_blocks);
                }
                return;
            }
            Ok(ProducerFrame::Waiting) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// What a producer says of itself over shared memory, behind its kind.
pub fn shm_hello(bytes: &[u8]) {
    shm::fuzz_hello(bytes);
}

/// What a consumer says while UCX moves its blocks: its address, then its words.
pub fn ucx_words(bytes: &[u8]) {
    ucx::fuzz_words(bytes);
}

/// What a producer says while UCX moves its blocks.
pub fn ucx_frames(bytes: &[u8]) {
    ucx::fuzz_frames(bytes);
}
