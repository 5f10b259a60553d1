//! What a worker drives, behind one narrow trait: a real vLLM, or the embedded engine.

#[cfg(feature = "conformance")]
pub mod conformance;
mod contract;
mod kv_cache;
mod kv_port;
mod pacing;
pub mod sim;
mod vllm;

pub use contract::{
    Answer, Engine, EngineDescription, EngineError, EngineLoad, EngineRequest, KvCache,
};
pub use kv_cache::{KvCacheChanges, KvCacheFollower, KvCacheLog};
pub use kv_port::{
    BlockInSlot, BlockToLoad, FromEngine, KvPort, MappedBlockToLoad, RankPort, ToEngine,
};
pub use pacing::{FittedSteps, Pacing, StepPace};
pub use sim::SimEngine;
pub use vllm::VllmEngine;
#[cfg(feature = "fuzzing")]
pub use vllm::fuzzing;
