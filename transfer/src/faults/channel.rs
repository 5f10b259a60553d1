//! Between a consumer's channel and its arena.

use std::{fs, future::pending, os::unix::fs::FileExt, sync::Arc};

use async_trait::async_trait;
use baton_arena::{Arena, Landing, PeerArena};

use super::{Disturbance, Fate, Faults};
use crate::{
    channel::{BlockSink, Channel, PeerAddress, Pulled, Subscription, TransferError},
    shm::MappedBlock,
};

pub(super) struct FaultyChannel {
    pub(super) channel: Arc<dyn Channel>,
    pub(super) faults: Faults,
}

#[async_trait]
impl Channel for FaultyChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let fate = self.faults.fate(&subscription);
        let sink = FaultySink { sink, fate, faults: &self.faults };
        self.channel.pull(peer, subscription, &sink).await
    }

    fn use_arena(&self, arena: &Arena) {
        self.channel.use_arena(arena);
    }

    fn transports(&self) -> Vec<String> {
        self.channel.transports()
    }
}

struct FaultySink<'a> {
    sink: &'a dyn BlockSink,
    fate: Option<Fate>,
    faults: &'a Faults,
}

impl FaultySink<'_> {
    fn fate_of(&self, index: u32) -> Option<Fate> {
        self.fate.filter(|fate| fate.index == index)
    }

    /// Unless the consumer takes nothing more from this block on.
    async fn may_take(&self, index: u32) -> Result<(), TransferError> {
        match self.fate_of(index).map(|fate| fate.what) {
            Some(what @ Disturbance::StallConsumer) => {
                self.faults.did(what);
                pending().await
            }
            Some(what @ Disturbance::CutConsumer) => {
                self.faults.did(what);
                Err(TransferError::BrokeOff("the network was cut".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl BlockSink for FaultySink<'_> {
    fn max_block_bytes(&self) -> u32 {
        self.sink.max_block_bytes()
    }

    fn layer_groups(&self) -> u32 {
        self.sink.layer_groups()
    }

    async fn reserve(&self, index: u32, len: u32) -> Result<Landing, TransferError> {
        self.may_take(index).await?;
        self.sink.reserve(index, len).await
    }

    async fn verified(&self, index: u32, block: Landing, crc32: u32) -> Result<(), TransferError> {
        if let Some(Fate { what: what @ Disturbance::Rot, dice, .. }) = self.fate_of(index)
            && rot(&block, dice).is_some()
        {
            self.faults.did(what);
        }
        self.sink.verified(index, block, crc32).await
    }

    fn takes_from(
        &self,
        index: u32,
        len: u32,
        arena: &Arc<PeerArena>,
    ) -> Result<bool, TransferError> {
        self.sink.takes_from(index, len, arena)
    }

    async fn verified_there(
        &self,
        index: u32,
        block: MappedBlock,
        crc32: u32,
    ) -> Result<(), TransferError> {
        self.may_take(index).await?;
        if let Some(Fate { what: what @ Disturbance::Rot, dice, .. }) = self.fate_of(index)
            && rot_there(&block, dice).is_some()
        {
            self.faults.did(what);
        }
        self.sink.verified_there(index, block, crc32).await
    }
}

/// Changes one bit where it lies.
fn rot(block: &Landing, dice: u64) -> Option<()> {
    let at = dice / 8 % u64::try_from(block.len_bytes()).ok().filter(|len| *len > 0)?;
    let byte = block.as_bytes().get(usize::try_from(at).ok()?)? ^ (1 << (dice % 8));
    block.arena().write(block.slot(), at, &[byte]).ok()
}

/// The same in the producer's arena, as the producer could.
fn rot_there(block: &MappedBlock, dice: u64) -> Option<()> {
    let bytes = block.bytes().ok()?;
    let at = dice / 8 % u64::try_from(bytes.len()).ok().filter(|len| *len > 0)?;
    let byte = bytes.get(usize::try_from(at).ok()?)? ^ (1 << (dice % 8));
    let file = fs::OpenOptions::new().write(true).open(&block.arena().file().path).ok()?;
    file.write_all_at(&[byte], block.offset() + at).ok()
}
