//! Against a server that says exactly what a test tells it to.

use http::HeaderValue;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

async fn server() -> (TcpListener, EngineHttp) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let engine = EngineHttp::new(listener.local_addr().unwrap().to_string());
    (listener, engine)
}

fn completion() -> EngineRequest {
    let mut headers = HeaderMap::new();
    headers.insert("x-request-id", HeaderValue::from_static("r1"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    EngineRequest {
        method: Method::POST,
        path: "/v1/completions?x=1".into(),
        headers,
        body: Bytes::from_static(b"{\"prompt\":1}"),
    }
}

/// Reads one request whose body ends with a brace.
async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        let mut piece = [0; 4096];
        let read = timeout(stream.read(&mut piece)).await.unwrap();
        assert!(read > 0, "the request broke off");
        request.extend_from_slice(&piece[..read]);
    }
    String::from_utf8(request).unwrap()
}

async fn timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

async fn whole(answer: Answer) -> String {
    let chunks: Vec<_> = answer.body.map(Result::unwrap).collect().await;
    String::from_utf8(chunks.concat()).unwrap()
}

#[tokio::test]
async fn a_request_passes_and_its_connection_is_used_again() {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        for body in ["{\"a\":1}", "{\"a\":2}"] {
            let request = read_request(&mut stream).await;
            assert!(request.starts_with("POST /v1/completions?x=1 HTTP/1.1\r\n"), "{request}");
            assert!(request.contains("x-request-id: r1\r\n"), "{request}");
            assert!(request.contains("content-length: 12\r\n"), "{request}");
            assert!(!request.contains("connection:") && !request.contains("gzip"), "{request}");
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-own: y\r\n\
                 content-length: 7\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let client = async {
        for body in ["{\"a\":1}", "{\"a\":2}"] {
            let answer = engine.run(completion()).await.unwrap();
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.headers["x-own"], "y");
            assert!(!answer.headers.contains_key(header::CONTENT_LENGTH));
            assert_eq!(whole(answer).await, body);
        }
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn dropping_an_answer_closes_its_connection() {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
            transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // Reset or closed: both are the end.
        let _ = stream.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
    };
    let client = async {
        let mut answer = engine.run(completion()).await.unwrap();
        assert_eq!(answer.body.next().await.unwrap().unwrap(), "data: 1\n\n");
    };
    timeout(async { tokio::join!(server, client) }).await;

    // Before the head has come, too.
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let client = async {
        let running = engine.run(completion());
        assert!(tokio::time::timeout(Duration::from_millis(100), running).await.is_err());
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn an_idle_connection_that_was_closed_costs_no_request() {
    let (listener, engine) = server().await;
    let server = async {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await;
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
            stream.write_all(answer.as_bytes()).await.unwrap();
            // Closed without a word, as a server does whose keep-alive time is over.
        }
    };
    let client = async {
        for _ in 0..2 {
            assert_eq!(whole(engine.run(completion()).await.unwrap()).await, "{}");
        }
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_error() {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
    };
    let client = async {
        let answer = engine.run(completion()).await.unwrap();
        let chunks: Vec<_> = answer.body.collect().await;
        assert!(matches!(chunks.last(), Some(Err(EngineError::BrokeOff(_)))), "{chunks:?}");
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn an_engine_that_is_not_there_or_speaks_no_http_is_an_error() {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_request(&mut stream).await;
        stream.write_all(b"SSH-2.0-x\r\n").await.unwrap();
    };
    let ((), result) = timeout(async { tokio::join!(server, engine.run(completion())) }).await;
    assert!(matches!(result, Err(EngineError::BrokeOff(_))), "{result:?}");

    drop(listener);
    let result = timeout(engine.run(completion())).await;
    assert!(matches!(result, Err(EngineError::Unreachable { .. })), "{result:?}");
}

#[test]
fn only_a_plain_url_is_an_engines() {
    assert_eq!(authority("http://127.0.0.1:8101").unwrap(), "127.0.0.1:8101");
    assert_eq!(authority("http://localhost/").unwrap(), "localhost:80");
    for wrong in ["https://h:1", "127.0.0.1:8101", "", "http://"] {
        assert!(authority(wrong).is_err(), "{wrong}");
    }
}

/// What a server answers to requests over one connection, and what a client then has of them.
async fn answered(answers: &[&str]) -> Vec<Result<String, EngineError>> {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        for answer in answers {
            read_request(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let client = async {
        let mut bodies = Vec::new();
        for _ in answers {
            let answer = match engine.run(completion()).await {
                Ok(answer) => answer,
                Err(error) => {
                    bodies.push(Err(error));
                    continue;
                }
            };
            let chunks: Result<Vec<_>, _> =
                answer.body.collect::<Vec<_>>().await.into_iter().collect();
            bodies.push(chunks.map(|chunks| String::from_utf8(chunks.concat()).unwrap()));
        }
        bodies
    };
    timeout(async { tokio::join!(server, client) }).await.1
}

#[tokio::test]
async fn every_framing_is_understood_and_all_but_the_last_keep_the_connection() {
    let bodies = answered(&[
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        "HTTP/1.1 400 Bad Request\r\ncontent-length: 3\r\n\r\nno.",
        "HTTP/1.1 200 OK\r\n\r\nuntil the end",
    ]);
    let bodies: Vec<_> = bodies.await.into_iter().map(Result::unwrap).collect();
    assert_eq!(bodies, ["abcde", "", "", "no.", "until the end"]);
}

#[tokio::test]
async fn what_is_no_answer_is_an_error_that_says_so() {
    for (answer, reason) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "the answer's head is malformed: invalid HTTP version"),
        ("HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "content-length is no number"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n", "chunks are malformed"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "before its answer was whole"),
        ("HTTP/1.1 200 OK\r\ncontent-le", "before its answer was whole"),
        ("", "before its answer was whole"),
    ] {
        match answered(&[answer]).await.remove(0) {
            Err(EngineError::BrokeOff(told)) => assert!(told.contains(reason), "{told}"),
            other => panic!("{answer:?}: {other:?}"),
        }
    }
}

/// Who answers before he has read all may never read it, and says what is wrong.
#[tokio::test]
async fn an_answer_that_comes_before_the_request_was_taken_is_heard() {
    let (listener, engine) = server().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = "HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\n{}";
        stream.write_all(answer.as_bytes()).await.unwrap();
        // The next one has a connection of its own.
        let (mut fresh, _) = listener.accept().await.unwrap();
        read_request(&mut fresh).await;
        fresh.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]").await.unwrap();
    };
    let client = async {
        let large = EngineRequest { body: Bytes::from(vec![b'x'; 64 << 20]), ..completion() };
        let answer = engine.run(large).await.unwrap();
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(whole(answer).await, "{}");
        assert_eq!(whole(engine.run(completion()).await.unwrap()).await, "[]");
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn what_comes_behind_an_answer_is_no_part_of_the_next_one() {
    let (listener, engine) = server().await;
    let server = async {
        for unasked in ["HTTP/1.1 500 Unasked\r\n\r\n", ""] {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{{}}{unasked}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let client = async {
        for _ in 0..2 {
            let answer = engine.run(completion()).await.unwrap();
            assert_eq!((answer.status, whole(answer).await.as_str()), (StatusCode::OK, "{}"));
        }
    };
    timeout(async { tokio::join!(server, client) }).await;
}

#[tokio::test]
async fn megabytes_pass_both_ways() {
    let (listener, engine) = server().await;
    let body: String = ('a'..='z').cycle().take(3_000_001).collect();
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        for _ in 0..2 {
            let request = read_request(&mut stream).await;
            let (head, sent) = request.split_once("\r\n\r\n").unwrap();
            assert!(head.contains("content-length: 3000002"), "{head}");
            assert!(sent.strip_suffix('}') == Some(&body));
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(body.as_bytes()).await.unwrap();
        }
    };
    let client = async {
        for _ in 0..2 {
            let request = EngineRequest { body: format!("{body}}}").into(), ..completion() };
            assert!(whole(engine.run(request).await.unwrap()).await == body);
        }
    };
    timeout(async { tokio::join!(server, client) }).await;
}
