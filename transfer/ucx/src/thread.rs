//! The thread that UCX lives on: it alone touches the context, the worker and all that hangs on them.

use std::{
    collections::HashMap,
    rc::Rc,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use baton_ucx_sys::Ucp;
use bytes::Bytes;

use crate::{
    Resource, StartError, UcxError,
    command::{Answer, Command, Commands, EndpointId, Queue, RegionId, RkeyId},
    native::{Leaving, Memory, Peer, RemoteKey, Source, Waker, Worker},
};

/// Rounds of progress between two looks at the commands.
const ROUNDS: usize = 64;

/// The longest sleep: should a wake-up be lost somewhere, it is late by this.
const NAP: Duration = Duration::from_millis(500);

/// What is known once it runs.
pub(crate) struct Started {
    pub(crate) version: String,
    pub(crate) address: Bytes,
    pub(crate) resources: Vec<Resource>,
}

pub(crate) fn start(
    ucp: &'static Ucp,
    spin: Duration,
) -> Result<(Arc<Commands>, Started), StartError> {
    let queue = Arc::new(Queue::new(Waker::new().map_err(StartError::Thread)?));
    let (told, started) = mpsc::channel();
    let (ending, ended) = mpsc::channel();
    let of_thread = Arc::clone(&queue);
    thread::Builder::new()
        .name("ucx".to_owned())
        .spawn(move || {
            match Worker::new(ucp) {
                Ok((worker, started)) => {
                    // Nobody waits for it where the starter has gone.
                    let _ = told.send(Ok(started));
                    Progress::new(Rc::new(worker), of_thread, spin).run();
                }
                Err(error) => {
                    let _ = told.send(Err(error));
                }
            }
            drop(ending);
        })
        .map_err(StartError::Thread)?;
    let started = started
        .recv()
        .map_err(|_| StartError::Thread(std::io::Error::other("it ended before it had begun")))??;
    Ok((Arc::new(Commands::new(queue, ended)), started))
}

struct Progress {
    // Fields go in this order: what hangs on the worker before the worker.
    keys: HashMap<RkeyId, Rc<RemoteKey>>,
    peers: HashMap<EndpointId, Peer>,
    leaving: Vec<Leaving>,
    regions: HashMap<RegionId, Rc<Memory>>,
    worker: Rc<Worker>,
    queue: Arc<Queue>,
    spin: Duration,
    names: u64,
}

impl Progress {
    fn new(worker: Rc<Worker>, queue: Arc<Queue>, spin: Duration) -> Self {
        Self {
            keys: HashMap::new(),
            peers: HashMap::new(),
            leaving: Vec::new(),
            regions: HashMap::new(),
            worker,
            queue,
            spin,
            names: 0,
        }
    }

    fn run(mut self) {
        let mut commands = Vec::new();
        let mut idle_since = Instant::now();
        loop {
            self.queue.take(&mut commands);
            let mut worked = !commands.is_empty();
            for command in commands.drain(..) {
                self.act(command);
            }
            for _ in 0..ROUNDS {
                if !self.worker.progress() {
                    break;
                }
                worked = true;
            }
            self.leaving.retain(|leaving| !leaving.may_close());
            if worked {
                idle_since = Instant::now();
            } else if self.queue.is_closed() {
                if self.peers.is_empty() && self.leaving.is_empty() {
                    return;
                }
                self.leaving.extend(self.peers.drain().map(|(_, peer)| peer.leave()));
                thread::yield_now();
            } else if idle_since.elapsed() < self.spin {
                // Where there are more threads than cores, whoever makes the work must get to run.
                thread::yield_now();
            } else {
                self.sleep();
                idle_since = Instant::now();
            }
        }
    }

    fn sleep(&self) {
        if self.queue.may_sleep() && self.worker.arm() {
            self.worker.wait(self.queue.waker(), NAP);
        }
        self.queue.awake();
    }

    fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    fn act(&mut self, command: Command) {
        match command {
            Command::Register { arena, answer } => {
                let registered = Memory::register(Rc::clone(&self.worker), arena);
                let named = registered.map(|(memory, key)| {
                    let id = RegionId(self.name());
                    self.regions.insert(id, Rc::new(memory));
                    (id, key)
                });
                tell(answer, named);
            }
            Command::Unregister(id) => {
                self.regions.remove(&id);
            }
            Command::Connect { address, answer } => {
                let named = Peer::connect(&self.worker, &address).map(|peer| {
                    let id = EndpointId(self.name());
                    self.peers.insert(id, peer);
                    id
                });
                tell(answer, named);
            }
            Command::Describe { endpoint, answer } => {
                let described = self.peers.get(&endpoint).ok_or(UcxError::Stopped);
                tell(answer, described.and_then(Peer::lanes));
            }
            Command::Leave(id) => {
                self.leaving.extend(self.peers.remove(&id).map(Peer::leave));
            }
            Command::Close(id) => {
                self.peers.remove(&id);
            }
            Command::Import { endpoint, key, answer } => {
                let peer = self.peers.get(&endpoint).ok_or(UcxError::Stopped);
                let named = peer.and_then(|peer| peer.import(&key)).map(|key| {
                    let id = RkeyId(self.name());
                    self.keys.insert(id, Rc::new(key));
                    id
                });
                tell(answer, named);
            }
            Command::Forget(id) => {
                self.keys.remove(&id);
            }
            Command::Put { endpoint, rkey, puts, answer } => {
                match (self.peers.get(&endpoint), self.keys.get(&rkey)) {
                    (Some(peer), Some(key)) => {
                        let sources = puts.into_iter().map(|(bytes, to)| {
                            let mut regions = self.regions.values();
                            let memory = regions.find(|region| region.holds(&bytes)).cloned();
                            Source { bytes, to, memory }
                        });
                        peer.put(Rc::clone(key), sources.collect(), answer);
                    }
                    _ => tell(answer, Err(UcxError::Stopped)),
                }
            }
        }
    }
}

/// Whoever asked need not be there any more.
fn tell<T>(answer: Answer<T>, said: Result<T, UcxError>) {
    let _ = answer.send(said);
}
