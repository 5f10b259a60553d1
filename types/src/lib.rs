//! The vocabulary that every part of Baton shares. No I/O lives here.

mod compatibility;
mod fault;
mod handoff;
mod role;
mod step_model;

pub use compatibility::{Compatibility, CompatibilityMismatch};
pub use fault::{Fault, FaultKind, Origin};
pub use handoff::{Epoch, Generation, HandoffId, HandoffKey, ParseIdError, PromptDigest};
pub use role::{Leg, ParseRoleError, Role};
pub use step_model::{StepLoad, StepModel};
