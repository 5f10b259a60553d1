use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use super::files::{self, Secrecy};

pub(super) const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";
/// Those that `[tls]` has in the sample.
pub(super) const HOST_CERTIFICATE: &str = "host.pem";
const HOST_KEY: &str = "host.key";
/// Hosts whose clocks go behind this much still take a fresh certificate.
const BACKDATED: Duration = Duration::hours(1);
/// What the coordinator looks for in a certificate that is for certain workers only.
const WORKER_URI: &str = "baton:worker:";

/// The names of one host.
pub(super) struct HostNames {
    /// Of its directory.
    first: String,
    names: Vec<SanType>,
}

impl HostNames {
    pub(super) fn new(hosts: &[String], workers: &[String]) -> anyhow::Result<Self> {
        let mut names = Vec::new();
        for host in hosts {
            names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    ensure!(
                        is_dns_name(host),
                        "{host:?} is no name of a host and no address, such as \
                         \"prefill-0.baton.internal\" or \"10.77.0.11\""
                    );
                    SanType::DnsName(host.as_str().try_into().context("host")?)
                }
            });
        }
        for worker in workers {
            let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            ensure!(
                !worker.is_empty() && worker.len() <= 63 && worker.chars().all(is_name),
                "--worker {worker:?} is no worker's name: at most 63 letters, digits, \"-\", \"_\" \
                 and \".\""
            );
            let uri = format!("{WORKER_URI}{worker}");
            names.push(SanType::URI(uri.as_str().try_into().context("worker")?));
        }
        let first = hosts.first().context("no host was named")?.clone();
        Ok(Self { first, names })
    }
}

fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
        (1..=63).contains(&label.len())
            && label.chars().all(is_inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// The CA of one cluster.
pub(super) struct Authority {
    directory: PathBuf,
    /// Its own certificate, and a former one's while it is rotated.
    bundle: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn init(directory: &Path, days: u32) -> anyhow::Result<()> {
        let files = [CERTIFICATE, KEY].map(|name| directory.join(name));
        files::refuse_existing(&files, "`baton certs rotate` replaces a CA step by step")?;
        files::directory(directory)?;
        let (certificate, key) = new_authority(days)?;
        // The key first: a certificate without one is of no use.
        files::write(&files[1], &key, Secrecy::Secret)?;
        files::write(&files[0], &certificate, Secrecy::Public)
    }

    pub(super) fn open(directory: &Path) -> anyhow::Result<Self> {
        let bundle = files::read(&directory.join(CERTIFICATE))?;
        let path = directory.join(KEY);
        let key = KeyPair::from_pem(&files::read(&path)?)
            .with_context(|| format!("{} holds no private key in PEM", path.display()))?;
        let path = directory.join(CERTIFICATE);
        let issuer = Issuer::from_ca_cert_pem(&bundle, key)
            .with_context(|| format!("{} holds no CA's certificate in PEM", path.display()))?;
        Ok(Self { directory: directory.to_owned(), bundle, issuer })
    }

    /// Writes `ca.pem`, `host.pem` and `host.key` into a directory of the host's first name, and
    /// answers the directory.
    pub(super) fn issue(
        &self,
        host: &HostNames,
        days: u32,
        renew: bool,
    ) -> anyhow::Result<PathBuf> {
        let directory = self.directory.join(&host.first);
        let [certificate_path, key_path] =
            [HOST_CERTIFICATE, HOST_KEY].map(|name| directory.join(name));
        if !renew {
            let paths = [certificate_path.clone(), key_path.clone()];
            files::refuse_existing(&paths, "--renew replaces it")?;
        }
        let mut params = lasting(days);
        params.distinguished_name.push(DnType::CommonName, host.first.as_str());
        params.subject_alt_names.clone_from(&host.names);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // The coordinator serves with it, a worker dials with it; a host may do both.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().context("cannot make a key")?;
        let certificate = params.signed_by(&key, &self.issuer).context("cannot sign")?;
        files::directory(&directory)?;
        files::write(&key_path, &key.serialize_pem(), Secrecy::Secret)?;
        files::write(&certificate_path, &certificate.pem(), Secrecy::Public)?;
        files::write(&directory.join(CERTIFICATE), &self.bundle, Secrecy::Public)?;
        Ok(directory)
    }

    /// A new CA signs from here on; `ca.pem` holds its certificate before the former one's.
    pub(super) fn rotate(directory: &Path, days: u32) -> anyhow::Result<()> {
        let former = Self::open(directory)?;
        let count = former.bundle.matches("BEGIN CERTIFICATE").count();
        if count > 1 {
            bail!(
                "{} holds {count} certificates: its rotation is under way; `baton certs retire` ends \
                 it",
                directory.join(CERTIFICATE).display()
            );
        }
        let (certificate, key) = new_authority(days)?;
        files::write(
            &directory.join(CERTIFICATE),
            &format!("{certificate}{}", former.bundle),
            Secrecy::Public,
        )?;
        files::write(&directory.join(KEY), &key, Secrecy::Secret)?;
        former.give_bundle_to_hosts(directory)
    }

    /// The former CA is trusted no more.
    pub(super) fn retire(directory: &Path) -> anyhow::Result<()> {
        let current = Self::open(directory)?;
        let end = "-----END CERTIFICATE-----";
        let first = current.bundle.find(end).map(|at| &current.bundle[..at + end.len()]);
        let (Some(first), true) = (first, current.bundle.matches(end).count() > 1) else {
            bail!(
                "{} holds one certificate: no rotation is under way",
                directory.join(CERTIFICATE).display()
            );
        };
        files::write(&directory.join(CERTIFICATE), &format!("{first}\n"), Secrecy::Public)?;
        current.give_bundle_to_hosts(directory)
    }

    /// Each host's directory has its own copy of `ca.pem`.
    fn give_bundle_to_hosts(&self, directory: &Path) -> anyhow::Result<()> {
        let bundle = files::read(&directory.join(CERTIFICATE))?;
        let entries = fs::read_dir(directory)
            .with_context(|| format!("cannot read {}", directory.display()))?;
        for entry in entries.flatten() {
            let copy = entry.path().join(CERTIFICATE);
            if copy.is_file() {
                files::write(&copy, &bundle, Secrecy::Public)?;
            }
        }
        Ok(())
    }
}

/// PEM of a new CA's certificate and key.
fn new_authority(days: u32) -> anyhow::Result<(String, String)> {
    let key = KeyPair::generate().context("cannot make a key")?;
    let mut params = lasting(days);
    // No two CAs of one name: whoever verifies would try the wrong one's key.
    let mark: String =
        params.key_identifier(&key).iter().take(4).map(|b| format!("{b:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("Baton CA {mark}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).context("cannot sign")?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn lasting(days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + Duration::days(days.into());
    params.use_authority_key_identifier_extension = true;
    params
}
