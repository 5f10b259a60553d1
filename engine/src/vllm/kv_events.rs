//! What vLLM tells of its prefix cache: its KV event stream, over ZeroMQ on a Unix socket.
//!
//! vLLM numbers its messages and keeps the last ones for replay. A message that was missed is fetched
//! from there; one that can no longer be had empties the log, since a block may have gone with it.
//!
//! vLLM names blocks by hashes that depend on its version and settings. They are translated into ours,
//! by the token ids that a stored block comes with. A block whose KV does not follow from its tokens
//! alone (an image stands in it) has no such name, and is not told of; nor is what follows it.

mod message;
mod translation;

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use tokio::{task::JoinHandle, time::timeout};
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqError, ZmqMessage};

use self::{message::EventBatch, translation::Translation};
use crate::kv_cache::KvCacheLog;

/// Between tries to reach an engine that is starting, or that went away.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// vLLM looks for requests for replay ten times a second, when it has nothing else to do.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(5);
/// Marks the end of a replay.
const END_OF_REPLAY: u64 = u64::MAX;
/// A Unix socket's path has 108 bytes at most.
const LONGEST_SOCKET_PATH: usize = 107;

/// Where vLLM publishes its events: two Unix sockets that it binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EventSockets {
    events: PathBuf,
    replay: PathBuf,
}

impl EventSockets {
    /// Beside the arena, where no other user may connect. `None` where the path is too long.
    pub(super) fn beside(directory: &std::path::Path, worker_name: &str) -> Option<Self> {
        let socket = |kind: &str| directory.join(format!("baton-{worker_name}.{kind}"));
        let sockets = Self { events: socket("kv-events"), replay: socket("kv-replay") };
        let fits = |path: &PathBuf| path.as_os_str().len() <= LONGEST_SOCKET_PATH;
        (fits(&sockets.events) && fits(&sockets.replay)).then_some(sockets)
    }

    /// The value of vLLM's `--kv-events-config`.
    pub(super) fn argument(&self) -> String {
        serde_json::json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "endpoint": endpoint(&self.events),
            "replay_endpoint": endpoint(&self.replay),
        })
        .to_string()
    }
}

fn endpoint(path: &std::path::Path) -> String {
    format!("ipc://{}", path.display())
}

/// Follows one engine's events until it is dropped.
#[derive(Debug)]
pub(super) struct KvEventsFollower {
    following: JoinHandle<()>,
}

impl KvEventsFollower {
    pub(super) fn start(
        sockets: EventSockets,
        model: String,
        block_size_tokens: u32,
        log: KvCacheLog,
    ) -> Self {
        let translation = Translation::new(model, block_size_tokens, log);
        let mut follower = Follower { sockets, translation, next: 0 };
        Self { following: tokio::spawn(async move { follower.run().await }) }
    }
}

impl Drop for KvEventsFollower {
    fn drop(&mut self) {
        self.following.abort();
    }
}

#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("ZeroMQ: {0}")]
    Zmq(#[from] ZmqError),
    #[error("a message of {0} parts came, not of topic, sequence number and payload")]
    Parts(usize),
    #[error("a sequence number of {0} bytes came, not of 8")]
    SequenceNumber(usize),
    #[error("an event could not be read: {0}")]
    Payload(#[from] rmp_serde::decode::Error),
    #[error("the sequence number {0} came, which vLLM keeps for the end of a replay")]
    NoNumber(u64),
    #[error("no replay came within {} s", REPLAY_TIMEOUT.as_secs())]
    NoReplay,
}

struct Follower {
    sockets: EventSockets,
    translation: Translation,
    /// The number of the next message.
    next: u64,
}

impl Follower {
    async fn run(&mut self) {
        loop {
            let error = match self.follow().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            // An engine that starts has no socket yet.
            tracing::debug!(%error, "vLLM's KV events are not followed");
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn follow(&mut self) -> Result<std::convert::Infallible, FollowError> {
        let mut events = SubSocket::new();
        events.connect(&endpoint(&self.sockets.events)).await?;
        events.subscribe("").await?;
        // Some may have been told before anybody listened.
        self.replay().await?;
        loop {
            let (number, payload) = parts(events.recv().await?)?;
            if number > self.next {
                self.replay().await?;
            }
            self.take(number, &payload)?;
        }
    }

    /// Fetches what was missed, as far as vLLM still has it.
    async fn replay(&mut self) -> Result<(), FollowError> {
        timeout(REPLAY_TIMEOUT, async {
            let mut replay = DealerSocket::new();
            replay.connect(&endpoint(&self.sockets.replay)).await?;
            let mut request = ZmqMessage::from(Bytes::new());
            request.push_back(Bytes::copy_from_slice(&self.next.to_be_bytes()));
            replay.send(request).await?;
            loop {
                let mut answer = replay.recv().await?.into_vecdeque();
                // As a REQ socket would be answered: after an empty part.
                answer.pop_front();
                let (number, payload) = parts_of(answer.into())?;
                if number == END_OF_REPLAY {
                    return Ok(());
                }
                self.take(number, &payload)?;
            }
        })
        .await
        .map_err(|_| FollowError::NoReplay)?
    }

    /// Takes the messages in their order; what it has heard already, it passes over.
    fn take(&mut self, number: u64, payload: &[u8]) -> Result<(), FollowError> {
        if number == END_OF_REPLAY {
            return Err(FollowError::NoNumber(number));
        }
        if number < self.next {
            return Ok(());
        }
        if number > self.next {
            tracing::warn!(
                missed = number - self.next,
                "KV events of vLLM were missed for good: its prefix cache counts as empty"
            );
            self.translation.cleared();
        }
        self.next = number + 1;
        match rmp_serde::from_slice::<EventBatch>(payload) {
            Ok(batch) => batch.events.iter().for_each(|event| self.translation.apply(event)),
            Err(error) => {
                self.translation.cleared();
                return Err(error.into());
            }
        }
        Ok(())
    }
}

fn parts(message: ZmqMessage) -> Result<(u64, Bytes), FollowError> {
    parts_of(message.into_vec())
}

fn parts_of(parts: Vec<Bytes>) -> Result<(u64, Bytes), FollowError> {
    let count = parts.len();
    let [_topic, number, payload] =
        <[Bytes; 3]>::try_from(parts).map_err(|_| FollowError::Parts(count))?;
    let number =
        <[u8; 8]>::try_from(&number[..]).map_err(|_| FollowError::SequenceNumber(number.len()))?;
    Ok((u64::from_be_bytes(number), payload))
}

/// Takes one message after the other: how far its number is from the one that is due (the last few stand for
/// the last numbers that there are), its length as a `u16`, and its payload.
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(mut bytes: &[u8]) {
    let log = KvCacheLog::default();
    let sockets = EventSockets { events: PathBuf::new(), replay: PathBuf::new() };
    let translation = Translation::new("m".to_owned(), 2, log.clone());
    let mut follower = Follower { sockets, translation, next: 0 };
    while let Some((&[step, low, high], rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
        let payload;
        (payload, bytes) = rest.split_at(length);
        let number = match step {
            ..=250 => follower.next.saturating_add(step.into()),
            _ => u64::MAX - u64::from(u8::MAX - step),
        };
        let taken = follower.take(number, payload);
        // It may undercount, never overcount.
        assert!(log.len() <= follower.translation.len());
        let is_unread = matches!(taken, Err(FollowError::Payload(_)));
        assert!(!is_unread || log.is_empty());
    }
}

#[cfg(test)]
mod tests;
