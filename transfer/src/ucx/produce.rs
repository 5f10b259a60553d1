//! The producer's side of one handoff.

use std::{
    collections::{HashMap, VecDeque},
    future::pending,
    mem,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use baton_types::HandoffKey;
use baton_ucx::{Put, RemoteRegion, Writing};
use bytes::{Bytes, BytesMut};
use futures::{FutureExt, future::BoxFuture};
use quinn::{RecvStream, SendStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    failed,
    lane::Lane,
    wire::{Frame, Inbox, MAX_WHOLE_BYTES, Word, take_address},
};
use crate::{
    attach::{Attached, Guest, attached, understood},
    channel::{ExportStream, Exported, Exports, Refusal, Seal, TransferError},
    frame::{
        Asked, BlockHead, BlocksDigest, ConsumerWord, PRELUDE_BYTES, ProducerFrame,
        SUBSCRIPTION_BYTES, SealedFrame, decode_prelude, decode_subscription,
    },
    mac::MacKey,
    quic::{
        code::{Code, write_failed},
        produce::WAITING_INTERVAL,
        stalled,
    },
};

/// Blocks that are announced and have not landed: enough to keep UCX busy over a round trip.
const WINDOW_BLOCKS: usize = 64;
const WINDOW_BYTES: u64 = 16 << 20;

/// So much is said to have landed at once: the consumer verifies it while the next is written.
const BATCH_BYTES: u64 = 1 << 20;

/// How long writes may take to end once the handoff has failed, before the endpoint is closed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers one subscription.
pub(crate) async fn serve(
    (send, recv): (SendStream, RecvStream),
    peer: [u8; 32],
    exports: Arc<dyn Exports>,
    lane: Arc<Lane>,
    stall: Duration,
) {
    let mut consumer = Consumer {
        send,
        inbox: Inbox::new(recv),
        saying: BytesMut::new(),
        lane,
        stall,
        address: Bytes::new(),
        key: None,
        regions: HashMap::new(),
        offered: VecDeque::new(),
        writing: VecDeque::new(),
        window_bytes: 0,
        deadline: Instant::now() + stall,
    };
    let asked = consumer.subscription().await;
    let Some(Asked { subscription, key }) = understood(&mut consumer, asked).await else { return };
    consumer.key = key;
    let stream = attached(&mut consumer, &*exports, &subscription, peer).await;
    let Some(mut stream) = stream else { return };
    let outcome = consumer.hand_over(&mut *stream).await;
    // What ends the stream says that no write is under way: the consumer then uses the slots for others.
    consumer.drain().await;
    match &outcome {
        Ok(()) => {}
        Err(TransferError::Refused(Refusal::WrongPrompt)) => {
            consumer.last_frame(ProducerFrame::Refused(Refusal::WrongPrompt)).await;
        }
        Err(error) => consumer.break_off(Code::of(error)),
    }
    // The blocks are let go of before the handoff is said to be over.
    drop(consumer);
    stream.finish(outcome);
}

/// A block that waits for its slot.
struct Offered {
    index: u32,
    crc: u64,
    bytes: Bytes,
}

/// Blocks of one region that go together.
#[derive(Default)]
struct Granted {
    region: u32,
    puts: Vec<Put>,
    /// Index, checksum, length.
    blocks: Vec<(u32, u64, u64)>,
    bytes: u64,
}

/// Blocks on their way, in order.
struct Batch {
    /// Index, checksum, length.
    blocks: Vec<(u32, u64, u64)>,
    writing: Writing,
}

/// The stream to one consumer.
struct Consumer {
    send: SendStream,
    inbox: Inbox,
    saying: BytesMut,
    lane: Arc<Lane>,
    stall: Duration,
    address: Bytes,
    /// For the MAC that the consumer asked for.
    key: Option<MacKey>,
    regions: HashMap<u32, RemoteRegion>,
    offered: VecDeque<Offered>,
    writing: VecDeque<Batch>,
    /// Of blocks that are announced and have not landed.
    window_bytes: u64,
    deadline: Instant,
}

/// What comes next from the export, or that it was taken back.
enum Next {
    Item(Exported),
    Revoked,
}

impl Consumer {
    async fn subscription(&mut self) -> Result<Asked, TransferError> {
        let come = async {
            loop {
                if self.inbox.unread.len() >= PRELUDE_BYTES {
                    decode_prelude(&self.inbox.unread[..PRELUDE_BYTES])?;
                }
                if self.inbox.unread.len() >= PRELUDE_BYTES + SUBSCRIPTION_BYTES {
                    break;
                }
                self.listen().await?;
            }
            let asked = self.inbox.unread.split_to(PRELUDE_BYTES + SUBSCRIPTION_BYTES);
            let asked = decode_subscription(&asked[PRELUDE_BYTES..])?;
            loop {
                if let Some(address) = take_address(&mut self.inbox.unread)? {
                    self.address = address;
                    return Ok(asked);
                }
                self.listen().await?;
            }
        };
        let stall = Duration::from_secs(10);
        timeout(stall, come).await.map_err(|_| stalled(stall))?
    }

    async fn listen(&mut self) -> Result<(), TransferError> {
        if self.inbox.more().await? {
            return Ok(());
        }
        let ended = "it ended its stream without an acknowledgement".to_owned();
        Err(TransferError::BrokeOff(ended))
    }

    async fn hand_over(&mut self, stream: &mut dyn ExportStream) -> Result<(), TransferError> {
        let mut digest = BlocksDigest::default();
        let mut blocks_sent = 0;
        let mut sealed: Option<Seal> = None;
        self.deadline = Instant::now() + self.stall;
        loop {
            if self.hear().await? {
                return Err(unasked());
            }
            if let Some(seal) = sealed
                && self.offered.is_empty()
                && self.writing.is_empty()
            {
                return self.seal(seal, blocks_sent, digest.finish(), stream).await;
            }
            self.say().await?;
            let takes_more = sealed.is_none() && self.has_room();
            let next = async {
                if takes_more {
                    Next::Item(stream.next().await)
                } else {
                    stream.revoked().await;
                    Next::Revoked
                }
            };
            let is_waited_for = !self.offered.is_empty() || !self.writing.is_empty();
            let Self { inbox, writing, .. } = self;
            tokio::select! {
                biased;
                done = first_done(writing) => {
                    done?;
                    self.deadline = Instant::now() + self.stall;
                    for (index, crc, bytes) in self.landed() {
                        digest.add(index, crc);
                        blocks_sent += 1;
                        stream.sent(bytes);
                    }
                    self.lane.check().await?;
                }
                more = inbox.more() => if !more? {
                    let ended = "it ended its stream without an acknowledgement".to_owned();
                    return Err(TransferError::BrokeOff(ended));
                },
                next = next => {
                    let mut next = Some(next);
                    // All that is there goes into one announcement.
                    while let Some(item) = next.take() {
                        match item {
                            Next::Item(Exported::Block { handoff, index, crc, bytes }) => {
                                let head = self.head(handoff, index, crc, &bytes)?;
                                let behind = if self.has_room_behind(&head) {
                                    stream.next().now_or_never()
                                } else {
                                    None
                                };
                                if let Some(Exported::Sealed(seal)) = behind
                                    && self.may_go_whole(&head)
                                {
                                    let len = bytes.len() as u64;
                                    Frame::Whole { head, bytes }.encode(&mut self.saying);
                                    digest.add(index, crc);
                                    blocks_sent += 1;
                                    stream.sent(len);
                                    sealed = Some(seal);
                                } else {
                                    self.offer(head, bytes);
                                    next = behind.map(Next::Item);
                                }
                            }
                            Next::Item(Exported::Sealed(seal)) => sealed = Some(seal),
                            Next::Item(Exported::Refused(refusal)) => {
                                return Err(TransferError::Refused(refusal));
                            }
                            Next::Item(Exported::Aborted) | Next::Revoked => {
                                return Err(TransferError::Refused(Refusal::Aborted));
                            }
                        }
                    }
                }
                () = sleep(WAITING_INTERVAL) => self.add(ProducerFrame::Waiting),
                () = sleep_until(self.deadline), if is_waited_for => {
                    return Err(stalled(self.stall));
                }
            }
            if !is_waited_for {
                self.deadline = Instant::now() + self.stall;
            }
        }
    }

    fn has_room(&self) -> bool {
        self.has_room_with(0, 0)
    }

    fn has_room_behind(&self, head: &BlockHead) -> bool {
        self.has_room_with(1, u64::from(head.len))
    }

    fn has_room_with(&self, blocks: usize, bytes: u64) -> bool {
        let under_way = self.writing.iter().map(|batch| batch.blocks.len()).sum::<usize>();
        let blocks = self.offered.len() + under_way + blocks;
        blocks == 0 || blocks < WINDOW_BLOCKS && self.window_bytes + bytes < WINDOW_BYTES
    }

    /// Whether a block that is all of what is left goes over the stream, which takes one round trip where
    /// a write takes two and its own.
    fn may_go_whole(&self, head: &BlockHead) -> bool {
        head.len <= MAX_WHOLE_BYTES
            && self.offered.is_empty()
            && self.writing.is_empty()
            && !self.lane.requires_rdma()
    }

    fn head(
        &self,
        handoff: HandoffKey,
        index: u32,
        crc: u64,
        bytes: &Bytes,
    ) -> Result<BlockHead, TransferError> {
        let whole = bytes.len() as u64;
        let len = u32::try_from(whole)
            .map_err(|_| TransferError::Protocol(format!("block {index} has {whole} bytes")))?;
        let mac = self.key.map(|key| key.of_block(&handoff, index, bytes));
        Ok(BlockHead { handoff, index, len, crc, mac })
    }

    fn offer(&mut self, head: BlockHead, bytes: Bytes) {
        self.add(ProducerFrame::Block(head));
        self.window_bytes += u64::from(head.len);
        self.offered.push_back(Offered { index: head.index, crc: head.crc, bytes });
    }

    /// Acts on all that the consumer has said. Answers whether it acknowledged.
    async fn hear(&mut self) -> Result<bool, TransferError> {
        let mut granted: Vec<Granted> = Vec::new();
        let mut is_acked = false;
        while let Some(word) = Word::take(&mut self.inbox.unread)? {
            self.deadline = Instant::now() + self.stall;
            match word {
                Word::Said(ConsumerWord::Progress) => {}
                Word::Said(ConsumerWord::Ack) => is_acked = true,
                Word::Said(ConsumerWord::Taken) => return Err(unasked()),
                Word::Region { id, base, len_bytes, key } => {
                    let region = self.lane.region(&self.address, base, len_bytes, key).await?;
                    self.regions.insert(id, region);
                }
                Word::Grant { region, offset } => {
                    let Offered { index, crc, bytes } =
                        self.offered.pop_front().ok_or_else(unasked)?;
                    let len = bytes.len() as u64;
                    let batch = match granted.last_mut() {
                        Some(last) if last.region == region && last.bytes < BATCH_BYTES => last,
                        _ => granted.push_mut(Granted { region, ..Granted::default() }),
                    };
                    batch.puts.push(Put { bytes, offset });
                    batch.blocks.push((index, crc, len));
                    batch.bytes += len;
                }
            }
        }
        for Granted { region, puts, blocks, .. } in granted {
            let region = self.regions.get(&region).ok_or_else(unasked)?;
            let writing = region.put(puts).map_err(|error| failed(&error))?;
            self.writing.push_back(Batch { blocks, writing });
        }
        Ok(is_acked)
    }

    /// The first batch was written.
    fn landed(&mut self) -> Vec<(u32, u64, u64)> {
        let Some(Batch { blocks, .. }) = self.writing.pop_front() else { return Vec::new() };
        self.window_bytes -= blocks.iter().map(|(.., bytes)| bytes).sum::<u64>();
        let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
        Frame::Landed { blocks: count }.encode(&mut self.saying);
        blocks
    }

    async fn seal(
        &mut self,
        seal: Seal,
        blocks_sent: u32,
        digest: [u8; 32],
        stream: &mut dyn ExportStream,
    ) -> Result<(), TransferError> {
        self.add(ProducerFrame::Sealed(SealedFrame { seal, blocks_sent, digest }));
        self.say().await?;
        // Fails only where the stream was finished or reset here, which it was not.
        let _ = self.send.finish();
        let mut revoked = pin!(stream.revoked());
        self.deadline = Instant::now() + self.stall;
        loop {
            if self.hear().await? {
                return Ok(());
            }
            let deadline = self.deadline;
            tokio::select! {
                heard = self.listen() => heard?,
                () = &mut revoked => return Err(TransferError::Refused(Refusal::Aborted)),
                () = sleep_until(deadline) => return Err(stalled(self.stall)),
            }
        }
    }

    /// Waits until no write is under way.
    async fn drain(&mut self) {
        let mut batches = mem::take(&mut self.writing);
        let ends = async {
            for batch in &mut batches {
                // However it ended, it ended.
                let _ = batch.writing.done().await;
            }
        };
        if timeout(DRAIN_TIMEOUT, ends).await.is_err() {
            self.lane.cut().await;
            for batch in &mut batches {
                let _ = batch.writing.done().await;
            }
        }
    }

    fn add(&mut self, frame: ProducerFrame) {
        Frame::Said(frame).encode(&mut self.saying);
    }

    async fn say(&mut self) -> Result<(), TransferError> {
        if self.saying.is_empty() {
            return Ok(());
        }
        let said = self.saying.split().freeze();
        timeout(self.stall, self.send.write_chunk(said))
            .await
            .map_err(|_| stalled(self.stall))?
            .map_err(|error| write_failed(&error))
    }

    fn break_off(&mut self, code: Code) {
        // Either may be over already.
        let _ = self.send.reset(code.wire());
        let _ = self.inbox.recv.stop(code.wire());
    }
}

#[async_trait]
impl Guest for Consumer {
    async fn wait_for(
        &mut self,
        mut attaching: BoxFuture<'_, Attached>,
    ) -> Result<Attached, TransferError> {
        loop {
            while let Some(word) = Word::take(&mut self.inbox.unread)? {
                if word != Word::Said(ConsumerWord::Progress) {
                    return Err(unasked());
                }
            }
            tokio::select! {
                biased;
                done = &mut attaching => return Ok(done),
                heard = self.listen() => heard?,
                () = sleep(WAITING_INTERVAL) => {
                    self.add(ProducerFrame::Waiting);
                    self.say().await?;
                }
            }
        }
    }

    async fn last_frame(&mut self, frame: ProducerFrame) {
        self.add(frame);
        if self.say().await.is_ok() {
            // Fails only where the consumer is gone.
            let _ = self.send.finish();
        }
    }

    fn turn_away(&mut self, error: &TransferError) {
        self.break_off(Code::of(error));
    }
}

async fn first_done(writing: &mut VecDeque<Batch>) -> Result<(), TransferError> {
    match writing.front_mut() {
        Some(batch) => batch.writing.done().await.map_err(|error| failed(&error)),
        None => pending().await,
    }
}

fn unasked() -> TransferError {
    TransferError::Protocol("it said what it was not asked".to_owned())
}
