//! How the socket and the connections are set up: measured, so change them with a measurement.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};

/// The kernel takes up to ten datagrams in one call and 65,507 bytes in all; past that sends vanish
/// without an error.
const LARGEST_MTU_BYTES: u16 = 6500;

/// Every QUIC path carries this much.
const SMALLEST_MTU_BYTES: u16 = 1200;

/// A peer that is gone is noticed within the sum of the two.
const IDLE_TIMEOUT_MS: u32 = 1500;
const KEEP_ALIVE: Duration = Duration::from_millis(400);

/// What a consumer that places nothing can make its peer send, for each handoff, and for all of one
/// peer together.
const STREAM_WINDOW_BYTES: u32 = 32 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 128 << 20;

/// Not yet acknowledged bytes of one connection, which keep their blocks' slots. What the peer's
/// socket can hold: more only makes it drop datagrams when its process is late.
const SEND_WINDOW_BYTES: u64 = 4 << 20;

/// Handoffs from one peer at a time; further ones wait.
const CONCURRENT_HANDOFFS: u32 = 1024;

const SOCKET_BUFFER_BYTES: usize = 4 << 20;

pub(super) fn mtu_bytes(wanted: u16) -> u16 {
    wanted.clamp(SMALLEST_MTU_BYTES, LARGEST_MTU_BYTES)
}

pub(super) fn endpoint(max_mtu_bytes: u16) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // Refuses nothing in the range of `mtu_bytes`.
    let _ = config.max_udp_payload_size(mtu_bytes(max_mtu_bytes));
    config
}

/// For either side; the dialling one keeps the connection alive for both.
pub(super) fn transport(max_mtu_bytes: u16, keep_alive: bool) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(mtu_bytes(max_mtu_bytes)).black_hole_cooldown(Duration::from_secs(5));
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(CONCURRENT_HANDOFFS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(keep_alive.then_some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .mtu_discovery_config(Some(mtu));
    Arc::new(config)
}

pub(super) fn socket(listen: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    // The kernel caps them at its own limits, and smaller ones only cost speed.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.bind(&listen.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
