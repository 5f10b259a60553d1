//! A coordinator that has its workers with it: all that they do together, they do in one process too.

use std::{fs, path::Path, process::Command, time::Duration};

use baton_tests::{ClusterBuilder, Process, baton, free_port};
use serde_json::json;

fn arenas(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    let names = entries.map(|name| name.into_string().unwrap());
    names.filter(|name| name.starts_with("baton-")).collect()
}

#[tokio::test]
async fn it_splits_as_several_do_and_leaves_nothing() {
    let mut one = ClusterBuilder::sim().pools(2, 2).in_one_process().start().await.unwrap();
    let mut whole = ClusterBuilder::sim().pools(0, 1).not_ready().start().await.unwrap();
    whole.wait_for_workers(1, Duration::from_secs(30)).await.unwrap();

    let prompts = (1..40_u32).map(|seed| -> Vec<u32> {
        (0..seed * 37).map(|i| (seed % 5 * 31 + i * 7) % 200).collect()
    });
    for prompt in prompts {
        let length = prompt.len();
        let (a, b) = tokio::join!(one.complete(prompt.clone(), 8), whole.complete(prompt, 8));
        assert_eq!((a.path(), b.path()), ("disaggregated", "aggregated"), "{:?}", a.headers);
        assert_eq!(a.generated(), b.generated(), "prompt of {length} tokens");
    }
    let metrics = one.eventually_idle().await;
    assert!(metrics.sum("baton_handoff_blocks_total", &[]) > 0.0);
    assert!(!arenas(one.directory()).is_empty(), "staging memory in use");

    // An answer that is under way ends well, since the workers leave after the coordinator.
    let body = json!({"prompt": "on", "max_tokens": 3000, "stream": true});
    let url = one.url("/v1/completions");
    let answer = one.http.post(url).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let reading = tokio::spawn(answer.text());
    one.terminate("coordinator").unwrap();
    let text = reading.await.unwrap().unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{}", &text[text.len().saturating_sub(300)..]);
    assert_eq!(arenas(one.directory()), [""; 0]);
}

#[tokio::test]
async fn an_engine_that_is_not_there_holds_nobody_up() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("baton.toml");
    let (clients, workers, nobody) = (free_port(), free_port(), free_port());
    let toml = format!(
        r#"
        [coordinator]
        listen = "127.0.0.1:{clients}"
        workers_listen = "127.0.0.1:{workers}"
        [arena]
        directory = "."
        [[worker]]
        name = "decode-0"
        role = "decode"
        engine = {{ kind = "sim", time_scale = 0.0 }}
        transfer = {{ listen = "127.0.0.1:{}" }}
        [[worker]]
        name = "decode-1"
        role = "decode"
        engine = {{ kind = "vllm", url = "http://127.0.0.1:{nobody}", start_timeout_seconds = 1 }}
        transfer = {{ listen = "127.0.0.1:{}" }}
        "#,
        free_port(),
        free_port(),
    );
    fs::write(&config, toml).unwrap();
    let mut command = Command::new(baton().unwrap());
    command.args(["coordinator", "--with-workers", "--config"]).arg(&config);
    let mut process = Process::spawn("baton", command, directory.path()).unwrap();

    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://127.0.0.1:{clients}/v1/completions");
    let body = json!({"prompt": "is anybody there?", "max_tokens": 4});
    let is_answered = async || {
        let answer = http.post(&url).json(&body).send().await;
        answer.is_ok_and(|answer| answer.status() == 200)
    };
    let says_twice = |log: &str| log.matches("the worker's engine does not serve").count() > 1;
    for patience in (0..300).rev() {
        if says_twice(&process.log()) && is_answered().await {
            break;
        }
        assert!(patience > 0, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(process.log().contains("decode-1"), "whose engine it is: {}", process.log());
    process.terminate().unwrap();
}

#[test]
fn a_template_is_nobody_to_start() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("baton.toml");
    let toml = "[coordinator]\nlisten = \"127.0.0.1:0\"\nworkers_listen = \"127.0.0.1:7000\"\n\
        [engine]\nkind = \"sim\"\n[[worker]]\nname = \"decode-*\"\nrole = \"decode\"\n";
    fs::write(&config, toml).unwrap();
    let mut command = Command::new(baton().unwrap());
    command.args(["coordinator", "--with-workers", "--config"]).arg(&config);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("\"decode-*\""), "{text}");
}
