//! The vocabulary that every part of Baton shares. No I/O lives here.

mod block_hash;
mod compatibility;
mod fault;
mod handoff;
mod heads;
mod reslice;
mod role;
mod step_fit;
mod step_model;
mod step_tail;

pub use block_hash::{BlockHash, BlockHasher, BlockScope, BlockUnit};
pub use compatibility::{Compatibility, CompatibilityMismatch};
pub use fault::{Fault, FaultKind, Origin};
pub use handoff::{Epoch, Generation, HandoffId, HandoffKey, ParseIdError, PromptDigest};
pub use heads::{HeadLayout, HeadLayoutError};
pub use reslice::{Reslice, ResliceError, Run};
pub use role::{Leg, ParseRoleError, Role};
pub use step_fit::{StepFit, StepSamples, StepWork};
pub use step_model::{StepLoad, StepModel};
pub use step_tail::{STEP_HEADROOM, StepTail};
