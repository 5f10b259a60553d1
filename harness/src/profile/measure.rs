//! Points of a live engine, from outside: how long lone prompts and full batches take.

use std::{
    fmt,
    time::{Duration, Instant},
};

use tokio::task::JoinSet;

use super::{DecodePoint, Points, PrefillPoint};
use crate::{
    bench::{Answer, End, Endpoint, Prompts},
    trace::TraceRequest,
};

/// Steps that every measured batch makes at least with all its sequences.
const STEPS_WANTED: u32 = 24;
/// Output tokens are doubled this often until a batch has its steps.
const DOUBLINGS: u32 = 4;

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Lengths of lone prompts.
    pub prompt_tokens: Vec<u32>,
    /// Sequences that decode together, and the prompt of each.
    pub batches: Vec<(u32, u32)>,
    /// Each prompt so often; the median counts.
    pub repeats: u32,
    /// Prompt plus output never exceed it.
    pub max_model_tokens: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    #[error("the endpoint does not answer a prompt of {tokens} tokens: {reason}")]
    Failed { tokens: u32, reason: String },
    #[error(
        "{sequences} sequences of {tokens} tokens never decoded together for {STEPS_WANTED} steps: \
         their prompts take longer than their answers, give fewer or shorter ones"
    )]
    NeverTogether { sequences: u32, tokens: u32 },
}

/// What is being measured, for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measured {
    Prefill(PrefillPoint),
    Decode(DecodePoint),
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill(point) => {
                write!(f, "prefill of {} tokens: {:.2} ms", point.tokens, point.ms)
            }
            Self::Decode(point) => write!(
                f,
                "decode step of {} sequences, {:.0} tokens of context: {:.2} ms",
                point.sequences, point.context_tokens, point.ms
            ),
        }
    }
}

impl Sweep {
    /// A sweep over what fits `max_model_tokens`, up to `max_sequences` at once.
    pub fn up_to(max_model_tokens: u32, max_sequences: u32) -> Self {
        let output = 2 * STEPS_WANTED;
        let longest = max_model_tokens.saturating_sub(output).max(1);
        let shortest = 16.min(longest);
        // From the shortest to the longest in even steps of their logarithm, and close to the end in
        // even steps of length, where the square counts.
        let mut prompt_tokens = vec![shortest];
        while let Some(last) = prompt_tokens.last().filter(|last| **last < longest) {
            let next = (last * 2).min(last + longest / 4).clamp(last + 1, longest);
            prompt_tokens.push(next);
        }
        let contexts = [shortest, longest / 4, longest / 2];
        let mut sequences = vec![1];
        while let Some(last) = sequences.last().filter(|last| **last < max_sequences) {
            sequences.push((last * 2).min(max_sequences));
        }
        let batches = contexts
            .into_iter()
            .filter(|context| *context > 0)
            .flat_map(|context| sequences.iter().map(move |sequences| (*sequences, context)))
            .collect();
        Self { prompt_tokens, batches, repeats: 3, max_model_tokens }
    }
}

/// Measures `sweep`, one thing after the other: nothing else should use the endpoint meanwhile.
///
/// A prefill takes from the request to its first token, with all that lies between this client and the
/// engine. A decode step takes the mean gap of streams while all of a batch's stream.
///
/// # Errors
/// The first thing that cannot be measured.
pub async fn measure(
    endpoint: &Endpoint,
    prompts: &Prompts,
    sweep: &Sweep,
    mut on_measured: impl FnMut(Measured),
) -> Result<Points, MeasureError> {
    let mut points = Points::default();
    let mut asker = Asker { endpoint, prompts, asked: 0 };
    // The first request of a process pays for much that no other does.
    asker.prefill_ms(sweep.prompt_tokens.first().copied().unwrap_or(1)).await?;
    for tokens in sweep.prompt_tokens.iter().copied() {
        let mut times = Vec::new();
        for _ in 0..sweep.repeats.max(1) {
            times.push(asker.prefill_ms(tokens).await?);
        }
        times.sort_unstable_by(f64::total_cmp);
        let point = PrefillPoint { tokens: f64::from(tokens), ms: times[times.len() / 2] };
        on_measured(Measured::Prefill(point));
        points.prefill.push(point);
    }
    for (sequences, tokens) in sweep.batches.iter().copied() {
        let point = asker.decode(sequences, tokens, sweep.max_model_tokens).await?;
        on_measured(Measured::Decode(point));
        points.decode.push(point);
    }
    Ok(points)
}

struct Asker<'a> {
    endpoint: &'a Endpoint,
    prompts: &'a Prompts,
    /// Prompts so far: each is another.
    asked: u64,
}

