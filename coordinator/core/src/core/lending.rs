//! The start of a prompt, lent by the worker that has it cached: a job beside those of the request, whose
//! failure costs the request nothing but the copy.

use std::time::Duration;

use baton_types::Leg;

use super::{Core, milliseconds};
use crate::{
    event::Action,
    fleet::WorkerKey,
    placement::PrefixPull,
    request::{Job, JobId, RequestKey, Stage},
};

impl Core {
    pub(super) fn lend(
        &mut self,
        key: RequestKey,
        to: WorkerKey,
        pull: PrefixPull,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let (Some(request), Some(on)) = (self.requests.get_mut(key.0), self.fleet.get(to)) else {
            return;
        };
        let cost_ms =
            |cached_tokens| on.load.prefill_ms(cached_tokens, request.shape.prompt_tokens);
        let saved_ms = cost_ms(request.found.hit_tokens(to)) - cost_ms(pull.tokens);
        let worth = milliseconds(saved_ms / on.load.prefill_rate(&self.settings.targets));
        let job = Job {
            request: key,
            worker: pull.from,
            leg: Leg::Lend,
            // The lender computes one token, which counts for nothing.
            stage: Stage::Holding,
            since: now,
            prompt_tokens: pull.tokens,
            output_tokens: 0,
            work_ms: 0.0,
            is_long: false,
        };
        let id = JobId(self.jobs.insert(job));
        debug_assert!(request.lending.is_none(), "an attempt begins with what another left");
        request.lending = Some(id);
        let (handoff, generation) = (request.handoff.of_pull(), request.generation);
        self.fleet.job_started(&job, now);
        actions.push(Action::Lend {
            job: id,
            request: key,
            to,
            pull,
            id: handoff,
            generation,
            worth,
        });
    }

    /// The lender need keep nothing any more.
    pub(super) fn pull_over(&mut self, id: JobId, now: Duration, actions: &mut Vec<Action>) {
        let Some(&Job { request, leg, .. }) = self.jobs.get(id.0) else { return };
        let lending = self.requests.get(request.0).and_then(|request| request.lending);
        if let Some(lending) = lending.filter(|_| leg != Leg::Lend) {
            self.cancel(lending, now, actions);
        }
    }
}
