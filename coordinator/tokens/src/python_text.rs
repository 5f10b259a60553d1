//! Values as Python writes them: chat templates are written for Jinja2.

use std::io;

use minijinja::{Error, ErrorKind, Output, State, Value, value::Kwargs, value::ValueKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `tojson` as Hugging Face's templates have it: `json.dumps(x, ensure_ascii=False, indent=indent)`.
pub(crate) fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // The others change the text in ways that no template was seen to ask for.
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true)
        || options.get::<Option<bool>>("sort_keys")? == Some(true)
        || options.get::<Option<Value>>("separators")?.is_some_and(|value| !value.is_none())
    {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson with such options"));
    }
    options.assert_all_used()?;
    json(value, indent).map(Value::from_safe_string)
}

fn json(value: &Value, indent: Option<usize>) -> Result<String, Error> {
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "cannot be JSON").with_source(error)
    };
    let mut text = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut text, OneLine)),
        Some(width) => {
            let spaces = " ".repeat(width);
            let pretty = Indented(PrettyFormatter::with_indent(spaces.as_bytes()));
            value.serialize(&mut Serializer::with_formatter(&mut text, pretty))
        }
    }
    .map_err(failed)?;
    String::from_utf8(text)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "not UTF-8").with_source(error))
}

struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, w: &mut W, value: f64) -> io::Result<()> {
        w.write_all(float(value).as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        escape: serde_json::ser::CharEscape,
    ) -> io::Result<()> {
        write_char_escape(w, escape)
    }
}

struct Indented<'a>(PrettyFormatter<'a>);

impl Formatter for Indented<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_array(w)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array(w)
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array_value(w)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object(w)
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object(w)
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object_value(w)
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, w: &mut W, value: f64) -> io::Result<()> {
        w.write_all(float(value).as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        escape: serde_json::ser::CharEscape,
    ) -> io::Result<()> {
        write_char_escape(w, escape)
    }
}

/// As `json.dumps` has them, which leaves the slash alone as serde does.
fn write_char_escape<W: ?Sized + io::Write>(
    w: &mut W,
    escape: serde_json::ser::CharEscape,
) -> io::Result<()> {
    use serde_json::ser::CharEscape::{
        AsciiControl, Backspace, CarriageReturn, FormFeed, LineFeed, Quote, ReverseSolidus,
        Solidus, Tab,
    };
    match escape {
        Quote => w.write_all(b"\\\""),
        ReverseSolidus => w.write_all(b"\\\\"),
        Solidus => w.write_all(b"/"),
        Backspace => w.write_all(b"\\b"),
        FormFeed => w.write_all(b"\\f"),
        LineFeed => w.write_all(b"\\n"),
        CarriageReturn => w.write_all(b"\\r"),
        Tab => w.write_all(b"\\t"),
        AsciiControl(byte) => write!(w, "\\u{byte:04x}"),
    }
}

/// The shortest digits that come back as the same number. Rust and Python agree on them and on when to
/// write an exponent, which Python gives a sign and two digits.
fn float(value: f64) -> String {
    let text = format!("{value:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

/// What `{{ value }}` writes.
pub(crate) fn write(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    let written = match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => out.write_str(text),
            None => write!(out, "{value}"),
        },
        ValueKind::Undefined => Ok(()),
        _ => out.write_str(&repr(value)?),
    };
    written.map_err(|error| Error::new(ErrorKind::WriteFailure, error.to_string()))
}

fn repr(value: &Value) -> Result<String, Error> {
    let text = match value.kind() {
        ValueKind::None | ValueKind::Undefined => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number if value.is_integer() => value.to_string(),
        ValueKind::Number => f64::try_from(value.clone()).map(float)?,
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value.try_iter()?.map(|item| repr(&item)).collect::<Result<Vec<_>, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key)?;
                Ok::<_, Error>(format!("{}: {}", repr(&key)?, repr(&item)?))
            };
            let items = value.try_iter()?.map(pair).collect::<Result<Vec<_>, _>>()?;
            format!("{{{}}}", items.join(", "))
        }
        _ => return Err(Error::new(ErrorKind::InvalidOperation, "no text in Python is known")),
    };
    Ok(text)
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut quoted = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            other if other == quote => {
                quoted.push('\\');
                quoted.push(other);
            }
            other => quoted.push(other),
        }
    }
    quoted.push(quote);
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn json_is_as_python_dumps_it() {
        // python3 -c 'import json; print(json.dumps(..., ensure_ascii=False))'
        let nested = value(r#"{"b":[1,2.5,1e-7,1e22,true,null],"a":{},"ü":"é\"/\u0001"}"#);
        assert_eq!(
            json(&nested, None).unwrap(),
            r#"{"b": [1, 2.5, 1e-07, 1e+22, true, null], "a": {}, "ü": "é\"/\u0001"}"#
        );
        assert_eq!(
            json(&value(r#"{"b":[1,[]]}"#), Some(2)).unwrap(),
            "{\n  \"b\": [\n    1,\n    []\n  ]\n}"
        );
    }

    #[test]
    fn values_are_shown_as_python_shows_them() {
        // python3 -c 'print({...})'
        let nested = value(r#"{"a":[true,null,1.0,"it's","say \"it's\""]}"#);
        assert_eq!(repr(&nested).unwrap(), r#"{'a': [True, None, 1.0, "it's", 'say "it\'s"']}"#);
    }
}
