//! Who may send requests, how many at once, and how much in a minute.

use std::{fs, time::Duration};

use baton_tests::{Answer, Cluster, ClusterBuilder};
use futures::StreamExt as _;
use serde_json::{Value, json};

/// Of "sesame" and "millet".
const TENANTS: &str = "
[[tenant]]
name = \"search\"
key_sha256 = \"d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272\"
max_requests = 1

[[tenant]]
name = \"batch\"
key_sha256 = \"7142041d842dd25ca345374d601674dd84035c7c3f5c424ec804fbdf3b586857\"
max_tokens_per_minute = 60

[[tenant]]
name = \"chat\"
key_file = \"keys\"
";

async fn start(keys: &std::path::Path) -> Cluster {
    let tenants = TENANTS.replace("\"keys\"", &format!("{keys:?}"));
    ClusterBuilder::sim().engine("time_scale = 0.2").tables(&tenants).start().await.unwrap()
}

fn completion(tokens: u32, stream: bool) -> Value {
    json!({"prompt": "Open", "max_tokens": tokens, "ignore_eos": true, "stream": stream})
}

async fn ask(cluster: &Cluster, authorization: Option<&str>) -> Answer {
    let mut request = cluster.http.post(cluster.url("/v1/completions")).json(&completion(3, false));
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    let response = request.header("x-request-id", "r1").send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Answer { status, headers, text: response.text().await.unwrap() }
}

#[tokio::test]
async fn only_who_has_a_key_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    fs::write(&keys, "# spring\nold-word\n").unwrap();
    let cluster = start(&keys).await;

    for none in [
        None,
        Some("Bearer "),
        Some("Basic c2VzYW1l"),
        Some("Bearer sesame!"),
        Some("Bearer old-wor"),
    ] {
        let refused = ask(&cluster, none).await;
        refused.assert_error(401, "invalid_api_key");
        assert_eq!(refused.json()["error"]["type"], "invalid_request_error");
        assert_eq!(
            (refused.header("www-authenticate"), refused.header("x-request-id")),
            ("Bearer", "r1")
        );
    }
    for key in ["sesame", "old-word"] {
        let served = ask(&cluster, Some(&format!("Bearer {key}"))).await;
        assert_eq!((served.status, served.path()), (200, "disaggregated"), "{}", served.text);
    }
    // Everything below /v1 asks, and what machines watch does not.
    cluster.get("/v1/models").await.assert_error(401, "invalid_api_key");
    cluster.post("/tokenize", &json!({"prompt": "x"})).await.assert_error(401, "invalid_api_key");
    for open in ["/health", "/ready", "/metrics"] {
        assert_eq!(cluster.get(open).await.status, 200, "{open}");
    }

    // A key is changed without a restart.
    fs::write(&keys, "new-word\n").unwrap();
    cluster.wait_for_log("coordinator", "a tenant's keys changed").await;
    assert_eq!(ask(&cluster, Some("Bearer new-word")).await.status, 200);
    ask(&cluster, Some("Bearer old-word")).await.assert_error(401, "invalid_api_key");

    let metrics = cluster.metrics().await;
    let count = |tenant: &str, outcome: &str| {
        let labels = [format!("tenant={tenant:?}"), format!("outcome={outcome:?}")];
        metrics.sum("baton_tenant_requests_total", &labels.each_ref().map(String::as_str))
    };
    assert_eq!((count("search", "admitted"), count("chat", "admitted")), (1.0, 2.0));
    assert!(count("", "no_key") >= 3.0 && count("", "wrong_key") >= 3.0);
    let logs = ["coordinator", "prefill-0", "decode-0"].map(|name| cluster.log(name)).concat();
    for key in ["sesame", "old-word", "new-word"] {
        assert!(!logs.contains(key), "{key} was logged");
    }
}

#[tokio::test]
async fn a_tenant_has_no_more_requests_in_flight_than_it_may() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    fs::write(&keys, "word\n").unwrap();
    let cluster = start(&keys).await;
    let stream = cluster.http.post(cluster.url("/v1/completions")).bearer_auth("sesame");
    let mut stream = stream.json(&completion(4000, true)).send().await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();

    let refused = ask(&cluster, Some("Bearer sesame")).await;
    refused.assert_error(429, "rate_limit_exceeded");
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(ask(&cluster, Some("Bearer word")).await.status, 200, "another tenant's is its own");

    // A client that goes away makes room.
    drop(stream);
    let served = async {
        while ask(&cluster, Some("Bearer sesame")).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), served).await.expect("room");
}

#[tokio::test]
async fn a_tenant_that_used_its_tokens_is_told_how_long_to_wait() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    fs::write(&keys, "word\n").unwrap();
    let cluster = start(&keys).await;
    let ask = |key: &'static str, tokens: u32, stream: bool| {
        let request = cluster.http.post(cluster.url("/v1/completions")).bearer_auth(key);
        let request = request.json(&completion(tokens, stream));
        async move { Answer::of(request.send().await.unwrap()).await.unwrap() }
    };
    // It is not known before how much it will be: more than there is may be taken once.
    for stream in [false, true] {
        let served = ask("millet", 35, stream).await;
        assert_eq!(served.status, 200, "{}", served.text);
    }
    let refused = ask("millet", 1, false).await;
    refused.assert_error(429, "rate_limit_exceeded");
    assert_eq!(refused.json()["error"]["type"], "tokens");
    // Some 10 to 20 too many, at one a second.
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(ask("word", 35, false).await.status, 200, "another tenant's is its own");

    let metrics = cluster.metrics().await;
    let refusals = ["tenant=\"batch\"", "outcome=\"too_many_tokens\""];
    assert_eq!(metrics.sum("baton_tenant_requests_total", &refusals), 1.0);
}
