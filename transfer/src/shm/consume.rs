//! The consumer's side of one handoff.

use std::{collections::VecDeque, future::Future, pin::pin, sync::Arc, time::Duration};

use baton_arena::PeerArena;
use bytes::{BufMut, BytesMut};
use futures::FutureExt;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep_until},
};

use super::{
    ShmChannel,
    copying::{Copiers, Copying, Place, Placed},
    link::{Came, Link},
    mapped::Lent,
};
use crate::{
    arrivals::{Arrivals, verify},
    channel::{BlockSink, PeerAddress, Pulled, Subscription, TransferError},
    frame::{BlockHead, ConsumerWord, ProducerFrame, VERSION, encode_subscription},
};

/// Blocks of so many bytes that were taken are told of together, where there is more to take meanwhile.
const TOLD_BYTES: u64 = 2 << 20;

/// Subscribes, takes every block, verifies, acknowledges.
pub(super) async fn pull(
    channel: &ShmChannel,
    stream: UnixStream,
    peer: &PeerAddress,
    subscription: &Subscription,
    sink: &dyn BlockSink,
) -> Result<Pulled, TransferError> {
    let config = &channel.shared.config;
    let mut link = Link::new(stream, sink.max_block_bytes());
    link.write(&encode_subscription(subscription, None)).await?;
    link.write(&config.certificate_fingerprint).await?;
    link.write(&peer.certificate_fingerprint).await?;
    let hello = link.hello().await?;
    if hello.fingerprint != peer.certificate_fingerprint {
        return Err(TransferError::WrongCertificate { worker: peer.worker_name.clone() });
    }
    let arena = match hello.arena {
        Some(file) => Some(channel.map(peer, file).await?),
        None => None,
    };
    let producer = Producer {
        link,
        stall: config.stall_timeout,
        max_block_bytes: sink.max_block_bytes(),
        frames: VecDeque::new(),
        lent: Lent::new(),
        taken: Vec::new(),
        taken_bytes: 0,
    };
    producer.take_over(arena, subscription, sink, &channel.copiers).await
}

/// One handoff's producer, as far as its blocks were taken.
struct Producer {
    link: Link,
    stall: Duration,
    max_block_bytes: u32,
    frames: VecDeque<Came>,
    /// Blocks that are read where they lie.
    lent: Lent,
    /// Blocks that are needed there no more, which the producer does not know.
    taken: Vec<u32>,
    taken_bytes: u64,
}

/// What there is to do next.
enum Next {
    Came(Came),
    Placed(Vec<Placed>),
}

/// A block in the producer's arena, as it is announced.
#[derive(Clone, Copy)]
struct Mapped {
    head: BlockHead,
    offset: u64,
    wanted_back: bool,
}

impl From<Mapped> for Came {
    fn from(Mapped { head, offset, wanted_back }: Mapped) -> Self {
        Self(ProducerFrame::Mapped { head, offset, wanted_back }, None)
    }
}

