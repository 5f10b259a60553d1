//! Mooncake's format, and ours, which is the same with `phase` and `client`.

use std::{borrow::Cow, io, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    Trace, TraceErrors,
    read::{Line, Lines, Names},
};

const NAMES: Names = Names { stamp: "timestamp", input: "input_length", output: "output_length" };

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    /// Milliseconds.
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    phase: Option<Cow<'a, str>>,
    /// Whose request it is. Nothing asks for it yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash_ids: Option<Box<[u64]>>,
}

pub(super) fn lines(text: &str, errors: &mut TraceErrors) -> Lines {
    let mut is_mooncake = true;
    let mut lines = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        if line.trim().is_empty() {
            continue;
        }
        let fields: Fields<'_> = match serde_json::from_str(line) {
            Ok(fields) => fields,
            Err(error) => {
                errors.at(number, without_line(&error));
                continue;
            }
        };
        let Ok(stamp) = Duration::try_from_secs_f64(fields.timestamp / 1000.0) else {
            let stamp = fields.timestamp;
            errors.at(number, format!("timestamp is {stamp}: expected milliseconds from 0 up"));
            continue;
        };
        is_mooncake &=
            fields.hash_ids.is_some() && fields.phase.is_none() && fields.client.is_none();
        lines.push(Line {
            number,
            stamp,
            input_tokens: fields.input_length,
            output_tokens: fields.output_length,
            prefix_blocks: fields.hash_ids.unwrap_or_default(),
            phase: fields.phase.map(Cow::into_owned),
        });
    }
    Lines { lines, stamps_may_be_quantised: is_mooncake, names: NAMES }
}

/// The text was one line, so that only the column is worth saying.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

impl Trace {
    /// Writes our JSONL. What was spread, scaled or generated is read back as it is, to the
    /// microsecond.
    ///
    /// # Errors
    /// Those of `writer`.
    pub fn write_jsonl(&self, mut writer: impl io::Write) -> io::Result<()> {
        for request in &self.requests {
            let phase = request.phase.and_then(|phase| self.phases.get(usize::from(phase)));
            let hash_ids =
                (!request.prefix_blocks.is_empty()).then(|| request.prefix_blocks.clone());
            let fields = Fields {
                timestamp: (request.arrival.as_secs_f64() * 1e6).round() / 1e3,
                input_length: request.input_tokens,
                output_length: request.output_tokens,
                phase: phase.map(|phase| phase.as_str().into()),
                client: None,
                hash_ids,
            };
            serde_json::to_writer(&mut writer, &fields)?;
            writer.write_all(b"\n")?;
        }
        Ok(())
    }
}
