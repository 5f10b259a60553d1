//! How the values of keys are read from TOML and written to it.

use std::{
    collections::BTreeMap,
    marker::PhantomData,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use baton_types::Role;
use toml::de::DeValue;

use crate::cluster::{
    BalancerActuator, CheckChoice, LateRequests, MAX_PRIORITY, OnNoPrefill, PlacementMode,
    Requirement, TransportChoice,
};

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

pub(crate) const NAME: &str = "a name of at most 63 letters, digits, \"-\", \"_\" and \".\"";

pub(crate) fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=63).contains(&name.len()) && name.chars().all(allowed)
}

/// Names stand in HTTP headers and metric labels.
pub(crate) struct Name;

impl Codec for Name {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value).filter(|name| is_name(name)).map(str::to_owned).ok_or_else(|| NAME.to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

/// A name, or what many begin with.
pub(crate) struct NameOrStart;

impl Codec for NameOrStart {
    type Value = String;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<String, String> {
        Name::read(value, base).or_else(|wanted| {
            text(value)
                .filter(|name| name.strip_suffix('*').is_some_and(is_name))
                .map(str::to_owned)
                .ok_or_else(|| format!("{wanted}, or the start of such names and \"*\""))
        })
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

pub(crate) struct RoleName;

impl Codec for RoleName {
    type Value = Role;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Role, String> {
        text(value)
            .and_then(|name| name.parse().ok())
            .ok_or_else(|| "\"prefill\" or \"decode\"".to_owned())
    }

    fn write(value: &Role) -> Option<String> {
        Some(quoted(value.as_str()))
    }
}

/// One of several values that have names.
pub(crate) trait Named: Copy + PartialEq + 'static {
    const NAMES: &'static [(&'static str, Self)];
    /// What whoever wants something else should know.
    const BESIDES: &'static str = "";
}

pub(crate) struct OneOf<T>(PhantomData<T>);

impl<T: Named> Codec for OneOf<T> {
    type Value = T;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<T, String> {
        let named = |text: &str| T::NAMES.iter().find(|(name, _)| *name == text);
        let wanted = || one_of(&T::NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        let refused = || wanted() + T::BESIDES;
        text(value).and_then(named).map(|(_, value)| *value).ok_or_else(refused)
    }

    fn write(value: &T) -> Option<String> {
        T::NAMES.iter().find(|(_, one)| one == value).map(|(name, _)| quoted(name))
    }
}

impl Named for TransportChoice {
    const NAMES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("quic", Self::Quic), ("ucx", Self::Ucx), ("shm", Self::Shm)];
}

impl Named for CheckChoice {
    const NAMES: &'static [(&'static str, Self)] = &[("crc", Self::Crc), ("blake3", Self::Blake3)];
    const BESIDES: &'static str = "; verification cannot be turned off";
}

impl Named for PlacementMode {
    const NAMES: &'static [(&'static str, Self)] =
        &[("adaptive", Self::Adaptive), ("always", Self::Always), ("never", Self::Never)];
}

impl Named for OnNoPrefill {
    const NAMES: &'static [(&'static str, Self)] =
        &[("reject", Self::Reject), ("local", Self::Local)];
}

impl Named for LateRequests {
    const NAMES: &'static [(&'static str, Self)] = &[("last", Self::Last), ("fifo", Self::Fifo)];
}

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

/// The name of an HTTP header.
pub(crate) struct HeaderName;

