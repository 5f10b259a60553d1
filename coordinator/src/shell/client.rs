use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use baton_core::{JobId, Route, Tenant};
use http::{HeaderValue, StatusCode};

use super::{
    ForwardedRequest,
    pulls::{PromptIds, Pulling},
};
use crate::{
    client::{Answer, ClientError, TokenBudget, broken_stream_event},
    metrics::{Metrics, Outcome, Path},
    placed::Placed,
    prefixes::CachedPrefix,
    spans::RequestTrace,
    timeline::Timeline,
};

/// One request's side towards its client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) answer: Arc<Answer>,
    /// Kept for another try, until the first answer.
    pub(super) request: Option<ForwardedRequest>,
    /// Of its prompt, as it arrived.
    pub(super) prompt: Option<CachedPrefix>,
    /// Of which a peer can be asked for the start, as long as no worker has answered.
    pub(super) prompt_ids: Option<PromptIds>,
    /// What the worker that prefills is to copy first, as long as it has not said what became of it.
    pub(super) pulling: Option<Pulling>,
    pub(super) request_id: HeaderValue,
    pub(super) streams: bool,
    pub(super) timeline: Timeline,
    pub(super) trace: Option<Box<RequestTrace>>,
    pub(super) model: Option<String>,
    pub(super) relaying: Option<Relaying>,
    pub(super) tenant: Tenant,
    pub(super) budget: Option<Arc<TokenBudget>>,
    pub(super) placed: Placed,
}

#[derive(Debug)]
pub(super) struct Relaying {
    pub(super) job: JobId,
    pub(super) path: Path,
    pub(super) route: Route,
    pub(super) status: StatusCode,
    pub(super) event_stream: bool,
    pub(super) last_tokens: Option<Instant>,
}

impl Client {
    /// What a log line about the request stands in.
    pub(super) fn log_span(&self) -> tracing::Span {
        let request_id = String::from_utf8_lossy(self.request_id.as_bytes());
        tracing::info_span!("request", %request_id)
    }

    /// Something of all that the next tokens touch.
    pub(super) fn at_hand(&self) -> (Option<JobId>, u64, usize) {
        let job = self.relaying.as_ref().map(|relaying| relaying.job);
        (job, self.placed.output_tokens, self.answer.max_unread_bytes())
    }

    pub(super) fn path(&self) -> Path {
        self.relaying.as_ref().map_or(Path::None, |relaying| relaying.path)
    }

    pub(super) fn outcome(&self) -> Outcome {
        match self.relaying.as_ref().map(|relaying| relaying.status) {
            Some(status) if status.is_client_error() => Outcome::ClientError,
            Some(status) if status.is_server_error() => Outcome::ServerError,
            _ => Outcome::Ok,
        }
    }

    /// Answers how long after those before them they came, where somebody could see that.
    pub(super) fn tokens(
        &mut self,
        tokens: u32,
        now: Instant,
        metrics: &Metrics,
    ) -> Option<Duration> {
        let relaying = self.relaying.as_mut().filter(|_| tokens > 0)?;
        metrics.requests.tokens(relaying.path, tokens);
        self.placed.output_tokens += u64::from(tokens);
        // An answer that comes whole has no first token that anybody could see.
        match relaying.last_tokens.filter(|_| relaying.event_stream) {
            Some(last) => {
                let gap = now.duration_since(last);
                metrics.requests.gaps(relaying.path, gap, tokens);
                relaying.last_tokens = Some(now);
                return Some(gap);
            }
            None if relaying.event_stream => {
                let ttft = now.duration_since(self.timeline.arrived);
                metrics.requests.first_token(relaying.path, ttft);
                self.placed.first_token = Some(ttft);
            }
            None => {}
        }
        relaying.last_tokens = Some(now);
        None
    }

    /// When the last tokens came, if anybody could see them come.
    pub(super) fn last_token(&self) -> Option<Duration> {
        let last = self.relaying.as_ref()?.last_tokens?;
        self.placed.first_token?;
        Some(last.duration_since(self.timeline.arrived))
    }

    /// Says `error` in whatever way the answer still allows.
    pub(super) fn break_off(&self, error: &ClientError) {
        match &self.relaying {
            None => {
                let (mut head, body) = error.to_parts();
                head.headers.insert("x-request-id", self.request_id.clone());
                self.answer.begin(head);
                // A fresh answer has room for an error.
                let _ = self.answer.push(&body);
                self.answer.complete();
            }
            Some(relaying) if relaying.event_stream => {
                let _ = self.answer.push(&broken_stream_event());
                self.answer.complete();
            }
            Some(_) => self.answer.break_off(),
        }
    }
}
