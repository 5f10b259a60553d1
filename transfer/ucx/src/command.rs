//! What is asked of UCX's thread.

use std::{
    convert::Infallible,
    sync::{
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    time::Duration,
};

use baton_arena::Arena;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{Lane, UcxError, native::Waker};

/// Names are never used twice, so that a late command finds nothing instead of another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RegionId(pub(crate) u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EndpointId(pub(crate) u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RkeyId(pub(crate) u64);

pub(crate) type Answer<T> = oneshot::Sender<Result<T, UcxError>>;

pub(crate) enum Command {
    Register {
        arena: Arena,
        answer: Answer<(RegionId, Bytes)>,
    },
    Unregister(RegionId),
    Connect {
        address: Bytes,
        answer: Answer<EndpointId>,
    },
    Describe {
        endpoint: EndpointId,
        answer: Answer<Vec<Lane>>,
    },
    /// Once what is under way has ended.
    Leave(EndpointId),
    /// At once.
    Close(EndpointId),
    Import {
        endpoint: EndpointId,
        key: Bytes,
        answer: Answer<RkeyId>,
    },
    Forget(RkeyId),
    /// Bytes, each with the address in the peer's process where they are to lie.
    Put {
        endpoint: EndpointId,
        rkey: RkeyId,
        puts: Vec<(Bytes, u64)>,
        answer: Answer<()>,
    },
}

/// How long whoever drops the last handle waits for the thread to end.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The way to the thread. When the last handle goes, the thread ends, and lets go of the arenas: whoever
/// then ends the process leaves no file behind.
pub(crate) struct Commands {
    queue: std::sync::Arc<Queue>,
    /// Disconnected once the thread holds nothing any more.
    ended: Mutex<mpsc::Receiver<Infallible>>,
}

pub(crate) struct Queue {
    waiting: Mutex<Vec<Command>>,
    is_asleep: AtomicBool,
    is_closed: AtomicBool,
    waker: Waker,
}

impl Commands {
    pub(crate) fn new(queue: std::sync::Arc<Queue>, ended: mpsc::Receiver<Infallible>) -> Self {
        Self { queue, ended: Mutex::new(ended) }
    }

    pub(crate) fn send(&self, command: Command) {
        self.queue.waiting.lock().push(command);
        self.queue.wake();
    }

    pub(crate) async fn ask<T>(
        &self,
        command: impl FnOnce(Answer<T>) -> Command,
    ) -> Result<T, UcxError> {
        let (sender, answer) = oneshot::channel();
        self.send(command(sender));
        answer.await.unwrap_or(Err(UcxError::Stopped))
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        self.queue.is_closed.store(true, SeqCst);
        self.queue.wake();
        if self.ended.get_mut().recv_timeout(END_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("UCX's thread did not end in {END_TIMEOUT:?}");
        }
    }
}

impl Queue {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { waiting: Mutex::default(), is_asleep: false.into(), is_closed: false.into(), waker }
    }

    fn wake(&self) {
        if self.is_asleep.load(SeqCst) {
            self.waker.wake();
        }
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    pub(crate) fn take(&self, into: &mut Vec<Command>) {
        std::mem::swap(&mut *self.waiting.lock(), into);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(SeqCst)
    }

    /// Says that the thread will sleep. Answers whether it may: what was sent before this is seen here,
    /// what is sent after it wakes.
    pub(crate) fn may_sleep(&self) -> bool {
        self.is_asleep.store(true, SeqCst);
        self.waiting.lock().is_empty() && !self.is_closed()
    }

    pub(crate) fn awake(&self) {
        self.is_asleep.store(false, SeqCst);
    }
}
