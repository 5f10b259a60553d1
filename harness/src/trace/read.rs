//! From a file to a trace, with every error of the file at once.

use std::{
    io::{self, Read},
    path::Path,
    time::Duration,
};

use flate2::read::MultiGzDecoder;

use super::{PREFIX_BLOCK_TOKENS, Trace, TraceErrors, TraceRequest, csv_formats, jsonl, spread};

/// One line, whatever the format.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) number: u64,
    /// Since whatever the format counts from.
    pub(super) stamp: Duration,
    pub(super) input_tokens: u32,
    pub(super) output_tokens: u32,
    pub(super) prefix_blocks: Box<[u64]>,
    pub(super) phase: Option<String>,
}

/// All lines that could be read, in the order of the file.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) lines: Vec<Line>,
    /// The format rounds its stamps: equal ones may be told apart.
    pub(super) stamps_may_be_quantised: bool,
    /// What the format calls its columns, for what is said about them.
    pub(super) names: Names,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) stamp: &'static str,
    pub(super) input: &'static str,
    pub(super) output: &'static str,
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

fn read_text(path: &Path) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    let mut text = String::new();
    if bytes.starts_with(&GZIP_MAGIC) {
        MultiGzDecoder::new(&bytes[..]).read_to_string(&mut text)?;
    } else {
        text = String::from_utf8(bytes).map_err(io::Error::other)?;
    }
    Ok(text)
}

impl Trace {
    /// Reads a file of any of [these formats](crate::trace), compressed by gzip or not.
    ///
    /// # Errors
    /// Everything that is wrong with the file: lines that are none of the format's, unknown fields,
    /// requests without input or output, time that goes backwards, a file that holds no request.
    pub fn read(path: &Path) -> Result<Self, TraceErrors> {
        match read_text(path) {
            Ok(text) => Self::parse(&text, path),
            Err(error) => {
                let mut errors = TraceErrors::new(path.to_owned());
                errors.whole_file(format!("cannot be read: {error}"));
                Err(errors)
            }
        }
    }

    /// Reads the text of a trace; `path` names the trace, and its errors.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, TraceErrors> {
        let mut errors = TraceErrors::new(path.to_owned());
        let text = text.trim_start_matches('\u{feff}');
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let lines = if first.trim_start().starts_with('{') {
            Some(jsonl::lines(text, &mut errors))
        } else if first.is_empty() {
            errors.whole_file("holds no request");
            None
        } else {
            csv_formats::lines(text, &mut errors)
        };
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let plain = file.strip_suffix(".gz").unwrap_or(&file);
        let name = plain.rsplit_once('.').map_or(plain, |(stem, _)| stem).to_owned();
        let trace = lines.map(|lines| assemble(name, lines, &mut errors)).unwrap_or_default();
        if errors.is_empty() && trace.requests.is_empty() {
            errors.whole_file("holds no request");
        }
        if errors.is_empty() { Ok(trace) } else { Err(errors.in_order()) }
    }
}

fn assemble(name: String, read: Lines, errors: &mut TraceErrors) -> Trace {
    let Lines { lines, stamps_may_be_quantised, names } = read;
    let mut stamps: Vec<Duration> = lines.iter().map(|line| line.stamp).collect();
    if stamps_may_be_quantised && stamps.is_sorted() {
        spread::spread(&mut stamps);
    }
    let start = stamps.first().copied().unwrap_or_default();
    let mut trace = Trace { name, prefix_block_tokens: PREFIX_BLOCK_TOKENS, ..Trace::default() };
    trace.requests.reserve_exact(lines.len());
    let mut before: Option<(u64, Duration)> = None;
    for (line, stamp) in lines.into_iter().zip(stamps) {
        for (what, tokens) in [(names.input, line.input_tokens), (names.output, line.output_tokens)]
        {
            if tokens == 0 {
                errors.at(line.number, format!("{what} is 0: expected at least 1"));
            }
        }
        let blocks = line.input_tokens.div_ceil(PREFIX_BLOCK_TOKENS) as usize;
        if line.prefix_blocks.len() > blocks {
            errors.at(
                line.number,
                format!(
                    "{} hash_ids for {} of {}: expected at most {blocks}, one for each \
                     {PREFIX_BLOCK_TOKENS} tokens",
                    line.prefix_blocks.len(),
                    line.input_tokens,
                    names.input
                ),
            );
        }
        match before {
            Some((number, latest)) if line.stamp < latest => {
                errors.at(
                    line.number,
                    format!(
                        "{} lies before that of line {number}: expected the order of arrival",
                        names.stamp
                    ),
                );
            }
            _ => before = Some((line.number, line.stamp)),
        }
        let phase = line.phase.and_then(|phase| index_of(phase, &mut trace.phases));
        trace.requests.push(TraceRequest {
            arrival: stamp.saturating_sub(start),
            input_tokens: line.input_tokens,
            output_tokens: line.output_tokens,
            prefix_blocks: line.prefix_blocks,
            phase,
        });
    }
    if trace.phases.len() > usize::from(u16::MAX) {
        errors.whole_file(format!("has more than {} phases", u16::MAX));
    }
    trace
}

/// None where there are more phases than can be told apart.
fn index_of(phase: String, phases: &mut Vec<String>) -> Option<u16> {
    // Neighbours are mostly of one phase, and phases are few.
    let index = phases.iter().position(|known| *known == phase).unwrap_or_else(|| {
        if phases.len() <= usize::from(u16::MAX) {
            phases.push(phase);
        }
        phases.len() - 1
    });
    u16::try_from(index).ok()
}
