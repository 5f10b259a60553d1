use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;

use super::{endpoint::Endpoint, prompts::Prompts};
use crate::trace::Trace;

/// How long a stop may take to be noticed.
const NAP: Duration = Duration::from_millis(100);

/// A request whose time has come.
pub(super) struct Due {
    pub(super) index: usize,
    pub(super) at: Instant,
    pub(super) body: Bytes,
}

/// Sends each request of the trace when it is due, counted from `start`, until all are sent, nobody
/// listens, or `stop` is set. Prompts are made one ahead.
///
/// A thread's sleep ends within a tenth of a millisecond; a runtime's timer counts whole ones, and
/// shares its thread with the tokens that come in.
pub(super) fn keep(
    trace: &Trace,
    endpoint: &Endpoint,
    prompts: &Prompts,
    start: Instant,
    due: &UnboundedSender<Due>,
    stop: &Arc<AtomicBool>,
) {
    for (index, request) in trace.requests.iter().enumerate() {
        let body = endpoint.body(prompts, index as u64, request);
        let at = start + request.arrival;
        loop {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(NAP));
        }
        if due.send(Due { index, at, body }).is_err() {
            return;
        }
    }
}
