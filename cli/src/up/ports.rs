//! Loopback ports for a cluster on this machine.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

use anyhow::Context as _;
use baton_config::AdminConfig;

/// The address for clients, if nobody listens there.
pub(super) fn for_clients(port: u16) -> anyhow::Result<SocketAddr> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    match TcpListener::bind(address) {
        Ok(listener) => Ok(listener.local_addr()?),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let other = free(1)?.first().copied().unwrap_or_default();
            anyhow::bail!(
                "port {port} is taken: stop what listens on {address}, or choose another, such as \
                 --port {other}"
            )
        }
        Err(error) => Err(error).with_context(|| format!("cannot listen on {address}")),
    }
}

/// The address for operators: the usual one if nobody listens there. Whoever asks for any port for
/// clients is not the only one here, and gets any for operators too.
pub(super) fn for_operators(clients_port: u16) -> anyhow::Result<SocketAddr> {
    let usual = AdminConfig::default().listen;
    if clients_port != 0 && TcpListener::bind(usual).is_ok() {
        return Ok(usual);
    }
    let port = free(1)?.first().copied().unwrap_or_default();
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

/// Ports that nobody listens on. All are held until the last is found, so that they differ; another
/// program can still be quicker than the one that they are meant for, which then says so.
pub(super) fn free(count: usize) -> anyhow::Result<Vec<u16>> {
    let bound: io::Result<Vec<TcpListener>> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    let ports: io::Result<Vec<u16>> =
        bound.and_then(|all| all.iter().map(|one| Ok(one.local_addr()?.port())).collect());
    ports.context("cannot find free loopback ports")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_a_way_out() {
        let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = holder.local_addr().unwrap().port();
        let error = for_clients(taken).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {taken} is taken: ")), "{error}");
        assert!(error.contains("--port "), "{error}");
        drop(holder);
        assert_eq!(for_clients(taken).unwrap().port(), taken);
    }

    #[test]
    fn free_ports_differ() {
        let mut ports = free(8).unwrap();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 8);
        assert!(!ports.contains(&0));
    }
}
