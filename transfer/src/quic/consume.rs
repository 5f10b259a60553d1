//! The consumer's side of one handoff.

use std::{
    future::{Future, pending},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream};
use tokio::time::{sleep, timeout};

use super::{
    code::{Code, lost, read_failed, was_reset, write_failed},
    stalled,
};
use crate::{
    arrivals::Arrivals,
    channel::{BlockSink, Pulled, Subscription, TransferError},
    frame::{BlockHead, ConsumerWord, ProducerFrame, VERSION, encode_subscription},
    mac::MacKey,
};

/// How often the producer is told that blocks are being placed.
pub(crate) const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Subscribes, places every block, verifies, acknowledges.
pub(super) async fn pull(
    connection: Connection,
    subscription: &Subscription,
    sink: &dyn BlockSink,
    key: Option<MacKey>,
    stall: Duration,
) -> Result<Pulled, TransferError> {
    let opened = timeout(stall, connection.open_bi()).await.map_err(|_| stalled(stall))?;
    let (send, recv) = opened.map_err(|error| lost(&error))?;
    let mut producer = Producer { connection, send, recv, stall, is_over: false };
    let pulled = producer.take_over(subscription, sink, key).await;
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
    recv: RecvStream,
    stall: Duration,
    is_over: bool,
}

impl Producer {
    async fn take_over(
        &mut self,
        subscription: &Subscription,
        sink: &dyn BlockSink,
        key: Option<MacKey>,
    ) -> Result<Pulled, TransferError> {
        self.say(encode_subscription(subscription, key.as_ref())).await?;
        let mut arrivals = Arrivals::new(subscription, super::TRANSPORT, key, sink.layer_groups());
        let mut last_word = Instant::now();
        loop {
            match self.frame().await? {
                ProducerFrame::Block(head) => {
                    self.block(sink, &mut arrivals, &head).await?;
                    if last_word.elapsed() >= PROGRESS_INTERVAL {
                        last_word = Instant::now();
                        self.say(ConsumerWord::Progress.encode()).await?;
                    }
                }
                ProducerFrame::Sealed(sealed) => {
                    let pulled = arrivals.sealed(&sealed)?;
                    acknowledge(&mut self.send, self.stall).await?;
                    return Ok(pulled);
                }
                ProducerFrame::Waiting => {}
                ProducerFrame::Mapped { .. } | ProducerFrame::Kept => {
                    let elsewhere = "a block in memory that is not shared".to_owned();
                    return Err(TransferError::Protocol(elsewhere));
                }
                ProducerFrame::Refused(refusal) => return Err(TransferError::Refused(refusal)),
                ProducerFrame::WrongVersion { ours: theirs } => {
                    return Err(TransferError::Version { ours: VERSION, theirs });
                }
            }
        }
    }

    async fn block(
        &mut self,
        sink: &dyn BlockSink,
        arrivals: &mut Arrivals<'_>,
        head: &BlockHead,
    ) -> Result<(), TransferError> {
        arrivals.announced(head, sink.max_block_bytes())?;
        let chunks = self.exactly(head.len as usize).await?;
        let block = self.attend(sink.reserve(head.index, head.len)).await?;
        let slices: Vec<&[u8]> = chunks.iter().map(AsRef::as_ref).collect();
        block.write(&slices).map_err(|error| TransferError::NoRoom(error.to_string()))?;
        drop(chunks);
        let crc32 = arrivals.placed(head, block.as_bytes())?;
        self.attend(sink.verified(head.index, block, crc32)).await
    }

    async fn attend<T>(
        &mut self,
        work: impl Future<Output = Result<T, TransferError>>,
    ) -> Result<T, TransferError> {
        attend(&mut self.recv, &self.connection, self.stall, work).await
    }

    async fn frame(&mut self) -> Result<ProducerFrame, TransferError> {
        let kind = self.exactly(1).await?.iter().find_map(|chunk| chunk.first().copied());
        let kind = kind.ok_or_else(ended_early)?;
        let body = self.exactly(ProducerFrame::body_bytes(kind)?).await?.concat();
        Ok(ProducerFrame::decode(kind, &body)?)
    }

    /// The next `len` bytes, in the pieces in which they came, and not a byte more: what is not taken
    /// from the connection is what slows the producer down.
    async fn exactly(&mut self, len: usize) -> Result<Vec<Bytes>, TransferError> {
        let mut taken = Vec::new();
        let mut missing = len;
        while missing > 0 {
            let chunk = timeout(self.stall, self.recv.read_chunk(missing, true))
                .await
                .map_err(|_| stalled(self.stall))?
                .map_err(|error| read_failed(&error))?
                .ok_or_else(ended_early)?;
            missing -= chunk.bytes.len();
            taken.push(chunk.bytes);
        }
        Ok(taken)
    }

    async fn say(&mut self, word: Bytes) -> Result<(), TransferError> {
        say(&mut self.send, word, self.stall).await
    }

    fn break_off(&mut self, code: Code) {
        self.is_over = true;
        // Either may be over already.
        let _ = self.send.reset(code.wire());
        let _ = self.recv.stop(code.wire());
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if !self.is_over {
            self.break_off(Code::Cancelled);
        }
    }
}

/// Works on what has arrived, and lets go of it when the producer takes the handoff back or dies meanwhile.
pub(crate) async fn attend<T>(
    recv: &mut RecvStream,
    connection: &Connection,
    stall: Duration,
    work: impl Future<Output = Result<T, TransferError>>,
) -> Result<T, TransferError> {
    let reset = async {
        match recv.received_reset().await {
            Ok(Some(code)) => was_reset(code),
            _ => pending().await,
        }
    };
    tokio::select! {
        biased;
        done = work => done,
        error = reset => Err(error),
        error = connection.closed() => Err(lost(&error)),
        () = sleep(stall) => {
            Err(TransferError::NoRoom(format!("no block was placed for {stall:?}")))
        }
    }
}

/// Tells the producer something. That it listens no more is no error here: what it said last tells why.
pub(crate) async fn say(
    send: &mut SendStream,
    word: Bytes,
    stall: Duration,
) -> Result<(), TransferError> {
    match timeout(stall, send.write_chunk(word)).await {
        Err(_) => Err(stalled(stall)),
        Ok(Ok(()) | Err(quinn::WriteError::Stopped(_))) => Ok(()),
        Ok(Err(error)) => Err(write_failed(&error)),
    }
}

pub(crate) async fn acknowledge(
    send: &mut SendStream,
    stall: Duration,
) -> Result<(), TransferError> {
    timeout(stall, send.write_chunk(ConsumerWord::Ack.encode()))
        .await
        .map_err(|_| stalled(stall))?
        .map_err(|error| write_failed(&error))?;
    // Fails only where the stream was finished or reset here, which it was not.
    let _ = send.finish();
    Ok(())
}

pub(crate) fn ended_early() -> TransferError {
    TransferError::BrokeOff("its stream ended before the seal".to_owned())
}
