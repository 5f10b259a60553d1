//! What this worker's engine exported, until its consumer has it.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use baton_types::{Epoch, Generation, HandoffId, HandoffKey, PromptDigest};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::{
    channel::{ExportStream, Exported, Exports, Refusal, Seal, Subscription, TransferError},
    counters::{LedgerCounters, Tallies},
    lease::{Ending, Handoff, HandoffError, Taken},
};

/// How long a subscription waits for its handoff to be expected here. The two legs of a request
/// start at the same time on two machines, so that either may be the first.
const EARLY_SUBSCRIPTION_WAIT: Duration = Duration::from_secs(2);

/// When a handoff is due of which that is not said: long enough to let all others pass that are, and not for
/// ever.
const UNHURRIED: Duration = Duration::from_secs(10);

/// Handoffs that ended are remembered, so that a late subscription hears why at once.
const REMEMBERED_ENDINGS: usize = 1024;

/// The producer's store of handoffs. The worker fills it from its engine's exports; a channel empties
/// it. Clones share the store.
#[derive(Clone, Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    books: Mutex<Books>,
    /// A handoff was expected, or the epoch changed: early subscriptions look again.
    news: Notify,
    lease: Duration,
    tallies: Tallies,
}

#[derive(Debug)]
struct Books {
    epoch: Epoch,
    compatibility: [u8; 32],
    layer_groups: u32,
    open: HashMap<HandoffId, Entry>,
    ended: Ended,
    next_serial: u64,
}

#[derive(Debug)]
struct Entry {
    handoff: Handoff,
    due: Instant,
    /// Tells this handoff from another of the same id.
    serial: u64,
    /// Something can be taken.
    ready: Arc<Notify>,
    ending: oneshot::Sender<Ending>,
    /// Goes with the entry, which tells the attached consumer's stream.
    attached: Option<oneshot::Sender<Infallible>>,
}

