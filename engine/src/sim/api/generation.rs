use baton_types::PromptDigest;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::request::GenerationRequest;
use crate::sim::{
    core::{ChoiceEvent, ChoiceProgress, Handoff, Submission},
    handoff::{BlockHasher, Part, prompt_digest},
    kv_store::mix,
    sampling::Sampling,
    stepper::Command,
};

/// The choices of one request on their way through the engine. Dropping it aborts those that are not
/// at their end.
#[derive(Debug)]
pub(super) struct Generation {
    request: u64,
    commands: UnboundedSender<Command>,
    events: UnboundedReceiver<ChoiceEvent>,
    /// Taken out to look at, and not yet read.
    looked_at: Option<ChoiceEvent>,
    /// Choices that begin when the first one's KV has come: they find it in the prefix cache.
    later: Vec<Submission>,
    open_choices: u32,
}

impl Generation {
    pub(super) fn begin(
        request: u64,
        model: &str,
        asked: &GenerationRequest,
        block_size_tokens: u32,
        commands: &UnboundedSender<Command>,
    ) -> Self {
        let (events_sender, events) = mpsc::unbounded_channel();
        let mut submissions = submissions(request, model, asked, block_size_tokens, &events_sender);
        let open_choices = u32::try_from(submissions.len()).unwrap_or(u32::MAX);
        let consumes = asked.handoff.is_some_and(|(_, part)| part == Part::Consume);
        let later = if consumes { submissions.split_off(1) } else { Vec::new() };
        for submission in submissions {
            // An engine that has ended closes the events, too: that is where it is noticed.
            let _ = commands.send(Command::Submit(submission));
        }
        Self { request, commands: commands.clone(), events, looked_at: None, later, open_choices }
    }

    /// Waits until something has come, and says why the request failed if that is what came.
    pub(super) async fn first(&mut self) -> Result<(), FirstEvent> {
        match self.next().await {
            None => Err(FirstEvent::EngineEnded),
            Some(ChoiceEvent { what: ChoiceProgress::Failed(reason), .. }) => {
                Err(FirstEvent::Failed(reason))
            }
            Some(event) => {
                self.looked_at = Some(event);
                Ok(())
            }
        }
    }

    /// None when the engine has ended.
    pub(super) async fn next(&mut self) -> Option<ChoiceEvent> {
        if let Some(event) = self.looked_at.take() {
            return Some(event);
        }
        let event = self.events.recv().await?;
        for submission in self.later.drain(..) {
            let _ = self.commands.send(Command::Submit(submission));
        }
        Some(event)
    }

    /// A choice has come to its end: by itself, or because what came is enough.
    pub(super) fn end_choice(&mut self, choice: u32, by_itself: bool) {
        self.open_choices = self.open_choices.saturating_sub(1);
        if !by_itself {
            let abort = Command::Abort { request: self.request, choice: Some(choice) };
            let _ = self.commands.send(abort);
        }
    }

    pub(super) fn open_choices(&self) -> u32 {
        self.open_choices
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.open_choices > 0 {
            let _ = self.commands.send(Command::Abort { request: self.request, choice: None });
        }
    }
}

/// What can come in place of a first token.
#[derive(Debug)]
pub(super) enum FirstEvent {
    EngineEnded,
    Failed(String),
}

fn submissions(
    request: u64,
    model: &str,
    asked: &GenerationRequest,
    block_size_tokens: u32,
    events: &UnboundedSender<ChoiceEvent>,
) -> Vec<Submission> {
    let salt_of_request = asked.is_random.then(|| match asked.seed {
        Some(seed) => seed.cast_unsigned(),
        None => uuid::Uuid::new_v4().as_u64_pair().0,
    });
    let mut submissions = Vec::new();
    for (prompt, choices_before) in asked.prompts.iter().zip((0..).step_by(asked.n as usize)) {
        let mut hasher = BlockHasher::new(model, asked.cache_salt.as_deref());
        let full_blocks = prompt.chunks_exact(block_size_tokens as usize);
        let block_hashes: Vec<_> = full_blocks.map(|block| hasher.next(block)).collect();
        for index in 0..asked.n {
            let salt = salt_of_request.map_or(0, |salt| mix(salt, 1)) ^ u64::from(index);
            // Further choices of one prompt have no handoff of their own.
            let handoff = asked.handoff.filter(|_| index == 0).map(|(name, part)| {
                let prompt_digest: PromptDigest =
                    prompt_digest(prompt, asked.cache_salt.as_deref());
                Handoff { name, part, prompt_digest }
            });
            submissions.push(Submission {
                request,
                choice: choices_before + index,
                prompt: prompt.clone(),
                block_hashes: block_hashes.clone(),
                hasher: hasher.clone(),
                sampling: Sampling {
                    salt,
                    ignore_eos: asked.ignore_eos,
                    min_tokens: asked.min_tokens,
                    max_tokens: asked.max_tokens,
                    stop_token_ids: asked.stop_token_ids.clone(),
                },
                handoff,
                events: events.clone(),
            });
        }
    }
    submissions
}
