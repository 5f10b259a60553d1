//! What a consumer has of one handoff, held against what it must have: the same for every channel.

use baton_arena::PIECE_BYTES;
use crc_fast::{CrcAlgorithm, Digest};

use crate::{
    channel::{Pulled, Seal, Subscription, TransferError},
    frame::{BlockHead, BlocksDigest, SealedFrame},
    mac::MacKey,
    order::Order,
};

/// Takes a handoff's blocks one by one, each in its turn.
#[derive(Debug)]
pub(crate) struct Arrivals<'a> {
    subscription: &'a Subscription,
    transport: &'static str,
    key: Option<MacKey>,
    order: Order,
    blocks: u32,
    bytes: u64,
    digest: BlocksDigest,
}

impl<'a> Arrivals<'a> {
    /// With a key, a block comes under its MAC or is not taken.
    pub(crate) fn new(
        subscription: &'a Subscription,
        transport: &'static str,
        key: Option<MacKey>,
        layer_groups: u32,
    ) -> Self {
        Self {
            subscription,
            transport,
            key,
            order: Order::from(subscription.first_block, layer_groups),
            blocks: 0,
            bytes: 0,
            digest: BlocksDigest::default(),
        }
    }

    /// Whether the block that is announced is one that is due. To be asked, once, before any of its bytes is
    /// taken.
    pub(crate) fn announced(
        &mut self,
        head: &BlockHead,
        longest_bytes: u32,
    ) -> Result<(), TransferError> {
        let BlockHead { handoff, index, len, crc: _, mac } = *head;
        if handoff != self.subscription.handoff {
            let due = self.subscription.handoff;
            return Err(TransferError::ForeignBlock { index, of: handoff, due });
        }
        self.order
            .take(index)
            .map_err(|expected| TransferError::UnexpectedBlock { index, expected })?;
        if len > longest_bytes {
            let excess = format!("block {index} of {len} bytes, {longest_bytes} are the most");
            return Err(TransferError::Protocol(excess));
        }
        if mac.is_some() != self.key.is_some() {
            let wrong = format!("block {index} comes under another check than was asked for");
            return Err(TransferError::Protocol(wrong));
        }
        Ok(())
    }

    /// The block that was announced last has to wait, and will be announced again.
    pub(crate) fn put_back(&mut self, head: &BlockHead) {
        self.order.put_back(head.index);
    }

    /// Verifies a block where it now lies, and counts it. Answers the CRC-32 for
    /// [`BlockSink::verified`](crate::BlockSink::verified).
    pub(crate) fn placed(&mut self, head: &BlockHead, bytes: &[u8]) -> Result<u32, TransferError> {
        let crc32 = verify(head, bytes, self.key.as_ref())?;
        self.verified(head);
        Ok(crc32)
    }

    /// Counts a block that was verified.
    pub(crate) fn verified(&mut self, head: &BlockHead) {
        self.blocks += 1;
        self.bytes += u64::from(head.len);
        self.digest.add(head.index, head.crc);
    }

    /// Compares the seal with what arrived, and with what was asked for.
    pub(crate) fn sealed(self, sealed: &SealedFrame) -> Result<Pulled, TransferError> {
        let SealedFrame { seal, blocks_sent, digest } = sealed;
        let Seal { prompt_blocks, prompt_tokens, prompt_digest, .. } = seal;
        let wanted = self.subscription;
        agree("prompt tokens", prompt_tokens, &wanted.prompt_tokens)?;
        agree("prompt digest", prompt_digest, &wanted.prompt_digest)?;
        agree("blocks", blocks_sent, &self.blocks)?;
        let Some(end) = self.order.end() else {
            let (field, sealed) = ("blocks of each layer group", prompt_blocks.to_string());
            let found = "unlike numbers".to_owned();
            return Err(TransferError::SealMismatch { field, sealed, found });
        };
        agree("the prompt's blocks", prompt_blocks, &end)?;
        let (blocks, bytes) = (self.blocks, self.bytes);
        agree("the blocks' digest", &hex(digest), &hex(&self.digest.finish()))?;
        Ok(Pulled { seal: *seal, blocks, bytes, transport: self.transport })
    }
}

/// Holds a block, where it now lies, against what its producer said of it. Answers the CRC-32 for
/// [`BlockSink::verified`](crate::BlockSink::verified), taken before anything else.
pub(crate) fn verify(
    head: &BlockHead,
    bytes: &[u8],
    key: Option<&MacKey>,
) -> Result<u32, TransferError> {
    let mut sums = Sums::default();
    bytes.chunks(PIECE_BYTES).for_each(|piece| sums.add(piece));
    let crc32 = verify_sums(head, bytes.len(), &sums)?;
    if let (Some(key), Some(mac)) = (key, &head.mac)
        && !mac.agrees_with(&key.of_block(&head.handoff, head.index, bytes))
    {
        return Err(TransferError::Forged { index: head.index });
    }
    Ok(crc32)
}

/// As [`verify`], for a block of so many bytes of which the sums were taken piece by piece. A block under a MAC is
/// not for this.
pub(crate) fn verify_sums(
    head: &BlockHead,
    found_bytes: usize,
    sums: &Sums,
) -> Result<u32, TransferError> {
    let BlockHead { index, len, crc, .. } = *head;
    if found_bytes as u64 != u64::from(len) {
        let (bytes, expected) = (found_bytes as u64, u64::from(len));
        return Err(TransferError::Truncated { index, bytes, expected });
    }
    let found = sums.crc64.finalize();
    if found != crc {
        return Err(TransferError::Corrupt { index, expected: crc, found });
    }
    // The upper half of what a 32-bit sum comes as is empty.
    Ok(u32::try_from(sums.crc32.finalize()).unwrap_or_default())
}

/// A block's two sums, taken together over one piece after the other, so that the second reads what the first has
/// brought near. Of each piece the CRC-32 is taken *before* the CRC-64: a bit that changes in between is in the
/// second alone, which then is not the producer's; one that changes later is in neither, and whoever reads the block
/// next finds that it does not agree with the first.
#[derive(Debug)]
pub(crate) struct Sums {
    crc32: Digest,
    crc64: Digest,
}

impl Default for Sums {
    fn default() -> Self {
        let crc32 = Digest::new(CrcAlgorithm::Crc32IsoHdlc);
        Self { crc32, crc64: Digest::new(CrcAlgorithm::Crc64Nvme) }
    }
}

impl Sums {
    pub(crate) fn add(&mut self, piece: &[u8]) {
        self.crc32.update(piece);
        self.crc64.update(piece);
    }
}

fn agree<T: PartialEq + ToString>(
    field: &'static str,
    sealed: &T,
    found: &T,
) -> Result<(), TransferError> {
    if sealed == found {
        return Ok(());
    }
    let (sealed, found) = (sealed.to_string(), found.to_string());
    Err(TransferError::SealMismatch { field, sealed, found })
}

fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
