use std::{pin::Pin, sync::Arc, time::Duration};

use baton_proto::{MAX_FRAME_BYTES, WINDOW_BYTES, WorkersHere, fleet_server::FleetServer};
use tokio::net::TcpListener;
use tonic::transport::{Server, server::TcpIncoming};

use super::FleetService;
use crate::{
    shell::Shell,
    tls::{TlsFiles, incoming},
};

/// Where workers come from.
pub(crate) enum Workers {
    Dial(TcpListener),
    Here(WorkersHere),
}

impl Workers {
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Dial(listener) => {
                listener.local_addr().map_or_else(|_| String::new(), |address| address.to_string())
            }
            Self::Here(_) => "in this process".to_owned(),
        }
    }

    /// Attaches workers as they come, for as long as it is driven.
    pub(crate) fn taken_in(
        self,
        shell: Shell,
        max_body_bytes: u64,
        tls: Option<Arc<TlsFiles>>,
    ) -> Pin<Box<dyn Future<Output = Result<(), tonic::transport::Error>> + Send>> {
        let service = FleetService { shell };
        let listener = match self {
            Self::Dial(listener) => listener,
            Self::Here(workers) => {
                return Box::pin(async {
                    service.take_in_all(workers).await;
                    std::future::pending().await
                });
            }
        };
        // A body of the largest size must fit into one message, with room for its headers.
        let max_message_bytes =
            usize::try_from(max_body_bytes).unwrap_or(usize::MAX).saturating_add(1 << 20);
        let service = FleetServer::new(service)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(max_message_bytes);
        let routes = Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_frame_size(MAX_FRAME_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(1)))
            .http2_keepalive_timeout(Some(Duration::from_secs(2)))
            .add_service(service);
        match tls {
            Some(tls) => Box::pin(routes.serve_with_incoming(incoming(listener, tls))),
            None => {
                let plain = TcpIncoming::from(listener).with_nodelay(Some(true));
                Box::pin(routes.serve_with_incoming(plain))
            }
        }
    }
}
