//! Which channels a worker's blocks take, by what its configuration allows and this machine has.

use std::{fmt, path::Path, sync::Arc};

use baton_config::{CheckChoice, Requirement, TransferConfig, TransportChoice};
use baton_transfer::{
    BindError, Channel, Check, Exports, NearestChannel, QuicChannel, QuicConfig, ShmBindError,
    ShmChannel, ShmConfig, UcxBindError, UcxChannel, UcxConfig,
};
use baton_types::HandoffId;
use baton_ucx::Options;

/// Where the kernel lists RDMA devices.
pub const RDMA_DEVICES: &str = "/sys/class/infiniband";

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error(transparent)]
    Quic(#[from] BindError),
    #[error("transfer.transport = \"{}\": {source}", asked_for.as_str())]
    Ucx { asked_for: TransportChoice, source: UcxBindError },
    #[error("transfer.transport = \"shm\": {0}")]
    Shm(#[from] ShmBindError),
    #[error(
        "transfer.require = [\"{}\"] cannot be met by transport \"{}\": {reason}",
        requirement.as_str(), transport.as_str()
    )]
    Unmet { requirement: Requirement, transport: TransportChoice, reason: &'static str },
    #[error("transfer.transport leaves nothing to open")]
    Nothing,
}

/// What is to be opened. With each peer the first of them is taken that it has, too: shared memory, UCX,
/// QUIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub shm: bool,
    pub ucx: bool,
    pub quic: bool,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.shm, TransportChoice::Shm),
            (self.ucx, TransportChoice::Ucx),
            (self.quic, TransportChoice::Quic),
        ];
        let names = all.iter().filter(|(is_chosen, _)| *is_chosen).map(|(_, name)| name.as_str());
        f.write_str(&names.collect::<Vec<_>>().join(", else "))
    }
}

/// What is to be opened, by the configuration and by whether there is an RDMA device.
pub fn choose(config: &TransferConfig, has_rdma: bool) -> Result<Chosen, TransportError> {
    let is_required = |requirement| config.require.contains(&requirement);
    let (rdma, encrypted) = (is_required(Requirement::Rdma), is_required(Requirement::Encrypted));
    let transport = config.transport;
    let unmet = |requirement, reason| Err(TransportError::Unmet { requirement, transport, reason });
    match transport {
        TransportChoice::Auto if rdma && encrypted => {
            unmet(Requirement::Encrypted, "only UCX goes by RDMA, and it encrypts nothing")
        }
        TransportChoice::Auto => {
            // Memory of one user on one host is read by whoever can read the arenas anyway.
            Ok(Chosen { shm: !rdma, ucx: rdma || has_rdma && !encrypted, quic: !rdma })
        }
        TransportChoice::Quic if rdma => {
            unmet(Requirement::Rdma, "QUIC goes through the kernel; \"ucx\" may go by RDMA")
        }
        TransportChoice::Shm if rdma => {
            unmet(Requirement::Rdma, "shared memory has no network card; \"ucx\" may go by RDMA")
        }
        TransportChoice::Ucx if encrypted => {
            unmet(Requirement::Encrypted, "UCX encrypts nothing; \"quic\" does")
        }
        TransportChoice::Quic => Ok(Chosen { shm: false, ucx: false, quic: true }),
        TransportChoice::Shm => Ok(Chosen { shm: true, ucx: false, quic: false }),
        TransportChoice::Ucx => Ok(Chosen { shm: false, ucx: true, quic: false }),
    }
}

/// Whether the kernel knows any; whether UCX can use one is for UCX to say.
pub fn has_rdma_device(listed_in: &Path) -> bool {
    std::fs::read_dir(listed_in).is_ok_and(|mut devices| devices.next().is_some())
}

/// Channels that are open, and what others must know to reach them.
pub struct OpenTransport {
    pub channel: Arc<dyn Channel>,
    /// `host:port`, or a socket's path where there is shared memory alone.
    pub address: String,
    pub certificate_fingerprint: [u8; 32],
    network: Option<Network>,
}

