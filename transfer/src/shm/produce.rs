//! The producer's side of one handoff.

use std::{
    collections::HashMap,
    io,
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use async_trait::async_trait;
use baton_arena::Arena;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};

use super::{BEAT, SILENCE, Shared, WINDOW, gone, hello::Hello, silent, written};
use crate::{
    attach::{Attached, Guest, attached, understood},
    channel::{ExportStream, Exported, Refusal, Subscription, TransferError},
    frame::{
        BlockHead, BlocksDigest, ConsumerWord, PRELUDE_BYTES, ProducerFrame, SUBSCRIPTION_BYTES,
        SealedFrame, decode_prelude, decode_subscription,
    },
};

/// Words are read in pieces of this.
const READ_BYTES: usize = 4 << 10;

/// Answers one subscription.
pub(super) async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let mut consumer = Consumer::new(stream, Arc::clone(&shared));
    let asked = consumer.subscription().await;
    let Some(asked) = understood(&mut consumer, asked).await else { return };
    let Asked { subscription, peer, of } = asked;
    let arena = shared.arena.lock().clone();
    if let Err(error) = consumer.greet(&shared, arena.as_ref()).await {
        return tracing::debug!(%error, "a consumer is gone already");
    }
    if of != shared.config.certificate_fingerprint {
        return tracing::debug!("a consumer means another worker");
    }
    let exports = attached(&mut consumer, &*shared.exports, &subscription, peer).await;
    let Some(mut exports) = exports else { return };
    let outcome = consumer.hand_over(arena.as_ref(), &mut *exports).await;
    if let Err(TransferError::Refused(refusal)) = outcome {
        consumer.last_frame(ProducerFrame::Refused(refusal)).await;
    }
    // Lets go of its blocks before the handoff is said to be over.
    drop(consumer);
    exports.finish(outcome);
}

/// What a consumer asks for.
struct Asked {
    subscription: Subscription,
    /// Who it says it is.
    peer: [u8; 32],
    /// Of whom.
    of: [u8; 32],
}

/// The connection to one consumer.
struct Consumer {
    words: Words,
    /// Closed before the blocks are let go of: whoever still reads one finds it closed then.
    writer: OwnedWriteHalf,
    beat: Interval,
    heard: Instant,
    /// Blocks that the consumer may be reading, by their index.
    announced: HashMap<u32, Announced>,
    shared: Arc<Shared>,
    /// The last of them came over the socket, whole: one at a time does.
    is_inline: bool,
}

/// A block that the consumer may be reading.
struct Announced {
    bytes: Bytes,
    shared: Arc<Shared>,
}

impl Announced {
    fn new(bytes: Bytes, shared: &Arc<Shared>) -> Self {
        shared.announced.fetch_add(1, Relaxed);
        Self { bytes, shared: Arc::clone(shared) }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.shared.announced.fetch_sub(1, Relaxed);
    }
}

/// What the consumer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Ack,
    Progress,
    Taken(u32),
}

/// What comes next.
enum Event {
    Word(Word),
    Beat,
    Exported(Exported),
    Revoked,
}

impl Consumer {
    fn new(stream: UnixStream, shared: Arc<Shared>) -> Self {
        let (reader, writer) = stream.into_split();
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (heard, announced) = (Instant::now(), HashMap::new());
        let (words, is_inline) = (Words::new(reader), false);
        Self { words, writer, beat, heard, announced, shared, is_inline }
    }

    async fn subscription(&mut self) -> Result<Asked, TransferError> {
        let mut prelude = [0; PRELUDE_BYTES];
        self.read(&mut prelude).await?;
        decode_prelude(&prelude)?;
        let mut body = [0; SUBSCRIPTION_BYTES];
        self.read(&mut body).await?;
        let (mut peer, mut of) = ([0; 32], [0; 32]);
        self.read(&mut peer).await?;
        self.read(&mut of).await?;
        let asked = decode_subscription(&body)?;
        if asked.key.is_some() {
            return Err(TransferError::Protocol(
                "it wants a MAC of memory that it can read".into(),
            ));
        }
        Ok(Asked { subscription: asked.subscription, peer, of })
    }

