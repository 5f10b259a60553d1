//! The consumer's connection to one producer: what comes over it, and that both live.

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout},
};

use super::{
    BEAT, SILENCE, gone,
    hello::{HEAD_BYTES, Hello, KIND},
    silent, written,
};
use crate::{
    channel::TransferError,
    frame::{ConsumerWord, ProducerFrame, VERSION},
};

/// Frames are read in pieces of this: some hundred at a time.
const READ_BYTES: usize = 16 << 10;

/// Dropping it tells that the handoff is over.
pub(super) struct Link {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    max_block_bytes: u32,
    beat: Interval,
    heard: Instant,
    unread: BytesMut,
}

/// A frame, with its block where that came over the socket.
pub(super) struct Came(pub(super) ProducerFrame, pub(super) Option<Bytes>);

impl Link {
    pub(super) fn new(stream: UnixStream, max_block_bytes: u32) -> Self {
        let (reader, writer) = stream.into_split();
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (heard, unread) = (Instant::now(), BytesMut::new());
        Self { reader, writer, max_block_bytes, beat, heard, unread }
    }

    pub(super) async fn hello(&mut self) -> Result<Hello, TransferError> {
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

    /// Reads what there is, and tells meanwhile that this side lives. Nothing is lost when the future is
    /// dropped.
    pub(super) async fn more(&mut self) -> Result<(), TransferError> {
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

    /// What can be read without waiting.
    pub(super) fn read_now(&mut self) {
        // That it is closed is for the next who waits to find.
        let _ = self.reader.try_read_buf(&mut self.unread);
    }

    /// The next frame of what was read, if it is whole.
    pub(super) fn parse(&mut self) -> Result<Option<Came>, TransferError> {
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

    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), TransferError> {
        let writing = timeout(SILENCE, self.writer.write_all(bytes));
        written(writing.await.map_err(|_| silent())?)
    }
}

fn ended_early() -> TransferError {
    TransferError::BrokeOff("its socket was closed before the end".to_owned())
}
