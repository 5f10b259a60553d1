use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use csv::{ReaderBuilder, StringRecord, Trim};

/// What was measured of one engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Points {
    pub prefill: Vec<PrefillPoint>,
    pub decode: Vec<DecodePoint>,
    /// Where the measurements tell it.
    pub kv_capacity_tokens: Option<u64>,
}

/// One prompt, alone on the engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillPoint {
    pub tokens: f64,
    pub ms: f64,
}

/// One step that gives each sequence one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodePoint {
    pub sequences: f64,
    /// Of all sequences together.
    pub context_tokens: f64,
    pub ms: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum PointsError {
    #[error("{file}: cannot be read: {source}", file = file.display())]
    Unreadable { file: PathBuf, source: csv::Error },
    #[error(
        "{file}: has the columns {found}: expected kind,sequences,tokens,ms, or those of a published \
         sweep (isl,ttft_ms or batch,mean_context,itl_ms or \
         prompt_size,batch_size,token_size,prompt_time,token_time)",
        file = file.display()
    )]
    Header { file: PathBuf, found: String },
    #[error("{file}: row {row}: {column} is {value:?}: expected {expected}", file = file.display())]
    Value { file: PathBuf, row: usize, column: &'static str, value: String, expected: &'static str },
}

/// The tables that are known, by their columns.
#[derive(Clone, Copy)]
enum Table {
    /// `kind,sequences,tokens,ms`.
    Ours,
    /// Of NVIDIA's Dynamo planner.
    DynamoPrefill,
    DynamoDecode,
    /// Of the Splitwise simulator.
    Splitwise,
}

impl Points {
    /// Adds what a CSV file with a header holds. Ours has the columns `kind,sequences,tokens,ms`:
    ///
    /// * `prefill`: one prompt of `tokens` took `ms` (`sequences` is 1 or empty),
    /// * `decode`: a step over `sequences`, whose contexts are `tokens` together, took `ms`.
    ///
    /// Besides, these published sweeps are known, in milliseconds all: Dynamo's planner's prefill
    /// (`isl,ttft_ms,…`) and decode (`batch,mean_context,itl_ms,…`, of which `kv_usage` gives the KV
    /// capacity), and Splitwise's (`prompt_size,batch_size,token_size,prompt_time,token_time,…`, of
    /// which only prompts that were alone count for prefill).
    ///
    /// # Errors
    /// The first thing that is wrong with the file.
    pub fn read(&mut self, file: &Path) -> Result<(), PointsError> {
        let unreadable = |source| PointsError::Unreadable { file: file.to_owned(), source };
        let mut reader =
            ReaderBuilder::new().trim(Trim::All).from_path(file).map_err(unreadable)?;
        let header = reader.headers().map_err(unreadable)?.clone();
        let table = Table::of(&header).ok_or_else(|| PointsError::Header {
            file: file.to_owned(),
            found: header.iter().collect::<Vec<_>>().join(","),
        })?;
        for (record, number) in reader.records().zip(2..) {
            let record = record.map_err(unreadable)?;
            self.add(table, &Row { file, number, header: &header, record: &record })?;
        }
        Ok(())
    }

    /// Writes our table.
    pub fn to_csv(&self) -> String {
        let mut csv = "kind,sequences,tokens,ms\n".to_owned();
        // Writing to a string does not fail.
        for point in &self.prefill {
            let _ = writeln!(csv, "prefill,1,{},{:.4}", point.tokens, point.ms);
        }
        for point in &self.decode {
            let DecodePoint { sequences, context_tokens, ms } = point;
            let _ = writeln!(csv, "decode,{sequences},{context_tokens},{ms:.4}");
        }
        csv
    }

    fn add(&mut self, table: Table, row: &Row<'_>) -> Result<(), PointsError> {
        match table {
            Table::Ours => match row.text("kind") {
                "prefill" => {
                    self.prefill.push(PrefillPoint {
                        tokens: row.positive("tokens")?,
                        ms: row.positive("ms")?,
                    });
                }
                "decode" => self.decode.push(DecodePoint {
                    sequences: row.positive("sequences")?,
                    context_tokens: row.positive("tokens")?,
                    ms: row.positive("ms")?,
                }),
                _ => return Err(row.wrong("kind", "prefill or decode")),
            },
            Table::DynamoPrefill => self
                .prefill
                .push(PrefillPoint { tokens: row.positive("isl")?, ms: row.positive("ttft_ms")? }),
            Table::DynamoDecode => {
                let sequences = row.positive("batch")?;
                let context_tokens = sequences * row.positive("mean_context")?;
                self.decode.push(DecodePoint {
                    sequences,
                    context_tokens,
                    ms: row.positive("itl_ms")?,
                });
                if self.kv_capacity_tokens.is_none() && row.place("kv_usage").is_some() {
                    let capacity = context_tokens / row.positive("kv_usage")?;
                    self.kv_capacity_tokens = whole(capacity);
                }
            }
            Table::Splitwise => {
                let (prompt, sequences) =
                    (row.positive("prompt_size")?, row.positive("batch_size")?);
                if (sequences - 1.0).abs() < f64::EPSILON {
                    self.prefill
                        .push(PrefillPoint { tokens: prompt, ms: row.positive("prompt_time")? });
                }
                // Its token_time is the mean over an answer, half of which lies before.
                let context = prompt + row.positive("token_size")? / 2.0;
                self.decode.push(DecodePoint {
                    sequences,
                    context_tokens: sequences * context,
                    ms: row.positive("token_time")?,
                });
            }
        }
        Ok(())
    }
}

