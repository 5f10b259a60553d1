use crate::sim::{
    sampling::{Drawn, Finish, log_probabilities},
    tokenizer::Tokenizer,
};

/// Text and tokens of one choice as they come.
#[derive(Debug, Default)]
pub(super) struct Choice {
    text: String,
    sent_bytes: usize,
    pub(super) tokens: u32,
    is_ended: bool,
}

/// What makes an answer end early.
#[derive(Debug)]
pub(super) struct StopStrings {
    stop: Vec<String>,
    longest_bytes: usize,
    include: bool,
    min_tokens: u32,
}

/// What one token adds to its choice.
#[derive(Debug, PartialEq)]
pub(super) struct Delta {
    pub(super) text: String,
    pub(super) drawn: Drawn,
    /// Of the token's own text, in the choice's whole text.
    pub(super) text_offset: usize,
    pub(super) finish: Option<FinishReason>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FinishReason {
    Length,
    Stop(StopReason),
}

/// Of what kind a stop was; the end mark is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StopReason {
    EndMark,
    Token(u32),
    Text(String),
}

impl FinishReason {
    pub(super) fn as_str(&self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Stop(_) => "stop",
        }
    }

    /// As JSON: null, a token id, or a text.
    pub(super) fn stop_reason(&self) -> serde_json::Value {
        match self {
            Self::Stop(StopReason::Token(id)) => (*id).into(),
            Self::Stop(StopReason::Text(text)) => text.as_str().into(),
            Self::Length | Self::Stop(StopReason::EndMark) => serde_json::Value::Null,
        }
    }
}

impl StopStrings {
    pub(super) fn new(stop: Vec<String>, include: bool, min_tokens: u32) -> Self {
        let longest_bytes = stop.iter().map(String::len).max().unwrap_or(0);
        Self { stop, longest_bytes, include, min_tokens }
    }

    /// Bytes at the end of a text that may yet turn out to be the start of a stop string.
    fn held_back_bytes(&self) -> usize {
        if self.include { 0 } else { self.longest_bytes.saturating_sub(1) }
    }
}

impl Choice {
    /// None when the choice had ended before this token.
    pub(super) fn push(
        &mut self,
        drawn: Drawn,
        finish: Option<Finish>,
        stops: &StopStrings,
    ) -> Option<Delta> {
        if self.is_ended {
            return None;
        }
        let tokenizer = Tokenizer::shared();
        let text_offset = self.text.len();
        self.tokens += 1;
        if drawn.token != tokenizer.end() {
            self.text.push_str(&String::from_utf8_lossy(tokenizer.bytes(drawn.token)));
        }
        let finish = match self.find_stop(text_offset, stops) {
            Some((end, stop)) => {
                self.text.truncate(end);
                Some(FinishReason::Stop(StopReason::Text(stop)))
            }
            None => finish.map(|finish| match finish {
                Finish::Length => FinishReason::Length,
                Finish::Stop { token: None } => FinishReason::Stop(StopReason::EndMark),
                Finish::Stop { token: Some(id) } => FinishReason::Stop(StopReason::Token(id)),
            }),
        };
        self.is_ended = finish.is_some();
        let ready = if self.is_ended {
            self.text.len()
        } else {
            self.text.len().saturating_sub(stops.held_back_bytes()).max(self.sent_bytes)
        };
        let ready = self.text.floor_char_boundary(ready);
        let text = self.text.get(self.sent_bytes..ready).unwrap_or_default().to_owned();
        self.sent_bytes = self.sent_bytes.max(ready);
        Some(Delta { text, drawn, text_offset, finish })
    }

    /// Where the text ends if the newest token completed a stop string, and which.
    fn find_stop(&self, new_from: usize, stops: &StopStrings) -> Option<(usize, String)> {
        if self.tokens <= stops.min_tokens {
            return None;
        }
        stops.stop.iter().find_map(|stop| {
            let from = new_from.saturating_sub(stop.len() - 1);
            let from = self.text.floor_char_boundary(from);
            let found = from + self.text[from..].find(stop.as_str())?;
            let end = if stops.include { found + stop.len() } else { found };
            Some((end.max(self.sent_bytes), stop.clone()))
        })
    }
}

/// The log probability of a token, and of those that might have stood in its place.
#[derive(Debug)]
pub(super) struct TokenLogprobs {
    pub(super) token: String,
    pub(super) logprob: f64,
    pub(super) others: Vec<(String, f64)>,
}

impl TokenLogprobs {
    /// `alternatives`, the token itself counted among them.
    pub(super) fn of(drawn: Drawn, alternatives: u32) -> Self {
        let tokenizer = Tokenizer::shared();
        let text = |token: u32| String::from_utf8_lossy(tokenizer.bytes(token)).into_owned();
        let all = log_probabilities(drawn, (alternatives as usize).saturating_sub(1));
        let others = all.iter().take(alternatives as usize);
        Self {
            token: text(drawn.token),
            logprob: all.first().map_or(0.0, |(_, logprob)| *logprob),
            others: others.map(|(token, logprob)| (text(*token), *logprob)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(words: &str, stops: &StopStrings) -> (Vec<String>, Option<FinishReason>) {
        let mut choice = Choice::default();
        let mut finish = None;
        let mut texts = Vec::new();
        let tokens = Tokenizer::shared().encode(words);
        let last = tokens.len() - 1;
        for (index, token) in tokens.into_iter().enumerate() {
            let length = (index == last).then_some(Finish::Length);
            if let Some(delta) = choice.push(Drawn { token, draw: 0 }, length, stops) {
                texts.push(delta.text);
                finish = delta.finish;
            }
        }
        (texts, finish)
    }

    fn stops(stop: &[&str], include: bool) -> StopStrings {
        StopStrings::new(stop.iter().map(|stop| (*stop).to_owned()).collect(), include, 0)
    }

    #[test]
    fn without_stop_strings_each_token_is_sent_at_once() {
        let (texts, finish) = answer(" the river was warm", &stops(&[], false));
        assert_eq!(texts, [" the", " river", " was", " warm"]);
        assert_eq!(finish, Some(FinishReason::Length));
    }

    #[test]
    fn nothing_of_a_stop_string_is_sent() {
        let (texts, finish) = answer(" the river was warm", &stops(&["ver w", "zzz"], false));
        assert_eq!(texts.concat(), " the ri");
        assert_eq!(finish, Some(FinishReason::Stop(StopReason::Text("ver w".into()))));
        let (texts, _) = answer(" the river was warm", &stops(&["ver w"], true));
        assert_eq!(texts.concat(), " the river w");
    }

    #[test]
    fn what_was_held_back_in_vain_is_sent_at_the_end() {
        let (texts, finish) = answer(" the river was warm", &stops(&["warmth"], false));
        assert_eq!(texts.concat(), " the river was warm");
        assert_eq!(finish, Some(FinishReason::Length));
    }
}