impl Ledger {
    /// `lease` is how long a handoff may stay without anything moving before [`Self::expire`] ends
    /// it.
    pub fn new(our_epoch: Epoch, compatibility_digest: [u8; 32], lease: Duration) -> Self {
        let books = Books {
            epoch: our_epoch,
            compatibility: compatibility_digest,
            layer_groups: 1,
            open: HashMap::new(),
            ended: Ended::default(),
            next_serial: 0,
        };
        let shared = Shared {
            books: Mutex::new(books),
            news: Notify::new(),
            lease,
            tallies: Tallies::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The engine has a new life: every open handoff was of the old one and is void.
    pub fn begin_epoch(&self, epoch: Epoch, compatibility_digest: [u8; 32], layer_groups: u32) {
        let mut books = self.shared.books.lock();
        let void: Vec<_> = books.open.drain().map(|(_, entry)| entry).collect();
        books.ended = Ended::default();
        books.epoch = epoch;
        books.compatibility = compatibility_digest;
        books.layer_groups = layer_groups;
        drop(books);
        for entry in void {
            self.shared.tallies.ended(&Ending::Aborted);
            entry.close(Ending::Aborted);
        }
        self.shared.news.notify_waiters();
    }

    /// The engine's present life.
    pub fn epoch(&self) -> Epoch {
        self.shared.books.lock().epoch
    }

    /// As [`Self::expect_by`], for whom nobody waits in particular.
    pub fn expect(
        &self,
        id: HandoffId,
        generation: Generation,
        consumer_fingerprint: [u8; 32],
    ) -> Result<oneshot::Receiver<Ending>, HandoffError> {
        self.expect_by(Instant::now() + UNHURRIED, id, generation, consumer_fingerprint)
    }

    /// Announces a handoff at the start of its prefill job. An older generation that is still open
    /// is void from here on. Where many share a link, those that are `due` first go first.
    ///
    /// What it returns is told how the handoff ends; it may be dropped. A handoff that ends in
    /// anything but [`Ending::Acked`] before its prefill is through need not be computed any further.
    pub fn expect_by(
        &self,
        due: Instant,
        id: HandoffId,
        generation: Generation,
        consumer_fingerprint: [u8; 32],
    ) -> Result<oneshot::Receiver<Ending>, HandoffError> {
        let (ending, ended) = oneshot::channel();
        let mut books = self.shared.books.lock();
        if let Some(known) = books.newest_generation(id)
            && known >= generation
        {
            return Err(HandoffError::Stale { given: generation, known });
        }
        let superseded = books.open.remove(&id);
        let serial = books.next_serial;
        books.next_serial += 1;
        let key = HandoffKey { epoch: books.epoch, id, generation };
        let (groups, lease) = (books.layer_groups, self.shared.lease);
        let handoff = Handoff::new(key, consumer_fingerprint, groups, lease, Instant::now());
        let ready = Arc::new(Notify::new());
        books.open.insert(id, Entry { handoff, due, serial, ready, ending, attached: None });
        drop(books);
        self.shared.tallies.expected();
        if let Some(entry) = superseded {
            self.shared.tallies.ended(&Ending::Aborted);
            entry.close(Ending::Aborted);
        }
        self.shared.news.notify_waiters();
        Ok(ended)
    }

    /// Adds the next block of a prompt, counted from 0, or of one of its layer groups. Takes its CRC-64/NVME here: from now on its
    /// bytes must not change until `bytes` is dropped, which also tells that they are needed no more.
    #[allow(clippy::needless_pass_by_value)] // The caller's hold on the block ends here.
    pub fn push(
        &self,
        id: HandoffId,
        generation: Generation,
        index: u32,
        bytes: Bytes,
    ) -> Result<(), HandoffError> {
        if u32::try_from(bytes.len()).is_err() {
            return Err(HandoffError::BlockTooLong { bytes: bytes.len() });
        }
        let crc = crc_fast::crc64_nvme(&bytes);
        self.with_open(id, generation, |entry| {
            entry.handoff.push(index, crc, &bytes, Instant::now())?;
            entry.ready.notify_one();
            Ok(())
        })
    }

    /// Says that all blocks of the prompt were pushed.
    pub fn seal(
        &self,
        id: HandoffId,
        generation: Generation,
        prompt_tokens: u32,
        prompt_digest: PromptDigest,
        cached_tokens: u32,
    ) -> Result<(), HandoffError> {
        let seal = Seal { prompt_blocks: 0, prompt_tokens, prompt_digest, cached_tokens };
        let sealed = self.with_open(id, generation, |entry| {
            let sealed = entry.handoff.seal(seal, Instant::now());
            entry.ready.notify_one();
            sealed.map(drop)
        });
        if sealed == Err(HandoffError::WrongPrompt) {
            self.shared.tallies.refused(Refusal::WrongPrompt);
        }
        sealed
    }

    /// Takes a handoff back, if it is still open. Its blocks are freed, and its consumer is told.
    pub fn abort(&self, id: HandoffId, generation: Generation) {
        self.shared.end(id, |entry| entry.handoff.generation() == generation, Ending::Aborted);
    }

    /// Keeps a handoff whose prefill is under way but exports nothing yet.
    pub fn renew(&self, id: HandoffId, generation: Generation) -> Result<(), HandoffError> {
        self.with_open(id, generation, |entry| {
            entry.handoff.renew(Instant::now());
            Ok(())
        })
    }

    /// Ends every handoff whose lease ran out, and answers which. To be called now and then.
    pub fn expire(&self, now: Instant) -> Vec<(HandoffId, Generation)> {
        let mut books = self.shared.books.lock();
        let over: Vec<_> = (books.open.iter())
            .filter(|(_, entry)| entry.handoff.is_expired(now))
            .map(|(id, entry)| (*id, entry.handoff.generation()))
            .collect();
        let entries: Vec<_> =
            over.iter().filter_map(|(id, _)| books.remove(*id, &Ending::Expired)).collect();
        drop(books);
        for entry in entries {
            self.shared.tallies.ended(&Ending::Expired);
            entry.close(Ending::Expired);
        }
        over
    }

    /// Handoffs that have not ended.
    pub fn open_handoffs(&self) -> usize {
        self.shared.books.lock().open.len()
    }

    pub fn counters(&self) -> LedgerCounters {
        self.shared.tallies.snapshot()
    }

    fn with_open<T>(
        &self,
        id: HandoffId,
        generation: Generation,
        act: impl FnOnce(&mut Entry) -> Result<T, HandoffError>,
    ) -> Result<T, HandoffError> {
        let mut books = self.shared.books.lock();
        let entry = books.open.get_mut(&id).ok_or(HandoffError::NotOpen)?;
        let known = entry.handoff.generation();
        if generation < known {
            return Err(HandoffError::Stale { given: generation, known });
        }
        if generation > known {
            return Err(HandoffError::NotOpen);
        }
        act(entry)
    }

    fn try_attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<LedgerStream, Attempt> {
        let key = subscription.handoff;
        // Outlives the lock: an owner of blocks may do what it likes when they are dropped.
        let _unwanted;
        let mut books = self.shared.books.lock();
        if key.epoch != books.epoch {
            return Err(Attempt::Refused(Refusal::WrongEpoch));
        }
        if subscription.compatibility != books.compatibility {
            return Err(Attempt::Refused(Refusal::Incompatible));
        }
        if let Some(ended) = books.ended.get(key.id)
            && ended.generation >= key.generation
        {
            let of_this = ended.generation == key.generation;
            let refusal = if of_this { ended.refusal } else { Refusal::WrongGeneration };
            return Err(Attempt::Refused(refusal));
        }
        let layer_groups = books.layer_groups.max(1);
        let Some(entry) = books.open.get_mut(&key.id) else {
            return Err(Attempt::Early(Refusal::UnknownHandoff));
        };
        if entry.handoff.generation() > key.generation {
            return Err(Attempt::Refused(Refusal::WrongGeneration));
        }
        if entry.handoff.generation() < key.generation {
            return Err(Attempt::Early(Refusal::WrongGeneration));
        }
        _unwanted =
            entry.handoff.attach(subscription, peer, Instant::now()).map_err(Attempt::Refused)?;
        let (attached, revoked) = oneshot::channel();
        entry.attached = Some(attached);
        Ok(LedgerStream {
            shared: Arc::clone(&self.shared),
            id: key.id,
            due: entry.due,
            serial: entry.serial,
            ready: Arc::clone(&entry.ready),
            revoked,
            is_revoked: false,
            layer_groups,
            sent: 0,
            is_finished: false,
        })
    }
}

enum Attempt {
    /// It may still come.
    Early(Refusal),
    Refused(Refusal),
}

#[async_trait]
impl Exports for Ledger {
    async fn attach(
        &self,
        subscription: &Subscription,
        peer: [u8; 32],
    ) -> Result<Box<dyn ExportStream>, Refusal> {
        let deadline = tokio::time::Instant::now() + EARLY_SUBSCRIPTION_WAIT;
        let refusal = loop {
            let mut news = std::pin::pin!(self.shared.news.notified());
            // Listens before it looks, so that what happens in between is not missed.
            news.as_mut().enable();
            match self.try_attach(subscription, peer) {
                Ok(stream) => return Ok(Box::new(stream)),
                Err(Attempt::Refused(refusal)) => break refusal,
                Err(Attempt::Early(refusal)) => {
                    if tokio::time::timeout_at(deadline, news).await.is_err() {
                        break refusal;
                    }
                }
            }
        };
        self.shared.tallies.refused(refusal);
        Err(refusal)
    }
}

impl Shared {
    fn end(&self, id: HandoffId, which: impl FnOnce(&Entry) -> bool, ending: Ending) {
        let mut books = self.books.lock();
        if !books.open.get(&id).is_some_and(which) {
            return;
        }
        let entry = books.remove(id, &ending);
        drop(books);
        if let Some(entry) = entry {
            self.tallies.ended(&ending);
            entry.close(ending);
        }
    }
}

impl Books {
    fn newest_generation(&self, id: HandoffId) -> Option<Generation> {
        let open = self.open.get(&id).map(|entry| entry.handoff.generation());
        open.max(self.ended.get(id).map(|ended| ended.generation))
    }

    fn remove(&mut self, id: HandoffId, ending: &Ending) -> Option<Entry> {
        let entry = self.open.remove(&id)?;
        let refusal = match ending {
            Ending::Acked | Ending::Broken(_) => Refusal::AlreadyTaken,
            Ending::Aborted | Ending::Expired => Refusal::Aborted,
        };
        self.ended.remember(id, EndedHandoff { generation: entry.handoff.generation(), refusal });
        Some(entry)
    }
}

impl Entry {
    /// Frees what was not taken. Called without the lock, for the same reason.
    fn close(self, ending: Ending) {
        let Self { handoff, ending: told, .. } = self;
        drop(handoff);
        // The worker need not listen.
        let _ = told.send(ending);
    }
}

/// Endings of the last while, the oldest forgotten first.
#[derive(Debug, Default)]
struct Ended {
    by_id: HashMap<HandoffId, EndedHandoff>,
    order: VecDeque<HandoffId>,
}

#[derive(Clone, Copy, Debug)]
struct EndedHandoff {
    generation: Generation,
    refusal: Refusal,
}

impl Ended {
    fn get(&self, id: HandoffId) -> Option<EndedHandoff> {
        self.by_id.get(&id).copied()
    }

    fn remember(&mut self, id: HandoffId, ended: EndedHandoff) {
        if self.by_id.insert(id, ended).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > REMEMBERED_ENDINGS
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_id.remove(&oldest);
        }
    }
}

/// An attached consumer's end of one handoff.
#[derive(Debug)]
struct LedgerStream {
    shared: Arc<Shared>,
    id: HandoffId,
    due: Instant,
    serial: u64,
    ready: Arc<Notify>,
    revoked: oneshot::Receiver<Infallible>,
    is_revoked: bool,
    layer_groups: u32,
    /// Blocks of all layer groups.
    sent: u32,
    is_finished: bool,
}

impl LedgerStream {
    fn with_entry<T>(&self, act: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut books = self.shared.books.lock();
        let entry = books.open.get_mut(&self.id)?;
        (entry.serial == self.serial).then(|| act(entry))
    }

