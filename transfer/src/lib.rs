//! Moves KV blocks between workers' staging arenas.
//!
//! A producer's [`Ledger`] holds what its engine exported until the one consumer that the handoff is
//! meant for takes it over a [`Channel`]; [`QuicChannel`] is the channel that works on every network,
//! [`UcxChannel`] has UCX write into the consumer's arena, [`ShmChannel`] leaves them where they are or copies
//! them from arena to arena on one host, and [`NearestChannel`] takes that where it can and a network where it cannot.

mod arrivals;
mod attach;
mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod counters;
#[cfg(feature = "faults")]
pub mod faults;
mod frame;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod lease;
mod ledger;
mod mac;
mod nearest;
mod order;
mod quic;
mod ranks;
mod shm;
mod turns;
mod ucx;

pub use channel::{
    BlockSink, Channel, ExportStream, Exported, Exports, Interpose, PeerAddress, Pulled, Refusal,
    Seal, Subscription, TransferError,
};
pub use counters::LedgerCounters;
pub use lease::{Ending, HandoffError};
pub use ledger::Ledger;
pub use mac::Check;
pub use nearest::NearestChannel;
pub use quic::{BindError, QuicChannel, QuicConfig};
pub use ranks::RankLedgers;
pub use shm::{MappedBlock, ShmBindError, ShmChannel, ShmConfig};
pub use ucx::{UcxBindError, UcxChannel, UcxConfig};