enum Network {
    Quic(Arc<QuicChannel>),
    Ucx(Arc<UcxChannel>),
}

impl Network {
    fn control(&self) -> &QuicChannel {
        match self {
            Self::Quic(quic) => quic,
            Self::Ucx(ucx) => ucx.control(),
        }
    }

    fn address(&self) -> String {
        self.control().local_address().to_string()
    }

    fn channel(&self) -> Arc<dyn Channel> {
        match self {
            Self::Quic(quic) => quic.clone(),
            Self::Ucx(ucx) => ucx.clone(),
        }
    }
}

impl fmt::Debug for OpenTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenTransport")
            .field("transports", &self.channel.transports())
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl OpenTransport {
    /// Ends every handoff and waits until the peers were told.
    pub async fn close(&self) {
        if let Some(network) = &self.network {
            network.control().close().await;
        }
    }
}

/// Opens what the configuration asks for, or says what is missing for it. Sockets for peers on this host
/// are made in the arenas' directory.
pub fn open(
    config: &TransferConfig,
    directory: &Path,
    exports: &Arc<dyn Exports>,
) -> Result<OpenTransport, TransportError> {
    let chosen = choose(config, has_rdma_device(Path::new(RDMA_DEVICES)))?;
    let network = open_network(config, chosen, exports)?;
    let certificate_fingerprint = match &network {
        Some(network) => network.control().certificate_fingerprint(),
        None => fresh_name(),
    };
    let shm = chosen.shm.then(|| {
        let directory = directory.to_owned();
        let stall_timeout = config.stall_timeout;
        let shm = ShmConfig { directory, certificate_fingerprint, stall_timeout };
        ShmChannel::bind(shm, exports.clone())
    });
    let (channel, address): (Arc<dyn Channel>, String) = match (shm, &network) {
        (Some(Ok(shm)), Some(network)) => {
            (Arc::new(NearestChannel::new(shm, network.channel())), network.address())
        }
        (Some(Ok(shm)), None) => {
            let address = shm.path().display().to_string();
            (shm, address)
        }
        (Some(Err(error)), Some(network)) => {
            tracing::warn!(%error, "no shared memory with peers on this host");
            (network.channel(), network.address())
        }
        (None, Some(network)) => (network.channel(), network.address()),
        (Some(Err(error)), None) => return Err(error.into()),
        (None, None) => return Err(TransportError::Nothing),
    };
    tracing::info!(
        asked_for = config.transport.as_str(),
        transports = channel.transports().join(" "),
        address,
        "blocks pass between workers"
    );
    Ok(OpenTransport { channel, address, certificate_fingerprint, network })
}

fn open_network(
    config: &TransferConfig,
    chosen: Chosen,
    exports: &Arc<dyn Exports>,
) -> Result<Option<Network>, TransportError> {
    let control = QuicConfig {
        listen: config.listen,
        max_mtu_bytes: config.max_mtu_bytes,
        stall_timeout: config.stall_timeout,
        check: match config.check {
            CheckChoice::Crc => Check::Crc,
            CheckChoice::Blake3 => Check::Blake3,
        },
    };
    if chosen.ucx {
        let ucx = Options { library: config.ucx_library.clone(), ..Options::default() };
        let require_rdma = config.require.contains(&Requirement::Rdma);
        let ucx = UcxConfig { control, ucx, require_rdma, or_quic: chosen.quic };
        match UcxChannel::bind(ucx, exports.clone()) {
            Ok(ucx) => return Ok(Some(Network::Ucx(ucx))),
            Err(error) if chosen.quic => {
                tracing::warn!(%error, "an RDMA device, and no UCX: blocks go by QUIC");
            }
            Err(source) => {
                return Err(TransportError::Ucx { asked_for: config.transport, source });
            }
        }
    }
    let quic = chosen.quic.then(|| QuicChannel::bind(control, exports.clone())).transpose()?;
    Ok(quic.map(Network::Quic))
}

