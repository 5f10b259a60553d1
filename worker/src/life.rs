use std::{sync::Arc, time::Instant};

use baton_engine::{Engine, EngineDescription, EngineError, EngineLoad};
use baton_proto::{Hello, KvCache, Peer, Report, StepModel};
use baton_transfer::{Channel, RankLedgers};
use baton_types::{Compatibility, Epoch, Fault, FaultKind, Origin};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    counters::{Counters, Running},
    handoff::Handoffs,
    role::RoleKeeper,
};

/// One life of the engine: what every job of it needs, and what coordinators are told of it.
pub(crate) struct Life {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) epoch: Epoch,
    pub(crate) kv: KvSide,
    pub(crate) name: String,
    pub(crate) role: RoleKeeper,
    pub(crate) description: EngineDescription,
    pub(crate) counters: Arc<Counters>,
    pub(crate) load: Mutex<EngineLoad>,
    /// Turns true when this worker takes nothing new.
    pub(crate) leaving: watch::Receiver<bool>,
    pub(crate) born: Instant,
}

/// How this engine's KV can get to others.
pub(crate) enum KvSide {
    None,
    /// By the engines themselves.
    Engine,
    /// By Baton.
    Fenced(Box<Fenced>),
}

pub(crate) struct Fenced {
    pub(crate) handoffs: Handoffs,
    pub(crate) ledgers: RankLedgers,
    pub(crate) compatibility: Compatibility,
    /// Where other workers find this one: `host:port`, or a path.
    pub(crate) address: String,
    pub(crate) certificate_fingerprint: [u8; 32],
    pub(crate) channel: Arc<dyn Channel>,
}

impl std::fmt::Debug for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Life")
            .field("epoch", &self.epoch)
            .field("description", &self.description)
            .finish_non_exhaustive()
    }
}

impl Life {
    /// The handoffs, where Baton does them.
    pub(crate) fn handoffs(&self) -> Result<&Handoffs, Fault> {
        match &self.kv {
            KvSide::Fenced(fenced) => Ok(&fenced.handoffs),
            KvSide::None | KvSide::Engine => Err(Fault::new(
                Origin::Worker,
                FaultKind::Refused,
                "this worker's engine takes part in no fenced handoff",
            )),
        }
    }

