//! The producer's side of one handoff.

use std::{
    future::{Future, pending},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use quinn::{RecvStream, SendStream};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    code::{Code, read_failed, write_failed},
    stalled,
};
use crate::{
    attach::{Attached, Guest, attached, understood},
    channel::{ExportStream, Exported, Exports, Refusal, Seal, TransferError},
    frame::{
        Asked, BlockHead, BlocksDigest, ConsumerWord, PRELUDE_BYTES, ProducerFrame,
        SUBSCRIPTION_BYTES, SealedFrame, decode_prelude, decode_subscription,
    },
    mac::MacKey,
    turns::{Turn, Turns},
};

/// How often a consumer is told that this side lives, while there is nothing else to tell.
pub(crate) const WAITING_INTERVAL: Duration = Duration::from_millis(250);

/// Who has the turn on a connection and gets rid of nothing for so long has a consumer that takes nothing; others
/// of the same peer need not wait for that.
const TURN_PATIENCE: Duration = Duration::from_millis(100);

/// Blocks that are there go out together up to so many bytes, in one turn. A longer block is a turn of its own.
const TURN_BYTES: u64 = 512 << 10;

/// Answers one subscription.
pub(super) async fn serve(
    (send, recv): (SendStream, RecvStream),
    peer: [u8; 32],
    exports: Arc<dyn Exports>,
    turns: Arc<Turns>,
    stall: Duration,
) {
    let mut consumer = Consumer { send, recv, stall };
    let asked = consumer.subscription().await;
    let Some(Asked { subscription, key }) = understood(&mut consumer, asked).await else { return };
    let stream = attached(&mut consumer, &*exports, &subscription, peer).await;
    let Some(stream) = stream else { return };
    hand_over(consumer, stream, key, &turns).await;
}

async fn hand_over(
    mut consumer: Consumer,
    mut stream: Box<dyn ExportStream>,
    key: Option<MacKey>,
    turns: &Turns,
) {
    let outcome = consumer.send_all(&mut *stream, key, turns).await;
    match &outcome {
        // It was told so, and reads it in its place among the blocks.
        Ok(()) | Err(TransferError::Refused(Refusal::WrongPrompt)) => {}
        Err(error) => consumer.break_off(Code::of(error)),
    }
    // The connection lets go of blocks before the handoff is said to be over.
    drop(consumer);
    stream.finish(outcome);
}

/// What comes behind the blocks.
enum Last {
    Sealed(Seal),
    Refused(Refusal),
}

/// The stream to one consumer.
struct Consumer {
    send: SendStream,
    recv: RecvStream,
    stall: Duration,
}

impl Consumer {
    async fn subscription(&mut self) -> Result<Asked, TransferError> {
        let mut prelude = [0; PRELUDE_BYTES];
        self.read(&mut prelude).await?;
        decode_prelude(&prelude)?;
        let mut body = [0; SUBSCRIPTION_BYTES];
        self.read(&mut body).await?;
        Ok(decode_subscription(&body)?)
    }

    async fn read(&mut self, bytes: &mut [u8]) -> Result<(), TransferError> {
        let read = timeout(self.stall, self.recv.read_exact(bytes)).await;
        read.map_err(|_| stalled(self.stall))?.map_err(|error| match error {
            quinn::ReadExactError::FinishedEarly(_) => {
                TransferError::Protocol("a subscription that ends early".to_owned())
            }
            quinn::ReadExactError::ReadError(error) => read_failed(&error),
        })
    }

    async fn send_all(
        &mut self,
        stream: &mut dyn ExportStream,
        key: Option<MacKey>,
        turns: &Turns,
    ) -> Result<(), TransferError> {
        let due = stream.due();
        let mut digest = BlocksDigest::default();
        let mut blocks_sent = 0;
        loop {
            let mut next = Some(self.keep_waiting(stream.next()).await?);
            let (mut chunks, mut sizes, mut last) = (Vec::new(), Vec::new(), None);
            let mut gathered_bytes = 0;
            // What is there goes together: asking for a turn and for room takes its time, too.
            while let Some(item) = next.take() {
                match item {
                    Exported::Block { handoff, index, crc, bytes } => {
                        let whole = bytes.len() as u64;
                        let len = u32::try_from(whole).map_err(|_| {
                            TransferError::Protocol(format!("block {index} has {whole} bytes"))
                        })?;
                        let mac = key.map(|key| key.of_block(&handoff, index, &bytes));
                        let head = BlockHead { handoff, index, len, crc, mac };
                        chunks.extend([ProducerFrame::Block(head).encode(), bytes]);
                        sizes.push(whole);
                        gathered_bytes += whole;
                        digest.add(index, crc);
                        blocks_sent += 1;
                        if gathered_bytes < TURN_BYTES {
                            next = stream.next().now_or_never();
                        }
                    }
                    Exported::Sealed(seal) => last = Some(Last::Sealed(seal)),
                    Exported::Refused(refusal) => last = Some(Last::Refused(refusal)),
                    Exported::Aborted => {
                        return Err(TransferError::Refused(Refusal::Aborted));
                    }
                }
            }
            if !chunks.is_empty() {
                let turn = self.wait_for_turn(turns, due, stream).await?;
                self.write(&mut chunks, stream.revoked(), Some(turn)).await?;
                sizes.into_iter().for_each(|bytes| stream.sent(bytes));
            }
            match last {
                None => {}
                Some(Last::Sealed(seal)) => {
                    return self.seal(seal, blocks_sent, digest.finish(), stream).await;
                }
                Some(Last::Refused(refusal)) => {
                    self.last_frame(ProducerFrame::Refused(refusal)).await;
                    return Err(TransferError::Refused(refusal));
                }
            }
        }
    }