/// What stands for a certificate's fingerprint where there is no network, and so no certificate.
fn fresh_name() -> [u8; 32] {
    let mut name = [0; 32];
    let (first, second) = name.split_at_mut(16);
    first.copy_from_slice(HandoffId::random().as_bytes());
    second.copy_from_slice(HandoffId::random().as_bytes());
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        transport: TransportChoice,
        require: &[Requirement],
        has_rdma: bool,
    ) -> Result<String, String> {
        let require = require.to_vec();
        let config = TransferConfig { transport, require, ..TransferConfig::default() };
        let chosen = choose(&config, has_rdma).map_err(|error| error.to_string())?;
        Ok(chosen.to_string())
    }

    #[test]
    fn auto_takes_the_best_that_is_there_and_what_is_named_alone() {
        use Requirement::{Encrypted, Rdma};
        use TransportChoice::{Auto, Quic, Shm, Ucx};
        let told = |text: &str| Ok(text.to_owned());
        assert_eq!(chosen(Auto, &[], false), told("shm, else quic"));
        assert_eq!(chosen(Auto, &[], true), told("shm, else ucx, else quic"));
        assert_eq!(chosen(Auto, &[Encrypted], true), told("shm, else quic"));
        // Opening it then says which device is missing.
        assert_eq!(chosen(Auto, &[Rdma], false), told("ucx"));
        for named in [Quic, Ucx, Shm] {
            assert_eq!(chosen(named, &[], true), told(named.as_str()));
        }
    }

    #[test]
    fn what_a_transport_cannot_meet_is_refused_by_name() {
        use Requirement::{Encrypted, Rdma};
        use TransportChoice::{Auto, Quic, Shm, Ucx};
        for (transport, require, named) in [
            (Quic, vec![Rdma], "[\"rdma\"]"),
            (Shm, vec![Rdma], "[\"rdma\"]"),
            (Ucx, vec![Encrypted], "[\"encrypted\"]"),
            (Auto, vec![Rdma, Encrypted], "[\"encrypted\"]"),
        ] {
            let told = chosen(transport, &require, true).unwrap_err();
            assert!(told.contains(named) && told.contains(transport.as_str()), "{told}");
        }
    }

    struct Nothing;

    #[async_trait::async_trait]
    impl Exports for Nothing {
        async fn attach(
            &self,
            _: &baton_transfer::Subscription,
            _: [u8; 32],
        ) -> Result<Box<dyn baton_transfer::ExportStream>, baton_transfer::Refusal> {
            Err(baton_transfer::Refusal::UnknownHandoff)
        }
    }

    fn opened(config: &TransferConfig, directory: &Path) -> Result<OpenTransport, TransportError> {
        open(config, directory, &(Arc::new(Nothing) as Arc<dyn Exports>))
    }

    #[tokio::test]
    async fn a_missing_library_is_named_and_nothing_else_is_opened_instead() {
        let config = TransferConfig {
            require: vec![Requirement::Rdma],
            ucx_library: Some("/nowhere/libucp.so.0".into()),
            ..TransferConfig::default()
        };
        let told = opened(&config, Path::new("/nowhere")).unwrap_err().to_string();
        assert!(told.contains("/nowhere/libucp.so.0"), "{told}");
    }

    #[tokio::test]
    async fn without_a_place_for_its_socket_auto_does_without_shared_memory_and_shm_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let auto = TransferConfig::default();
        let shm = TransferConfig { transport: TransportChoice::Shm, ..auto.clone() };
        let first = |transport: OpenTransport| transport.channel.transports()[0].clone();
        assert_eq!(first(opened(&auto, directory.path()).unwrap()), "shm");
        assert_eq!(first(opened(&shm, directory.path()).unwrap()), "shm");
        let nowhere = directory.path().join("nowhere");
        assert_ne!(first(opened(&auto, &nowhere).unwrap()), "shm");
        let told = opened(&shm, &nowhere).unwrap_err().to_string();
        assert!(told.contains("nowhere") && told.contains("\"shm\""), "{told}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "sockets are removed");
    }
}
