//! Between one life of the engine's KV side and the other workers: what the engine exports goes to
//! the ledger, where the channel finds it; what the channel pulls goes to the engine.

mod exports;
mod fault;
mod imports;
mod pieces;
mod sinks;
mod to_engine;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use baton_arena::{ArenaError, Slot};
use baton_engine::{FromEngine, KvPort, RankPort, ToEngine};
use baton_transfer::{Channel, RankLedgers};
use baton_types::{Epoch, Fault, Generation, HandoffId};
use futures::{StreamExt, future::select_all, stream};
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
    pub(crate) ledgers: RankLedgers,
    pub(crate) channel: Arc<dyn Channel>,
    /// A handoff that moves nothing for this long is given up.
    pub(crate) stall_timeout: Duration,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("transports", &self.channel.transports())
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
    #[error("block {0} was not lent for loading")]
    BlockNotLent(u32),
    #[error("the engine has no rank {0}")]
    NoSuchRank(u32),
    #[error(transparent)]
    Ledger(#[from] baton_transfer::HandoffError),
}

/// The handoffs of one life of the engine's KV side. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Handoffs {
    exports: Arc<Exports>,
    imports: Arc<Imports>,
    ledgers: RankLedgers,
}

/// Carries messages between engine and handoffs.
#[derive(Debug)]
pub(crate) struct PortLoop {
    handoffs: Handoffs,
    /// In their order.
    ranks: Vec<Carried>,
}

/// What passes between one rank of the engine and the handoffs.
#[derive(Debug)]
struct Carried {
    from_engine: mpsc::Receiver<FromEngine>,
    to_engine: mpsc::Sender<ToEngine>,
    queue: Queue,
}

/// Slots of the arena, and those of them that are the imports'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaUse {
    pub(crate) used: u32,
    pub(crate) total: u32,
    pub(crate) imports_used: u32,
    pub(crate) imports_total: u32,
}

impl Handoffs {
    /// Takes a port in use under a fresh epoch.
    pub(crate) fn of_port(
        port: KvPort,
        epoch: Epoch,
        transfer: Transfer,
        counters: Arc<Counters>,
    ) -> (Self, PortLoop) {
        let KvPort { compatibility, arena, ranks } = port;
        let ledgers = transfer.ledgers.begin_epoch(epoch, &compatibility);
        transfer.channel.use_arena(&arena);
        let queues: Vec<_> = ranks.iter().map(|_| Queue::default()).collect();
        let block_bytes = compatibility.block_bytes;
        let handoffs = Self {
            exports: Arc::new(Exports::new(arena.clone(), block_bytes, ledgers, queues.clone())),
            imports: Imports::new(
                arena,
                compatibility,
                epoch,
                transfer.clone(),
                queues.clone(),
                counters,
            ),
            ledgers: transfer.ledgers,
        };
        let carried = |(RankPort { from_engine, to_engine }, queue)| Carried {
            from_engine,
            to_engine,
            queue,
        };
        let ranks = ranks.into_iter().zip(queues).map(carried).collect();
        let port_loop = PortLoop { handoffs: handoffs.clone(), ranks };
        (handoffs, port_loop)
    }

    /// The same engine in another role: what is still open of the old epoch is void.
    pub(crate) fn begin_epoch(&self, epoch: Epoch) {
        self.ledgers.begin_epoch(epoch, self.imports.compatibility());
        self.imports.begin_epoch(epoch);
    }

    /// Opens a handoff that this worker's engine shall produce for the worker that presents this
    /// certificate, by when the request's first token is due.
    pub(crate) fn produce(
        &self,
        name: Name,
        consumer: [u8; 32],
        due: Option<Instant>,
    ) -> Result<Producing, Fault> {
        self.exports.expect(name, consumer, due)
    }

    /// Expects this worker's engine to subscribe.
    pub(crate) fn consume(&self, name: Name, producer: Producer) -> Result<Consuming, Fault> {
        Imports::expect(&self.imports, name, producer)
    }

    /// Handoffs on either side that have not ended.
    pub(crate) fn open(&self) -> usize {
        self.exports.open() + self.imports.open()
    }

    /// How full the arena is.
    pub(crate) fn slots(&self) -> ArenaUse {
        let count = |slots| u32::try_from(slots).unwrap_or(u32::MAX);
        let imports_used = count(self.imports.slots_used());
        let layout = self.exports.layout();
        ArenaUse {
            used: count(self.exports.slots_used()).saturating_add(imports_used),
            total: layout.total_slots(),
            imports_used,
            imports_total: layout.import_slots,
        }
    }

    fn take(&self, rank: u32, message: FromEngine) {
        let (name, taken) = match message {
            FromEngine::Exported { handoff, generation, blocks } => {
                let name = (handoff, generation);
                (name, self.exports.exported(rank, name, &blocks))
            }
            FromEngine::Sealed {
                handoff,
                generation,
                prompt_tokens,
                prompt_digest,
                cached_tokens,
            } => {
                let name = (handoff, generation);
                let sealed =
                    self.exports.sealed(rank, name, prompt_tokens, prompt_digest, cached_tokens);
                (name, sealed)
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
                Imports::subscribe(&self.imports, rank, name, prompt);
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
            FromEngine::LoadedMapped { handoff, generation, indices } => {
                let name = (handoff, generation);
                (name, self.imports.loaded_mapped(rank, name, &indices))
            }
            FromEngine::Mapped { arena, refused } => {
                return self.imports.engine_mapped(rank, arena, refused.as_deref());
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
        let Self { handoffs, ranks } = self;
        let (mut heard, mut telling) = (Vec::new(), Vec::new());
        for (rank, Carried { mut from_engine, to_engine, queue }) in (0..).zip(ranks) {
            let messages = stream::poll_fn(move |context| from_engine.poll_recv(context));
            // The end of one rank is that of all.
            let messages = messages.map(Some).chain(stream::once(async { None }));
            heard.push(messages.map(move |message| (rank, message)).boxed());
            telling.push(Box::pin(async move { queue.pump(&to_engine).await }));
        }
        let mut heard = stream::select_all(heard);
        let reading = async {
            let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
            sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    next = heard.next() => match next {
                        Some((rank, Some(message))) => handoffs.take(rank, message),
                        Some((_, None)) | None => return,
                    },
                    _ = sweep.tick() => handoffs.imports.sweep(),
                }
            }
        };
        tokio::select! {
            () = reading => {}
            _ = select_all(telling) => {}
        }
        handoffs.imports.engine_gone();
    }
}

#[cfg(test)]
mod mapped_tests;
#[cfg(test)]
mod tests;
