//! Answers as server-sent events: one chunk of the body for each token, written by hand around the
//! parts that do not change.

use std::fmt::Write;

use bytes::Bytes;
use futures::{Stream, stream};

use super::{
    AnswerHead,
    choice::{Choice, Delta, StopStrings, TokenLogprobs},
    generation::Generation,
    request::{GenerationRequest, Surface},
    whole::{Usage, chat_logprobs, completion_logprobs},
};
use crate::{
    contract::EngineError,
    sim::core::{ChoiceEvent, ChoiceProgress},
};

#[derive(Debug)]
struct EventStream {
    asked: GenerationRequest,
    generation: Generation,
    choices: Vec<Choice>,
    stops: StopStrings,
    /// `data: {"id":…` up to the first choice.
    opening: String,
    is_opened: bool,
    is_ended: bool,
}

/// Chunks of the answer's body; each holds whole events.
pub(super) fn events(
    mut asked: GenerationRequest,
    generation: Generation,
    head: &AnswerHead,
) -> impl Stream<Item = Result<Bytes, EngineError>> + Send + 'static {
    let object = match asked.surface {
        Surface::Chat => "chat.completion.chunk",
        Surface::Completion => "text_completion",
    };
    let opening = format!(
        r#"data: {{"id":{},"object":"{object}","created":{},"model":{},"choices":["#,
        json(&head.id),
        head.created,
        json(&head.model),
    );
    let stops =
        StopStrings::new(std::mem::take(&mut asked.stop), asked.include_stop, asked.min_tokens);
    let choices = (0..generation.open_choices()).map(|_| Choice::default()).collect();
    let events = EventStream {
        asked,
        generation,
        choices,
        stops,
        opening,
        is_opened: false,
        is_ended: false,
    };
    stream::unfold(events, |mut events| async move {
        let chunk = events.next_chunk().await?;
        Some((chunk, events))
    })
}

impl EventStream {
    async fn next_chunk(&mut self) -> Option<Result<Bytes, EngineError>> {
        while !self.is_ended {
            match self.generation.next().await {
                Some(ChoiceEvent { choice, what: ChoiceProgress::Token { drawn, finish } }) => {
                    let progress = self.choices.get_mut(choice as usize);
                    let delta = progress.and_then(|of| of.push(drawn, finish, &self.stops));
                    let Some(delta) = delta else { continue };
                    if delta.finish.is_some() {
                        self.generation.end_choice(choice, finish.is_some());
                    }
                    return Some(Ok(Bytes::from(self.chunk(choice, &delta))));
                }
                Some(ChoiceEvent { what: ChoiceProgress::Failed(reason), .. }) => {
                    self.is_ended = true;
                    return Some(Err(EngineError::BrokeOff(reason)));
                }
                None => {
                    self.is_ended = true;
                    return Some(Err(EngineError::Ended("in the middle of an answer".to_owned())));
                }
            }
        }
        None
    }

    fn chunk(&mut self, choice: u32, delta: &Delta) -> String {
        let mut chunk = String::with_capacity(self.opening.len() + 160);
        if !self.is_opened && self.asked.surface == Surface::Chat {
            for index in 0..self.choices.len() {
                chunk.push_str(&self.opening);
                let _ = write!(
                    chunk,
                    r#"{{"index":{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],"prompt_token_ids":{}}}"#,
                    self.prompt_token_ids(0),
                );
                chunk.push_str("\n\n");
            }
        }
        chunk.push_str(&self.opening);
        match self.asked.surface {
            Surface::Chat => self.chat_choice(&mut chunk, choice, delta),
            Surface::Completion => self.completion_choice(&mut chunk, choice, delta),
        }
        chunk.push_str("]}\n\n");
        self.is_opened = true;
        if self.generation.open_choices() == 0 {
            self.is_ended = true;
            if self.asked.include_usage {
                chunk.push_str(&self.opening);
                let usage = Usage::new(&self.asked, &self.choices);
                let Usage { prompt_tokens, total_tokens, completion_tokens, .. } = usage;
                let _ = write!(
                    chunk,
                    r#"],"usage":{{"prompt_tokens":{prompt_tokens},"total_tokens":{total_tokens},"completion_tokens":{completion_tokens}}}}}"#,
                );
                chunk.push_str("\n\n");
            }
            chunk.push_str("data: [DONE]\n\n");
        }
        chunk
    }

    fn chat_choice(&self, chunk: &mut String, choice: u32, delta: &Delta) {
        let content = json(&delta.text);
        let logprobs = self.asked.logprobs.map_or_else(null, |alternatives| {
            json(&chat_logprobs(&[TokenLogprobs::of(delta.drawn, alternatives)]))
        });
        let _ = write!(
            chunk,
            r#"{{"index":{choice},"delta":{{"content":{content}}},"logprobs":{logprobs},"#,
        );
        match &delta.finish {
            None => chunk.push_str(r#""finish_reason":null,"#),
            Some(finish) => {
                let (reason, stop) = (finish.as_str(), finish.stop_reason());
                let _ = write!(chunk, r#""finish_reason":"{reason}","stop_reason":{stop},"#);
            }
        }
        let _ = write!(chunk, r#""token_ids":{}}}"#, self.token_ids(delta));
    }

    fn completion_choice(&self, chunk: &mut String, choice: u32, delta: &Delta) {
        let text = json(&delta.text);
        let logprobs = self.asked.logprobs.map_or_else(null, |alternatives| {
            let logprobs = TokenLogprobs::of(delta.drawn, alternatives);
            json(&completion_logprobs(&[logprobs], delta.text_offset))
        });
        let reason = delta.finish.as_ref().map_or_else(null, |finish| json(finish.as_str()));
        let stop = delta.finish.as_ref().map_or_else(null, |finish| json(&finish.stop_reason()));
        let is_first = self.choices.get(choice as usize).is_some_and(|of| of.tokens == 1);
        let prompt = choice / self.asked.n;
        let prompt_ids = if is_first { self.prompt_token_ids(prompt as usize) } else { null() };
        let _ = write!(
            chunk,
            r#"{{"index":{choice},"text":{text},"logprobs":{logprobs},"finish_reason":{reason},"stop_reason":{stop},"prompt_token_ids":{prompt_ids},"token_ids":{}}}"#,
            self.token_ids(delta),
        );
    }

    fn token_ids(&self, delta: &Delta) -> String {
        if self.asked.return_token_ids { format!("[{}]", delta.drawn.token) } else { null() }
    }

    fn prompt_token_ids(&self, prompt: usize) -> String {
        match self.asked.prompts.get(prompt) {
            Some(ids) if self.asked.return_token_ids => json(ids),
            _ => null(),
        }
    }
}

fn null() -> String {
    "null".to_owned()
}

fn json<T: serde::Serialize + ?Sized>(value: &T) -> String {
    // Texts, numbers and our own structs of them can always be written.
    serde_json::to_string(value).unwrap_or_else(|_| null())
}
