//! Counts, sizes, times and parts.

use std::{marker::PhantomData, path::Path, time::Duration};

use toml::de::DeValue;

use super::{Codec, number, text, whole};
use crate::cluster::MAX_PRIORITY;

/// vLLM's: smaller numbers are served first.
pub(crate) struct Priority;

impl Codec for Priority {
    type Value = i32;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<i32, String> {
        value
            .as_integer()
            .and_then(|integer| i32::from_str_radix(integer.as_str(), integer.radix()).ok())
            .filter(|priority| (-MAX_PRIORITY..=MAX_PRIORITY).contains(priority))
            .ok_or_else(|| format!("a whole number from {} to {MAX_PRIORITY}", -MAX_PRIORITY))
    }

    fn write(value: &i32) -> Option<String> {
        Some(value.to_string())
    }
}

/// A whole number from `MIN` to `MAX`.
pub(crate) struct Whole<T, const MIN: u64, const MAX: u64>(PhantomData<T>);

impl<T, const MIN: u64, const MAX: u64> Codec for Whole<T, MIN, MAX>
where
    T: TryFrom<u64> + Copy + Into<u64>,
{
    type Value = T;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<T, String> {
        whole(value)
            .filter(|number| (MIN..=MAX).contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| format!("a whole number from {MIN} to {MAX}"))
    }

    fn write(value: &T) -> Option<String> {
        Some((*value).into().to_string())
    }
}

/// A count of at least one.
pub(crate) type Count = Whole<u32, 1, { u32::MAX as u64 }>;
pub(crate) type Port = Whole<u16, 1, { u16::MAX as u64 }>;

/// A size: a whole number of bytes, or text such as `"256 MiB"`.
pub(crate) struct Bytes<T, const MIN: u64, const MAX: u64>(PhantomData<T>);

pub(crate) type AnyBytes = Bytes<u64, 1, { i64::MAX as u64 }>;
pub(crate) type TokenBytes = Bytes<u32, 1, { u32::MAX as u64 }>;
/// From what QUIC asks of every path to what UDP can carry.
pub(crate) type MtuBytes = Bytes<u16, 1200, 65_527>;

const UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

fn size(text: &str) -> Option<u64> {
    let (unit, scale) = UNITS.into_iter().find(|(unit, _)| text.ends_with(unit))?;
    let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
    number.checked_mul(scale)
}

impl<T, const MIN: u64, const MAX: u64> Codec for Bytes<T, MIN, MAX>
where
    T: TryFrom<u64> + Copy + Into<u64>,
{
    type Value = T;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<T, String> {
        text(value)
            .and_then(size)
            .or_else(|| whole(value))
            .filter(|bytes| (MIN..=MAX).contains(bytes))
            .and_then(|bytes| T::try_from(bytes).ok())
            .ok_or_else(|| {
                let range = if MAX == i64::MAX as u64 {
                    format!("a size of {MIN} bytes or more")
                } else {
                    format!("a size from {MIN} to {MAX} bytes")
                };
                format!("{range}: a whole number, or such as \"256 MiB\"")
            })
    }

    fn write(value: &T) -> Option<String> {
        let bytes: u64 = (*value).into();
        let unit =
            UNITS[..2].iter().find(|(_, scale)| bytes >= *scale && bytes.is_multiple_of(*scale));
        Some(match unit {
            Some((unit, scale)) => format!("\"{} {unit}\"", bytes / scale),
            None => bytes.to_string(),
        })
    }
}

/// A finite number above zero.
pub(crate) struct Positive;

impl Codec for Positive {
    type Value = f64;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<f64, String> {
        number(value).filter(|number| *number > 0.0).ok_or_else(|| "a number above 0".to_owned())
    }

    fn write(value: &f64) -> Option<String> {
        Some(value.to_string())
    }
}

/// A share.
pub(crate) struct Ratio;

impl Codec for Ratio {
    type Value = f64;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<f64, String> {
        number(value)
            .filter(|number| (0.0..=1.0).contains(number))
            .ok_or_else(|| "a number from 0 to 1".to_owned())
    }

    fn write(value: &f64) -> Option<String> {
        Some(value.to_string())
    }
}

/// A finite number that may be zero.
pub(crate) struct NotNegative;

impl Codec for NotNegative {
    type Value = f64;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<f64, String> {
        number(value)
            .filter(|number| *number >= 0.0)
            .ok_or_else(|| "a number of 0 or more".to_owned())
    }

    fn write(value: &f64) -> Option<String> {
        Some(value.to_string())
    }
}

/// A time above zero, in seconds.
pub(crate) struct Seconds;

/// Longer ones are slips, and would overflow a deadline.
const LONGEST_SECONDS: f64 = 365.0 * 86_400.0;

impl Codec for Seconds {
    type Value = Duration;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Duration, String> {
        number(value)
            .filter(|seconds| *seconds <= LONGEST_SECONDS)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .filter(|time| !time.is_zero())
            .ok_or_else(|| format!("a number of seconds above 0, at most {LONGEST_SECONDS}"))
    }

    fn write(value: &Duration) -> Option<String> {
        Some(value.as_secs_f64().to_string())
    }
}

/// A time in seconds that may be zero.
pub(crate) struct SecondsOrNone;

impl Codec for SecondsOrNone {
    type Value = Duration;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Duration, String> {
        number(value)
            .filter(|seconds| *seconds <= LONGEST_SECONDS)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .ok_or_else(|| format!("a number of seconds from 0 to {LONGEST_SECONDS}"))
    }

    fn write(value: &Duration) -> Option<String> {
        Seconds::write(value)
    }
}