impl Producer {
    async fn take_over(
        mut self,
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
                Next::Placed(blocks) => {
                    self.all_placed(blocks, arena.as_ref(), sink, &mut arrivals).await?;
                    continue;
                }
            };
            match frame {
                ProducerFrame::Mapped { head, offset, wanted_back } => {
                    let arena = arena.as_ref().ok_or_else(elsewhere)?;
                    let first = Mapped { head, offset, wanted_back };
                    self.mapped(first, arena, sink, &mut copying, &mut arrivals).await?;
                }
                ProducerFrame::Block(head) => {
                    arrivals.announced(&head, self.max_block_bytes)?;
                    let landing = self.attend(sink.reserve(head.index, head.len)).await?;
                    let bytes = bytes.unwrap_or_default();
                    let failed = |error| TransferError::NoRoom(format!("{error}"));
                    landing.write(&[&bytes]).map_err(failed)?;
                    let verified = verify(&head, landing.as_bytes(), None);
                    let block = Placed { head, place: Place::Copied(landing), verified };
                    self.placed(block, None, sink, &mut arrivals).await?;
                }
                ProducerFrame::Sealed(sealed) => {
                    let pulled = arrivals.sealed(&sealed)?;
                    self.all_let_go().await?;
                    self.link.write(&ConsumerWord::Ack.encode()).await?;
                    if self.lent.any() {
                        self.was_kept().await?;
                    }
                    return Ok(pulled);
                }
                ProducerFrame::Waiting => {}
                ProducerFrame::Kept => {
                    let early = "what it kept, before it was acknowledged".to_owned();
                    return Err(TransferError::Protocol(early));
                }
                ProducerFrame::Refused(refusal) => return Err(TransferError::Refused(refusal)),
                ProducerFrame::WrongVersion { ours: theirs } => {
                    return Err(TransferError::Version { ours: VERSION, theirs });
                }
            }
        }
    }

    /// Takes a block over from the producer's arena, and with it those behind it that are announced by now
    /// and for which there is a place.
    async fn mapped(
        &mut self,
        first: Mapped,
        arena: &Arc<PeerArena>,
        sink: &dyn BlockSink,
        copying: &mut Copying<'_>,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        let mut next = Some(first);
        while let Some(block) = next.take() {
            let Mapped { head, offset, wanted_back } = block;
            arrivals.announced(&head, self.max_block_bytes)?;
            let may_stay = sink.takes_from(head.index, head.len, arena)?;
            let slot = if may_stay && !wanted_back {
                None
            } else {
                sink.reserve(head.index, head.len).now_or_never()
            };
            let landing = match slot {
                Some(landing) => Some(landing?),
                None if may_stay => None,
                None if copying.is_empty() => {
                    Some(self.attend(sink.reserve(head.index, head.len)).await?)
                }
                None => {
                    copying.waits_for_slots();
                    arrivals.put_back(&head);
                    self.frames.push_front(block.into());
                    break;
                }
            };
            copying.gather(head, offset, landing, arena);
            if copying.has_room() {
                next = self.next_mapped()?;
            }
        }
        let placed = copying.start(arena);
        self.all_placed(placed, Some(arena), sink, arrivals).await
    }

    /// The next frame, if it has come and tells of a block in the producer's arena.
    fn next_mapped(&mut self) -> Result<Option<Mapped>, TransferError> {
        if self.frames.is_empty() {
            let came = self.link.parse()?;
            self.frames.extend(came);
        }
        let Some(&Came(ProducerFrame::Mapped { head, offset, wanted_back }, _)) =
            self.frames.front()
        else {
            return Ok(None);
        };
        self.frames.pop_front();
        Ok(Some(Mapped { head, offset, wanted_back }))
    }

    async fn all_placed(
        &mut self,
        placed: Vec<Placed>,
        arena: Option<&Arc<PeerArena>>,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        for block in placed {
            self.placed(block, arena, sink, arrivals).await?;
        }
        Ok(())
    }

    /// Counts a block that was verified, and passes it on.
    async fn placed(
        &mut self,
        block: Placed,
        arena: Option<&Arc<PeerArena>>,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), TransferError> {
        let Placed { head, place, verified } = block;
        let BlockHead { index, len, .. } = head;
        let crc32 = match verified {
            // The producer may have taken its slot back meanwhile, and have said so.
            Err(TransferError::Corrupt { .. }) if self.was_refused() => {
                return Err(TransferError::Refused(crate::Refusal::Aborted));
            }
            verified => verified?,
        };
        arrivals.verified(&head);
        match place {
            Place::Copied(landing) => {
                self.taken.push(index);
                self.taken_bytes += u64::from(len);
                self.attend(sink.verified(index, landing, crc32)).await
            }
            Place::There(offset) => {
                let arena = arena.ok_or_else(elsewhere)?;
                let block = self.lent.lend(arena, offset, len, index);
                self.attend(sink.verified_there(index, block, crc32)).await
            }
        }
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
                more = self.link.more() => more?,
                index = self.lent.come_back() => self.taken.push(index),
                () = sleep_until(give_up) => {
                    let reason = format!("no block was placed for {:?}", self.stall);
                    return Err(TransferError::NoRoom(reason));
                }
            }
            self.heed()?;
            self.tell_taken().await?;
        }
    }

    /// Keeps what has come for later, unless the producer takes the handoff back.
    fn heed(&mut self) -> Result<(), TransferError> {
        while let Some(came) = self.link.parse()? {
            if let Came(ProducerFrame::Refused(refusal), _) = came {
                return Err(TransferError::Refused(refusal));
            }
            self.frames.push_back(came);
        }
        Ok(())
    }

    /// What comes next: blocks that were taken, or a frame that need not wait for them. What was taken is
    /// told when there is nothing else to do, or much to tell.
    async fn next(&mut self, copying: &mut Copying<'_>) -> Result<Next, TransferError> {
        if self.taken_bytes >= TOLD_BYTES {
            self.tell_taken().await?;
        }
        loop {
            if self.frames.is_empty() {
                let came = self.link.parse()?;
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
                placed = copying.done() => return Ok(Next::Placed(placed?)),
                more = self.link.more(), if self.frames.is_empty() => more?,
                index = self.lent.come_back() => self.taken.push(index),
            }
        }
    }

    /// Waits until nobody reads a block any more where it lies, and tells the producer.
    async fn all_let_go(&mut self) -> Result<(), TransferError> {
        let mut give_up = Instant::now() + self.stall;
        loop {
            self.tell_taken().await?;
            if !self.lent.is_out() {
                return Ok(());
            }
            tokio::select! {
                biased;
                index = self.lent.come_back() => {
                    self.taken.push(index);
                    give_up = Instant::now() + self.stall;
                }
                more = self.link.more() => more?,
                () = sleep_until(give_up) => {
                    let seconds = u32::try_from(self.stall.as_secs()).unwrap_or(u32::MAX);
                    return Err(TransferError::Stalled { seconds });
                }
            }
            self.heed()?;
        }
    }

    /// Hears from the producer that what was read in its arena lay there untouched until it was acknowledged. Had
    /// it taken the handoff back before, it would have said that, or be gone.
    async fn was_kept(&mut self) -> Result<(), TransferError> {
        loop {
            while let Some(Came(frame, _)) = self.link.parse()? {
                match frame {
                    ProducerFrame::Kept => return Ok(()),
                    ProducerFrame::Waiting => {}
                    ProducerFrame::Refused(refusal) => return Err(TransferError::Refused(refusal)),
                    _ => {
                        let late = "more, after it was acknowledged".to_owned();
                        return Err(TransferError::Protocol(late));
                    }
                }
            }
            self.link.more().await?;
        }
    }

    /// Whether the producer's last word has come by now.
    fn was_refused(&mut self) -> bool {
        self.link.read_now();
        while let Ok(Some(came)) = self.link.parse() {
            self.frames.push_back(came);
        }
        self.frames.iter().any(|came| matches!(came.0, ProducerFrame::Refused(_)))
    }

    async fn tell_taken(&mut self) -> Result<(), TransferError> {
        while let Some(index) = self.lent.back_by_now() {
            self.taken.push(index);
        }
        if self.taken.is_empty() {
            return Ok(());
        }
        let mut words = BytesMut::with_capacity(5 * self.taken.len());
        for index in self.taken.drain(..) {
            words.put(ConsumerWord::Taken.encode());
            words.put_u32_le(index);
        }
        self.taken_bytes = 0;
        self.link.write(&words).await
    }
}

fn elsewhere() -> TransferError {
    TransferError::Protocol("a block in an arena it has not".to_owned())
}

#[cfg(test)]
mod tests {
    use baton_arena::{Arena, ArenaLayout};

    use super::*;

    /// Nobody says anything more to who waits here.
    #[tokio::test]
    async fn who_waits_for_blocks_sees_those_that_are_back_already() {
        let directory = tempfile::tempdir().unwrap();
        let layout = ArenaLayout { slot_bytes: 4096, export_slots: 1, import_slots: 0 };
        let arena = Arena::create(&directory.path().join("arena"), layout).unwrap();
        let arena = Arc::new(PeerArena::open(&arena.file().unwrap()).unwrap());
        let (stream, _producer) = UnixStream::pair().unwrap();
        let mut producer = Producer {
            link: Link::new(stream, 4096),
            stall: Duration::from_millis(200),
            max_block_bytes: 4096,
            frames: VecDeque::new(),
            lent: Lent::new(),
            taken: Vec::new(),
            taken_bytes: 0,
        };
        drop(producer.lent.lend(&arena, 0, 4096, 0));
        assert_eq!(producer.all_let_go().await, Ok(()));
    }
}
