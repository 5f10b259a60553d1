//! Which channel a worker's blocks take, by what its configuration allows and this machine has.

use std::{path::Path, sync::Arc};

use baton_config::{Requirement, TransferConfig, TransportChoice};
use baton_transfer::{
    BindError, Channel, Exports, QuicChannel, QuicConfig, UcxBindError, UcxChannel, UcxConfig,
};
use baton_ucx::Options;

/// Where the kernel lists RDMA devices.
pub const RDMA_DEVICES: &str = "/sys/class/infiniband";

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error(transparent)]
    Quic(#[from] BindError),
    #[error("transfer.transport = \"ucx\": {0}")]
    Ucx(#[from] UcxBindError),
    #[error(
        "transfer.require = [\"{}\"] cannot be met by transport \"{}\": {reason}",
        requirement.as_str(), transport.as_str()
    )]
    Unmet { requirement: Requirement, transport: TransportChoice, reason: &'static str },
    #[error("transfer.transport = \"shm\" is not in this version; \"quic\" and \"ucx\" are")]
    NoShm,
}

/// A channel that is open, and what others must know to reach it.
pub struct OpenTransport {
    pub channel: Arc<dyn Channel>,
    control: Control,
}

enum Control {
    Quic(Arc<QuicChannel>),
    Ucx(Arc<UcxChannel>),
}

impl std::fmt::Debug for OpenTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenTransport")
            .field("transport", &self.channel.transport())
            .finish_non_exhaustive()
    }
}

impl OpenTransport {
    /// The QUIC endpoint on which handoffs are agreed, whatever carries the blocks.
    pub fn control(&self) -> &QuicChannel {
        match &self.control {
            Control::Quic(quic) => quic,
            Control::Ucx(ucx) => ucx.control(),
        }
    }

    /// Where blocks go by UCX.
    pub fn ucx(&self) -> Option<&UcxChannel> {
        match &self.control {
            Control::Quic(_) => None,
            Control::Ucx(ucx) => Some(ucx),
        }
    }
}

/// Opens what the configuration asks for, or says what is missing for it.
pub fn open(
    config: &TransferConfig,
    exports: Arc<dyn Exports>,
) -> Result<OpenTransport, TransportError> {
    let chosen = choose(config, has_rdma_device(Path::new(RDMA_DEVICES)))?;
    let control = QuicConfig {
        listen: config.listen,
        max_mtu_bytes: config.max_mtu_bytes,
        stall_timeout: config.stall_timeout,
    };
    let opened = match chosen {
        TransportChoice::Shm => return Err(TransportError::NoShm),
        TransportChoice::Ucx => {
            let ucx = Options { library: config.ucx_library.clone(), ..Options::default() };
            let require_rdma = config.require.contains(&Requirement::Rdma);
            let ucx = UcxChannel::bind(UcxConfig { control, ucx, require_rdma }, exports)?;
            OpenTransport { channel: ucx.clone(), control: Control::Ucx(ucx) }
        }
        TransportChoice::Auto | TransportChoice::Quic => {
            let quic = QuicChannel::bind(control, exports)?;
            OpenTransport { channel: quic.clone(), control: Control::Quic(quic) }
        }
    };
    tracing::info!(
        asked_for = config.transport.as_str(),
        transport = opened.channel.transport(),
        address = %opened.control().local_address(),
        "blocks pass between workers"
    );
    Ok(opened)
}

/// What is to be opened: never `Auto`.
pub fn choose(config: &TransferConfig, has_rdma: bool) -> Result<TransportChoice, TransportError> {
    let is_required = |requirement| config.require.contains(&requirement);
    let chosen = match config.transport {
        TransportChoice::Auto if is_required(Requirement::Rdma) => TransportChoice::Ucx,
        TransportChoice::Auto if has_rdma && !is_required(Requirement::Encrypted) => {
            TransportChoice::Ucx
        }
        TransportChoice::Auto => TransportChoice::Quic,
        asked_for => asked_for,
    };
    let unmet =
        |requirement, reason| Err(TransportError::Unmet { requirement, transport: chosen, reason });
    match chosen {
        TransportChoice::Ucx if is_required(Requirement::Encrypted) => {
            unmet(Requirement::Encrypted, "UCX encrypts nothing; \"quic\" does")
        }
        TransportChoice::Quic if is_required(Requirement::Rdma) => {
            unmet(Requirement::Rdma, "QUIC goes through the kernel; \"ucx\" may go by RDMA")
        }
        TransportChoice::Shm => Err(TransportError::NoShm),
        chosen => Ok(chosen),
    }
}

/// Whether the kernel knows any; whether UCX can use one is for UCX to say.
pub fn has_rdma_device(listed_in: &Path) -> bool {
    std::fs::read_dir(listed_in).is_ok_and(|mut devices| devices.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        transport: TransportChoice,
        require: &[Requirement],
        has_rdma: bool,
    ) -> Result<TransportChoice, String> {
        let require = require.to_vec();
        let config = TransferConfig { transport, require, ..TransferConfig::default() };
        choose(&config, has_rdma).map_err(|error| error.to_string())
    }

    #[test]
    fn auto_takes_ucx_only_for_rdma_and_quic_where_it_must_be_encrypted() {
        use Requirement::{Encrypted, Rdma};
        use TransportChoice::{Auto, Quic, Ucx};
        assert_eq!(chosen(Auto, &[], false), Ok(Quic));
        assert_eq!(chosen(Auto, &[], true), Ok(Ucx));
        assert_eq!(chosen(Auto, &[Encrypted], true), Ok(Quic));
        // Opening it then says which device is missing.
        assert_eq!(chosen(Auto, &[Rdma], false), Ok(Ucx));
        assert_eq!(chosen(Ucx, &[], false), Ok(Ucx));
    }

    #[test]
    fn what_a_transport_cannot_meet_is_refused_by_name() {
        use Requirement::{Encrypted, Rdma};
        use TransportChoice::{Auto, Quic, Shm, Ucx};
        for (transport, require, named) in [
            (Quic, vec![Rdma], "[\"rdma\"]"),
            (Ucx, vec![Encrypted], "[\"encrypted\"]"),
            (Auto, vec![Rdma, Encrypted], "[\"encrypted\"]"),
            (Shm, vec![], "shm"),
        ] {
            let told = chosen(transport, &require, true).unwrap_err();
            assert!(told.contains(named), "{told}");
        }
    }

    #[tokio::test]
    async fn a_missing_library_is_named_and_nothing_else_is_opened_instead() {
        struct Nothing;
        #[async_trait::async_trait]
        impl Exports for Nothing {
            async fn attach(
                &self,
                _: &baton_transfer::Subscription,
                _: [u8; 32],
            ) -> Result<Box<dyn baton_transfer::ExportStream>, baton_transfer::Refusal>
            {
                Err(baton_transfer::Refusal::UnknownHandoff)
            }
        }
        let config = TransferConfig {
            require: vec![Requirement::Rdma],
            ucx_library: Some("/nowhere/libucp.so.0".into()),
            ..TransferConfig::default()
        };
        let told = open(&config, Arc::new(Nothing)).unwrap_err().to_string();
        assert!(told.contains("/nowhere/libucp.so.0"), "{told}");
    }
}
