//! Why a side broke a stream off, as the other side is told it.

use quinn::{ConnectionError, ReadError, VarInt, WriteError};

use crate::channel::{Refusal, TransferError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    Cancelled,
    Aborted,
    Stalled,
    Protocol,
    Corrupt,
    NoRoom,
}

impl Code {
    const ALL: [Self; 6] = [
        Self::Cancelled,
        Self::Aborted,
        Self::Stalled,
        Self::Protocol,
        Self::Corrupt,
        Self::NoRoom,
    ];

    fn value(self) -> u32 {
        match self {
            Self::Cancelled => 1,
            Self::Aborted => 2,
            Self::Stalled => 3,
            Self::Protocol => 4,
            Self::Corrupt => 5,
            Self::NoRoom => 6,
        }
    }

    pub(crate) fn wire(self) -> VarInt {
        VarInt::from_u32(self.value())
    }

    /// What to tell the peer of an error that arose here.
    pub(crate) fn of(error: &TransferError) -> Self {
        match error {
            TransferError::Version { .. }
            | TransferError::Protocol(_)
            | TransferError::Truncated { .. }
            | TransferError::UnexpectedBlock { .. }
            | TransferError::ForeignBlock { .. }
            | TransferError::SealMismatch { .. } => Self::Protocol,
            TransferError::Corrupt { .. }
            | TransferError::Forged { .. }
            | TransferError::Rotten { .. } => Self::Corrupt,
            TransferError::Stalled { .. } => Self::Stalled,
            TransferError::NoRoom(_) => Self::NoRoom,
            TransferError::Refused(Refusal::Aborted) => Self::Aborted,
            _ => Self::Cancelled,
        }
    }

    /// What a peer's code means here.
    fn heard(code: VarInt) -> TransferError {
        let known = Self::ALL.into_iter().find(|known| known.wire() == code);
        let reason = match known {
            Some(Self::Aborted) => return TransferError::Refused(Refusal::Aborted),
            Some(Self::Cancelled) => "it gave the handoff up".to_owned(),
            Some(Self::Stalled) => "nothing moved for too long".to_owned(),
            Some(Self::Protocol) => "it was sent what its protocol does not allow".to_owned(),
            Some(Self::Corrupt) => "a block arrived corrupt".to_owned(),
            Some(Self::NoRoom) => "it has no room".to_owned(),
            None => format!("code {code}"),
        };
        TransferError::BrokeOff(reason)
    }
}

pub(crate) fn lost(error: &ConnectionError) -> TransferError {
    TransferError::BrokeOff(error.to_string())
}

/// A stream that failed while reading.
pub(crate) fn read_failed(error: &ReadError) -> TransferError {
    match error {
        ReadError::Reset(code) => Code::heard(*code),
        ReadError::ConnectionLost(error) => lost(error),
        other => TransferError::BrokeOff(other.to_string()),
    }
}

/// A stream that failed while writing.
pub(crate) fn write_failed(error: &WriteError) -> TransferError {
    match error {
        WriteError::Stopped(code) => Code::heard(*code),
        WriteError::ConnectionLost(error) => lost(error),
        other => TransferError::BrokeOff(other.to_string()),
    }
}

/// A reset that a side was told of while it was not reading.
pub(crate) fn was_reset(code: VarInt) -> TransferError {
    Code::heard(code)
}
