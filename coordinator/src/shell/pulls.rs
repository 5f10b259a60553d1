//! The start of a prompt, copied from one worker's prefix cache into another's before that one computes the
//! rest: what both are told, and what became of it.

use std::time::Duration;

use baton_core::{JobId, RequestKey, WorkerKey};
use baton_proto as wire;
use baton_types::{Generation, HandoffId, Leg};

use super::{Shell, State, client::Client};
use crate::{
    metrics::PullOutcome,
    placed::Pull,
    prompt::{Prompt, PromptContent},
};

/// A prompt whose token ids are known.
#[derive(Clone)]
pub(super) struct PromptIds {
    tokens: Vec<u32>,
    cache_salt: String,
}

impl std::fmt::Debug for PromptIds {
    /// Prompts are not logged.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tokens", self.tokens.len())
    }
}

impl PromptIds {
    pub(super) fn of(prompt: Prompt) -> Option<Self> {
        match prompt.content {
            PromptContent::Tokens(tokens) => Some(Self { tokens, cache_salt: prompt.cache_salt }),
            PromptContent::Bytes(_) => None,
        }
    }
}

/// A copy as it was decided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pulling {
    pub(super) from: WorkerKey,
    pub(super) to: WorkerKey,
    pub(super) tokens: u32,
    pub(super) id: HandoffId,
    pub(super) generation: Generation,
    /// To compute these tokens would take no longer.
    pub(super) worth: Duration,
}

impl State {
    /// What the lender is told. What the puller will be told is kept.
    pub(super) fn lend_job(
        &mut self,
        ttft_target_ms: f64,
        job: JobId,
        request: RequestKey,
        pulling: Pulling,
    ) -> Option<wire::StartJob> {
        let client = self.clients.get_mut(&request)?;
        client.pulling = Some(pulling);
        let (from, tokens) = (pulling.from, pulling.tokens);
        client.placed.pull = Some(Pull::planned(from, tokens));
        let client = self.clients.get(&request)?;
        let mut headers = client.request.as_ref()?.headers.clone();
        if let Some(trace) = &client.trace {
            trace.passed_on(Leg::Lend, &mut headers);
        }
        Some(wire::StartJob {
            job: job.0,
            leg: wire::Leg::Lend.into(),
            headers,
            deadline_ms: client.timeline.due_in_ms(ttft_target_ms),
            pull: Some(self.pull(client, pulling, pulling.to, pulling.from)?),
            ..wire::StartJob::default()
        })
    }

    /// What the puller is told.
    pub(super) fn to_pull(&self, client: &Client, pulling: Pulling) -> Option<wire::PrefixPull> {
        self.pull(client, pulling, pulling.from, pulling.to)
    }

    fn pull(
        &self,
        client: &Client,
        pulling: Pulling,
        peer: WorkerKey,
        told: WorkerKey,
    ) -> Option<wire::PrefixPull> {
        let PromptIds { tokens, cache_salt } = client.prompt_ids.as_ref()?;
        let on = self.links.get(&told)?.peer.as_ref()?;
        let block_tokens = on.compatibility.block_size_tokens.max(1);
        let whole_blocks = (pulling.tokens / block_tokens * block_tokens) as usize;
        Some(wire::PrefixPull {
            handoff: Some(self.handoff(pulling.id, pulling.generation, peer, told)),
            prompt: tokens.get(..=whole_blocks)?.to_vec(),
            model: client.model.clone().unwrap_or_default(),
            cache_salt: cache_salt.clone(),
            give_up_ms: u32::try_from(pulling.worth.as_millis()).unwrap_or(u32::MAX).max(1),
        })
    }
}

impl Shell {
    /// A worker tells what became of what it was to copy.
    pub(super) fn pulled(&self, state: &mut State, request: RequestKey, result: &wire::PullResult) {
        let Some(client) = state.clients.get_mut(&request) else { return };
        // Nobody else has a word to say of it, and nobody says it twice.
        let Some(pulling) = client.pulling.take() else { return };
        let moved = result.handoff.as_ref();
        let outcome = PullOutcome::of(result);
        let took = Duration::from_micros(result.micros);
        let tokens = result.tokens.min(pulling.tokens);
        let bytes = moved.map_or(0, |moved| moved.bytes);
        self.metrics.prefixes.pulled(outcome, tokens, bytes, took);
        match (outcome, moved) {
            (PullOutcome::Failed(_), _) => state.handoffs.failed(pulling.from, pulling.to),
            (_, Some(moved)) => state.handoffs.add(pulling.from, pulling.to, moved),
            (_, None) => {}
        }
        if let Some(pull) = &mut client.placed.pull {
            pull.outcome = Some(outcome.as_str());
            (pull.tokens, pull.bytes, pull.took) = (tokens, bytes, took);
        }
        if let Some(trace) = &mut client.trace {
            trace.pulled(result, outcome.as_str());
        }
    }
}
