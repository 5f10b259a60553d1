//! The consumer's side of one handoff.

use std::{collections::VecDeque, future::Future, pin::pin, sync::Arc, time::Duration};

use baton_arena::PeerArena;
use bytes::{Buf, Bytes, BytesMut};
use futures::FutureExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};

use super::{
    BEAT, SILENCE, ShmChannel,
    copying::{Copied, Copiers, Copying},
    gone,
    hello::{HEAD_BYTES, Hello, KIND},
    silent, written,
};
use crate::{
    arrivals::{Arrivals, verify},
    channel::{BlockSink, PeerAddress, Pulled, Subscription, TransferError},
    frame::{BlockHead, ConsumerWord, ProducerFrame, VERSION, encode_subscription},
};

/// Frames are read in pieces of this: some hundred at a time.
const READ_BYTES: usize = 16 << 10;

/// Blocks of so many bytes that were copied are told of together, where there is more to copy meanwhile.
const TOLD_BYTES: u64 = 2 << 20;

/// Subscribes, copies every block, verifies, acknowledges.
pub(super) async fn pull(
    channel: &ShmChannel,
    stream: UnixStream,
    peer: &PeerAddress,
    subscription: &Subscription,
    sink: &dyn BlockSink,
) -> Result<Pulled, TransferError> {
    let config = &channel.shared.config;
    let mut producer = Producer::new(stream, config.stall_timeout, sink.max_block_bytes());
    producer.write(&encode_subscription(subscription, None)).await?;
    producer.write(&config.certificate_fingerprint).await?;
    producer.write(&peer.certificate_fingerprint).await?;
    let hello = producer.hello().await?;
    if hello.fingerprint != peer.certificate_fingerprint {
        return Err(TransferError::WrongCertificate { worker: peer.worker_name.clone() });
    }
    let arena = match hello.arena {
        Some(file) => Some(channel.map(peer, file).await?),
        None => None,
    };
    producer.take_over(arena, subscription, sink, &channel.copiers).await
}

/// The connection to one producer. Dropping it tells that the handoff is over.
struct Producer {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    stall: Duration,
    max_block_bytes: u32,
    beat: Interval,
    heard: Instant,
    unread: BytesMut,
    frames: VecDeque<Came>,
    /// Blocks that were taken, and the producer does not know.
    taken: usize,
    taken_bytes: u64,
}

/// What there is to do next.
enum Next {
    Came(Came),
    Copied(Vec<Copied>),
}

/// A frame, with its block where that came over the socket.
struct Came(ProducerFrame, Option<Bytes>);

