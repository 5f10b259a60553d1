use std::{
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use tokio::{
    sync::mpsc::{
        self, UnboundedReceiver,
        error::{TryRecvError, TrySendError},
    },
    time::Instant,
};

use super::{
    core::{Core, Said, Submission},
    profile::Profile,
    shards::Shards,
};
use crate::{
    kv_port::{FromEngine, KvPort, ToEngine},
    pacing::Pacing,
};

/// A machine that lags by more than this does not try to catch up.
const MOST_LAG: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) enum Command {
    Submit(Submission),
    Abort { request: u64, choice: Option<u32> },
}

/// What can be seen from outside; each number is that of the last step's end.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub(super) requests_running: AtomicU32,
    pub(super) requests_waiting: AtomicU32,
    pub(super) blocks_used: AtomicU32,
    pub(super) export_slots_used: AtomicU32,
}

/// Gives the core its time: plans a step, lets the profile's time for it pass, finishes it.
#[derive(Debug)]
pub(super) struct Stepper {
    pub(super) core: Core,
    pub(super) profile: Profile,
    pub(super) time_scale: f64,
    pub(super) pacing: Pacing,
    pub(super) commands: UnboundedReceiver<Command>,
    /// One for each rank, as the next.
    pub(super) from_engine: Vec<mpsc::Sender<FromEngine>>,
    pub(super) to_engine: Vec<mpsc::Receiver<ToEngine>>,
    pub(super) port_is_open: bool,
    /// Held so that the receiver of ports does not end before the engine does.
    pub(super) _ports: mpsc::Sender<KvPort>,
    pub(super) gauges: Arc<Gauges>,
}

/// What a rank says where all say the same: each names its own slots.
fn on_rank(shards: &Shards, rank: u32, mut message: FromEngine) -> FromEngine {
    if let FromEngine::Exported { blocks, .. } = &mut message {
        for block in blocks {
            block.slot = shards.slot_on(rank, block.slot);
        }
    }
    message
}

/// The next message to any rank. Nothing is lost when the future is dropped.
async fn first_of(ranks: &mut [mpsc::Receiver<ToEngine>]) -> (u32, Option<ToEngine>) {
    std::future::poll_fn(|context| {
        let mut ready = (0..).zip(ranks.iter_mut()).filter_map(|(rank, to_engine)| match to_engine
            .poll_recv(context)
        {
            Poll::Ready(message) => Some((rank, message)),
            Poll::Pending => None,
        });
        ready.next().map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

enum Heard {
    Command(Option<Command>),
    Message(u32, Option<ToEngine>),
    /// For what waits in the outbox.
    Room {
        is_there: bool,
    },
}

impl Stepper {
    /// Runs until nobody is left who could ask for anything.
    pub(super) async fn run(mut self) {
        let mut step_end = Instant::now();
        // Of the step before, where this one follows on it.
        let mut last_end = None;
        loop {
            while let Ok(command) = self.commands.try_recv() {
                self.command(command);
            }
            self.take_messages();
            self.core.scheduler.set_pace(self.pacing.pace());
            let step = self.core.begin_step();
            self.publish();
            if step.work.is_empty() {
                if step.preempted.is_empty() && !self.hear().await {
                    return;
                }
                // Idle time is no lag to be made up for.
                step_end = Instant::now();
                last_end = None;
                continue;
            }
            let begun = last_end.unwrap_or_else(Instant::now);
            let seconds = self.profile.step_seconds(&step) * self.time_scale;
            if seconds > 0.0 {
                let now = Instant::now();
                let begin = if now.duration_since(step_end) < MOST_LAG { step_end } else { now };
                let groups = self.core.shards.layer_groups();
                for group in 1..=groups {
                    let share = seconds * f64::from(group) / f64::from(groups);
                    step_end = begin + Duration::try_from_secs_f64(share).unwrap_or(Duration::MAX);
                    if !self.hear_until(step_end).await {
                        return;
                    }
                    if group < groups {
                        self.core.end_layer_group(&step);
                        self.publish();
                    }
                }
            } else {
                tokio::task::yield_now().await;
            }
            self.core.end_step(&step);
            let end = Instant::now();
            // A step that makes up for lost time is shorter than the engine that it stands for.
            let took = end.duration_since(begun).as_secs_f64().max(seconds);
            self.pacing.observe(&step.computed(), 1000.0 * took);
            last_end = Some(end);
            self.publish();
        }
    }

    fn take_messages(&mut self) {
        for (rank, to_engine) in (0..).zip(&mut self.to_engine) {
            while self.port_is_open {
                match to_engine.try_recv() {
                    Ok(message) => self.core.handle(rank, message),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.port_is_open = false;
                        self.core.lose_port();
                    }
                }
            }
        }
    }

    fn lose_port(&mut self) {
        self.port_is_open = false;
        self.core.lose_port();
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.core.submit(submission),
            Command::Abort { request, choice } => self.core.abort(request, choice),
        }
    }

    /// While a step takes its time, blocks come and go and clients hang up. False when all is over.
    async fn hear_until(&mut self, end: Instant) -> bool {
        let time = tokio::time::sleep_until(end);
        tokio::pin!(time);
        loop {
            tokio::select! {
                () = &mut time => return true,
                heard = self.hear() => if !heard { return false },
            }
        }
    }

    /// Takes in one message. False when all is over.
    async fn hear(&mut self) -> bool {
        let is_blocked = !self.core.outbox.is_empty();
        let full = self.from_engine.iter().find(|rank| rank.capacity() == 0);
        let room = async {
            match full {
                Some(rank) => rank.reserve().await.is_ok(),
                None => true,
            }
        };
        let heard = tokio::select! {
            command = self.commands.recv() => Heard::Command(command),
            (rank, message) = first_of(&mut self.to_engine), if self.port_is_open => {
                Heard::Message(rank, message)
            }
            is_there = room, if is_blocked => Heard::Room { is_there },
        };
        match heard {
            Heard::Command(Some(command)) => self.command(command),
            Heard::Command(None) => return false,
            Heard::Message(rank, Some(message)) => self.core.handle(rank, message),
            Heard::Message(_, None) | Heard::Room { is_there: false } => self.lose_port(),
            Heard::Room { is_there: true } => {}
        }
        self.publish();
        true
    }

    fn publish(&mut self) {
        // Nobody else sends: room that is there stays there.
        let has_room = |ranks: &[mpsc::Sender<_>]| ranks.iter().all(|rank| rank.capacity() > 0);
        while has_room(&self.from_engine)
            && let Some((said, message)) = self.core.outbox.pop_front()
        {
            for (rank, from_engine) in (0..).zip(&self.from_engine) {
                if matches!(said, Said::ByRank(by) if by != rank) {
                    continue;
                }
                let message = on_rank(&self.core.shards, rank, message.clone());
                if let Err(TrySendError::Closed(_)) = from_engine.try_send(message) {
                    self.port_is_open = false;
                    self.core.lose_port();
                }
            }
        }
        let scheduler = &self.core.scheduler;
        self.gauges.requests_running.store(scheduler.sequences_running(), Relaxed);
        self.gauges.requests_waiting.store(scheduler.sequences_waiting(), Relaxed);
        self.gauges.blocks_used.store(scheduler.blocks_used(), Relaxed);
        self.gauges.export_slots_used.store(self.core.exports.slots_used(), Relaxed);
    }
}
