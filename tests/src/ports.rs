//! Ports for servers that must be told theirs.

use std::{
    net::{TcpListener, UdpSocket},
    process,
    sync::atomic::{AtomicU16, Ordering::Relaxed},
};

/// Below those that the kernel gives to whoever asks for any, connections among them.
const FIRST: u16 = 12_000;
const COUNT: u16 = 20_000;
/// Processes of tests that run at once begin so far from each other.
const APART: u32 = 512;

static GIVEN: AtomicU16 = AtomicU16::new(0);

/// A port that is free for TCP and for UDP, and that this process gives to nobody else.
pub fn free_port() -> u16 {
    let begin = process::id().wrapping_mul(APART) % u32::from(COUNT);
    loop {
        let at = (begin + u32::from(GIVEN.fetch_add(1, Relaxed))) % u32::from(COUNT);
        let port = FIRST + u16::try_from(at).expect("below COUNT");
        if TcpListener::bind(("127.0.0.1", port)).is_ok()
            && UdpSocket::bind(("127.0.0.1", port)).is_ok()
        {
            return port;
        }
    }
}