impl Codec for HeaderName {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value)
            .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
            .map(str::to_ascii_lowercase)
            .ok_or_else(|| "the name of a header, such as \"x-tenant\"".to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
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

pub(crate) struct ActuatorName;

impl Codec for ActuatorName {
    type Value = BalancerActuator;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<BalancerActuator, String> {
        let named = |name: &str| BalancerActuator::ALL.into_iter().find(|one| one.as_str() == name);
        let wanted = || one_of(&BalancerActuator::ALL.map(BalancerActuator::as_str));
        text(value).and_then(named).ok_or_else(wanted)
    }

    fn write(value: &BalancerActuator) -> Option<String> {
        Some(quoted(value.as_str()))
    }
}

pub(crate) struct Requirements;

impl Codec for Requirements {
    type Value = Vec<Requirement>;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<Vec<Requirement>, String> {
        let named = |name: &str| Requirement::ALL.into_iter().find(|one| one.as_str() == name);
        let wanted = || format!("a list of {}", one_of(&Requirement::ALL.map(Requirement::as_str)));
        let items = value.as_array().ok_or_else(wanted)?;
        let read = items.iter().map(|item| item.get_ref().as_str().and_then(named));
        read.collect::<Option<_>>().ok_or_else(wanted)
    }

    fn write(value: &Vec<Requirement>) -> Option<String> {
        let names: Vec<String> = value.iter().map(|one| one.as_str().to_owned()).collect();
        (!names.is_empty()).then(|| list(&names))
    }
}

/// `"a", "b" or "c"`
fn one_of(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
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

/// Where to listen.
pub(crate) struct Address;

impl Codec for Address {
    type Value = SocketAddr;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<SocketAddr, String> {
        text(value)
            .and_then(|address| address.parse().ok())
            .ok_or_else(|| "an address IP:PORT, such as \"127.0.0.1:8000\"".to_owned())
    }

    fn write(value: &SocketAddr) -> Option<String> {
        Some(quoted(&value.to_string()))
    }
}

/// Where to listen so that others find it by the port.
pub(crate) struct FixedAddress;

impl Codec for FixedAddress {
    type Value = SocketAddr;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<SocketAddr, String> {
        let address = Address::read(value, base)?;
        if address.port() == 0 {
            return Err("an address with a port above 0, by which others can find it".to_owned());
        }
        Ok(address)
    }

    fn write(value: &SocketAddr) -> Option<String> {
        Address::write(value)
    }
}

/// Where to connect. Empty stands for "not given".
pub(crate) struct HostPort;

/// Splits `host:port`; an IPv6 address stands in brackets, and is answered without them.
pub(crate) fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return inner.parse::<std::net::Ipv6Addr>().ok().map(|_| (inner, port));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!host.is_empty() && host.chars().all(allowed)).then_some((host, port))
}

impl Codec for HostPort {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value)
            .filter(|address| host_and_port(address).is_some())
            .map(str::to_owned)
            .ok_or_else(|| "HOST:PORT, such as \"10.0.0.7:7000\"".to_owned())
    }

    fn write(value: &String) -> Option<String> {
        (!value.is_empty()).then(|| quoted(value))
    }
}

/// Where to connect, in several places. Empty stands for "not given".
pub(crate) struct HostPorts;

impl Codec for HostPorts {
    type Value = Vec<String>;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<Vec<String>, String> {
        let wanted = || "a list of HOST:PORT, such as [\"10.0.0.7:7000\"]".to_owned();
        let items = value.as_array().filter(|items| !items.is_empty()).ok_or_else(wanted)?;
        items
            .iter()
            .map(|item| HostPort::read(item.get_ref(), base).map_err(|_| wanted()))
            .collect()
    }

    fn write(value: &Vec<String>) -> Option<String> {
        (!value.is_empty()).then(|| list(value))
    }
}

/// Where an engine serves.
pub(crate) struct Url;

impl Codec for Url {
    type Value = String;

    fn read(value: &DeValue<'_>, _: &Path) -> Result<String, String> {
        text(value)
            .filter(|url| {
                url.strip_prefix("http://")
                    .is_some_and(|address| host_and_port(address.trim_end_matches('/')).is_some())
            })
            .map(|url| url.trim_end_matches('/').to_owned())
            .ok_or_else(|| "a URL http://HOST:PORT, such as \"http://127.0.0.1:8100\"".to_owned())
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

/// A path, relative to the file that names it.
pub(crate) struct FilePath;

impl Codec for FilePath {
    type Value = PathBuf;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, String> {
        text(value).map(|path| base.join(path)).ok_or_else(|| "a path".to_owned())
    }

    fn write(value: &PathBuf) -> Option<String> {
        Some(quoted(&value.to_string_lossy()))
    }
}

/// The path of a file that must be there.
pub(crate) struct ExistingFile;

impl Codec for ExistingFile {
    type Value = PathBuf;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, String> {
        let path = FilePath::read(value, base).map_err(|_| "the path of a file".to_owned())?;
        if path.is_file() {
            return Ok(path);
        }
        Err(format!("an existing file (looked for {})", path.display()))
    }

    fn write(value: &PathBuf) -> Option<String> {
        FilePath::write(value)
    }
}

/// The path of a directory that must be there.
pub(crate) struct ExistingDirectory;

impl Codec for ExistingDirectory {
    type Value = PathBuf;

    fn read(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, String> {
        let path = FilePath::read(value, base).map_err(|_| "the path of a directory".to_owned())?;
        if path.is_dir() {
            return Ok(path);
        }
        Err(format!("an existing directory (looked for {})", path.display()))
    }

    fn write(value: &PathBuf) -> Option<String> {
        FilePath::write(value)
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
