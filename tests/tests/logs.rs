//! What the logs say at their most talkative useful level: each line is JSON, lines about a request name
//! it, and neither prompts, answers nor keys are in any of them.

use baton_tests::{ADMIN_TOKEN, Cluster, ClusterBuilder};
use serde_json::{Value, json};

const PROMPT: &str = "the-horse-staples-correctly";
const KEY: &str = "sk-a-key-that-nobody-may-read";

async fn ask(cluster: &Cluster, id: &str, body: &Value) -> reqwest::Response {
    let request = cluster.http.post(cluster.url("/v1/completions"));
    request.header("x-request-id", id).bearer_auth(KEY).json(body).send().await.unwrap()
}

#[tokio::test]
async fn lines_name_their_request_and_hold_no_prompt_and_no_key() {
    let mut cluster = ClusterBuilder::sim()
        .pools(1, 2)
        .engine("time_scale = 0.1")
        .json_logs("debug")
        .start()
        .await
        .unwrap();
    let prompt = format!("{PROMPT} ").repeat(200);
    let body = json!({"prompt": prompt, "max_tokens": 8, "ignore_eos": true});
    let answer = ask(&cluster, "request-that-ends", &body).await;
    assert_eq!(answer.status(), 200);
    let generated = answer.json::<Value>().await.unwrap()["choices"][0]["text"].clone();
    let generated = generated.as_str().unwrap().trim().to_owned();
    assert!(generated.len() > 8, "{generated}");
    // What is refused by coordinator and engine, and what fails on the way.
    for spoiled in [
        json!({"prompt": prompt, "max_tokens": "many"}),
        json!({"prompt": prompt,
        "max_tokens": 10_000_000, "model": PROMPT}),
    ] {
        assert!(
            ask(&cluster, "request-that-is-refused", &spoiled).await.status().is_client_error()
        );
    }
    let long = json!({"prompt": prompt, "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let broken = ask(&cluster, "request-that-breaks-off", &long).await;
    let decode = broken.headers()["x-baton-decode-worker"].to_str().unwrap().to_owned();
    let log_of_killed = cluster.log(&decode);
    cluster.kill(&decode);
    let _ = broken.text().await;
    cluster.state().await;
    cluster.wait_for_log("coordinator", "\"outcome\":\"broken_off\"").await;

    let mut logs = vec![(decode.clone(), log_of_killed)];
    for name in ["coordinator", "prefill-0", "decode-0", "decode-1"] {
        logs.push((name.to_owned(), cluster.log(name)));
    }
    for (name, log) in &logs {
        assert!(name == &decode || !log.is_empty(), "{name} says something");
        for secret in [PROMPT, KEY, ADMIN_TOKEN, generated.as_str()] {
            assert!(!log.contains(secret), "{secret} is in the log of {name}");
        }
        for line in log.lines() {
            let line: Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            for field in ["timestamp", "level", "target"] {
                assert!(line[field].is_string(), "{field}: {line}");
            }
            let is_of_request = matches!(line["span"]["name"].as_str(), Some("request" | "job"));
            let id = line["span"]["request_id"].as_str().unwrap_or_default();
            assert!(!is_of_request || id.starts_with("request-that-"), "{line}");
        }
    }
    let said = |name: &str, id: &str, message: &str| {
        let (_, log) = logs.iter().find(|(of, _)| of == name).unwrap();
        log.lines().any(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            line["span"]["request_id"] == id && line["message"] == message
        })
    };
    assert!(said("coordinator", "request-that-ends", "request ended"));
    assert!(said("coordinator", "request-that-breaks-off", "leg failed"));
    assert!(said("coordinator", "request-that-breaks-off", "request ended"));
}
