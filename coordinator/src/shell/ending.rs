//! A request is over: what is counted, said and kept of it.

use std::time::Instant;

use baton_core::Route;

use super::{Shell, State, client::Client, operators::ended_request};
use crate::{admin::EndedRequest, journal::Ended, metrics::Outcome, spans::Ending};

impl Shell {
    /// What is kept are figures: words are made of them when somebody looks.
    pub(super) fn request_ended(&self, state: &mut State, client: Box<Client>, outcome: Outcome) {
        let ended = Ended {
            request_id: client.request_id.clone(),
            path: client.path(),
            outcome,
            timeline: client.timeline,
            at: Instant::now(),
        };
        self.metrics.requests.ended(ended.path, outcome, ended.at - ended.timeline.arrived);
        if outcome != Outcome::Ok || tracing::enabled!(tracing::Level::DEBUG) {
            client.log_span().in_scope(|| log_end(&ended_request(state, &ended), outcome));
        }
        if let (Some(tracer), Some(trace)) = (&self.tracer, &client.trace) {
            let request = ended_request(state, &ended);
            let relaying = client.relaying.as_ref();
            let reason = match relaying.map(|relaying| relaying.route) {
                Some(Route::Aggregated { reason, .. }) => reason.as_str(),
                _ => "",
            };
            let ending = Ending {
                request: &request,
                model: client.model.as_deref().unwrap_or_default(),
                reason,
                is_error: matches!(
                    outcome,
                    Outcome::ServerError | Outcome::BrokenOff | Outcome::TooSlow
                ),
                status_code: relaying.map_or(0, |relaying| relaying.status.as_u16()),
                at: ended.at,
            };
            tracer.end(trace, &ended.timeline, &ending);
        }
        state.journal.ended(ended);
        self.placement_ended(state, *client, outcome);
    }

    /// What was predicted of it is held against what happened, and its tenant is charged for its
    /// answer.
    fn placement_ended(&self, state: &mut State, mut client: Client, outcome: Outcome) {
        client.placed.last_token = client.last_token();
        let (path, e2e) = (client.path(), client.timeline.arrived.elapsed());
        state.core.answered_tokens(&client.tenant, client.placed.output_tokens);
        if let Some(budget) = &client.budget {
            let decision = client.placed.decisions.last();
            let prompt_tokens = decision.map_or(0, |decision| u64::from(decision.prompt_tokens));
            budget.take(prompt_tokens + client.placed.output_tokens, Instant::now());
        }
        if let Some(placed) = client.placed.decisions.last() {
            self.metrics.placement.prediction(
                client.placed.predicted_ttft().zip(client.placed.first_token),
                placed.itl_ms().zip(client.placed.itl_ms()),
            );
        }
        state.placed.ended(client.request_id, client.placed, path, outcome, e2e);
    }
}

/// A line for each request that did not end well; at `debug` for every one.
fn log_end(ended: &EndedRequest, outcome: Outcome) {
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                path = ended.path,
                outcome = ended.outcome,
                prefill_worker = ended.prefill_worker,
                decode_worker = ended.decode_worker,
                attempts = ended.attempts,
                queue_ms = ended.phases.queue_ms,
                prefill_ms = ended.phases.prefill_ms,
                handoff_ms = ended.phases.handoff_ms,
                decode_ms = ended.phases.decode_ms,
                "request ended"
            )
        };
    }
    match outcome {
        Outcome::Ok => line!(debug),
        _ => line!(info),
    }
}
