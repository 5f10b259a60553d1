use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use baton_proto as wire;
use baton_types::Role;
use futures::Stream;
use parking_lot::Mutex;
use tonic::Status;

/// What waits to go down to one worker. Everything that gathered since the last poll goes as one
/// message.
#[derive(Debug, Default)]
pub(crate) struct Link {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    first: Option<wire::coordinator_frame::Frame>,
    commands: wire::Commands,
    closed: bool,
    waiting: Option<Waker>,
}

impl Link {
    pub(crate) fn welcome(welcome: wire::Welcome) -> Arc<Self> {
        let first = wire::coordinator_frame::Frame::Welcome(welcome);
        Arc::new(Self { state: Mutex::new(State { first: Some(first), ..State::default() }) })
    }

    pub(crate) fn refusal(reason: String) -> Arc<Self> {
        let first = wire::coordinator_frame::Frame::Refusal(wire::Refusal { reason });
        let state = State { first: Some(first), closed: true, ..State::default() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    pub(crate) fn start(&self, job: wire::StartJob) {
        self.change(|state| state.commands.start.push(job));
    }

    pub(crate) fn cancel(&self, job: u64) {
        self.change(|state| {
            // One that has not left yet need not leave at all.
            let waiting = state.commands.start.iter().position(|start| start.job == job);
            match waiting {
                Some(at) => drop(state.commands.start.remove(at)),
                None => state.commands.cancel.push(job),
            }
        });
    }

    /// Asks a worker to tell of its prefix cache anew.
    pub(crate) fn restart_kv_events(&self) {
        self.change(|state| state.commands.restart_kv_events = true);
    }

    /// Tells a worker which role it shall have.
    pub(crate) fn set_role(&self, role: Role) {
        self.change(|state| state.commands.set_role = wire::Role::from(role).into());
    }

    /// Lets a worker change its role: nothing more goes there until it has.
    pub(crate) fn release(&self, change: u32) {
        self.change(|state| state.commands.release = change);
    }

    /// Ends the stream of a worker whose place another took, and tells it so.
    pub(crate) fn dismiss(&self, reason: String) {
        self.change(|state| {
            let refusal = wire::coordinator_frame::Frame::Refusal(wire::Refusal { reason });
            *state = State {
                first: Some(refusal),
                closed: true,
                waiting: state.waiting.take(),
                ..State::default()
            };
        });
    }

    /// Ends the stream once what waits has left.
    pub(crate) fn close(&self) {
        self.change(|state| state.closed = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = self.state.lock();
            change(&mut state);
            state.waiting.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The sending half of a worker's stream.
#[derive(Debug)]
pub(crate) struct LinkStream(pub(crate) Arc<Link>);

impl Stream for LinkStream {
    type Item = Result<wire::CoordinatorFrame, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state.lock();
        let frame = state.first.take().or_else(|| {
            let commands = std::mem::take(&mut state.commands);
            let any = commands != wire::Commands::default();
            any.then_some(wire::coordinator_frame::Frame::Commands(commands))
        });
        match frame {
            Some(frame) => Poll::Ready(Some(Ok(wire::CoordinatorFrame { frame: Some(frame) }))),
            None if state.closed => Poll::Ready(None),
            None => {
                state.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;

    fn start(job: u64) -> wire::StartJob {
        wire::StartJob { job, ..wire::StartJob::default() }
    }

    #[tokio::test]
    async fn what_gathers_goes_as_one_message_and_what_was_cancelled_in_time_not_at_all() {
        let link = Link::welcome(wire::Welcome { report_interval_ms: 500, itl_target_ms: 50.0 });
        let mut stream = LinkStream(link.clone());
        let welcome = stream.next().await.unwrap().unwrap().frame.unwrap();
        assert!(matches!(welcome, wire::coordinator_frame::Frame::Welcome(_)));
        assert!(stream.next().now_or_never().is_none());

        link.start(start(1));
        link.start(start(2));
        link.cancel(2);
        link.cancel(9);
        let frame = stream.next().await.unwrap().unwrap().frame.unwrap();
        let wire::coordinator_frame::Frame::Commands(commands) = frame else { panic!("{frame:?}") };
        assert_eq!((commands.start, commands.cancel), (vec![start(1)], vec![9]));

        link.close();
        assert!(stream.next().await.is_none());
    }
}
