use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use baton_proto::{
    Event, EventBatch, Hello, KvEvents, Leaving, Report, WorkerFrame, worker_frame::Frame,
};
use futures::Stream;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, Sleep},
};

/// Tokens in the middle of a stream wait until the last batch is at least this old. It is what makes
/// batches: a third to a quarter of the coordinator's CPU, and nobody sees a millisecond between tokens.
const SHORTEST_PACE: Duration = Duration::from_millis(1);
/// Those of slow streams wait longer, up to this: a thousand of them fill their batches no sooner.
const LONGEST_PACE: Duration = Duration::from_millis(4);
/// So small a part of the time since its stream's tokens before it a token is held back.
const PART_OF_GAP: u32 = 32;

/// With more than this waiting for the coordinator, jobs read no more from their engines.
const FULL_BYTES: usize = 64 << 20;

/// A batch is drained whole up to this size: the receiver's limit on one message is larger.
const BATCH_BYTES: usize = 4 << 20;

/// What one event costs beside its payload.
const EVENT_BYTES: usize = 64;

/// Whether somebody waits for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// First and last events of a job, and faults: sent at once.
    AtOnce,
    /// Tokens in the middle of a stream: sent together with others, once the last batch is this old.
    Within(Duration),
}

impl Pace {
    /// Of tokens that came so long after those before them.
    pub(crate) fn after(gap: Duration) -> Self {
        Self::Within((gap / PART_OF_GAP).clamp(SHORTEST_PACE, LONGEST_PACE))
    }
}

/// The events of all jobs towards one coordinator, until its stream takes them.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The outbox is no longer full, or it was closed.
    room: Notify,
    /// The news of the prefix cache left.
    kv_events_left: Notify,
}

#[derive(Debug)]
struct State {
    hello: Option<Hello>,
    events: Vec<Event>,
    report: Option<Report>,
    leaving: bool,
    kv_events: Option<KvEvents>,
    held_bytes: usize,
    /// The shortest of the events' paces; nothing where one goes at once.
    pace: Duration,
    last_batch: Option<Instant>,
    /// The pace by which the reader has a timer running: only what cannot wait so long need wake it.
    timed: Option<Duration>,
    reader: Option<Waker>,
    closed: bool,
}

impl Outbox {
    /// The outbox, and the frames that its stream sends: first the hello.
    pub(crate) fn open(hello: Hello) -> (Self, Frames) {
        let state = State {
            hello: Some(hello),
            events: Vec::new(),
            report: None,
            leaving: false,
            kv_events: None,
            held_bytes: 0,
            pace: LONGEST_PACE,
            last_batch: None,
            timed: None,
            reader: None,
            closed: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            room: Notify::new(),
            kv_events_left: Notify::new(),
        });
        (Self { shared: shared.clone() }, Frames { shared, timer: None })
    }

    pub(crate) fn push(&self, event: Event, pace: Pace) {
        let mut state = self.shared.state.lock();
        if state.closed {
            return; // Nobody will hear of it: the jobs of a lost stream are about to be cancelled.
        }
        state.held_bytes += cost(&event);
        state.events.push(event);
        state.pace = state.pace.min(match pace {
            Pace::AtOnce => Duration::ZERO,
            Pace::Within(pace) => pace,
        });
        if state.timed.is_none_or(|timed| state.pace < timed) {
            state.wake();
        }
    }

    /// Replaces a report that was not sent yet.
    pub(crate) fn report(&self, report: Report) {
        let mut state = self.shared.state.lock();
        state.report = Some(report);
        state.wake();
    }

    /// Tells the coordinator that this worker takes nothing new.
    pub(crate) fn leaving(&self) {
        let mut state = self.shared.state.lock();
        state.leaving = true;
        state.wake();
    }

    /// Waits until there is room for news of the prefix cache: one message at a time, so that what
    /// gathers meanwhile goes together.
    pub(crate) async fn kv_events_room(&self) {
        loop {
            let left = self.shared.kv_events_left.notified();
            if self.shared.state.lock().kv_events.is_none() {
                return;
            }
            left.await;
        }
    }

    /// To be called when there is room.
    pub(crate) fn kv_events(&self, kv_events: KvEvents) {
        let mut state = self.shared.state.lock();
        state.kv_events = Some(kv_events);
        state.wake();
    }

    /// Waits until the coordinator has taken enough of what it was sent.
    pub(crate) async fn room(&self) {
        loop {
            let room = self.shared.room.notified();
            {
                let state = self.shared.state.lock();
                if state.held_bytes < FULL_BYTES || state.closed {
                    return;
                }
            }
            room.await;
        }
    }

    /// Ends the stream; what was not sent yet is dropped.
    pub(crate) fn close(&self) {
        self.shared.close();
    }
}

