//! The consumer's side of one handoff.

use std::{
    collections::VecDeque,
    future::{Future, pending},
    mem,
    sync::atomic::{Ordering::Acquire, fence},
    task::Poll,
    time::Duration,
};

use baton_arena::Landing;
use bytes::BytesMut;
use futures::{future::BoxFuture, poll};
use quinn::{Connection, ReadError, RecvStream, SendStream};
use tokio::{
    task::yield_now,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Data, failed,
    wire::{Frame, Inbox, Word, put_address},
};
use crate::{
    arrivals::Arrivals,
    channel::{BlockSink, Pulled, Subscription, TransferError},
    frame::{BlockHead, ConsumerWord, ProducerFrame, VERSION, encode_subscription},
    mac::MacKey,
    quic::{
        code::{Code, lost},
        consume::{PROGRESS_INTERVAL, acknowledge, attend, ended_early, say},
        stalled,
    },
};

/// Blocks that a producer may announce before they are granted a slot.
const MAX_OFFERED: usize = 4096;

/// So much is verified before the producer is heard again, which may wait for slots to write into.
const PORTION_BYTES: u64 = 1 << 20;

/// How long a slot is kept that a lost producer may still write into. It notices the loss within two
/// seconds and stops; a network card that had been given a write before that gives up after eight.
const QUARANTINE: Duration = Duration::from_secs(15);

/// Subscribes, grants every block a slot, verifies, acknowledges.
pub(super) async fn pull(
    connection: Connection,
    subscription: &Subscription,
    sink: &dyn BlockSink,
    key: Option<MacKey>,
    data: &Data,
    stall: Duration,
) -> Result<Pulled, TransferError> {
    let opened = timeout(stall, connection.open_bi()).await.map_err(|_| stalled(stall))?;
    let (send, recv) = opened.map_err(|error| lost(&error))?;
    let mut producer = Producer {
        connection,
        send,
        inbox: Some(Inbox::new(recv)),
        granted: VecDeque::new(),
        landed: 0,
        stall,
        is_over: false,
    };
    let pulled = producer.take_over(subscription, sink, key, data).await;
    match &pulled {
        Ok(_) => producer.is_over = true,
        Err(error) => producer.break_off(Code::of(error)),
    }
    pulled
}

/// The stream to one producer. Dropped before its end it tells that the handoff was given up.
struct Producer {
    connection: Connection,
    send: SendStream,
    /// Gone once the stream is left to [`settle`].
    inbox: Option<Inbox>,
    /// Slots that the producer may be writing into.
    granted: VecDeque<(BlockHead, Landing)>,
    /// So many of them, the first ones, are said to have been written.
    landed: usize,
    stall: Duration,
    is_over: bool,
}

/// The slot that is being waited for.
type Reserving<'a> = BoxFuture<'a, Result<Landing, TransferError>>;

