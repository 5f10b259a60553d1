//! Between one life of the engine's KV side and the other workers: what the engine exports goes to
//! the ledger, where the channel finds it; what the channel pulls goes to the engine.

mod exports;
mod fault;
mod imports;
mod to_engine;

use std::{sync::Arc, time::Duration};

use baton_arena::{ArenaError, Slot};
use baton_engine::{FromEngine, KvPort, ToEngine};
use baton_transfer::{Channel, Ledger};
use baton_types::{Epoch, Fault, Generation, HandoffId};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use crate::counters::Counters;
use exports::Exports;
pub(crate) use exports::Producing;
use imports::Imports;
pub(crate) use imports::{Consuming, Producer, Progress, Received};
use to_engine::Queue;

/// Slots that an engine does not give back are looked for this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// A handoff on one side: the epoch is the port's own.
pub(crate) type Name = (HandoffId, Generation);

/// What every handoff of this worker needs.
#[derive(Clone)]
pub(crate) struct Transfer {
    pub(crate) ledger: Ledger,
    pub(crate) channel: Arc<dyn Channel>,
    /// A handoff that moves nothing for this long is given up.
    pub(crate) stall_timeout: Duration,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("transport", &self.channel.transport())
            .field("stall_timeout", &self.stall_timeout)
            .finish_non_exhaustive()
    }
}

/// What an engine said that it has no right to say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("slot {} is not the engine's to export", .0.0)]
    NotForExport(Slot),
    #[error("slot {} was exported before, and not yet released", .0.0)]
    StillLent(Slot),
    #[error("slot {} was not lent for loading", .0.0)]
    NotLent(Slot),
    #[error(transparent)]
    Ledger(#[from] baton_transfer::HandoffError),
}

/// The handoffs of one life of the engine's KV side. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Handoffs {
    exports: Arc<Exports>,
    imports: Arc<Imports>,
}

/// Carries messages between engine and handoffs.
#[derive(Debug)]
pub(crate) struct PortLoop {
    handoffs: Handoffs,
    from_engine: mpsc::Receiver<FromEngine>,
    to_engine: mpsc::Sender<ToEngine>,
    queue: Queue,
}

impl Handoffs {
    /// Takes a port in use under a fresh epoch.
    pub(crate) fn of_port(
        port: KvPort,
        epoch: Epoch,
        transfer: Transfer,
        counters: Arc<Counters>,
    ) -> (Self, PortLoop) {
        let KvPort { compatibility, arena, from_engine, to_engine } = port;
        transfer.ledger.begin_epoch(epoch, compatibility.digest());
        transfer.channel.use_arena(&arena);
        let queue = Queue::default();
        let block_bytes = compatibility.block_bytes;
        let handoffs = Self {
            exports: Arc::new(Exports::new(
                arena.clone(),
                block_bytes,
                transfer.clone(),
                queue.clone(),
            )),
            imports: Imports::new(arena, &compatibility, epoch, transfer, queue.clone(), counters),
        };
        let port_loop = PortLoop { handoffs: handoffs.clone(), from_engine, to_engine, queue };
        (handoffs, port_loop)
    }

    /// The same engine in another role: what is still open of the old epoch is void.
    pub(crate) fn begin_epoch(&self, epoch: Epoch) {
        self.exports.begin_epoch(epoch, self.imports.compatibility());
        self.imports.begin_epoch(epoch);
    }

    /// Opens a handoff that this worker's engine shall produce for the worker that presents this
    /// certificate.
    pub(crate) fn produce(&self, name: Name, consumer: [u8; 32]) -> Result<Producing, Fault> {
        self.exports.expect(name, consumer)
    }

    /// Expects this worker's engine to subscribe.
    pub(crate) fn consume(&self, name: Name, producer: Producer) -> Result<Consuming, Fault> {
        Imports::expect(&self.imports, name, producer)
    }

    /// Handoffs on either side that have not ended.
    pub(crate) fn open(&self) -> usize {
        self.exports.open() + self.imports.open()
    }

    /// Slots in use, of how many.
    pub(crate) fn slots(&self) -> (u32, u32) {
        let used = self.exports.slots_used() + self.imports.slots_used();
        (u32::try_from(used).unwrap_or(u32::MAX), self.exports.total_slots())
    }

    fn take(&self, message: FromEngine) {
        let (name, taken) = match message {
            FromEngine::Exported { handoff, generation, blocks } => {
                let name = (handoff, generation);
                (name, self.exports.exported(name, &blocks))
            }
            FromEngine::Sealed {
                handoff,
                generation,
                prompt_tokens,
                prompt_digest,
                cached_tokens,
            } => {
                let name = (handoff, generation);
                (name, self.exports.sealed(name, prompt_tokens, prompt_digest, cached_tokens))
            }
            FromEngine::Subscribe {
                handoff,
                generation,
                prompt_tokens,
                prompt_digest,
                first_block,
            } => {
                let name = (handoff, generation);
                let prompt = imports::Prompt { prompt_tokens, prompt_digest, first_block };
                Imports::subscribe(&self.imports, name, prompt);
                (name, Ok(()))
            }
            FromEngine::NotNeeded { handoff, generation } => {
                let name = (handoff, generation);
                self.imports.not_needed(name);
                (name, Ok(()))
            }
            FromEngine::Loaded { handoff, generation, slots } => {
                let name = (handoff, generation);
                (name, self.imports.loaded(name, &slots))
            }
            FromEngine::Corrupt { handoff, generation, index } => {
                let name = (handoff, generation);
                self.imports.corrupt(name, index);
                (name, Ok(()))
            }
            FromEngine::Aborted { handoff, generation } => {
                let name = (handoff, generation);
                if !self.imports.aborted(name) {
                    self.exports.abort(name);
                }
                (name, Ok(()))
            }
        };
        if let Err(error) = taken {
            tracing::error!(handoff = %name.0, generation = %name.1, %error, "the engine broke the protocol");
            self.exports.abort(name);
            self.imports.broken(name, &error);
        }
    }
}

impl PortLoop {
    /// Runs until the engine's KV side is gone.
    pub(crate) async fn run(self) {
        let Self { handoffs, mut from_engine, to_engine, queue } = self;
        let reading = async {
            let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
            sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    message = from_engine.recv() => match message {
                        Some(message) => handoffs.take(message),
                        None => return,
                    },
                    _ = sweep.tick() => handoffs.imports.sweep(),
                }
            }
        };
        tokio::select! {
            () = reading => {}
            () = queue.pump(&to_engine) => {}
        }
        handoffs.imports.engine_gone();
    }
}

#[cfg(test)]
mod tests;