impl Shared {
    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.events = Vec::new();
        state.wake();
        self.room.notify_waiters();
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn take_batch(&mut self) -> EventBatch {
        let mut bytes = 0;
        let fitting = self.events.iter().take_while(|event| {
            let first = bytes == 0;
            bytes += cost(event);
            first || bytes <= BATCH_BYTES
        });
        let count = fitting.count();
        let events = if count == self.events.len() {
            // As many will come again.
            let room = Vec::with_capacity(count);
            std::mem::replace(&mut self.events, room)
        } else {
            self.events.drain(..count).collect()
        };
        self.held_bytes = self.events.iter().map(cost).sum();
        if self.events.is_empty() {
            self.pace = LONGEST_PACE;
        }
        EventBatch { events }
    }
}

fn cost(event: &Event) -> usize {
    event.payload.len() + event.engine_handoff_params.len() + EVENT_BYTES
}

/// The frames towards the coordinator, as its stream takes them.
#[derive(Debug)]
pub(crate) struct Frames {
    shared: Arc<Shared>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream for Frames {
    type Item = WorkerFrame;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<WorkerFrame>> {
        let this = &mut *self;
        let mut state = this.shared.state.lock();
        if state.closed {
            return Poll::Ready(None);
        }
        let frame = |frame| Poll::Ready(Some(WorkerFrame { frame: Some(frame) }));
        if let Some(hello) = state.hello.take() {
            return frame(Frame::Hello(hello));
        }
        state.timed = None;
        if !state.events.is_empty() {
            let due = state.last_batch.map(|last| last + state.pace);
            if is_due(due, &mut this.timer, cx) {
                state.last_batch = Some(Instant::now());
                let was_full = state.held_bytes >= FULL_BYTES;
                let batch = state.take_batch();
                if was_full && state.held_bytes < FULL_BYTES {
                    this.shared.room.notify_waiters();
                }
                return frame(Frame::Events(batch));
            }
            state.timed = Some(state.pace);
        }
        if std::mem::take(&mut state.leaving) {
            return frame(Frame::Leaving(Leaving {}));
        }
        if let Some(report) = state.report.take() {
            return frame(Frame::Report(report));
        }
        if let Some(kv_events) = state.kv_events.take() {
            this.shared.kv_events_left.notify_waiters();
            return frame(Frame::KvEvents(kv_events));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Whether `due` has come; if not, the timer will wake the reader.
fn is_due(due: Option<Instant>, timer: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> bool {
    let Some(due) = due else { return true };
    if due <= Instant::now() {
        return true;
    }
    let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
    if timer.deadline() != due {
        timer.as_mut().reset(due);
    }
    timer.as_mut().poll(cx).is_ready()
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::StreamExt;

    use super::*;

    /// As fast streams are.
    const PACED: Pace = Pace::Within(SHORTEST_PACE);

    fn event(job: u64) -> Event {
        Event { job, payload: Bytes::from_static(b"x"), ..Event::default() }
    }

    async fn greeted() -> (Outbox, Frames) {
        let (outbox, mut frames) = Outbox::open(Hello::default());
        assert!(matches!(next(&mut frames), Some(Frame::Hello(_))));
        (outbox, frames)
    }

    fn next(frames: &mut Frames) -> Option<Frame> {
        let mut cx = Context::from_waker(Waker::noop());
        match frames.poll_next_unpin(&mut cx) {
            Poll::Pending => None,
            Poll::Ready(frame) => Some(frame.unwrap().frame.unwrap()),
        }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn jobs(frame: Option<Frame>) -> Vec<u64> {
        match frame {
            Some(Frame::Events(batch)) => batch.events.iter().map(|event| event.job).collect(),
            None => Vec::new(),
            Some(other) => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn mid_stream_tokens_go_at_once_only_after_a_quiet_millisecond() {
        let (outbox, mut frames) = greeted().await;
        outbox.push(event(1), PACED);
        assert_eq!(jobs(next(&mut frames)), [1], "nothing was sent yet");

        outbox.push(event(1), PACED);
        outbox.push(event(2), PACED);
        assert_eq!(jobs(next(&mut frames)), [0; 0]);
        tokio::time::advance(Duration::from_micros(900)).await;
        assert_eq!(jobs(next(&mut frames)), [0; 0]);
        tokio::time::advance(Duration::from_micros(200)).await;
        assert_eq!(jobs(next(&mut frames)), [1, 2]);

        tokio::time::advance(Duration::from_millis(5)).await;
        outbox.push(event(3), PACED);
        assert_eq!(jobs(next(&mut frames)), [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_wait_a_small_part_of_their_streams_own_gaps() {
        let milliseconds = |pace| match pace {
            Pace::AtOnce => 0,
            Pace::Within(pace) => pace.as_millis(),
        };
        let paces = [0, 10, 96, 10_000].map(|gap| milliseconds(Pace::after(ms(gap))));
        assert_eq!(paces, [1, 1, 3, 4]);

        let (outbox, mut frames) = greeted().await;
        outbox.push(event(0), Pace::AtOnce);
        assert_eq!(jobs(next(&mut frames)), [0]);
        outbox.push(event(1), Pace::after(ms(96)));
        tokio::time::advance(ms(2)).await;
        assert_eq!(jobs(next(&mut frames)), [0; 0]);
        tokio::time::advance(ms(1)).await;
        assert_eq!(jobs(next(&mut frames)), [1]);

        outbox.push(event(1), Pace::after(ms(96)));
        assert_eq!(jobs(next(&mut frames)), [0; 0]);
        outbox.push(event(2), PACED);
        tokio::time::advance(ms(1)).await;
        assert_eq!(jobs(next(&mut frames)), [1, 2], "the fast stream's pace holds for both");
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_wait_takes_all_the_others_along() {
        let (outbox, mut frames) = greeted().await;
        outbox.push(event(1), Pace::AtOnce);
        assert_eq!(jobs(next(&mut frames)), [1]);
        outbox.push(event(2), PACED);
        assert_eq!(jobs(next(&mut frames)), [0; 0]);
        outbox.push(event(3), Pace::AtOnce);
        assert_eq!(jobs(next(&mut frames)), [2, 3]);
        outbox.push(event(4), PACED);
        assert_eq!(jobs(next(&mut frames)), [0; 0], "being urgent was not remembered");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_sleeps_is_woken_by_the_pace_or_by_haste() {
        let (outbox, mut frames) = greeted().await;
        outbox.push(event(0), Pace::AtOnce);
        assert_eq!(jobs(next(&mut frames)), [0]);
        for pace in [PACED, Pace::AtOnce] {
            let pushing = {
                let outbox = outbox.clone();
                tokio::spawn(async move { outbox.push(event(1), pace) })
            };
            let frame = frames.next().await.unwrap().frame;
            assert_eq!(jobs(frame), [1]);
            pushing.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_full_outbox_holds_its_jobs_back_until_it_is_read() {
        let (outbox, mut frames) = greeted().await;
        let large = Bytes::from(vec![0; FULL_BYTES / 8]);
        for job in 0..8 {
            outbox.room().await;
            outbox.push(Event { payload: large.clone(), ..event(job) }, Pace::AtOnce);
        }
        let mut waiting = Box::pin(outbox.room());
        assert!(futures::poll!(&mut waiting).is_pending());
        assert_eq!(jobs(next(&mut frames)), [0], "a batch has its limit");
        assert!(futures::poll!(&mut waiting).is_ready());
        assert_eq!(jobs(next(&mut frames)), [1], "the rest is not delayed");
    }

    #[tokio::test]
    async fn a_closed_outbox_ends_its_stream_and_frees_who_waits() {
        let (outbox, mut frames) = greeted().await;
        outbox.push(Event { payload: vec![0; FULL_BYTES].into(), ..event(1) }, Pace::AtOnce);
        let mut waiting = Box::pin(outbox.room());
        assert!(futures::poll!(&mut waiting).is_pending());
        outbox.close();
        assert!(futures::poll!(&mut waiting).is_ready());
        assert!(frames.next().await.is_none());

        let (outbox, frames) = greeted().await;
        drop(frames);
        outbox.push(event(1), Pace::AtOnce);
        assert!(outbox.shared.state.lock().events.is_empty());
    }

    #[tokio::test]
    async fn the_newest_report_is_sent() {
        let (outbox, mut frames) = greeted().await;
        outbox.report(Report { jobs_running: 1, ..Report::default() });
        outbox.report(Report { jobs_running: 2, ..Report::default() });
        assert!(
            matches!(next(&mut frames), Some(Frame::Report(report)) if report.jobs_running == 2)
        );
        assert!(next(&mut frames).is_none());
    }
}
