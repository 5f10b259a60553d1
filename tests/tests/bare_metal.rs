//! Bare metal, as `deploy/bare-metal` has it: hosts with addresses of their own, cut off, slowed down,
//! restarted, given other certificates. Requests keep flowing or fail cleanly, no answer is wrong, and
//! the pools recover by themselves.
//!
//! Needs root for network namespaces, and says so where it is skipped; `BATON_REQUIRE_NETNS` makes
//! that a failure.

mod load;
mod machines;

use std::{fs, time::Duration};

use load::Load;
use machines::{COORDINATOR, FAR_AWAY, Machines, pools};
use serde_json::json;
use toml::{Table, Value};

#[tokio::test]
async fn hosts_that_are_cut_off_are_missed_and_taken_back() {
    let Some(machines) = Machines::start_or_skip().await else { return };
    let load = Load::start(&machines.client()).await;
    load.more_answers(20).await;
    for (host, without) in [("prefill-1", (1.0, 2.0)), ("decode-0", (2.0, 1.0))] {
        machines.cut_off(host);
        machines.eventually(&format!("{host} is missed"), |m| pools(m) == without).await;
        // Those that were on their way there have ended by the time that others are answered.
        load.more_answers(40).await;
        machines.reconnect(host);
        machines.eventually(&format!("{host} is back"), |m| pools(m) == (2.0, 2.0)).await;
        load.more_answers(40).await;
    }
    load.more_answers_of("decode-0", 10).await;
    let tally = load.stop();
    assert!(tally.all_answered() > 180);
    machines.eventually_idle().await;
}

#[tokio::test]
async fn a_far_and_lossy_host_serves_on() {
    let Some(mut machines) = Machines::start_or_skip().await else { return };
    let load = Load::start(&machines.client()).await;
    load.more_answers_of(FAR_AWAY, 10).await;
    machines.slow_down(Duration::from_millis(50), 0.01);
    load.more_answers_of(FAR_AWAY, 40).await;
    load.more_answers_of("decode-0", 40).await;
    machines.slow_down(Duration::ZERO, 0.0);
    machines.eventually("all workers are there", |metrics| pools(metrics) == (2.0, 2.0)).await;
    let tally = load.stop();
    // Lost frames are sent again: nobody need notice.
    assert!(tally.failed.len() * 20 < tally.all_answered(), "{tally:#?}");
    machines.eventually_idle().await;
}

#[tokio::test]
async fn workers_come_back_to_a_coordinator_that_restarts() {
    let Some(mut machines) = Machines::start_or_skip().await else { return };
    let load = Load::start(&machines.client()).await;
    load.more_answers(20).await;
    machines.kill(COORDINATOR);
    machines.start(COORDINATOR);
    machines.eventually("all workers came back", |metrics| pools(metrics) == (2.0, 2.0)).await;
    load.more_answers(40).await;
    // The polite way: nobody's answer is cut short.
    let before = load.tally();
    machines.terminate(COORDINATOR);
    machines.start(COORDINATOR);
    machines.eventually("all workers came back", |metrics| pools(metrics) == (2.0, 2.0)).await;
    load.more_answers(40).await;
    let tally = load.stop();
    assert_eq!(tally.failed, before.failed, "an open answer was broken off");
    machines.eventually_idle().await;
}

const RENEWED: &str = "certificates changed: ";

