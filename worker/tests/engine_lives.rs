//! An engine that comes and goes: each of its lives has an epoch of its own, and what it leaves behind
//! is cleared away. The engine is played by a server of four pages and a bare connector.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // A test says so by failing.

mod fleet;

use std::{net::SocketAddr, path::Path, time::Duration};

use baton_config::{VllmConfig, VllmSource};
use baton_proto::HandoffMode;
use baton_types::Role;
use fleet::{Fleet, timeout};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixStream},
    task::JoinHandle,
};

struct Pages {
    address: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Pages {
    async fn serve(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    if stream.read_buf(&mut request).await.unwrap() == 0 {
                        break;
                    }
                }
                let request = String::from_utf8(request).unwrap();
                let body = match request.split(' ').nth(1) {
                    Some("/v1/models") => json!({"data": [{"id": "m", "max_model_len": 64}]}),
                    Some("/version") => json!({"version": "0.0.1"}),
                    _ => json!({}),
                }
                .to_string();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, serving }
    }
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn vllm(address: SocketAddr, connector_socket: Option<&Path>) -> VllmConfig {
    VllmConfig {
        source: VllmSource::Url(format!("http://{address}")),
        connector_socket: connector_socket.map(Into::into),
        engine_handoff: false,
        start_timeout: Duration::from_secs(30),
        profile: None,
    }
}

/// Says hello as our connector does, and answers what it was told.
async fn connect(socket: &Path) -> (UnixStream, Value) {
    let mut stream = timeout(async {
        loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await;
    let hello = json!({
        "type": "hello", "protocol": 5, "connector_version": "1", "vllm_version": "0",
        "compatibility": {
            "model": "m", "revision": "", "kv_dtype": "float32", "kv_layout": "NHD",
            "block_size_tokens": 16, "block_bytes": 4096,
            "tensor_parallel_rank": 0, "tensor_parallel_size": 1, "connector_version": "1",
        },
    })
    .to_string();
    stream.write_all(&u32::try_from(hello.len()).unwrap().to_le_bytes()).await.unwrap();
    stream.write_all(hello.as_bytes()).await.unwrap();
    let length = timeout(stream.read_u32_le()).await.unwrap();
    let mut answer = vec![0; length as usize];
    timeout(stream.read_exact(&mut answer)).await.unwrap();
    (stream, serde_json::from_slice(&answer).unwrap())
}

#[tokio::test]
async fn a_connector_that_comes_again_is_a_new_epoch() {
    let mut fleet = Fleet::start().await;
    let pages = Pages::serve(any_port()).await;
    let socket = fleet.dir.path().join("kv.sock");
    let engine = vllm(pages.address, Some(&socket));
    let starting = fleet.spawn("d0", Role::Decode, baton_config::EngineConfig::Vllm(engine));

    let (connector, welcome) = connect(&socket).await;
    assert_eq!(welcome["type"], "welcome");
    let first = fleet.next_attached().await;
    assert_eq!(first.hello.handoff_mode(), HandoffMode::Fenced);
    assert_eq!(first.hello.compatibility.as_ref().unwrap().block_bytes, 4096);
    assert_eq!(
        (&first.hello.models[..], first.hello.max_model_tokens),
        (&["m".to_owned()][..], 64)
    );
    assert_eq!(first.hello.engine, "vllm 0.0.1");
    assert_eq!(first.hello.peer.as_ref().unwrap().epoch, first.hello.epoch);

    drop(connector);
    let (_connector, again) = connect(&socket).await;
    let second = fleet.next_attached().await;
    assert_ne!(first.hello.epoch, second.hello.epoch);
    assert_ne!(welcome["arena"], again["arena"]);
    timeout(first.closed()).await;

    starting.stop().await;
    let left: Vec<_> = std::fs::read_dir(fleet.dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn an_engine_that_goes_away_is_out_until_it_is_back() {
    let mut fleet = Fleet::start().await;
    let pages = Pages::serve(any_port()).await;
    let address = pages.address;
    let engine = baton_config::EngineConfig::Vllm(vllm(address, None));
    let worker = fleet.spawn("d0", Role::Decode, engine);
    let first = fleet.next_attached().await;
    assert_eq!(first.hello.handoff_mode(), HandoffMode::None);
    assert!(first.hello.peer.is_none() && first.hello.compatibility.is_none());

    drop(pages);
    timeout(first.closed()).await;
    let _pages = Pages::serve(address).await;
    let second = fleet.next_attached().await;
    assert_ne!(first.hello.epoch, second.hello.epoch);
    worker.stop().await;
}

#[tokio::test]
async fn an_engine_that_never_serves_ends_its_worker_with_a_reason() {
    let fleet = Fleet::start().await;
    let command = ["sh", "-c", "echo no such model >&2; exit 3"].map(str::to_owned).to_vec();
    let source = VllmSource::Command { command, environment: [].into(), port: 0 };
    let engine = VllmConfig { source, ..vllm(any_port(), None) };
    let worker = fleet.spawn("p0", Role::Prefill, baton_config::EngineConfig::Vllm(engine));
    let error = timeout(worker.running).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("exit status: 3") && error.contains("no such model"), "{error}");
}
