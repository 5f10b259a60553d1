//! The embedded engine: a library that behaves like an OpenAI-compatible server over a paged KV
//! cache, without a model.
//!
//! `scheduler` decides what each `step` computes; `kv_store` holds the bytes; `core` moves them as the
//! scheduler and the worker say; `stepper` gives it its time; `api` speaks HTTP.

mod api;
mod block_pool;
mod chat_template;
mod core;
mod exports;
mod handoff;
mod kv_store;
mod profile;
mod sampling;
mod scheduler;
mod shards;
mod step;
mod stepper;
mod tokenizer;

use std::sync::{Arc, atomic::Ordering::Relaxed};

use async_trait::async_trait;
use baton_arena::{Arena, ArenaError, ArenaLayout};
use baton_config::{ArenaConfig, SimConfig};
use baton_types::{Compatibility, HeadLayout};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use self::{
    api::Api,
    core::Core,
    kv_store::KvStore,
    shards::Shards,
    stepper::{Gauges, Stepper},
    tokenizer::Tokenizer,
};
pub use self::{
    block_pool::{BlockHash, BlockId},
    profile::{Profile, ProfileError},
    scheduler::{NeverFits, NewSequence, Scheduler, SchedulerLimits, SequenceId},
    step::{Admission, Step, Work},
};
use crate::{
    contract::{
        Answer, Engine, EngineDescription, EngineError, EngineLoad, EngineRequest, KvCache,
    },
    kv_cache::KvCacheLog,
    kv_port::{KvPort, RankPort},
    pacing::Pacing,
    vllm::arena_files,
};

/// Messages that may wait on either side of the port.
const PORT_CAPACITY: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("{field} is {value}: {reason}")]
    Config { field: &'static str, value: String, reason: String },
}

/// An engine that answers in readable words, each of which depends on all the KV before it.
#[derive(Debug)]
pub struct SimEngine {
    api: Api,
    description: EngineDescription,
    gauges: Arc<Gauges>,
    kv_blocks: u32,
    kv_cache: KvCache,
    pacing: Pacing,
    ports: Mutex<Option<mpsc::Receiver<KvPort>>>,
}

/// What the engine holds at this moment; for tests, and for looking at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimUsage {
    pub blocks_used: u32,
    pub blocks_total: u32,
    /// Export slots that the worker has and did not release yet.
    pub export_slots_used: u32,
    pub requests_running: u32,
    pub requests_waiting: u32,
}

impl SimEngine {
    /// Starts the engine on the current tokio runtime, with an arena of its own.
    pub fn start(
        config: &SimConfig,
        arena: &ArenaConfig,
        worker_name: &str,
    ) -> Result<Self, StartError> {
        check(config)?;
        let profile =
            config.profile.as_deref().map_or_else(|| Ok(Profile::demo()), Profile::read)?;
        let compatibility = compatibility_on(config, config.tensor_parallel)?;
        let layout = arena_layout(config, compatibility.block_bytes, arena)?;
        arena_files::remove_stale(arena, worker_name);
        let arena = Arena::create(&arena_files::fresh_path(arena, worker_name), layout)?;

        let limits = SchedulerLimits {
            block_size_tokens: config.block_size_tokens,
            kv_blocks: config.kv_blocks,
            max_seqs: config.max_seqs,
            max_step_tokens: config.max_step_tokens,
            reserves_output: false,
        };
        let store = KvStore::new(
            &config.model,
            config.kv_blocks,
            config.block_size_tokens,
            config.kv_bytes_per_token,
        );
        let shards =
            Shards::new(arena.clone(), config, &compatibility_on(config, 1)?, &compatibility)
                .map_err(|error| bad_split(config, &error.to_string()))?;
        let (mut ranks, mut from_engine, mut to_engine) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..config.tensor_parallel {
            let (rank, tell, hear) = RankPort::pair(PORT_CAPACITY);
            ranks.push(rank);
            from_engine.push(tell);
            to_engine.push(hear);
        }
        let port = KvPort { compatibility, arena, ranks };
        let (ports, ports_receiver) = mpsc::channel(1);
        // The channel is new and has room for the one port there will ever be.
        let _ = ports.try_send(port);

        let (commands, commands_receiver) = mpsc::unbounded_channel();
        let gauges = Arc::new(Gauges::default());
        let log = KvCacheLog::default();
        let mut scheduler = Scheduler::new(limits);
        scheduler.tell(log.clone());
        let pacing =
            Pacing::new((config.time_scale > 0.0).then(|| profile.model.slowed(config.time_scale)));
        let stepper = Stepper {
            core: Core::new(scheduler, store, shards),
            profile,
            time_scale: config.time_scale,
            pacing: pacing.clone(),
            commands: commands_receiver,
            from_engine,
            to_engine,
            port_is_open: true,
            _ports: ports,
            gauges: gauges.clone(),
        };
        tokio::spawn(stepper.run());
        Ok(Self {
            api: Api::new(config, commands),
            description: EngineDescription {
                engine: concat!("sim ", env!("CARGO_PKG_VERSION")).to_owned(),
                models: vec![config.model.clone()],
                adapters: Vec::new(),
                max_model_tokens: config.max_model_tokens,
            },
            gauges,
            kv_blocks: config.kv_blocks,
            kv_cache: KvCache {
                block_size_tokens: config.block_size_tokens,
                capacity_tokens: Some(
                    u64::from(config.kv_blocks) * u64::from(config.block_size_tokens),
                ),
                log,
            },
            pacing,
            ports: Mutex::new(Some(ports_receiver)),
        })
    }

