use super::{
    kv_store::mix,
    tokenizer::{Form, Tokenizer},
};

const FULL_STOP: u32 = b'.' as u32;

/// What of a request decides which token follows.
#[derive(Clone, Debug, Default)]
pub(super) struct Sampling {
    /// Of each choice of each request without a seed another one; zero where greedy.
    pub(super) salt: u64,
    pub(super) ignore_eos: bool,
    pub(super) min_tokens: u32,
    pub(super) max_tokens: u32,
    pub(super) stop_token_ids: Vec<u32>,
}

/// A token, and the number that it was drawn by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Drawn {
    pub(super) token: u32,
    pub(super) draw: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Length,
    /// The end mark, or the stop token that was asked for.
    Stop {
        token: Option<u32>,
    },
}

impl Sampling {
    /// The next token, from what the sequence's KV comes to and the token before it. Mostly words;
    /// a sentence now and then ends, and about one in twenty ends the answer. How many tokens were
    /// generated before has no part in it: an answer that is resumed elsewhere goes on the same.
    pub(super) fn next(&self, kv: u64, last_token: u32, generated: u32) -> Drawn {
        let tokenizer = Tokenizer::shared();
        let draw = mix(kv, self.salt);
        let after_sentence = last_token == FULL_STOP;
        let may_end = !self.ignore_eos && generated >= self.min_tokens;
        let dice = draw >> 40;
        let token = if after_sentence && may_end && dice.is_multiple_of(20) {
            tokenizer.end()
        } else if !after_sentence && !opens_line(last_token) && dice.is_multiple_of(12) {
            FULL_STOP
        } else {
            tokenizer.word(form_after(last_token), draw)
        };
        Drawn { token, draw }
    }

    /// Whether the token that is the `generated`th ends the answer.
    pub(super) fn finish(&self, token: u32, generated: u32) -> Option<Finish> {
        let may_stop = generated >= self.min_tokens;
        if may_stop && token == Tokenizer::shared().end() && !self.ignore_eos {
            Some(Finish::Stop { token: None })
        } else if may_stop && self.stop_token_ids.contains(&token) {
            Some(Finish::Stop { token: Some(token) })
        } else if generated >= self.max_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }
}

fn opens_line(last_token: u32) -> bool {
    last_token == u32::from(b'\n')
}

fn form_after(last_token: u32) -> Form {
    match last_token {
        FULL_STOP => Form::SpacedCapital,
        last if opens_line(last) => Form::Capital,
        _ => Form::Spaced,
    }
}

/// Logarithms of probabilities that a model might have had: the token's own first, then those of
/// `others` tokens that it might have said instead, each less likely than the one before.
pub(super) fn log_probabilities(drawn: Drawn, others: usize) -> Vec<(u32, f64)> {
    let tokenizer = Tokenizer::shared();
    let unit = |draw: u64| f64::from(u32::try_from(draw >> 32).unwrap_or(0)) / f64::from(u32::MAX);
    let mut draw = drawn.draw;
    let mut logprob = -0.05 - unit(draw);
    let mut all = vec![(drawn.token, logprob)];
    while all.len() <= others {
        draw = mix(draw, all.len() as u64);
        let token = tokenizer.word(Form::Spaced, draw);
        logprob -= 0.05 + unit(draw);
        if all.iter().all(|(known, _)| *known != token) {
            all.push((token, logprob));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(sampling: &Sampling, tokens: u32) -> String {
        let mut last = u32::from(b'\n');
        let mut all = Vec::new();
        for index in 0..tokens {
            last = sampling.next(mix(u64::from(index), 99), last, index).token;
            all.push(last);
        }
        Tokenizer::shared().decode(&all)
    }

    #[test]
    fn answers_read_like_text() {
        let sampling = Sampling { ignore_eos: true, ..Sampling::default() };
        let text = answer(&sampling, 400);
        assert!(text.starts_with(|first: char| first.is_ascii_uppercase()), "{text}");
        let sentences = text.split(". ").count();
        assert!((10..=80).contains(&sentences), "{sentences} sentences: {text}");
        assert!(!text.contains("..") && !text.contains("<|end|>"), "{text}");
    }

    #[test]
    fn an_answer_ends_by_itself_unless_told_otherwise() {
        assert!(answer(&Sampling::default(), 4000).contains("<|end|>"));
        let patient = Sampling { min_tokens: 4000, ..Sampling::default() };
        assert!(!answer(&patient, 4000).contains("<|end|>"));
    }

    #[test]
    fn the_first_reason_to_end_wins() {
        let end = Tokenizer::shared().end();
        let sampling = Sampling {
            max_tokens: 3,
            min_tokens: 2,
            stop_token_ids: vec![300],
            ..Sampling::default()
        };
        assert_eq!(sampling.finish(end, 1), None);
        assert_eq!(sampling.finish(end, 3), Some(Finish::Stop { token: None }));
        assert_eq!(sampling.finish(300, 2), Some(Finish::Stop { token: Some(300) }));
        assert_eq!(sampling.finish(301, 2), None);
        assert_eq!(sampling.finish(301, 3), Some(Finish::Length));
        let deaf = Sampling { ignore_eos: true, max_tokens: 9, ..Sampling::default() };
        assert_eq!(deaf.finish(end, 3), None);
    }

    #[test]
    fn log_probabilities_fall() {
        let all = log_probabilities(Drawn { token: 300, draw: 12345 }, 5);
        assert_eq!((all.len(), all[0].0), (6, 300));
        assert!(all[0].1 < 0.0);
        assert!(all.windows(2).all(|pair| pair[1].1 < pair[0].1));
    }
}