    async fn read(&mut self, bytes: &mut [u8]) -> Result<(), TransferError> {
        let read =
            timeout(SILENCE, self.words.reader.read_exact(bytes)).await.map_err(|_| silent())?;
        read.map(drop).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                TransferError::Protocol("a subscription that ends early".to_owned())
            }
            _ => gone(&error),
        })
    }

    async fn greet(&mut self, shared: &Shared, arena: Option<&Arena>) -> Result<(), TransferError> {
        let arena = arena.map(Arena::file).transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "blocks cannot be shared, and are sent");
            None
        });
        let fingerprint = shared.config.certificate_fingerprint;
        let hello = Hello { fingerprint, arena }.encode();
        written(self.writer.write_all(&hello).await)
    }

    async fn hand_over(
        &mut self,
        arena: Option<&Arena>,
        exports: &mut dyn ExportStream,
    ) -> Result<(), TransferError> {
        let (mut digest, mut blocks_sent, mut is_sealed) = (BlocksDigest::default(), 0, false);
        loop {
            let takes_more = !is_sealed && self.has_room();
            match self.event(exports, takes_more).await? {
                Event::Word(Word::Taken(index)) => self.taken(index, exports)?,
                Event::Word(Word::Ack) if is_sealed && self.announced.is_empty() => {
                    // Who copied all of it needs it no more, and may be gone.
                    let kept = ProducerFrame::Kept.encode();
                    let _ = timeout(SILENCE, self.writer.write_all(&kept)).await;
                    return Ok(());
                }
                Event::Word(Word::Ack) => {
                    let early = "an acknowledgement before the seal".to_owned();
                    return Err(TransferError::Protocol(early));
                }
                Event::Word(Word::Progress) => {}
                Event::Beat => self.write(&ProducerFrame::Waiting.encode(), exports).await?,
                Event::Exported(item) => {
                    let mut saying = BytesMut::new();
                    let mut next = Some(item);
                    // All that is there goes into one announcement.
                    while let Some(item) = next.take() {
                        match item {
                            Exported::Block { handoff, index, crc, bytes } => {
                                let whole = bytes.len();
                                let len = u32::try_from(whole).map_err(|_| {
                                    let excess = format!("block {index} has {whole} bytes");
                                    TransferError::Protocol(excess)
                                })?;
                                let head = BlockHead { handoff, index, len, crc, mac: None };
                                self.announce(head, bytes, arena, &mut saying, exports).await?;
                                digest.add(index, crc);
                                blocks_sent += 1;
                                if self.has_room() {
                                    next = exports.next().now_or_never();
                                }
                            }
                            Exported::Sealed(seal) => {
                                let digest = std::mem::take(&mut digest).finish();
                                let sealed = SealedFrame { seal, blocks_sent, digest };
                                saying.put(ProducerFrame::Sealed(sealed).encode());
                                is_sealed = true;
                            }
                            Exported::Refused(refusal) => {
                                return Err(TransferError::Refused(refusal));
                            }
                            Exported::Aborted => {
                                return Err(TransferError::Refused(Refusal::Aborted));
                            }
                        }
                    }
                    self.write(&saying, exports).await?;
                }
                Event::Revoked => return Err(TransferError::Refused(Refusal::Aborted)),
            }
        }
    }

    async fn event(
        &mut self,
        exports: &mut dyn ExportStream,
        takes_more: bool,
    ) -> Result<Event, TransferError> {
        let silence = sleep_until(self.heard + SILENCE);
        let event = if takes_more {
            tokio::select! {
                biased;
                word = self.words.next() => Event::Word(word?),
                item = exports.next() => return Ok(Event::Exported(item)),
                _ = self.beat.tick() => return Ok(Event::Beat),
                () = silence => return Err(silent()),
            }
        } else {
            tokio::select! {
                biased;
                word = self.words.next() => Event::Word(word?),
                () = exports.revoked() => return Ok(Event::Revoked),
                _ = self.beat.tick() => return Ok(Event::Beat),
                () = silence => return Err(silent()),
            }
        };
        self.heard = Instant::now();
        Ok(event)
    }

    /// A block is needed no more.
    fn taken(&mut self, index: u32, exports: &mut dyn ExportStream) -> Result<(), TransferError> {
        let taken = self.announced.remove(&index).ok_or_else(|| {
            TransferError::Protocol(format!("it took block {index}, which it was not given"))
        })?;
        self.is_inline = false;
        exports.sent(taken.bytes.len() as u64);
        Ok(())
    }

    fn has_room(&self) -> bool {
        !self.is_inline && self.announced.len() < WINDOW
    }

    /// Tells where the block lies, or sends it where it lies in no arena that is shared.
    async fn announce(
        &mut self,
        head: BlockHead,
        bytes: Bytes,
        arena: Option<&Arena>,
        saying: &mut BytesMut,
        exports: &mut dyn ExportStream,
    ) -> Result<(), TransferError> {
        let lies = arena.and_then(|arena| Some((arena, arena.offset_of(&bytes)?)));
        if let Some((arena, offset)) = lies {
            let wanted_back = self.shared.is_short_of_slots(arena);
            saying.put(ProducerFrame::Mapped { head, offset, wanted_back }.encode());
        } else {
            self.is_inline = true;
            saying.put(ProducerFrame::Block(head).encode());
            self.write(&saying.split(), exports).await?;
            self.write(&bytes, exports).await?;
        }
        self.announced.insert(head.index, Announced::new(bytes, &self.shared));
        Ok(())
    }

    /// Writes all of it, unless the consumer dies or the producer takes the handoff back meanwhile.
    async fn write(
        &mut self,
        bytes: &[u8],
        exports: &mut dyn ExportStream,
    ) -> Result<(), TransferError> {
        let mut write = pin!(self.writer.write_all(bytes));
        loop {
            tokio::select! {
                biased;
                result = &mut write => return written(result),
                word = self.words.next() => match word? {
                    Word::Progress => self.heard = Instant::now(),
                    Word::Taken(index) if self.announced.contains_key(&index) => {
                        self.heard = Instant::now();
                        self.is_inline = false;
                        if let Some(taken) = self.announced.remove(&index) {
                            exports.sent(taken.bytes.len() as u64);
                        }
                    }
                    other => {
                        return Err(TransferError::Protocol(format!("{other:?} before its time")));
                    }
                },
                () = exports.revoked() => return Err(TransferError::Refused(Refusal::Aborted)),
                () = sleep_until(self.heard + SILENCE) => return Err(silent()),
            }
        }
    }
}

