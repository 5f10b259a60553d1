use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use time::OffsetDateTime;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, pem::Pem, prelude::FromDer as _,
};

use super::files;
use crate::terminal::{Terminal, bad, faint, good, pending};

/// Whoever has this long left should renew.
const SOON_DAYS: i64 = 30;
const SECONDS_A_DAY: i64 = 86_400;

/// Shows every certificate of these files and directories.
pub(super) fn run(paths: &[PathBuf], terminal: &mut Terminal) -> anyhow::Result<ExitCode> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            certificates_below(path, &mut files)?;
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        bail!("no certificate (*.pem) below {}", shown(paths));
    }
    let mut any_expired = false;
    for file in &files {
        terminal.say(&faint(&file.display().to_string()).to_string());
        for certificate in certificates(file)? {
            any_expired |= certificate.left_days < 0;
            for line in certificate.lines() {
                terminal.say(&line);
            }
        }
        if let Some(complaint) = complaint_about_key(&file.with_extension("key")) {
            terminal.say(&format!("  {}", bad(&complaint)));
        }
    }
    Ok(if any_expired { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Days that the first certificate of a file has left.
pub(super) fn days_left(file: &Path) -> anyhow::Result<i64> {
    let first = certificates(file)?.into_iter().next();
    Ok(first.with_context(|| format!("{} holds no certificate", file.display()))?.left_days)
}

/// The CA's own first, then those of the hosts.
fn certificates_below(directory: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_by_key(|path| (path.is_dir(), path.clone()));
    for path in paths {
        if path.is_dir() {
            certificates_below(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "pem") {
            found.push(path);
        }
    }
    Ok(())
}

struct Shown {
    subject: String,
    issuer: String,
    is_authority: bool,
    names: Vec<String>,
    expires: String,
    left_days: i64,
}

impl Shown {
    fn lines(&self) -> Vec<String> {
        let what = if self.is_authority {
            "a CA".to_owned()
        } else {
            format!("{}, signed by {}", self.names.join(", "), self.issuer)
        };
        let left = match self.left_days {
            ..0 => bad(&format!("expired on {}", self.expires)).to_string(),
            0..SOON_DAYS => {
                let soon = format!("expires on {}, in {} days", self.expires, self.left_days);
                pending(&soon).to_string()
            }
            _ => good(&format!("expires on {}, in {} days", self.expires, self.left_days))
                .to_string(),
        };
        vec![format!("  {}: {what}", self.subject), format!("  {left}")]
    }
}

fn certificates(file: &Path) -> anyhow::Result<Vec<Shown>> {
    let text = files::read(file)?;
    let mut found = Vec::new();
    for pem in Pem::iter_from_buffer(text.as_bytes()) {
        let pem = pem.with_context(|| format!("{} is not PEM", file.display()))?;
        if pem.label != "CERTIFICATE" {
            continue;
        }
        let (_, certificate) = X509Certificate::from_der(&pem.contents)
            .with_context(|| format!("{} holds a broken certificate", file.display()))?;
        found.push(show(&certificate));
    }
    if found.is_empty() {
        bail!("{} holds no certificate in PEM", file.display());
    }
    Ok(found)
}

fn show(certificate: &X509Certificate<'_>) -> Shown {
    let expires = certificate.validity().not_after.to_datetime();
    let left = expires - OffsetDateTime::now_utc();
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.iter().map(name).collect());
    Shown {
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        is_authority: certificate.is_ca(),
        names: names.unwrap_or_default(),
        expires: expires.date().to_string(),
        left_days: left.whole_seconds().div_euclid(SECONDS_A_DAY),
    }
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) => (*name).to_owned(),
        GeneralName::URI(uri) => uri
            .strip_prefix("baton:worker:")
            .map_or_else(|| (*uri).to_owned(), |worker| format!("worker {worker}")),
        GeneralName::IPAddress(bytes) => {
            match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
                (Ok(bytes), _) => Ipv4Addr::from(bytes).to_string(),
                (_, Ok(bytes)) => Ipv6Addr::from(bytes).to_string(),
                _ => "a broken address".to_owned(),
            }
        }
        other => other.to_string(),
    }
}

/// A key that others may read is no secret.
fn complaint_about_key(key: &Path) -> Option<String> {
    let mode = fs::metadata(key).ok()?.mode() & 0o777;
    // A group's right to read is how a service gets at its key.
    (mode & 0o037 != 0).then(|| {
        format!("{} has mode {mode:o}: others than its owner may use it (chmod 600)", key.display())
    })
}
