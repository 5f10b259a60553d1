//! What passes over the connector's socket: frames of a `u32` length (little-endian) and that much
//! JSON. First a hello and its answer; then, of the connector, [`crate::FromEngine`] up and
//! [`crate::ToEngine`] down, and of the scheduler, [`FromScheduler`] up and [`ToScheduler`] down.

use std::{io, path::PathBuf};

use baton_types::{Compatibility, StepWork};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::pacing::StepPace;

/// Raised with every change that an older connector would misunderstand.
pub(super) const PROTOCOL: u32 = 5;

/// A longer frame is refused.
pub(super) const MAX_FRAME_BYTES: usize = 16 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Hello {
    /// Of the connector's half in a worker process of vLLM.
    #[serde(rename = "hello")]
    Connector {
        protocol: u32,
        connector_version: String,
        vllm_version: String,
        compatibility: Box<Compatibility>,
    },
    /// Of our scheduler in vLLM's engine core.
    Scheduler { protocol: u32 },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum FromScheduler {
    Steps { steps: Vec<ObservedStep> },
}

/// One step of the engine, as it was.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ObservedStep {
    pub(super) ms: f64,
    #[serde(flatten)]
    pub(super) work: StepWork,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ToScheduler {
    Attached {
        protocol: u32,
    },
    /// None: steps are as large as vLLM itself would make them.
    Pace {
        pace: Option<StepPace>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Answer {
    /// The arena is that of all ranks; the slots from each first one on are this rank's.
    Welcome {
        protocol: u32,
        arena: PathBuf,
        slot_bytes: u64,
        first_export_slot: u32,
        export_slots: u32,
        first_import_slot: u32,
        import_slots: u32,
    },
    Refused {
        reason: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error("reading: {0}")]
    Io(#[from] io::Error),
    #[error("the connection ended inside a frame")]
    Cut,
    #[error("a frame of {0} bytes: at most {MAX_FRAME_BYTES} are allowed")]
    TooLong(usize),
    #[error("a frame that the protocol does not have: {0}")]
    Malformed(serde_json::Error),
}

/// The next frame, or `None` where the other side has closed between frames.
pub(super) async fn read<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<Option<T>, FrameError> {
    let mut length = [0; 4];
    let mut have = 0;
    while have < length.len() {
        match from.read(&mut length[have..]).await? {
            0 if have == 0 => return Ok(None),
            0 => return Err(FrameError::Cut),
            read => have += read,
        }
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    buffer.clear();
    // Grows with what comes, not with what was announced.
    if from.take(length as u64).read_to_end(buffer).await? < length {
        return Err(FrameError::Cut);
    }
    serde_json::from_slice(buffer).map(Some).map_err(FrameError::Malformed)
}

/// Appends one frame.
pub(super) fn append(message: &impl Serialize, to: &mut Vec<u8>) -> io::Result<()> {
    let start = to.len();
    to.extend([0; 4]);
    serde_json::to_writer(&mut *to, message)?;
    let length = to.len() - start - 4;
    let length = u32::try_from(length)
        .ok()
        .filter(|length| *length as usize <= MAX_FRAME_BYTES)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a frame too long to send"))?;
    to[start..start + 4].copy_from_slice(&length.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(mut bytes: &[u8]) -> Result<Option<serde_json::Value>, FrameError> {
        read(&mut bytes, &mut Vec::new()).await
    }

    #[tokio::test]
    async fn frames_that_are_none_are_told_apart() {
        let mut frame = Vec::new();
        append(&serde_json::json!({"a": 1}), &mut frame).unwrap();
        assert_eq!(read_all(&frame).await.unwrap().unwrap()["a"], 1);
        assert!(read_all(&[]).await.unwrap().is_none());
        assert!(matches!(read_all(&frame[..2]).await, Err(FrameError::Cut)));
        assert!(matches!(read_all(&frame[..frame.len() - 1]).await, Err(FrameError::Cut)));
        assert!(matches!(read_all(&[0xff; 8]).await, Err(FrameError::TooLong(_))));
        assert!(matches!(read_all(&[1, 0, 0, 0, b'{']).await, Err(FrameError::Malformed(_))));
    }
}
