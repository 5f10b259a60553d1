//! Between a consumer's channel and its arena.

use std::{future::pending, sync::Arc};

use async_trait::async_trait;
use baton_arena::{Arena, Slot, SlotView};
use parking_lot::Mutex;

use super::{Disturbance, Fate, Faults};
use crate::channel::{BlockSink, Channel, PeerAddress, Pulled, Subscription, TransferError};

pub(super) struct FaultyChannel {
    channel: Arc<dyn Channel>,
    faults: Faults,
    arena: Mutex<Option<Arena>>,
}

impl FaultyChannel {
    pub(super) fn new(channel: Arc<dyn Channel>, faults: Faults) -> Self {
        Self { channel, faults, arena: Mutex::default() }
    }
}

#[async_trait]
impl Channel for FaultyChannel {
    async fn pull(
        &self,
        peer: &PeerAddress,
        subscription: Subscription,
        sink: &mut dyn BlockSink,
    ) -> Result<Pulled, TransferError> {
        let fate = self.faults.fate(&subscription);
        let arena = self.arena.lock().clone();
        let mut sink = FaultySink { sink, fate, faults: &self.faults, arena, placed: None };
        self.channel.pull(peer, subscription, &mut sink).await
    }

    fn use_arena(&self, arena: &Arena) {
        *self.arena.lock() = Some(arena.clone());
        self.channel.use_arena(arena);
    }

    fn transport(&self) -> &'static str {
        self.channel.transport()
    }
}

struct FaultySink<'a> {
    sink: &'a mut dyn BlockSink,
    fate: Option<Fate>,
    faults: &'a Faults,
    arena: Option<Arena>,
    placed: Option<SlotView>,
}

#[async_trait]
impl BlockSink for FaultySink<'_> {
    fn max_block_bytes(&self) -> u32 {
        self.sink.max_block_bytes()
    }

    async fn place(&mut self, index: u32, bytes: &[&[u8]]) -> Result<SlotView, TransferError> {
        match self.fate.filter(|fate| fate.index == index).map(|fate| fate.what) {
            Some(what @ Disturbance::StallConsumer) => {
                self.faults.did(what);
                pending().await
            }
            Some(what @ Disturbance::CutConsumer) => {
                self.faults.did(what);
                Err(TransferError::BrokeOff("the network was cut".to_owned()))
            }
            Some(Disturbance::Rot) => {
                let view = self.sink.place(index, bytes).await?;
                self.placed = Some(view.clone());
                Ok(view)
            }
            _ => self.sink.place(index, bytes).await,
        }
    }

    async fn verified(&mut self, index: u32) -> Result<(), TransferError> {
        if let (Some(view), Some(arena), Some(fate)) = (self.placed.take(), &self.arena, self.fate)
            && rot(arena, view.as_ref(), fate.dice).is_some()
        {
            self.faults.did(Disturbance::Rot);
        }
        self.sink.verified(index).await
    }
}

/// Changes one bit where it lies.
fn rot(arena: &Arena, bytes: &[u8], dice: u64) -> Option<()> {
    let at = dice / 8 % u64::try_from(bytes.len()).ok().filter(|len| *len > 0)?;
    let byte = bytes.get(usize::try_from(at).ok()?)? ^ (1 << (dice % 8));
    let (offset, slot_bytes) = (arena.offset_of(bytes)? + at, arena.layout().slot_bytes);
    let slot = Slot(u32::try_from(offset / slot_bytes).ok()?);
    arena.write(slot, offset % slot_bytes, &[byte]).ok()
}
