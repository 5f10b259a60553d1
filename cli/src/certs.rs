//! `baton certs`: a private CA for one cluster, and a certificate for each of its hosts.

mod authority;
mod files;
mod show;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Subcommand;

use crate::terminal::Terminal;
use authority::{Authority, HostNames};

#[derive(Subcommand)]
pub(crate) enum CertsCommand {
    /// Makes a private CA: ca.pem, which every host gets, and ca.key, which none does.
    Init {
        /// Directory that it is written to.
        #[arg(long, default_value = "certs")]
        out: PathBuf,
        /// How long the CA lasts.
        #[arg(long, default_value_t = 3650, value_parser = days())]
        days: u32,
    },
    /// Issues one host's certificate: the three files that `[tls]` names.
    Issue {
        /// The names and addresses by which others dial the host. The first names its directory.
        #[arg(required = true)]
        host: Vec<String>,
        /// A worker that the host runs: it may attach under this name, and no other. May be given
        /// several times; without any, the host may attach as any worker.
        #[arg(long)]
        worker: Vec<String>,
        /// The CA's directory. The host's is made in it.
        #[arg(long, default_value = "certs")]
        ca: PathBuf,
        /// How long the certificate lasts.
        #[arg(long, default_value_t = 365, value_parser = days())]
        days: u32,
        /// Replaces the host's former certificate and key.
        #[arg(long)]
        renew: bool,
    },
    /// Begins the CA's rotation: a new one signs, and ca.pem holds both, so that hosts trust both.
    Rotate {
        /// The CA's directory.
        #[arg(long, default_value = "certs")]
        ca: PathBuf,
        /// How long the new CA lasts.
        #[arg(long, default_value_t = 3650, value_parser = days())]
        days: u32,
    },
    /// Ends the CA's rotation: ca.pem holds the new one alone.
    Retire {
        /// The CA's directory.
        #[arg(long, default_value = "certs")]
        ca: PathBuf,
    },
    /// Shows certificates: names, workers, expiry. Fails where one has expired.
    Show {
        /// PEM files, or directories of them.
        #[arg(default_value = "certs")]
        path: Vec<PathBuf>,
    },
}

/// A hundred years are for ever.
fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=36_500)
}

pub(crate) fn run(command: &CertsCommand) -> anyhow::Result<ExitCode> {
    let mut terminal = Terminal::stdout();
    let made = match command {
        CertsCommand::Init { out, days } => {
            Authority::init(out, *days)?;
            vec![out.join(authority::CERTIFICATE)]
        }
        CertsCommand::Issue { host, worker, ca, days, renew } => {
            let names = HostNames::new(host, worker)?;
            let authority = Authority::open(ca).with_context(|| {
                format!("{} holds no CA: `baton certs init --out {0}` makes one", ca.display())
            })?;
            let directory = authority.issue(&names, *days, *renew)?;
            warn_of_the_authority(ca, *days, &mut terminal)?;
            vec![directory.join(authority::HOST_CERTIFICATE)]
        }
        CertsCommand::Rotate { ca, days } => {
            Authority::rotate(ca, *days)?;
            terminal.say(
                "1. give every host the new ca.pem; 2. renew and give out each host's certificate \
                 (`baton certs issue --renew`); 3. `baton certs retire`, and give out ca.pem again",
            );
            vec![ca.join(authority::CERTIFICATE)]
        }
        CertsCommand::Retire { ca } => {
            Authority::retire(ca)?;
            vec![ca.join(authority::CERTIFICATE)]
        }
        CertsCommand::Show { path } => return show::run(path, &mut terminal),
    };
    show::run(&made, &mut terminal)
}

/// A host's certificate is worth nothing once its CA's has expired.
fn warn_of_the_authority(ca: &Path, days: u32, terminal: &mut Terminal) -> anyhow::Result<()> {
    let left = show::days_left(&ca.join(authority::CERTIFICATE))?;
    if left < i64::from(days) {
        let warning = format!("the CA itself expires in {left} days: `baton certs rotate`");
        terminal.say(&crate::terminal::pending(&warning).to_string());
    }
    Ok(())
}
