//! Moves KV blocks between workers' staging arenas.

mod channel;

pub use channel::{
    BlockSink, Channel, ExportStream, Exported, Exports, PeerAddress, Pulled, Refusal, Seal,
    Subscription, TransferError,
};