#[async_trait]
impl Guest for Consumer {
    async fn wait_for(
        &mut self,
        mut attaching: BoxFuture<'_, Attached>,
    ) -> Result<Attached, TransferError> {
        loop {
            tokio::select! {
                biased;
                done = &mut attaching => return Ok(done),
                word = self.words.next() => match word? {
                    Word::Progress => self.heard = Instant::now(),
                    other => {
                        return Err(TransferError::Protocol(format!("{other:?} before a block")));
                    }
                },
                _ = self.beat.tick() => {
                    let waiting = ProducerFrame::Waiting.encode();
                    written(self.writer.write_all(&waiting).await)?;
                }
                () = sleep_until(self.heard + SILENCE) => return Err(silent()),
            }
        }
    }

    async fn last_frame(&mut self, frame: ProducerFrame) {
        // A consumer that is gone needs no reason.
        let _ = timeout(SILENCE, self.writer.write_all(&frame.encode())).await;
    }

    /// Its socket is closed when it is dropped.
    fn turn_away(&mut self, _error: &TransferError) {}
}

/// What the consumer says after its subscription. It says much at a time.
struct Words {
    reader: OwnedReadHalf,
    unread: BytesMut,
}

impl Words {
    fn new(reader: OwnedReadHalf) -> Self {
        Self { reader, unread: BytesMut::new() }
    }

    /// The next one. Nothing is lost when the future is dropped.
    async fn next(&mut self) -> Result<Word, TransferError> {
        loop {
            if let Some(word) = self.parse()? {
                return Ok(word);
            }
            self.unread.reserve(READ_BYTES);
            let read = self.reader.read_buf(&mut self.unread).await;
            if read.map_err(|error| gone(&error))? == 0 {
                return Err(TransferError::BrokeOff("it gave the handoff up".to_owned()));
            }
        }
    }

    fn parse(&mut self) -> Result<Option<Word>, TransferError> {
        let Some(&first) = self.unread.first() else { return Ok(None) };
        let word = match ConsumerWord::decode(first)? {
            ConsumerWord::Ack => Word::Ack,
            ConsumerWord::Progress => Word::Progress,
            ConsumerWord::Taken => {
                let Some(index) = self.unread.get(1..5) else { return Ok(None) };
                let index = index.iter().rev().fold(0, |index, byte| index << 8 | u32::from(*byte));
                self.unread.advance(4);
                Word::Taken(index)
            }
        };
        self.unread.advance(1);
        Ok(Some(word))
    }
}