    async fn seal(
        &mut self,
        seal: Seal,
        blocks_sent: u32,
        digest: [u8; 32],
        stream: &mut dyn ExportStream,
    ) -> Result<(), TransferError> {
        let sealed = ProducerFrame::Sealed(SealedFrame { seal, blocks_sent, digest });
        self.write(&mut [sealed.encode()], stream.revoked(), None).await?;
        // Fails only where the stream was finished or reset here, which it was not.
        let _ = self.send.finish();
        let mut revoked = pin!(stream.revoked());
        let mut deadline = Instant::now() + self.stall;
        loop {
            tokio::select! {
                word = word(&mut self.recv) => match word? {
                    ConsumerWord::Ack => return Ok(()),
                    ConsumerWord::Progress => deadline = Instant::now() + self.stall,
                    ConsumerWord::Taken => return Err(taken_of_nothing()),
                },
                () = &mut revoked => return Err(TransferError::Refused(Refusal::Aborted)),
                () = sleep_until(deadline) => return Err(stalled(self.stall)),
            }
        }
    }

    /// Waits for something on this side, while telling the consumer that this side lives.
    async fn keep_waiting<T>(&mut self, work: impl Future<Output = T>) -> Result<T, TransferError> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                word = word(&mut self.recv) => no_ack_yet(word?)?,
                () = sleep(WAITING_INTERVAL) => {
                    self.write(&mut [ProducerFrame::Waiting.encode()], pending(), None).await?;
                }
            }
        }
    }

    async fn wait_for_turn<'a>(
        &mut self,
        turns: &'a Turns,
        due: std::time::Instant,
        stream: &mut dyn ExportStream,
    ) -> Result<Turn<'a>, TransferError> {
        let turn = async {
            tokio::select! {
                biased;
                turn = turns.turn(due) => Ok(turn),
                () = stream.revoked() => Err(TransferError::Refused(Refusal::Aborted)),
            }
        };
        self.keep_waiting(turn).await?
    }

    /// Gives the bytes to the connection, as fast as the consumer makes room for them. A turn that nothing is
    /// made of is passed on.
    async fn write(
        &mut self,
        mut bytes: &mut [Bytes],
        revoked: impl Future<Output = ()>,
        mut turn: Option<Turn<'_>>,
    ) -> Result<(), TransferError> {
        let mut revoked = pin!(revoked);
        let mut deadline = Instant::now() + self.stall;
        while !bytes.is_empty() {
            tokio::select! {
                biased;
                written = self.send.write_chunks(bytes) => {
                    let written = written.map_err(|error| write_failed(&error))?;
                    bytes = &mut bytes[written.chunks..];
                }
                word = word(&mut self.recv) => no_ack_yet(word?)?,
                () = &mut revoked => return Err(TransferError::Refused(Refusal::Aborted)),
                () = sleep(TURN_PATIENCE), if turn.is_some() => {
                    turn = None;
                    continue;
                }
                () = sleep_until(deadline) => return Err(stalled(self.stall)),
            }
            deadline = Instant::now() + self.stall;
        }
        Ok(())
    }

    fn break_off(&mut self, code: Code) {
        // Either may be over already.
        let _ = self.send.reset(code.wire());
        let _ = self.recv.stop(code.wire());
    }
}

#[async_trait]
impl Guest for Consumer {
    async fn wait_for(
        &mut self,
        attaching: BoxFuture<'_, Attached>,
    ) -> Result<Attached, TransferError> {
        self.keep_waiting(attaching).await
    }

    async fn last_frame(&mut self, frame: ProducerFrame) {
        if self.write(&mut [frame.encode()], pending(), None).await.is_ok() {
            // Fails only where the consumer is gone.
            let _ = self.send.finish();
        }
    }

    fn turn_away(&mut self, error: &TransferError) {
        self.break_off(Code::of(error));
    }
}

/// What the consumer says next. Nothing is lost when the future is dropped.
async fn word(recv: &mut RecvStream) -> Result<ConsumerWord, TransferError> {
    let chunk = recv.read_chunk(1, true).await.map_err(|error| read_failed(&error))?;
    let byte = chunk.as_ref().and_then(|chunk| chunk.bytes.first());
    let byte = byte.ok_or_else(|| {
        TransferError::BrokeOff("it ended its stream without an acknowledgement".to_owned())
    })?;
    Ok(ConsumerWord::decode(*byte)?)
}

fn no_ack_yet(word: ConsumerWord) -> Result<(), TransferError> {
    match word {
        ConsumerWord::Progress => Ok(()),
        ConsumerWord::Ack => {
            Err(TransferError::Protocol("an acknowledgement before the seal".to_owned()))
        }
        ConsumerWord::Taken => Err(taken_of_nothing()),
    }
}

fn taken_of_nothing() -> TransferError {
    TransferError::Protocol("nothing lies in memory that is shared".to_owned())
}
