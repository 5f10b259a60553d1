use baton_transfer::{Refusal, TransferError};
use baton_types::{Fault, FaultKind, Origin};

/// What a failed transfer means for its leg.
pub(super) fn of_transfer(error: &TransferError) -> Fault {
    let kind = match error {
        TransferError::Unreachable { .. }
        | TransferError::Memory(_)
        | TransferError::WrongCertificate { .. }
        | TransferError::BrokeOff(_) => FaultKind::Unavailable,
        TransferError::Version { .. } | TransferError::Refused(Refusal::Incompatible) => {
            FaultKind::Refused
        }
        TransferError::Refused(_) | TransferError::Cancelled => FaultKind::Failed,
        TransferError::Protocol(_)
        | TransferError::Corrupt { .. }
        | TransferError::Forged { .. }
        | TransferError::Rotten { .. }
        | TransferError::Truncated { .. }
        | TransferError::UnexpectedBlock { .. }
        | TransferError::ForeignBlock { .. }
        | TransferError::SealMismatch { .. } => FaultKind::Corrupt,
        TransferError::Stalled { .. } | TransferError::NoRoom(_) => FaultKind::TimedOut,
    };
    Fault::new(Origin::Handoff, kind, error.to_string())
}
