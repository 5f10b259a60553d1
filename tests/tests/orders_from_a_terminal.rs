//! `baton status`, `drain` and `mode` as operators and their scripts use them, over TLS: what they say,
//! and with which status they exit. Then what changes under a coordinator that is not started anew: its
//! token, and nothing by SIGHUP.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use baton_tests::{ADMIN_TOKEN, Cluster, ClusterBuilder, TlsPem, baton};
use serde_json::{Value, json};

/// What `baton certs` makes for this host.
fn certificates() -> TlsPem {
    let directory = tempfile::tempdir().unwrap();
    let certs = directory.path().join("certs").to_string_lossy().into_owned();
    for arguments in [vec!["init", "--out", &certs], vec!["issue", "127.0.0.1", "--ca", &certs]] {
        let made = Command::new(baton().unwrap()).arg("certs").args(arguments).output().unwrap();
        assert!(made.status.success(), "{made:?}");
    }
    let read = |file| fs::read_to_string(Path::new(&certs).join("127.0.0.1").join(file)).unwrap();
    TlsPem { ca: read("ca.pem"), certificate: read("host.pem"), private_key: read("host.key") }
}

async fn cluster() -> Cluster {
    let https = "[admin.https]\ncertificate = \"tls/host.pem\"\nprivate_key = \"tls/host.key\"\n";
    let builder = ClusterBuilder::sim().engine("time_scale = 0.2").tls(certificates());
    builder.tables(https).start().await.unwrap()
}

/// Asks as somebody on the coordinator's host does, by its file, or with `more`.
async fn ask(cluster: &Cluster, arguments: &[&str], more: &[&str]) -> (i32, String) {
    let mut command = tokio::process::Command::new(baton().unwrap());
    command.args(arguments).env_remove("BATON_ADMIN_TOKEN");
    if more.is_empty() {
        command.arg("--config").arg(cluster.directory().join("baton.toml"));
    }
    let Output { status, stdout, stderr } = command.args(more).output().await.unwrap();
    let said = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), said)
}

#[tokio::test]
async fn scripts_can_tell_what_came_of_it() {
    let cluster = cluster().await;
    let file = cluster.directory().join("baton.toml").to_string_lossy().into_owned();
    let (code, said) = ask(&cluster, &["check"], &[&file]).await;
    let url = cluster.admin_url("").replace("http:", "https:");
    assert!(code == 0 && said.contains(&format!("{url} for operators")), "{said}");
    let (code, said) = ask(&cluster, &["status", "--check"], &[]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("1 prefill and 1 decode workers"), "{said}");
    let (code, said) = ask(&cluster, &["status", "--json"], &[]).await;
    let state: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &state["workers"][0]["name"]), (0, &json!("decode-0")));

    // A worker that answers goes on until it has, and then the command returns.
    let body = json!({"prompt": "The last lap. ".repeat(20), "max_tokens": 400, "stream": true,
        "ignore_eos": true});
    let running = cluster.http.post(cluster.url("/v1/completions")).json(&body).send().await;
    let (code, said) = ask(&cluster, &["drain", "decode-0", "--wait"], &[]).await;
    assert_eq!((code, said.as_str()), (0, "decode-0 is draining\ndecode-0 is drained\n"));
    assert!(running.unwrap().text().await.unwrap().contains("[DONE]"), "it was let finish");
    let (code, said) = ask(&cluster, &["status", "--check"], &[]).await;
    assert_eq!(code, 2, "no decode worker takes requests: {said}");
    assert_eq!(ask(&cluster, &["status"], &[]).await.0, 0);
    let (code, said) = ask(&cluster, &["drain", "decode-0", "--undrain"], &[]).await;
    assert_eq!((code, said.as_str()), (0, "decode-0 is ready\n"));
    assert_eq!(ask(&cluster, &["status", "--check"], &[]).await.0, 0);
    let (code, said) = ask(&cluster, &["mode", "aggregated"], &[]).await;
    assert_eq!((code, said.as_str()), (0, "the mode is aggregated\n"));
    assert_eq!(cluster.complete("Which way?", 3).await.path(), "aggregated");
    let (code, said) = ask(&cluster, &["drain", "decode-7", "--wait"], &[]).await;
    assert_eq!(code, 1);
    assert!(said.contains("attached are decode-0, prefill-0"), "{said}");
}

#[tokio::test]
async fn what_is_amiss_with_the_way_there_is_said() {
    let cluster = cluster().await;
    let url = cluster.admin_url("").replace("http:", "https:");
    let ca = cluster.directory().join("tls/ca.pem").to_string_lossy().into_owned();
    let token = cluster.directory().join("admin.token").to_string_lossy().into_owned();
    let way = ["--admin", &url, "--ca", &ca, "--token-file", &token];
    let (code, said) = ask(&cluster, &["status", "--check"], &way).await;
    assert_eq!(code, 0, "{said}");
    let stranger = cluster.directory().join("stranger.pem");
    fs::write(&stranger, certificates().ca).unwrap();
    let stranger = stranger.to_string_lossy().into_owned();
    let other_name = url.replace("127.0.0.1", "localhost");
    let plain = cluster.admin_url("");
    for (way, says) in [
        (["--admin", &url, "--ca", &stranger, "--token-file", &token], "UnknownIssuer"),
        (["--admin", &other_name, "--ca", &ca, "--token-file", &token], "not valid for name"),
        (["--admin", &url, "--ca", &token, "--token-file", &token], "no certificate in PEM"),
        (["--admin", &plain, "--ca", &ca, "--token-file", &token], ""),
        (["--admin", &url, "--ca", &ca, "--token-file", &ca], "does not take this token"),
    ] {
        let (code, said) = ask(&cluster, &["status", "--check"], &way).await;
        assert_eq!(code, 1, "{way:?}: {said}");
        assert!(said.contains(says), "{way:?}: {said}");
    }
    let (code, said) = ask(&cluster, &["status"], &["--admin", &url, "--token-file", &token]).await;
    assert_eq!(code, 1);
    assert!(said.contains("give --ca FILE"), "{said}");
}

#[tokio::test]
async fn a_token_changes_without_a_restart_and_sighup_stops_nothing() {
    let cluster = cluster().await;
    let file = cluster.directory().join("admin.token");
    let beside = cluster.directory().join("former.token");
    fs::rename(&file, &beside).unwrap();
    fs::write(&file, "fedcba9876543210fedcba9876543210\n").unwrap();
    cluster.wait_for_log("coordinator", "the operators' token changed").await;
    assert_eq!(ask(&cluster, &["status"], &[]).await.0, 0);
    let url = cluster.admin_url("").replace("http:", "https:");
    let ca = cluster.directory().join("tls/ca.pem").to_string_lossy().into_owned();
    let former = beside.to_string_lossy().into_owned();
    let way = ["--admin", &url, "--ca", &ca, "--token-file", &former];
    let (code, said) = ask(&cluster, &["status"], &way).await;
    assert_eq!(code, 1);
    assert!(said.contains("does not take this token"), "{said}");

    for name in ["coordinator", "prefill-0", "decode-0"] {
        let id = cluster.process_id(name).unwrap().to_string();
        assert!(Command::new("kill").args(["-HUP", &id]).status().unwrap().success());
        cluster.wait_for_log(name, "SIGHUP changes nothing").await;
    }
    let answer = cluster.complete("Who runs on?", 3).await;
    assert_eq!((answer.status, answer.path()), (200, "disaggregated"));
    let log = cluster.log("coordinator");
    assert!(!log.contains(ADMIN_TOKEN) && !log.contains("fedcba98"), "{log}");
}