    /// Nothing is left of any job: none runs, and no block of one is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        let handoffs_open = match &self.kv {
            KvSide::Fenced(fenced) => fenced.handoffs.open(),
            KvSide::None | KvSide::Engine => 0,
        };
        self.counters.running.prefills.get() + self.counters.running.decodes.get() == 0
            && handoffs_open == 0
    }

    /// Of the KV that is handed over; 0 where none is.
    pub(crate) fn block_size_tokens(&self) -> u32 {
        match &self.kv {
            KvSide::Fenced(fenced) => fenced.compatibility.block_size_tokens,
            KvSide::None | KvSide::Engine => 0,
        }
    }

    /// A time so many milliseconds from now, on this life's own clock.
    pub(crate) fn due_ms(&self, in_ms: u32) -> i64 {
        let now_ms = i64::try_from(self.born.elapsed().as_millis()).unwrap_or(i64::MAX);
        now_ms.saturating_add(in_ms.into())
    }

    pub(crate) fn hello(&self) -> Hello {
        let mut hello = Hello {
            protocol_version: baton_proto::PROTOCOL_VERSION,
            worker_name: self.name.clone(),
            epoch: epoch_bytes(self.epoch),
            role: baton_proto::Role::from(self.role.role()).into(),
            role_change: self.role.change(),
            models: self.description.models.clone(),
            max_model_tokens: self.description.max_model_tokens,
            engine: self.description.engine.clone(),
            kv_cache: self.engine.kv_cache().map(|cache| KvCache {
                block_size_tokens: cache.block_size_tokens,
                adapters: self.description.adapters.clone(),
                capacity_tokens: cache.capacity_tokens.unwrap_or_default(),
            }),
            step_model: self
                .engine
                .pacing()
                .and_then(|pacing| pacing.cold_start())
                .map(|model| StepModel::fitted(&model, 0)),
            ..Hello::default()
        };
        match &self.kv {
            KvSide::None => hello.set_handoff_mode(baton_proto::HandoffMode::None),
            KvSide::Engine => hello.set_handoff_mode(baton_proto::HandoffMode::Engine),
            KvSide::Fenced(fenced) => {
                hello.set_handoff_mode(baton_proto::HandoffMode::Fenced);
                hello.compatibility = Some((&fenced.compatibility).into());
                hello.transports = fenced.channel.transports();
                // What is copied must be found by the request that follows, and peers must hear of it.
                hello.pulls_prefixes = self.engine.kv_cache().is_some();
                hello.peer = Some(Peer {
                    worker_name: self.name.clone(),
                    epoch: epoch_bytes(self.epoch),
                    address: fenced.address.clone(),
                    certificate_fingerprint: Bytes::copy_from_slice(
                        &fenced.certificate_fingerprint,
                    ),
                    compatibility: None,
                });
            }
        }
        hello
    }

    /// For a coordinator of which `own` jobs are.
    pub(crate) fn report(&self, own: &Running) -> Report {
        let load = *self.load.lock();
        let (prefills, decodes) =
            (self.counters.running.prefills.get(), self.counters.running.decodes.get());
        let steps = self.engine.pacing().and_then(|pacing| pacing.fitted());
        let mut report = Report {
            jobs_running: prefills + decodes,
            prefills_elsewhere: prefills.saturating_sub(own.prefills.get()),
            decodes_elsewhere: decodes.saturating_sub(own.decodes.get()),
            handoff_blocks_received: self.counters.handoff_blocks_received.get(),
            handoff_blocks_mapped: self.counters.handoff_blocks_mapped.get(),
            handoff_bytes_received: self.counters.handoff_bytes_received.get(),
            handoff_blocks_reused: self.counters.handoff_blocks_reused.get(),
            handoff_errors: self.counters.handoff_errors.get(),
            role_change: self.role.change(),
            engine_requests_running: load.requests_running,
            engine_requests_waiting: load.requests_waiting,
            engine_kv_used_ratio: load.kv_used_ratio,
            engine_kv_blocks_cached: self
                .engine
                .kv_cache()
                .map_or(0, |cache| cache.log.len() as u64),
            step_model: steps.map(|steps| StepModel::fitted(&steps.model, steps.samples)),
            slowest_step_part: steps.map_or(0.0, |steps| steps.slowest_part),
            ..Report::default()
        };
        if let KvSide::Fenced(fenced) = &self.kv {
            let Fenced { handoffs, ledgers, channel, .. } = &**fenced;
            report.transports = channel.transports();
            let sent = ledgers.counters();
            report.handoff_blocks_sent = sent.blocks_sent;
            report.handoff_bytes_sent = sent.bytes_sent;
            let ended = sent.endings().into_iter().map(|(name, count)| (name.to_owned(), count));
            report.handoffs_ended = ended.collect();
            report.handoffs_open = u32::try_from(handoffs.open()).unwrap_or(u32::MAX);
            let arena = handoffs.slots();
            (report.arena_slots_used, report.arena_slots) = (arena.used, arena.total);
            (report.arena_import_slots_used, report.arena_import_slots) =
                (arena.imports_used, arena.imports_total);
        }
        report
    }
}

fn epoch_bytes(epoch: Epoch) -> Bytes {
    Bytes::copy_from_slice(epoch.as_bytes())
}

/// Which leg's failure an engine's error is.
pub(crate) fn engine_fault(error: &EngineError) -> Fault {
    let kind = match error {
        EngineError::NotStarted(_)
        | EngineError::Unreachable { .. }
        | EngineError::Ended(_)
        | EngineError::BrokeOff(_) => FaultKind::Unavailable,
        EngineError::Unexpected { .. } => FaultKind::Failed,
    };
    Fault::new(Origin::Engine, kind, error.to_string())
}
