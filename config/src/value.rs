//! How the values of keys are read from TOML and written to it.

mod names;
mod numbers;
mod places;

use std::{collections::BTreeMap, marker::PhantomData, path::Path};

use toml::de::DeValue;

pub(crate) use self::{names::*, numbers::*, places::*};

/// One kind of value.
pub(crate) trait Codec {
    type Value;

    /// On failure answers what would have been right: "an address IP:PORT". Relative paths are taken
    /// from `base`.
    fn read(value: &DeValue<'_>, base: &Path) -> Result<Self::Value, String>;

    /// As TOML; `None` where the value is that of a file which does not name the key.
    fn write(value: &Self::Value) -> Option<String>;
}

/// A key that may stay away.
pub(crate) struct Maybe<C>(PhantomData<C>);

impl<C: Codec> Codec for Maybe<C> {
    type Value = Option<C::Value>;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<Self::Value, String> {
        C::read(value, base).map(Some)
    }

    fn write(value: &Self::Value) -> Option<String> {
        value.as_ref().and_then(C::write)
    }
}

pub(crate) struct Flag;

impl Codec for Flag {
    type Value = bool;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<bool, String> {
        value.as_bool().ok_or_else(|| "true or false".to_owned())
    }

    fn write(value: &bool) -> Option<String> {
        Some(value.to_string())
    }
}

pub(crate) struct Text;

impl Codec for Text {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value).map(str::to_owned).ok_or_else(|| "a string with something in it".to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

/// 64 hexadecimal digits.
pub(crate) struct Sha256;

impl Codec for Sha256 {
    type Value = [u8; 32];

    fn read(value: &DeValue<'_>, _: &Path) -> Result<[u8; 32], String> {
        let digits = text(value)
            .filter(|text| text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let bytes = digits.and_then(|digits| {
            let byte = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
            let bytes: Option<Vec<u8>> = (0..64).step_by(2).map(byte).collect();
            bytes?.try_into().ok()
        });
        bytes.ok_or_else(|| "the 64 hexadecimal digits of a SHA-256".to_owned())
    }

    fn write(value: &[u8; 32]) -> Option<String> {
        Some(quoted(&value.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
    }
}

/// A program and its arguments.
pub(crate) struct Program;

impl Codec for Program {
    type Value = Vec<String>;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Vec<String>, String> {
        let wanted =
            || "a list of strings, program first, such as [\"vllm\", \"serve\"]".to_owned();
        let items = value.as_array().ok_or_else(wanted)?;
        let words: Option<Vec<String>> =
            items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect();
        words.filter(|words| words.first().is_some_and(|word| !word.is_empty())).ok_or_else(wanted)
    }

    fn write(value: &Vec<String>) -> Option<String> {
        Some(list(value))
    }
}

/// Environment variables.
pub(crate) struct Environment;

impl Codec for Environment {
    type Value = BTreeMap<String, String>;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Self::Value, String> {
        let wanted = || "a table of strings, such as { OMP_NUM_THREADS = \"8\" }".to_owned();
        let table = value.as_table().ok_or_else(wanted)?;
        let allowed = |name: &str| !name.is_empty() && !name.contains(['=', '\0', '\n', '\r']);
        table
            .iter()
            .map(|(name, value)| {
                let value = value.get_ref().as_str().filter(|value| !value.contains('\0'))?;
                let name = name.get_ref().as_ref();
                allowed(name).then(|| (name.to_owned(), value.to_owned()))
            })
            .collect::<Option<_>>()
            .ok_or_else(wanted)
    }

    fn write(value: &Self::Value) -> Option<String> {
        let pairs: Vec<String> = value
            .iter()
            .map(|(name, value)| format!("{} = {}", quoted(name), quoted(value)))
            .collect();
        (!pairs.is_empty()).then(|| format!("{{ {} }}", pairs.join(", ")))
    }
}

/// A string that is not empty.
fn text<'a>(value: &'a DeValue<'_>) -> Option<&'a str> {
    value.as_str().filter(|text| !text.is_empty())
}

fn whole(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn number(value: &DeValue<'_>) -> Option<f64> {
    let number = match value {
        DeValue::Integer(integer) => {
            // Every whole number that anybody writes here is exact in 53 bits.
            i64::from_str_radix(integer.as_str(), integer.radix()).ok()?.to_string().parse().ok()?
        }
        DeValue::Float(float) => float.as_str().parse::<f64>().ok()?,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

/// A basic string, which may stand for a key too.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn list(words: &[String]) -> String {
    format!("[{}]", words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(", "))
}
