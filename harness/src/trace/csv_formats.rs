//! Azure's and BurstGPT's CSV files.

use std::time::Duration;

use csv::{ReaderBuilder, StringRecord, Trim};
use time::{PrimitiveDateTime, format_description::FormatItem, macros::format_description};

use super::{
    TraceErrors,
    read::{Line, Lines, Names},
};

const AZURE: Names =
    Names { stamp: "TIMESTAMP", input: "ContextTokens", output: "GeneratedTokens" };
const BURST_GPT: Names =
    Names { stamp: "Timestamp", input: "Request tokens", output: "Response tokens" };
/// Columns that BurstGPT's files have besides; nothing of them is needed.
const BURST_GPT_BESIDES: [&str; 5] =
    ["Model", "Total tokens", "Log Type", "Session ID", "Elapsed time"];

/// Azure's files of 2024 name their zone, always UTC.
const DATE_AND_TIME: &[FormatItem<'_>] = format_description!(
    version = 2,
    "[year]-[month]-[day] [hour]:[minute]:[second][optional [.[subsecond]]][optional [+00:00]]"
);

/// Places of the columns in a record.
struct Columns {
    names: Names,
    stamp: usize,
    input: usize,
    output: usize,
}

/// None, and an error, where the header is of no format.
pub(super) fn lines(text: &str, errors: &mut TraceErrors) -> Option<Lines> {
    let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(text.as_bytes());
    let columns = match reader.headers().map(columns) {
        Ok(Ok(columns)) => columns,
        Ok(Err(reason)) => {
            errors.at(1, reason);
            return None;
        }
        Err(error) => {
            errors.at(1, error.to_string());
            return None;
        }
    };
    let is_azure = columns.names.stamp == AZURE.stamp;
    let mut lines = Vec::new();
    let mut all_whole_seconds = true;
    let mut line_numbers = LineNumbers { text: text.as_bytes(), byte: 0, line: 1 };
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let number = line_numbers.at(error.position());
                errors.at(number, reason_of(&error));
                continue;
            }
        };
        let number = line_numbers.at(record.position());
        let field = |at: usize| record.get(at).unwrap_or_default();
        let stamp = if is_azure { date_and_time } else { seconds };
        let read = (
            stamp(columns.names.stamp, field(columns.stamp)),
            tokens(columns.names.input, field(columns.input)),
            tokens(columns.names.output, field(columns.output)),
        );
        match read {
            (Ok(stamp), Ok(input_tokens), Ok(output_tokens)) => {
                all_whole_seconds &= stamp.subsec_nanos() == 0;
                lines.push(Line {
                    number,
                    stamp,
                    input_tokens,
                    output_tokens,
                    prefix_blocks: Box::default(),
                    phase: None,
                });
            }
            (stamp, input, output) => {
                for reason in [stamp.err(), input.err(), output.err()].into_iter().flatten() {
                    errors.at(number, reason);
                }
            }
        }
    }
    let stamps_may_be_quantised = !is_azure && all_whole_seconds;
    Some(Lines { lines, stamps_may_be_quantised, names: columns.names })
}

/// The csv crate counts a record's line from the end of the one before: wrong after an empty line, or
/// where lines end in CR LF.
struct LineNumbers<'a> {
    text: &'a [u8],
    /// Where `line` was counted to.
    byte: usize,
    line: u64,
}

impl LineNumbers<'_> {
    /// Positions come in order.
    fn at(&mut self, position: Option<&csv::Position>) -> u64 {
        let start = position.and_then(|at| usize::try_from(at.byte()).ok()).unwrap_or(self.byte);
        while let Some(byte) = self.text.get(self.byte)
            && (self.byte < start || matches!(byte, b'\r' | b'\n'))
        {
            self.line += u64::from(*byte == b'\n');
            self.byte += 1;
        }
        self.line
    }
}

fn columns(header: &StringRecord) -> Result<Columns, String> {
    let place = |name: &str| header.iter().position(|column| column == name);
    for (names, besides) in [(AZURE, &[][..]), (BURST_GPT, &BURST_GPT_BESIDES[..])] {
        let places = (place(names.stamp), place(names.input), place(names.output));
        if let (Some(stamp), Some(input), Some(output)) = places {
            let known = [names.stamp, names.input, names.output];
            let unknown =
                header.iter().find(|column| !known.contains(column) && !besides.contains(column));
            return match unknown {
                Some(column) => Err(format!("the column {column:?} is unknown")),
                None => Ok(Columns { names, stamp, input, output }),
            };
        }
    }
    let header: Vec<_> = header.iter().collect();
    Err(format!(
        "a trace of no known format starts with {:?}: expected JSON objects, or a CSV header with \
         {},{},{} (Azure) or {},{},{} (BurstGPT)",
        header.join(","),
        AZURE.stamp,
        AZURE.input,
        AZURE.output,
        BURST_GPT.stamp,
        BURST_GPT.input,
        BURST_GPT.output,
    ))
}

fn date_and_time(name: &str, text: &str) -> Result<Duration, String> {
    PrimitiveDateTime::parse(text, DATE_AND_TIME)
        .ok()
        .and_then(|at| Duration::try_from(at - PrimitiveDateTime::MIN).ok())
        .ok_or_else(|| {
            format!("{name} is {text:?}: expected a time like 2023-11-16 18:17:03.9799600")
        })
}

fn seconds(name: &str, text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("{name} is {text:?}: expected seconds from 0 up"))
}

fn tokens(name: &str, text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{name} is {text:?}: expected a number of tokens"))
}

/// Without the position, which is told beside it.
fn reason_of(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} fields: expected {expected_len}, as the header")
        }
        _ => error.to_string(),
    }
}