impl Producer {
    fn new(stream: UnixStream, stall: Duration, max_block_bytes: u32) -> Self {
        let (reader, writer) = stream.into_split();
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            reader,
            writer,
            stall,
            max_block_bytes,
            beat,
            heard: Instant::now(),
            unread: BytesMut::new(),
            frames: VecDeque::new(),
            taken: 0,
            taken_bytes: 0,
        }
    }

    async fn take_over(
        &mut self,
        arena: Option<Arc<PeerArena>>,
        subscription: &Subscription,
        sink: &dyn BlockSink,
        copiers: &Copiers,
    ) -> Result<Pulled, TransferError> {
        let mut arrivals = Arrivals::new(subscription, super::TRANSPORT, None, sink.layer_groups());
        let mut copying = Copying::new(copiers);
        loop {
            let Came(frame, bytes) = match self.next(&mut copying).await? {
                Next::Came(came) => came,
                Next::Copied(blocks) => {
                    self.all_placed(blocks, sink, &mut arrivals).await?;
                    continue;
                }
            };
            match frame {
                ProducerFrame::Mapped { head, offset } => {
                    let arena = arena.as_ref().ok_or_else(|| {
                        TransferError::Protocol("a block in an arena it has not".to_owned())
                    })?;
                    self.mapped((head, offset), arena, sink, &mut copying, &mut arrivals).await?;
                }
                ProducerFrame::Block(head) => {
                    arrivals.announced(&head, self.max_block_bytes)?;
                    let landing = self.attend(sink.reserve(head.index, head.len)).await?;
                    let bytes = bytes.unwrap_or_default();
                    let failed = |error| TransferError::NoRoom(format!("{error}"));
                    landing.write(&[&bytes]).map_err(failed)?;
                    let verified = verify(&head, landing.as_bytes(), None);
                    self.placed(Copied { head, landing, verified }, sink, &mut arrivals).await?;
                }
                ProducerFrame::Sealed(sealed) => {
                    self.tell_taken().await?;
                    let pulled = arrivals.sealed(&sealed)?;
                    self.write(&ConsumerWord::Ack.encode()).await?;
                    return Ok(pulled);
                }
                ProducerFrame::Waiting => {}
                ProducerFrame::Refused(refusal) => return Err(TransferError::Refused(refusal)),
                ProducerFrame::WrongVersion { ours: theirs } => {
                    return Err(TransferError::Version { ours: VERSION, theirs });
                }
            }
        }
    }

    /// Takes a block over from the producer's arena, and with it those behind it that are announced by now
    /// and for which there are slots.
    async fn mapped(
        &mut self,
        first: (BlockHead, u64),
        arena: &Arc<PeerArena>,
        sink: &dyn BlockSink,
        copying: &mut Copying<'_>,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        let mut next = Some(first);
        while let Some((head, offset)) = next.take() {
            arrivals.announced(&head, self.max_block_bytes)?;
            let landing = match sink.reserve(head.index, head.len).now_or_never() {
                Some(landing) => landing?,
                None if copying.is_empty() => {
                    self.attend(sink.reserve(head.index, head.len)).await?
                }
                None => {
                    copying.waits_for_slots();
                    arrivals.put_back(&head);
                    self.frames.push_front(Came(ProducerFrame::Mapped { head, offset }, None));
                    break;
                }
            };
            copying.gather(head, offset, landing, arena);
            if copying.has_room() {
                next = self.next_mapped()?;
            }
        }
        let copied = copying.start(arena);
        self.all_placed(copied, sink, arrivals).await
    }

    /// The next frame, if it has come and tells of a block in the producer's arena.
    fn next_mapped(&mut self) -> Result<Option<(BlockHead, u64)>, TransferError> {
        if self.frames.is_empty() {
            let came = self.parse()?;
            self.frames.extend(came);
        }
        let Some(Came(ProducerFrame::Mapped { head, offset }, _)) = self.frames.front() else {
            return Ok(None);
        };
        let mapped = (*head, *offset);
        self.frames.pop_front();
        Ok(Some(mapped))
    }

    async fn all_placed(
        &mut self,
        copied: Vec<Copied>,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        for copied in copied {
            self.placed(copied, sink, arrivals).await?;
        }
        Ok(())
    }

    /// Counts a block that was copied and verified, and passes it on.
    async fn placed(
        &mut self,
        copied: Copied,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        let Copied { head, landing, verified } = copied;
        let crc32 = match verified {
            // The producer may have taken its slot back under the copy, and have said so.
            Err(TransferError::Corrupt { .. }) if self.was_refused() => {
                return Err(TransferError::Refused(crate::Refusal::Aborted));
            }
            verified => verified?,
        };
        arrivals.verified(&head);
        self.taken += 1;
        self.taken_bytes += u64::from(head.len);
        self.attend(sink.verified(head.index, landing, crc32)).await
    }

    /// Works on what has come, and lets go of it when the producer takes the handoff back or dies
    /// meanwhile.
    async fn attend<T>(
        &mut self,
        work: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        let mut work = pin!(work);
        let give_up = Instant::now() + self.stall;
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                more = self.more() => more?,
                () = sleep_until(give_up) => {
                    let reason = format!("no block was placed for {:?}", self.stall);
                    return Err(TransferError::NoRoom(reason));
                }
            }
            while let Some(came) = self.parse()? {
                if let Came(ProducerFrame::Refused(refusal), _) = came {
                    return Err(TransferError::Refused(refusal));
                }
                self.frames.push_back(came);
            }
            self.tell_taken().await?;
        }
    }

    /// What comes next: blocks that were copied, or a frame that need not wait for them. What was taken is
    /// told when there is nothing else to do, or much to tell.
    async fn next(&mut self, copying: &mut Copying<'_>) -> Result<Next, TransferError> {
        if self.taken_bytes >= TOLD_BYTES {
            self.tell_taken().await?;
        }
        loop {
            if self.frames.is_empty() {
                let came = self.parse()?;
                self.frames.extend(came);
            }
            let may_come = match self.frames.front() {
                None => false,
                Some(Came(ProducerFrame::Mapped { .. }, _)) => copying.has_room(),
                Some(Came(ProducerFrame::Block(_) | ProducerFrame::Sealed(_), _)) => {
                    copying.is_empty()
                }
                Some(_) => true,
            };
            if may_come && let Some(came) = self.frames.pop_front() {
                return Ok(Next::Came(came));
            }
            if copying.is_empty() {
                self.tell_taken().await?;
            }
            tokio::select! {
                biased;
                copied = copying.done() => return Ok(Next::Copied(copied?)),
                more = self.more(), if self.frames.is_empty() => more?,
            }
        }
    }

    /// Whether the producer's last word has come by now.
    fn was_refused(&mut self) -> bool {
        let _ = self.reader.try_read_buf(&mut self.unread);
        while let Ok(Some(came)) = self.parse() {
            self.frames.push_back(came);
        }
        self.frames.iter().any(|came| matches!(came.0, ProducerFrame::Refused(_)))
    }

    async fn tell_taken(&mut self) -> Result<(), TransferError> {
        if self.taken > 0 {
            let words = ConsumerWord::Taken.encode().repeat(self.taken);
            (self.taken, self.taken_bytes) = (0, 0);
            self.write(&words).await?;
        }
        Ok(())
    }

    /// Reads what there is, and tells meanwhile that this side lives. Nothing is lost when the future is
    /// dropped.
    async fn more(&mut self) -> Result<(), TransferError> {
        self.unread.reserve(READ_BYTES);
        loop {
            tokio::select! {
                biased;
                read = self.reader.read_buf(&mut self.unread) => {
                    if read.map_err(|error| gone(&error))? == 0 {
                        return Err(ended_early());
                    }
                    self.heard = Instant::now();
                    return Ok(());
                }
                _ = self.beat.tick() => {
                    // One byte is written or it is not.
                    let alive = ConsumerWord::Progress.encode();
                    written(self.writer.write_all(&alive).await)?;
                }
                () = sleep_until(self.heard + SILENCE) => return Err(silent()),
            }
        }
    }

    /// The next frame of what was read, if it is whole.
    fn parse(&mut self) -> Result<Option<Came>, TransferError> {
        let Some((&kind, rest)) = self.unread.split_first() else { return Ok(None) };
        let body_bytes = ProducerFrame::body_bytes(kind)?;
        let Some((body, rest)) = rest.split_at_checked(body_bytes) else { return Ok(None) };
        let frame = ProducerFrame::decode(kind, body)?;
        let inline = match &frame {
            // A longer one is refused by whoever takes the frame: none of it is waited for.
            ProducerFrame::Block(head) if head.len <= self.max_block_bytes => head.len as usize,
            _ => 0,
        };
        if rest.len() < inline {
            self.unread.reserve(inline - rest.len());
            return Ok(None);
        }
        self.unread.advance(1 + body_bytes);
        let is_block = matches!(frame, ProducerFrame::Block(_));
        let bytes = is_block.then(|| self.unread.split_to(inline).freeze());
        Ok(Some(Came(frame, bytes)))
    }

    async fn hello(&mut self) -> Result<Hello, TransferError> {
        while self.unread.is_empty() {
            self.more().await?;
        }
        if self.unread.first() != Some(&KIND) {
            // Another version, or no producer at all.
            let came = loop {
                if let Some(came) = self.parse()? {
                    break came;
                }
                self.more().await?;
            };
            return Err(match came.0 {
                ProducerFrame::WrongVersion { ours: theirs } => {
                    TransferError::Version { ours: VERSION, theirs }
                }
                _ => TransferError::Protocol("it does not say who it is".to_owned()),
            });
        }
        loop {
            if let Some((head, rest)) = self.unread[1..].split_first_chunk::<HEAD_BYTES>()
                && let Some(path) = rest.get(..Hello::path_bytes(head))
            {
                let hello = Hello::decode(head, path)?;
                let read = 1 + HEAD_BYTES + path.len();
                self.unread.advance(read);
                return Ok(hello);
            }
            self.more().await?;
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), TransferError> {
        let writing = timeout(SILENCE, self.writer.write_all(bytes));
        written(writing.await.map_err(|_| silent())?)
    }
}

fn ended_early() -> TransferError {
    TransferError::BrokeOff("its socket was closed before the seal".to_owned())
}
