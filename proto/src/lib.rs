//! The wire between coordinator and workers: generated messages, and their conversions to and from
//! the vocabulary of `baton-types`.

mod convert;
mod in_process;

#[allow(clippy::all, clippy::pedantic, missing_debug_implementations, unreachable_pub)]
#[rustfmt::skip]
mod generated {
    include!("generated/baton.v1.rs");
}

pub use convert::{WireError, epoch, fingerprint};
pub use generated::*;
pub use in_process::{
    Attachment, CoordinatorFrames, CoordinatorHere, WorkerFrames, WorkersHere, in_process,
};

/// Raised with every change that an older peer would misunderstand.
pub const PROTOCOL_VERSION: u32 = 1;

/// HTTP/2 windows on both ends of a stream: a batch of a thousand streams' tokens, or a prompt of
/// the largest size, must not wait for a window update.
pub const WINDOW_BYTES: u32 = 4 << 20;

/// Large frames: a 256 KiB prompt is one write, not sixteen.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;
