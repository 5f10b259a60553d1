//! A worker's stream without a wire, where worker and coordinator are one process: the same frames, neither
//! encoded nor sent.

use std::{fmt, pin::Pin};

use futures::Stream;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::{CoordinatorFrame, WorkerFrame};

/// What a worker says.
pub type WorkerFrames = Pin<Box<dyn Stream<Item = Result<WorkerFrame, Status>> + Send>>;
/// What it is told.
pub type CoordinatorFrames = Pin<Box<dyn Stream<Item = Result<CoordinatorFrame, Status>> + Send>>;

/// A worker that asks to be attached.
pub struct Attachment {
    pub frames: WorkerFrames,
    pub answer: oneshot::Sender<Result<CoordinatorFrames, Status>>,
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").finish_non_exhaustive()
    }
}

/// The worker's end: where the coordinator of this process is.
#[derive(Clone, Debug)]
pub struct CoordinatorHere(mpsc::Sender<Attachment>);

/// The coordinator's end: who wants to attach.
pub type WorkersHere = mpsc::Receiver<Attachment>;

/// Both ends. A worker that is before the coordinator waits.
pub fn in_process() -> (CoordinatorHere, WorkersHere) {
    let (coordinator, workers) = mpsc::channel(1);
    (CoordinatorHere(coordinator), workers)
}

impl CoordinatorHere {
    /// # Errors
    /// The coordinator has ended, or does not take this worker.
    pub async fn attach(&self, frames: WorkerFrames) -> Result<CoordinatorFrames, Status> {
        let gone = || Status::unavailable("the coordinator of this process has ended");
        let (answer, answered) = oneshot::channel();
        let attachment = Attachment { frames, answer };
        self.0.send(attachment).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
