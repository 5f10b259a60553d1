//! Loopback ports for a cluster on this machine.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

use anyhow::Context as _;
use baton_config::AdminConfig;

/// Ports that nobody listens on. All are held until this goes, so that they differ; another program can then still be
/// quicker than the one that they are meant for, which says so.
#[derive(Debug, Default)]
pub(super) struct Ports(Vec<TcpListener>);

impl Ports {
    fn hold(&mut self, address: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        self.0.push(listener);
        Ok(address)
    }

    pub(super) fn any(&mut self) -> anyhow::Result<SocketAddr> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        self.hold(any).context("cannot find a free loopback port")
    }

    /// The address for clients, if nobody listens there.
    pub(super) fn for_clients(&mut self, port: u16) -> anyhow::Result<SocketAddr> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        match self.hold(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let other = self.any()?.port();
                anyhow::bail!(
                    "port {port} is taken: stop what listens on {address}, or choose another, such as \
                     --port {other}"
                )
            }
            held => held.with_context(|| format!("cannot listen on {address}")),
        }
    }

    /// The address for operators: the usual one if nobody listens there. Whoever asks for any port for
    /// clients is not the only one here, and gets any for operators too.
    pub(super) fn for_operators(&mut self, clients_port: u16) -> anyhow::Result<SocketAddr> {
        match clients_port {
            0 => self.any(),
            _ => self.hold(AdminConfig::default().listen).or_else(|_| self.any()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_a_way_out() {
        let mut holder = Ports::default();
        let taken = holder.any().unwrap().port();
        let mut ports = Ports::default();
        let error = ports.for_clients(taken).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {taken} is taken: ")), "{error}");
        assert!(error.contains("--port "), "{error}");
        drop(holder);
        assert_eq!(ports.for_clients(taken).unwrap().port(), taken);
    }

    /// Whatever each is for.
    #[test]
    fn ports_differ() {
        let mut ports = Ports::default();
        let mut found = vec![ports.for_clients(0).unwrap(), ports.for_operators(0).unwrap()];
        found.extend((0..200).map(|_| ports.any().unwrap()));
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), 202);
        assert!(found.iter().all(|address| address.port() != 0));
    }
}
