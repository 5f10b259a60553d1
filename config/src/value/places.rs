//! Where something is: on the network, or among files.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use toml::de::DeValue;

use super::{Codec, list, quoted, text};

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
