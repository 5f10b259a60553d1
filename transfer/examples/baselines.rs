//! What channels are measured beside: the same bytes over TLS 1.3 on one TCP stream, over quinn as it comes, and over
//! quinn set up as the channel sets it up (`quinn-6500`, by the largest UDP payload), from one process to another.
//! Nothing is verified, and nothing is placed but into the block's own place.
//!
//! `baselines tls|quinn|quinn-6500 BLOCK_BYTES BYTES` prints GB/s, the median of five rounds after one that warms up.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)] // A measurement ends where it cannot go on.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use socket2::{Domain, Protocol, Socket, Type};

const ROUNDS: usize = 5;
const NAME: &str = "localhost";

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [name, block, bytes, rest @ ..] = &arguments[..] else {
        panic!("baselines tls|quinn|quinn-6500 BLOCK_BYTES BYTES");
    };
    let (block, bytes): (usize, usize) = (block.parse().unwrap(), bytes.parse().unwrap());
    let _ = provider().install_default();
    if rest.is_empty() {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([name, &block.to_string(), &bytes.to_string(), "send"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (port, certificate) = line.trim().split_once(' ').unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().unwrap()));
        let certificate = CertificateDer::from(from_hex(certificate));
        let mut seconds = match name.as_str() {
            "tls" => receive_tls(address, certificate, block, bytes),
            name => receive_quinn(&setup(name), address, certificate, block, bytes),
        };
        child.kill().unwrap();
        child.wait().unwrap();
        seconds.remove(0);
        seconds.sort_by(f64::total_cmp);
        #[allow(clippy::cast_precision_loss)] // Far below 2^52.
        let moved = (bytes / block * block) as f64;
        println!("{}", moved / 1e9 / seconds[ROUNDS / 2]);
    } else {
        match name.as_str() {
            "tls" => send_tls(block, bytes),
            name => send_quinn(&setup(name), block, bytes),
        }
    }
}

/// The same suite as the channel's.
fn provider() -> rustls::crypto::CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    provider
}

fn identity() -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    (made.cert.der().clone(), key.into())
}

fn announce(port: u16, certificate: &CertificateDer<'_>) {
    let hex: String = certificate.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{port} {hex}");
    std::io::stdout().flush().unwrap();
}

fn from_hex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

fn trusting(certificate: CertificateDer<'static>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    roots
}

/// Blocks of a round, in places that are no neighbours.
fn places(block: usize, bytes: usize) -> (Vec<u8>, Vec<usize>) {
    let blocks = bytes / block;
    let mut order: Vec<usize> = (0..blocks).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    (vec![1; blocks * block], order)
}

fn send_tls(block: usize, bytes: usize) {
    let (certificate, key) = identity();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    announce(listener.local_addr().unwrap().port(), &certificate);
    let (socket, _) = listener.accept().unwrap();
    socket.set_nodelay(true).unwrap();
    let connection = ServerConnection::new(Arc::new(config)).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    let (memory, order) = places(block, bytes);
    while stream.read_exact(&mut [0]).is_ok() {
        for place in &order {
            stream.write_all(&memory[place * block..(place + 1) * block]).unwrap();
        }
        stream.flush().unwrap();
    }
}

fn receive_tls(
    address: SocketAddr,
    certificate: CertificateDer<'static>,
    block: usize,
    bytes: usize,
) -> Vec<f64> {
    let config =
        ClientConfig::builder().with_root_certificates(trusting(certificate)).with_no_client_auth();
    let connection = ClientConnection::new(Arc::new(config), NAME.try_into().unwrap()).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    let (mut memory, order) = places(block, bytes);
    let mut round = || {
        let begun = Instant::now();
        stream.write_all(&[1]).unwrap();
        stream.flush().unwrap();
        for place in order.iter().rev() {
            stream.read_exact(&mut memory[place * block..(place + 1) * block]).unwrap();
        }
        begun.elapsed().as_secs_f64()
    };
    (0..=ROUNDS).map(|_| round()).collect()
}

fn on_one_thread(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work);
}

/// How an endpoint is set up.
#[derive(Default)]
struct Setup {
    endpoint: quinn::EndpointConfig,
    transport: Arc<quinn::TransportConfig>,
    socket_buffer_bytes: Option<usize>,
}

/// As it comes, or as in `quic/tuning.rs`.
fn setup(name: &str) -> Setup {
    if name == "quinn" {
        return Setup::default();
    }
    let mut setup = Setup { socket_buffer_bytes: Some(4 << 20), ..Setup::default() };
    setup.endpoint.max_udp_payload_size(6500).unwrap();
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(6500);
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window((32_u32 << 20).into())
        .receive_window((128_u32 << 20).into())
        .send_window(4 << 20)
        .mtu_discovery_config(Some(mtu));
    setup.transport = Arc::new(transport);
    setup
}

impl Setup {
    fn endpoint(&self, server: Option<quinn::ServerConfig>) -> quinn::Endpoint {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        if let Some(bytes) = self.socket_buffer_bytes {
            socket.set_recv_buffer_size(bytes).unwrap();
            socket.set_send_buffer_size(bytes).unwrap();
        }
        socket.bind(&any.into()).unwrap();
        let runtime = Arc::new(quinn::TokioRuntime);
        quinn::Endpoint::new(self.endpoint.clone(), server, socket.into(), runtime).unwrap()
    }
}

fn send_quinn(setup: &Setup, block: usize, bytes: usize) {
    let (certificate, key) = identity();
    let mut config = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], key).unwrap();
    config.transport_config(Arc::clone(&setup.transport));
    on_one_thread(async {
        let endpoint = setup.endpoint(Some(config));
        announce(endpoint.local_addr().unwrap().port(), &certificate);
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (memory, order) = places(block, bytes);
        let memory = bytes::Bytes::from(memory);
        while let Ok((mut send, mut recv)) = connection.accept_bi().await {
            recv.read_to_end(1).await.unwrap();
            for place in &order {
                send.write_chunk(memory.slice(place * block..(place + 1) * block)).await.unwrap();
            }
            send.finish().unwrap();
        }
    });
}

fn receive_quinn(
    setup: &Setup,
    address: SocketAddr,
    certificate: CertificateDer<'static>,
    block: usize,
    bytes: usize,
) -> Vec<f64> {
    let mut config =
        quinn::ClientConfig::with_root_certificates(Arc::new(trusting(certificate))).unwrap();
    config.transport_config(Arc::clone(&setup.transport));
    let mut seconds = Vec::new();
    on_one_thread(async {
        let endpoint = setup.endpoint(None);
        let connecting = endpoint.connect_with(config, address, NAME).unwrap();
        let connection = connecting.await.unwrap();
        let (mut memory, order) = places(block, bytes);
        for _ in 0..=ROUNDS {
            let begun = Instant::now();
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(&[1]).await.unwrap();
            send.finish().unwrap();
            for place in order.iter().rev() {
                let place = &mut memory[place * block..(place + 1) * block];
                recv.read_exact(place).await.unwrap();
            }
            seconds.push(begun.elapsed().as_secs_f64());
        }
    });
    seconds
}
