//! Between two UDP sockets.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::UdpSocket,
    task::{JoinHandle, JoinSet},
    time::sleep,
};

/// Of a hundred datagrams each.
const DROPPED: u32 = 1;
const DUPLICATED: u32 = 1;
const FLIPPED: u32 = 1;
const TRUNCATED: u32 = 1;
const DELAYED: u32 = 2;
/// Of a hundred thousand: after it, nothing passes for a while.
const DEAF: u32 = 2;

/// Longer than a peer may be silent before it counts as gone.
const DEAF_FOR: Duration = Duration::from_millis(2500);

/// Passes datagrams on to a socket and back, less than faithfully. Ends when dropped.
#[derive(Debug)]
pub struct DatagramRelay {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for DatagramRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl DatagramRelay {
    /// Must be called in a tokio runtime.
    pub async fn start(to: SocketAddr, seed: u64) -> io::Result<Self> {
        let near = Arc::new(UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?);
        let address = near.local_addr()?;
        let task = tokio::spawn(relay(near, to, seed));
        Ok(Self { address, task })
    }

    /// Where peers shall send.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn relay(near: Arc<UdpSocket>, to: SocketAddr, seed: u64) {
    let mut ways: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    // Ends what it has when it is dropped.
    let mut ways_back = JoinSet::new();
    let mut weather = Weather::new(seed);
    let mut buffer = vec![0; 1 << 16];
    loop {
        // A peer that is gone makes its socket answer with errors for a while.
        let Ok((len, from)) = near.recv_from(&mut buffer).await else { continue };
        if !ways.contains_key(&from) {
            let Ok(far) = UdpSocket::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await else {
                continue;
            };
            if far.connect(to).await.is_err() {
                continue;
            }
            let far = Arc::new(far);
            let seed = seed.wrapping_add(ways.len() as u64 + 1);
            ways_back.spawn(way_back(far.clone(), near.clone(), from, seed));
            ways.insert(from, far);
        }
        if let Some(far) = ways.get(&from) {
            weather.pass(&buffer[..len], far, None);
        }
    }
}

async fn way_back(far: Arc<UdpSocket>, near: Arc<UdpSocket>, to: SocketAddr, seed: u64) {
    let mut weather = Weather::new(seed);
    let mut buffer = vec![0; 1 << 16];
    loop {
        if let Ok(len) = far.recv(&mut buffer).await {
            weather.pass(&buffer[..len], &near, Some(to));
        }
    }
}

struct Weather {
    random: fastrand::Rng,
    deaf_until: Instant,
}

impl Weather {
    fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), deaf_until: Instant::now() }
    }

    fn pass(&mut self, datagram: &[u8], by: &Arc<UdpSocket>, to: Option<SocketAddr>) {
        let now = Instant::now();
        if self.random.u32(..100_000) < DEAF {
            self.deaf_until = now + DEAF_FOR;
        }
        let dice = self.random.u32(..100);
        let mut bounds = [DROPPED, DUPLICATED, FLIPPED, TRUNCATED, DELAYED].into_iter().scan(
            0,
            |bound, share| {
                *bound += share;
                Some(*bound)
            },
        );
        let what = bounds.position(|bound| dice < bound);
        if now < self.deaf_until || what == Some(0) {
            return;
        }
        let mut bytes = datagram.to_vec();
        match what {
            Some(1) => send(by, to, &bytes),
            Some(2) => bytes = super::flipped(&bytes, self.random.u64(..)),
            Some(3) => bytes.truncate(self.random.usize(..=bytes.len())),
            Some(4) => {
                let (by, delay) = (by.clone(), Duration::from_millis(self.random.u64(1..20)));
                tokio::spawn(async move {
                    sleep(delay).await;
                    send(&by, to, &bytes);
                });
                return;
            }
            _ => {}
        }
        send(by, to, &bytes);
    }
}

/// What finds no room is lost, as on any network.
fn send(by: &UdpSocket, to: Option<SocketAddr>, bytes: &[u8]) {
    let _ = match to {
        Some(to) => by.try_send_to(bytes, to),
        None => by.try_send(bytes),
    };
}