impl Producer {
    async fn take_over(
        &mut self,
        subscription: &Subscription,
        sink: &dyn BlockSink,
        key: Option<MacKey>,
        data: &Data,
    ) -> Result<Pulled, TransferError> {
        let mut saying = BytesMut::from(&encode_subscription(subscription, key.as_ref())[..]);
        put_address(&mut saying, &data.ucx.address());
        let mut arrivals = Arrivals::new(subscription, super::TRANSPORT, key, sink.layer_groups());
        let mut offered: VecDeque<BlockHead> = VecDeque::new();
        let mut told_regions: Vec<u64> = Vec::new();
        let mut reserving: Option<Reserving<'_>> = None;
        let mut reserving_since = Instant::now();
        let mut last_word = Instant::now();
        loop {
            while let Some(frame) = self.next_frame()? {
                match frame {
                    Frame::Said(ProducerFrame::Block(head)) => {
                        arrivals.announced(&head, sink.max_block_bytes())?;
                        if offered.len() >= MAX_OFFERED {
                            let excess =
                                format!("more than {MAX_OFFERED} blocks were announced at once");
                            return Err(TransferError::Protocol(excess));
                        }
                        offered.push_back(head);
                    }
                    Frame::Whole { head, bytes } => {
                        self.verify(u64::MAX, sink, &mut arrivals).await?;
                        if !offered.is_empty() || !self.granted.is_empty() {
                            let early = "a block that overtakes others".to_owned();
                            return Err(TransferError::Protocol(early));
                        }
                        self.whole(&head, &bytes, sink, &mut arrivals).await?;
                    }
                    Frame::Landed { blocks } => {
                        self.landed = self.landed.saturating_add(blocks as usize);
                        if self.landed > self.granted.len() {
                            let early = "a block landed for which it was granted no slot";
                            return Err(TransferError::Protocol(early.to_owned()));
                        }
                        if last_word.elapsed() >= PROGRESS_INTERVAL {
                            last_word = Instant::now();
                            Word::Said(ConsumerWord::Progress).encode(&mut saying);
                        }
                    }
                    Frame::Said(ProducerFrame::Sealed(sealed)) => {
                        self.verify(u64::MAX, sink, &mut arrivals).await?;
                        if !offered.is_empty() || !self.granted.is_empty() {
                            let early = "a seal before all its blocks".to_owned();
                            return Err(TransferError::Protocol(early));
                        }
                        let pulled = arrivals.sealed(&sealed)?;
                        acknowledge(&mut self.send, self.stall).await?;
                        return Ok(pulled);
                    }
                    Frame::Said(ProducerFrame::Waiting) => {}
                    Frame::Said(ProducerFrame::Mapped { .. } | ProducerFrame::Kept) => {
                        let elsewhere = "a block in memory that is not shared".to_owned();
                        return Err(TransferError::Protocol(elsewhere));
                    }
                    Frame::Said(ProducerFrame::Refused(refusal)) => {
                        return Err(TransferError::Refused(refusal));
                    }
                    Frame::Said(ProducerFrame::WrongVersion { ours: theirs }) => {
                        return Err(TransferError::Version { ours: VERSION, theirs });
                    }
                }
            }
            // Every block that there is a slot for now gets one; the first that there is none for waits.
            while let Some(offer) = offered.front().copied() {
                let slot = reserving.get_or_insert_with(|| {
                    reserving_since = Instant::now();
                    sink.reserve(offer.index, offer.len)
                });
                let Poll::Ready(slot) = poll!(slot) else { break };
                reserving = None;
                offered.pop_front();
                self.grant(offer, slot?, data, &mut told_regions, &mut saying).await?;
            }
            self.say(&mut saying).await?;
            self.verify(PORTION_BYTES, sink, &mut arrivals).await?;
            let stall = self.stall;
            let inbox = self.inbox.as_mut().ok_or_else(ended_early)?;
            tokio::select! {
                biased;
                more = inbox.more() => if !more? { return Err(ended_early()) },
                slot = waiting(&mut reserving) => {
                    reserving = None;
                    if let Some(offer) = offered.pop_front() {
                        self.grant(offer, slot?, data, &mut told_regions, &mut saying).await?;
                    }
                }
                // What has come meanwhile is heard before the next portion.
                () = yield_now(), if self.landed > 0 => {}
                () = sleep_until(reserving_since + stall), if reserving.is_some() => {
                    let reason = format!("no block was placed for {stall:?}");
                    return Err(TransferError::NoRoom(reason));
                }
                // The producer says that it lives whenever it has nothing else to say.
                () = sleep(stall) => return Err(stalled(stall)),
            }
        }
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, TransferError> {
        let inbox = self.inbox.as_mut().ok_or_else(ended_early)?;
        Ok(Frame::take(&mut inbox.unread)?)
    }

    async fn grant(
        &mut self,
        offer: BlockHead,
        slot: Landing,
        data: &Data,
        told_regions: &mut Vec<u64>,
        saying: &mut BytesMut,
    ) -> Result<(), TransferError> {
        if slot.len_bytes() as u64 != u64::from(offer.len) {
            return Err(TransferError::NoRoom(format!("no slot of {} bytes", offer.len)));
        }
        let region = data.region(slot.arena()).await.map_err(|error| failed(&error))?;
        let number = match told_regions.iter().position(|base| *base == region.base()) {
            Some(number) => number,
            None => {
                told_regions.push(region.base());
                let number = told_regions.len() - 1;
                let (base, len_bytes, key) = (region.base(), region.len_bytes(), region.key());
                Word::Region { id: small(number), base, len_bytes, key }.encode(saying);
                number
            }
        };
        let offset = slot.offset() as u64;
        Word::Grant { region: small(number), offset }.encode(saying);
        self.granted.push_back((offer, slot));
        Ok(())
    }

    /// Verifies blocks that the producer says lie in their slots, which is no proof, until so many bytes are
    /// read or there are no more.
    async fn verify(
        &mut self,
        most_bytes: u64,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        let mut bytes = 0;
        while self.landed > 0 && bytes < most_bytes {
            let Some((head, slot)) = self.granted.pop_front() else { break };
            self.landed -= 1;
            bytes += u64::from(head.len);
            fence(Acquire);
            let crc32 = arrivals.placed(&head, slot.as_bytes())?;
            self.attend(sink.verified(head.index, slot, crc32)).await?;
        }
        Ok(())
    }

    /// A block that came over the stream itself.
    async fn whole(
        &mut self,
        head: &BlockHead,
        bytes: &[u8],
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        arrivals.announced(head, sink.max_block_bytes())?;
        let slot = self.attend(sink.reserve(head.index, head.len)).await?;
        slot.write(&[bytes]).map_err(|error| TransferError::NoRoom(error.to_string()))?;
        let crc32 = arrivals.placed(head, slot.as_bytes())?;
        self.attend(sink.verified(head.index, slot, crc32)).await
    }

    async fn attend<T>(
        &mut self,
        work: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        let inbox = self.inbox.as_mut().ok_or_else(ended_early)?;
        attend(&mut inbox.recv, &self.connection, self.stall, work).await
    }

    async fn say(&mut self, saying: &mut BytesMut) -> Result<(), TransferError> {
        if saying.is_empty() {
            return Ok(());
        }
        say(&mut self.send, saying.split().freeze(), self.stall).await
    }

    fn break_off(&mut self, code: Code) {
        self.is_over = true;
        // It may be over already.
        let _ = self.send.reset(code.wire());
        let Some(mut inbox) = self.inbox.take() else { return };
        let granted = mem::take(&mut self.granted);
        if granted.is_empty() {
            let _ = inbox.recv.stop(code.wire());
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(settle(inbox.recv, granted))),
            // Nobody is left to wait for the producer: better a slot lost than written into by two.
            Err(_) => mem::forget(granted),
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if !self.is_over {
            self.break_off(Code::Cancelled);
        }
    }
}

/// Keeps slots until the producer writes into them no more.
async fn settle(mut recv: RecvStream, granted: VecDeque<(BlockHead, Landing)>) {
    loop {
        // In order, although that does not matter here. Out of order, quinn-proto 0.11.19 counts twice what it had handed
        // out in order and what then came again, and with it loses count of the connection's window: it panics where
        // overflow is checked.
        match recv.read_chunk(usize::MAX, true).await {
            Ok(Some(_)) => {}
            Ok(None) | Err(ReadError::Reset(_)) => break,
            Err(_) => {
                let slots = granted.len();
                tracing::warn!(slots, "slots wait for a lost producer's writes to end");
                sleep(QUARANTINE).await;
                break;
            }
        }
    }
    drop(granted);
}

async fn waiting(reserving: &mut Option<Reserving<'_>>) -> Result<Landing, TransferError> {
    match reserving {
        Some(slot) => slot.await,
        None => pending().await,
    }
}

/// Counts of regions and blocks of one handoff fit.
fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