    fn end(&self, ending: Ending) {
        self.shared.end(self.id, |entry| entry.serial == self.serial, ending);
    }
}

#[async_trait]
impl ExportStream for LedgerStream {
    async fn next(&mut self) -> Exported {
        loop {
            match self.with_entry(|entry| entry.handoff.take(Instant::now())) {
                None => return Exported::Aborted,
                Some(Taken::Item(item)) => return item,
                Some(Taken::NothingYet) => {}
            }
            let ready = Arc::clone(&self.ready);
            tokio::select! {
                () = ready.notified() => {}
                () = self.revoked() => return Exported::Aborted,
            }
        }
    }

    async fn revoked(&mut self) {
        if !self.is_revoked {
            // Nothing is ever sent: it resolves when the entry is gone.
            let _ = (&mut self.revoked).await;
            self.is_revoked = true;
        }
    }

    fn due(&self) -> Instant {
        self.due
    }

    fn sent(&mut self, bytes: u64) {
        self.sent = self.sent.wrapping_add(1);
        let is_whole = self.sent.is_multiple_of(self.layer_groups);
        self.shared.tallies.sent(u64::from(is_whole), bytes);
        self.with_entry(|entry| entry.handoff.renew(Instant::now()));
    }

    fn finish(mut self: Box<Self>, outcome: Result<(), TransferError>) {
        self.is_finished = true;
        let ending = match outcome {
            Ok(()) => {
                self.with_entry(|entry| entry.handoff.acknowledged()).unwrap_or(Ending::Aborted)
            }
            Err(error) => Ending::Broken(error),
        };
        self.end(ending);
    }
}

impl Drop for LedgerStream {
    fn drop(&mut self) {
        if !self.is_finished {
            let gone = "the consumer's stream is gone".to_owned();
            self.end(Ending::Broken(TransferError::BrokeOff(gone)));
        }
    }
}