impl Asker<'_> {
    async fn prefill_ms(&mut self, tokens: u32) -> Result<f64, MeasureError> {
        self.asked += 1;
        let body = self.endpoint.body(self.prompts, self.asked, &request(tokens, 1));
        let start = Instant::now();
        let answer = self.endpoint.ask(body, || ()).await;
        let first = completed(&answer, tokens)?;
        Ok(first.saturating_duration_since(start).as_secs_f64() * 1000.0)
    }

    async fn decode(
        &mut self,
        sequences: u32,
        tokens: u32,
        max_model_tokens: u32,
    ) -> Result<DecodePoint, MeasureError> {
        let first = self.asked + 1;
        self.asked += u64::from(sequences);
        let room = max_model_tokens.saturating_sub(tokens);
        // Where there is a prefix cache, the batch starts together.
        self.batch(first, sequences, tokens, 1).await?;
        for doubling in 0..=DOUBLINGS {
            let output = ((2 * STEPS_WANTED) << doubling).min(room);
            let streams = self.batch(first, sequences, tokens, output).await?;
            if let Some(point) = together(&streams, tokens) {
                return Ok(point);
            }
            if output == room {
                break;
            }
        }
        Err(MeasureError::NeverTogether { sequences, tokens })
    }

    /// The same prompts for the same `first`.
    async fn batch(
        &self,
        first: u64,
        sequences: u32,
        tokens: u32,
        output: u32,
    ) -> Result<Vec<Answer>, MeasureError> {
        let mut in_flight = JoinSet::new();
        for index in first..first + u64::from(sequences) {
            let body = self.endpoint.body(self.prompts, index, &request(tokens, output));
            let endpoint = self.endpoint.clone();
            in_flight.spawn(async move { endpoint.ask(body, || ()).await });
        }
        let answers = in_flight.join_all().await;
        for answer in &answers {
            completed(answer, tokens)?;
        }
        Ok(answers)
    }
}

fn request(input_tokens: u32, output_tokens: u32) -> TraceRequest {
    TraceRequest { input_tokens, output_tokens, ..TraceRequest::default() }
}

fn completed(answer: &Answer, tokens: u32) -> Result<Instant, MeasureError> {
    match (&answer.end, answer.first()) {
        (End::Complete, Some(first)) => Ok(first),
        (End::Complete, None) => {
            Err(MeasureError::Failed { tokens, reason: "an answer of no token".to_owned() })
        }
        (End::Refused(reason) | End::BrokeOff(reason), _) => {
            Err(MeasureError::Failed { tokens, reason: reason.clone() })
        }
    }
}

/// The step while all streams run; none where that is too short.
fn together(streams: &[Answer], prompt_tokens: u32) -> Option<DecodePoint> {
    let from = streams.iter().filter_map(Answer::first).max()?;
    let to = streams.iter().filter_map(Answer::last).min()?;
    let mut context_tokens = 0.0;
    let (mut steps, mut spent) = (0_u32, Duration::ZERO);
    for stream in streams {
        let inside = |at: &&(Instant, u32)| (from..=to).contains(&at.0);
        let mut arrivals = stream.arrivals.iter().filter(inside);
        let (first, before) = arrivals.next()?;
        let (last, after) = arrivals.next_back()?;
        steps += after - before;
        spent += *last - *first;
        // Of the steps between the two.
        context_tokens += f64::from(prompt_tokens) + f64::from(before + after - 1) / 2.0;
    }
    let sequences = f64::from(u32::try_from(streams.len()).ok()?);
    if f64::from(steps) < f64::from(STEPS_WANTED) * sequences / 2.0 {
        return None;
    }
    let ms = spent.as_secs_f64() * 1000.0 / f64::from(steps);
    Some(DecodePoint { sequences, context_tokens, ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of which one token comes at each of these times.
    fn stream(start: Instant, at_ms: impl Iterator<Item = u64>) -> Answer {
        let at = at_ms.map(|ms| start + Duration::from_millis(ms));
        Answer {
            arrivals: at.zip(1..).collect(),
            prompt_tokens: None,
            cached_tokens: 0,
            disaggregated: false,
            end: End::Complete,
        }
    }

    #[test]
    fn a_step_is_measured_while_all_decode() {
        let start = Instant::now();
        // Alone the first has a token each 10 ms; from 200 ms on both have one each 14 ms.
        let first = (0..20).map(|n| n * 10).chain((0..40).map(|n| 200 + n * 14));
        let second = (0..40).map(|n| 200 + n * 14);
        let point = together(&[stream(start, first), stream(start, second)], 100).unwrap();
        assert!((point.ms - 14.0).abs() < 1e-9, "{point:?}");
        // The first is 20 tokens ahead; in the mean each has 20 more than at first.
        assert!((point.context_tokens - (200.0 + 20.0 + 40.0)).abs() < 2.0, "{point:?}");
    }

    #[test]
    fn streams_that_hardly_meet_tell_nothing() {
        let start = Instant::now();
        let streams = [stream(start, 0..30), stream(start, 25..55)];
        assert_eq!(together(&streams, 100), None);
        assert_eq!(together(&[stream(start, 0..1)], 100), None);
    }

    #[test]
    fn a_sweep_stays_within_the_model() {
        for (max_model_tokens, max_sequences) in [(128, 2), (2048, 8), (32_768, 100)] {
            let sweep = Sweep::up_to(max_model_tokens, max_sequences);
            assert!(sweep.prompt_tokens.len() >= 4, "{sweep:?}");
            assert!(sweep.prompt_tokens.is_sorted_by(|a, b| a < b));
            assert!(sweep.prompt_tokens.iter().all(|tokens| *tokens < max_model_tokens));
            assert!(
                sweep.batches.iter().all(|(_, tokens)| tokens + STEPS_WANTED < max_model_tokens)
            );
            assert_eq!(
                sweep.batches.iter().map(|(sequences, _)| *sequences).max(),
                Some(max_sequences)
            );
        }
    }
}