impl Table {
    fn of(header: &StringRecord) -> Option<Self> {
        let has = |columns: &[&str]| {
            columns.iter().all(|column| header.iter().any(|named| named == *column))
        };
        let tables = [
            (Self::Ours, &["kind", "sequences", "tokens", "ms"][..]),
            (Self::DynamoPrefill, &["isl", "ttft_ms"]),
            (Self::DynamoDecode, &["batch", "mean_context", "itl_ms"]),
            (
                Self::Splitwise,
                &["prompt_size", "batch_size", "token_size", "prompt_time", "token_time"],
            ),
        ];
        tables.into_iter().find(|(_, columns)| has(columns)).map(|(table, _)| table)
    }
}

struct Row<'a> {
    file: &'a Path,
    /// As an editor counts.
    number: usize,
    header: &'a StringRecord,
    record: &'a StringRecord,
}

impl Row<'_> {
    fn place(&self, column: &str) -> Option<usize> {
        self.header.iter().position(|named| named == column)
    }

    fn text(&self, column: &str) -> &str {
        self.place(column).and_then(|place| self.record.get(place)).unwrap_or_default()
    }

    fn positive(&self, column: &'static str) -> Result<f64, PointsError> {
        let value = self.text(column).parse().ok();
        value
            .filter(|value: &f64| value.is_finite() && *value > 0.0)
            .ok_or_else(|| self.wrong(column, "a number above 0"))
    }

    fn wrong(&self, column: &'static str, expected: &'static str) -> PointsError {
        let (file, value) = (self.file.to_owned(), self.text(column).to_owned());
        PointsError::Value { file, row: self.number, column, value, expected }
    }
}

/// The nearest whole number.
fn whole(number: f64) -> Option<u64> {
    format!("{number:.0}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Points, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let mut points = Points::default();
        let name = file.path().display().to_string();
        points.read(file.path()).map_err(|error| error.to_string().replace(&name, "points.csv"))?;
        Ok(points)
    }

    #[test]
    fn our_table_holds_both_kinds() {
        let points = read("kind,sequences,tokens,ms\nprefill,,100,8\ndecode,4,4000,9.5\n").unwrap();
        assert_eq!(points.prefill, [PrefillPoint { tokens: 100.0, ms: 8.0 }]);
        let decode = DecodePoint { sequences: 4.0, context_tokens: 4000.0, ms: 9.5 };
        assert_eq!(points.decode, [decode]);
        assert_eq!(read(&points.to_csv()).unwrap(), points);
    }

    #[test]
    fn published_sweeps_are_known() {
        let prefill = read("isl,ttft_ms,tok_s_per_gpu\n2135,132.5,2014\n").unwrap();
        assert_eq!(prefill.prefill, [PrefillPoint { tokens: 2135.0, ms: 132.5 }]);
        let decode = read("kv_usage,mean_context,itl_ms,batch\n0.25,350.0,16.2,40\n").unwrap();
        let point = DecodePoint { sequences: 40.0, context_tokens: 14_000.0, ms: 16.2 };
        assert_eq!((decode.decode, decode.kv_capacity_tokens), (vec![point], Some(56_000)));
        let header = "prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time";
        let both = read(&format!("{header}\n512,1,128,94,44,5\n512,2,128,150,45,5\n")).unwrap();
        assert_eq!(both.prefill, [PrefillPoint { tokens: 512.0, ms: 94.0 }]);
        assert_eq!(both.decode[1].context_tokens, 1152.0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let header = "kind,sequences,tokens,ms\n";
        for (text, expected) in [
            ("a,b\n1,2\n".to_owned(), "points.csv: has the columns a,b: expected kind,sequences"),
            (
                format!("{header}prefill,,1,2\nstep,1,1,1\n"),
                "points.csv: row 3: kind is \"step\": expected prefill or decode",
            ),
            (
                format!("{header}decode,1,5,-2\n"),
                "points.csv: row 2: ms is \"-2\": expected a number above 0",
            ),
            (format!("{header}decode,1,5\n"), "points.csv: cannot be read: CSV error"),
        ] {
            let said = read(&text).unwrap_err();
            assert!(said.starts_with(expected), "{said}");
        }
    }
}
