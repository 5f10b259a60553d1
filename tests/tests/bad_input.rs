//! What clients and strangers send: an error that says what is wrong, and others undisturbed.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

async fn served(cluster: &Cluster) {
    assert_eq!(cluster.complete("Is anybody there?", 4).await.path(), "disaggregated");
}

#[tokio::test]
async fn errors_have_openais_shape() {
    let cluster = ClusterBuilder::sim().limits("max_body_bytes = 100000").start().await.unwrap();
    let text = async |path: &str, body: &str| {
        let request =
            cluster.http.post(cluster.url(path)).header("content-type", "application/json");
        let response = request.body(body.to_owned()).send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        baton_tests::Answer { status, headers, text: response.text().await.unwrap() }
    };
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for broken in ["", "{", "[]", "null", "{\"stream\": \"yes\"}", "{\"max_tokens\": -3}"] {
            text(path, broken).await.assert_error(400, "invalid_body");
        }
        let reserved = json!({"kv_transfer_params": {"remote_host": "10.0.0.1"}}).to_string();
        text(path, &reserved).await.assert_error(400, "reserved_parameter");
        let hidden = json!({"vllm_xargs": {"kv_transfer_params": {}}}).to_string();
        text(path, &hidden).await.assert_error(400, "reserved_parameter");
        let large = json!({"prompt": "x".repeat(100_001)}).to_string();
        text(path, &large).await.assert_error(413, "body_too_large");
        let unknown = json!({"model": "no-such-model", "prompt": "x", "messages": []}).to_string();
        text(path, &unknown).await.assert_error(404, "model_not_found");
    }
    cluster.get("/v1/completions").await.assert_error(405, "method_not_allowed");
    cluster.get("/no/such/page").await.assert_error(404, "no_such_path");
    served(&cluster).await;
}

/// A connection that still had bytes on their way when it was closed would be reset, and its next
/// request or even the answer lost.
#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let cluster = ClusterBuilder::sim().limits("max_body_bytes = 100000").start().await.unwrap();
    let mut stream = TcpStream::connect(cluster.address()).await.unwrap();
    let head = async |stream: &mut TcpStream| {
        let mut head = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&head).contains("body_too_large") {
            let length = stream.read(&mut buffer).await.unwrap();
            assert!(length > 0, "{}", String::from_utf8_lossy(&head));
            head.extend_from_slice(&buffer[..length]);
        }
        String::from_utf8(head).unwrap().to_lowercase()
    };
    let post = |rest: &str| format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{rest}\r\n\r\n");
    for _ in 0..3 {
        stream.write_all(post("content-length: 3000000").as_bytes()).await.unwrap();
        stream.write_all(&vec![b'x'; 3_000_000]).await.unwrap();
        let answer = head(&mut stream).await;
        assert!(answer.starts_with("http/1.1 413"), "{answer}");
        assert!(!answer.contains("connection: close"), "{answer}");
    }
    // Who asks first is not invited to send.
    let asks = post("content-length: 3000000\r\nexpect: 100-continue");
    stream.write_all(asks.as_bytes()).await.unwrap();
    let answer = head(&mut stream).await;
    assert!(answer.starts_with("http/1.1 413"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    served(&cluster).await;
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_refused_with_both_numbers() {
    let cluster = ClusterBuilder::sim().engine("max_model_tokens = 100").start().await.unwrap();
    let answer = cluster.complete(vec![65; 101], 4).await;
    assert_eq!(answer.status, 400, "{}", answer.text);
    let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("100") && message.contains("101"), "{message}");
    cluster.eventually_idle().await;
    served(&cluster).await;
}

#[tokio::test]
async fn clients_that_stall_or_leave_halfway() {
    let limits = "header_timeout_seconds = 1\nbody_timeout_seconds = 1";
    let cluster = ClusterBuilder::sim().limits(limits).start().await.unwrap();
    let send = async |bytes: &str| {
        let mut stream = TcpStream::connect(cluster.address()).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        stream
    };
    let post = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n";
    let mut stalled_head = send(post).await;
    let mut stalled_body = send(&format!("{post}\r\n{{\"prompt\":")).await;
    let mut half_closed = send(&format!("{post}\r\n{{\"prompt\":")).await;
    half_closed.shutdown().await.unwrap();
    let mut garbage = send("\u{1}\u{2}\u{3} what is this\r\n\r\n").await;
    served(&cluster).await;

    let answer = async |stream: &mut TcpStream| {
        let mut text = String::new();
        let reading = stream.read_to_string(&mut text);
        tokio::time::timeout(Duration::from_secs(10), reading).await.expect("closed in time").ok();
        text
    };
    answer(&mut stalled_head).await;
    let body = answer(&mut stalled_body).await;
    assert!(body.contains("408") && body.contains("body_timeout"), "{body}");
    answer(&mut half_closed).await;
    answer(&mut garbage).await;
    served(&cluster).await;
    cluster.eventually_idle().await;
}

#[tokio::test]
async fn strangers_at_the_inner_doors() {
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    let noise: Vec<u8> = (0..5000u32).map(|i| (i * 7919 % 251) as u8).collect();

    let workers = format!("127.0.0.1:{}", cluster.workers_port());
    for start in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut stream = TcpStream::connect(&workers).await.unwrap();
        // It may hang up before all of it is written.
        let _ = stream.write_all(start).await;
        let _ = stream.write_all(&noise).await;
    }
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for name in ["prefill-0", "decode-0"] {
        for length in [1, 100, 1200, 1400] {
            let address = ("127.0.0.1", cluster.transfer_port(name));
            socket.send_to(&noise[..length], address).await.unwrap();
        }
    }
    served(&cluster).await;
    for process in ["coordinator", "prefill-0", "decode-0"] {
        assert!(!cluster.log(process).contains("panicked"), "{}", cluster.log(process));
    }
}
