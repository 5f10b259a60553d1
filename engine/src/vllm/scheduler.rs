//! What passes between a worker and our scheduler inside vLLM: steps as they were observed come up, the
//! pace that they shall keep goes down.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::{MissedTickBehavior, interval},
};

use super::frames::{self, FrameError, FromScheduler, ToScheduler};
use crate::pacing::Pacing;

/// The model changes with every step; the scheduler is told so often.
const TELL_INTERVAL: Duration = Duration::from_millis(250);

/// Serves one connection until its other end goes.
pub(super) async fn serve(
    mut read: impl AsyncRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
    pacing: &Pacing,
) -> Result<(), FrameError> {
    send(&ToScheduler::Attached { protocol: frames::PROTOCOL }, &mut write).await?;
    tracing::info!("the scheduler is attached: its steps are paced");
    tokio::select! {
        heard = hear(&mut read, pacing) => heard,
        told = tell(&mut write, pacing) => told,
    }
}

pub(super) async fn hear(
    read: &mut (impl AsyncRead + Unpin),
    pacing: &Pacing,
) -> Result<(), FrameError> {
    let mut buffer = Vec::new();
    while let Some(FromScheduler::Steps { steps }) = frames::read(read, &mut buffer).await? {
        for step in steps {
            pacing.observe(&step.work, step.ms);
        }
    }
    Ok(())
}

async fn tell(write: &mut (impl AsyncWrite + Unpin), pacing: &Pacing) -> Result<(), FrameError> {
    let mut told = None;
    let mut ticks = interval(TELL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let pace = pacing.pace();
        if pace != told {
            send(&ToScheduler::Pace { pace }, write).await?;
            told = pace;
        }
    }
}

async fn send(
    message: &ToScheduler,
    write: &mut (impl AsyncWrite + Unpin),
) -> Result<(), FrameError> {
    let mut frame = Vec::new();
    frames::append(message, &mut frame)?;
    Ok(write.write_all(&frame).await?)
}