#[tokio::test]
async fn certificates_and_their_ca_are_rotated_while_requests_flow() {
    let Some(mut machines) = Machines::start_or_skip().await else { return };
    let all = [COORDINATOR, "prefill-0", "prefill-1", "decode-0", FAR_AWAY];
    let load = Load::start(&machines.client()).await;
    // What a host of the former CA has, for later.
    let former = machines.host_directory("former");
    fs::create_dir_all(former.join("tls")).unwrap();
    for file in ["host.pem", "host.key"] {
        let of_host = machines.host_directory("prefill-1").join("tls").join(file);
        fs::copy(of_host, former.join("tls").join(file)).unwrap();
    }

    // Both CAs are trusted; then each host has a certificate of the new one; then only that is.
    let mut renewals = 0;
    for step in ["rotate", "issue", "retire"] {
        for host in all {
            if step == "issue" {
                machines.issue(host, &["--renew"]);
            } else if host == COORDINATOR {
                machines.ca(step);
            }
            machines.install(host);
        }
        renewals += 1;
        for host in all {
            machines.said(host, RENEWED, renewals).await;
        }
        load.more_answers(20).await;
    }
    let tally = load.tally();
    assert!(tally.failed.is_empty() && tally.unreached == 0, "{tally:#?}");

    // A new connection is made with the new ones, by processes that were never restarted.
    machines.cut_off("decode-0");
    machines.eventually("decode-0 is missed", |metrics| pools(metrics) == (2.0, 1.0)).await;
    machines.reconnect("decode-0");
    machines.eventually("decode-0 is back", |metrics| pools(metrics) == (2.0, 2.0)).await;
    load.more_answers_of("decode-0", 5).await;

    let attachments =
        |machines: &Machines| machines.log("decode-0").matches("attach: attached").count();
    let before = attachments(&machines);
    // Who comes with one of the former CA stays outside, and so does who takes another's name.
    let file = machines.file();
    let named = |name: &str| {
        let mut file = file.clone();
        let role = name.split('-').next().unwrap();
        let transfer: Table = "listen = \"10.77.0.12:0\"".parse().unwrap();
        let worker = [
            ("name".to_owned(), Value::from(name)),
            ("role".to_owned(), Value::from(role)),
            ("transfer".to_owned(), transfer.into()),
        ];
        let worker = Table::from_iter(worker);
        file.insert("worker".into(), Value::Array(vec![worker.into()]));
        file
    };
    machines.write_file("former", &named("prefill-9"));
    let ca = machines.host_directory("prefill-1").join("tls/ca.pem");
    fs::copy(ca, former.join("tls/ca.pem")).unwrap();
    machines.start_on("prefill-1", "former", "prefill-9");
    machines.said("former", "UnknownCA", 2).await;
    let impostor = machines.host_directory("impostor");
    fs::create_dir_all(&impostor).unwrap();
    std::os::unix::fs::symlink(
        machines.host_directory("prefill-1").join("tls"),
        impostor.join("tls"),
    )
    .unwrap();
    machines.write_file("impostor", &named("decode-0"));
    machines.start_on("prefill-1", "impostor", "decode-0");
    machines.said("impostor", "the certificate of worker \"decode-0\" is for prefill-1", 2).await;
    load.more_answers(20).await;
    machines.eventually("nobody else got in", |metrics| pools(metrics) == (2.0, 2.0)).await;
    for stranger in ["former", "impostor"] {
        assert!(!machines.log(stranger).contains("attach: attached"), "{stranger} got in");
    }
    // The one whose name was taken has not been thrown out.
    assert_eq!(attachments(&machines), before, "{}", machines.log("decode-0"));
    load.stop();
}

#[tokio::test]
async fn two_coordinators_count_each_others_load() {
    const SECOND: &str = "coordinator-b";
    let Some(mut machines) = Machines::prepare_or_skip() else { return };
    machines.add_host(SECOND, "10.77.0.13:8000".parse().unwrap());
    let mut file = machines.file();
    for worker in file["worker"].as_array_mut().unwrap() {
        let both = vec![Value::from("10.77.0.10:7000"), Value::from("10.77.0.13:7000")];
        worker.as_table_mut().unwrap().insert("coordinators".into(), Value::Array(both));
    }
    for name in ["prefill-0", "prefill-1", "decode-0", FAR_AWAY, COORDINATOR] {
        machines.write_file(name, &file);
    }
    let coordinator = file["coordinator"].as_table_mut().unwrap();
    coordinator.insert("listen".into(), Value::from("10.77.0.13:8000"));
    coordinator.insert("workers_listen".into(), Value::from("10.77.0.13:7000"));
    machines.write_file(SECOND, &file);
    let mut machines = machines.started().await;
    machines.eventually_of(SECOND, "2 + 2 workers", |metrics| pools(metrics) == (2.0, 2.0)).await;
    let (a, b) = (machines.client(), machines.client_of(SECOND));
    let completion = |tokens: u32| json!({"prompt": "On your marks", "max_tokens": tokens, "ignore_eos": true, "stream": true});
    let decoded_by =
        |headers: &http::HeaderMap| headers["x-baton-decode-worker"].to_str().unwrap().to_owned();

    // While one keeps a decode worker busy, the other sends its requests to the idle one: without a
    // word of the first's load it would take turns.
    let long = tokio::spawn({
        let (a, body) = (a.clone(), completion(1000));
        async move { a.post("/v1/completions", &body).await.unwrap() }
    });
    machines
        .eventually_of(SECOND, "it hears of the job", |m| {
            m.sum("baton_worker_jobs_elsewhere", &[]) > 0.0
        })
        .await;
    let mut short = Vec::new();
    for _ in 0..6 {
        let (status, headers, text) = b.post("/v1/completions", &completion(4)).await.unwrap();
        assert_eq!(status, 200, "{text}");
        short.push(decoded_by(&headers));
    }
    assert!(!long.is_finished(), "it was busy all the time");
    let (_, headers, _) = long.await.unwrap();
    let busy = decoded_by(&headers);
    assert!(short.iter().all(|worker| *worker != busy), "{busy} was busy: {short:?}");

    // Both serve, and the workers share what comes.
    let loads = [Load::start(&a).await, Load::start(&b).await];
    for load in &loads {
        load.more_answers(60).await;
    }
    let tallies = loads.map(Load::stop);
    let sum = |worker: &str| -> usize {
        tallies.iter().filter_map(|tally| tally.answered.get(worker)).sum()
    };
    let (near, far) = (sum("decode-0"), sum(FAR_AWAY));
    assert!(near < 2 * far && far < 2 * near, "{near} and {far}");
    assert!(tallies.iter().all(|tally| tally.failed.is_empty()), "{tallies:#?}");

    // One goes; the other serves on.
    machines.kill(COORDINATOR);
    let load = Load::start(&b).await;
    load.more_answers(20).await;
    assert!(load.stop().failed.is_empty());
}