    pub fn usage(&self) -> SimUsage {
        SimUsage {
            blocks_used: self.gauges.blocks_used.load(Relaxed),
            blocks_total: self.kv_blocks,
            export_slots_used: self.gauges.export_slots_used.load(Relaxed),
            requests_running: self.gauges.requests_running.load(Relaxed),
            requests_waiting: self.gauges.requests_waiting.load(Relaxed),
        }
    }

    /// Token ids of a prompt are below this.
    pub fn vocabulary_size() -> u32 {
        Tokenizer::shared().vocabulary_size()
    }
}

#[async_trait]
impl Engine for SimEngine {
    async fn ready(&self) -> Result<EngineDescription, EngineError> {
        Ok(self.description.clone())
    }

    async fn run(&self, request: EngineRequest) -> Result<Answer, EngineError> {
        self.api.run(request).await
    }

    async fn load(&self) -> Result<EngineLoad, EngineError> {
        let usage = self.usage();
        let ratio = f64::from(usage.blocks_used) / f64::from(usage.blocks_total.max(1));
        #[allow(clippy::cast_possible_truncation)] // A ratio needs no more than seven digits.
        let kv_used_ratio = ratio as f32;
        Ok(EngineLoad {
            requests_running: usage.requests_running,
            requests_waiting: usage.requests_waiting,
            kv_used_ratio,
        })
    }

    fn kv_ports(&self) -> Option<mpsc::Receiver<KvPort>> {
        self.ports.lock().take()
    }

    fn kv_cache(&self) -> Option<KvCache> {
        Some(self.kv_cache.clone())
    }

    fn pacing(&self) -> Option<Pacing> {
        Some(self.pacing.clone())
    }
}

fn check(config: &SimConfig) -> Result<(), StartError> {
    let error = |field, value: String, reason: &str| {
        Err(StartError::Config { field, value, reason: reason.to_owned() })
    };
    for (field, value) in [
        ("max_model_tokens", config.max_model_tokens),
        ("block_size_tokens", config.block_size_tokens),
        ("tensor_parallel", config.tensor_parallel),
        ("layer_groups", config.layer_groups),
        ("kv_blocks", config.kv_blocks),
        ("max_seqs", config.max_seqs),
        ("max_step_tokens", config.max_step_tokens),
    ] {
        if value == 0 {
            return error(field, value.to_string(), "expected at least 1");
        }
    }
    if config.kv_bytes_per_token < 8 {
        let value = config.kv_bytes_per_token.to_string();
        return error("kv_bytes_per_token", value, "fewer than 8 cannot hold a token's state");
    }
    shards::check(config).map_err(|reason| bad_split(config, &reason))?;
    if let Err(reason) = shards::check_groups(config) {
        return error("layer_groups", config.layer_groups.to_string(), &reason);
    }
    if !config.time_scale.is_finite() || config.time_scale < 0.0 {
        return error("time_scale", config.time_scale.to_string(), "expected a number from 0 up");
    }
    let kv_tokens = u64::from(config.kv_blocks) * u64::from(config.block_size_tokens);
    if kv_tokens < u64::from(config.max_model_tokens) {
        let reason = format!("the KV cache of {kv_tokens} tokens cannot hold one such sequence");
        return error("max_model_tokens", config.max_model_tokens.to_string(), &reason);
    }
    Ok(())
}

/// For each rank no more slots than the cache has blocks, of all layer groups: the others would never be used.
fn arena_layout(
    config: &SimConfig,
    slot_bytes: u64,
    arena: &ArenaConfig,
) -> Result<ArenaLayout, StartError> {
    let ranks = u64::from(config.tensor_parallel);
    let slots = |field, bytes: u64| {
        let most = u64::from(config.kv_blocks) * u64::from(config.layer_groups);
        let slots = (bytes / ranks / slot_bytes).min(most);
        let all = u32::try_from(slots * ranks).ok().filter(|slots| *slots > 0);
        all.ok_or_else(|| StartError::Config {
            field,
            value: bytes.to_string(),
            reason: format!("one block of KV has {slot_bytes} bytes on each of {ranks} ranks"),
        })
    };
    Ok(ArenaLayout {
        slot_bytes,
        export_slots: slots("export_bytes", arena.export_bytes)?,
        import_slots: slots("import_bytes", arena.import_bytes)?,
    })
}

/// Of the first of so many ranks.
fn compatibility_on(config: &SimConfig, ranks: u32) -> Result<Compatibility, StartError> {
    let kv_heads = shards::kv_heads(config, ranks);
    let block_bytes = kv_heads.parse().ok().as_ref().and_then(HeadLayout::block_bytes);
    Ok(Compatibility {
        model: config.model.clone(),
        revision: config.revision.clone().unwrap_or_default(),
        kv_dtype: "sim".to_owned(),
        kv_layout: "token-major".to_owned(),
        block_size_tokens: config.block_size_tokens,
        layer_groups: config.layer_groups,
        block_bytes: block_bytes.ok_or_else(|| bad_split(config, "a block has too many bytes"))?,
        tensor_parallel_rank: 0,
        tensor_parallel_size: ranks,
        connector_version: "sim-1".to_owned(),
        kv_heads,
    })
}

fn bad_split(config: &SimConfig, reason: &str) -> StartError {
    let (value, reason) = (config.tensor_parallel.to_string(), reason.to_owned());
    StartError::Config { field: "tensor_parallel", value, reason }
}
