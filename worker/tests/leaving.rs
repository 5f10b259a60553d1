//! What a worker does that is told to stop, and what it tells probes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fleet;

use std::{net::SocketAddr, time::Duration};

use baton_config::{EngineConfig, SimConfig};
use baton_proto::Leg;
use baton_types::Role;
use fleet::{Fleet, completion, fast, job};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

fn prompt(tokens: u32) -> impl Iterator<Item = u32> {
    (0..tokens).map(|token| 100 + token)
}

/// Steps of some 10 ms: 40 tokens are under way for long enough.
fn unhurried() -> SimConfig {
    SimConfig { time_scale: 1.0, ..fast() }
}

#[tokio::test]
async fn it_says_so_finishes_its_jobs_and_only_then_hangs_up() {
    let mut fleet = Fleet::start().await;
    let mut worker = fleet.worker("d0", Role::Decode, unhurried()).await;
    let attached = &mut worker.attached;
    let body = completion(prompt(20), true, 40);
    attached.command(vec![], vec![job(1, Leg::Aggregated, &body)]).await;
    let first = attached.event().await;
    assert!(!first.end, "the job is under way");

    worker.running.order_to_stop();
    worker.attached.leaving().await;
    // One that was sent before the coordinator heard of it.
    worker.attached.command(vec![], vec![job(2, Leg::Aggregated, &body)]).await;
    let mut ended = Vec::new();
    while ended.len() < 2 {
        let event = worker.attached.event().await;
        assert_eq!(event.fault, None);
        if event.end {
            ended.push(event.job);
        }
    }
    ended.sort_unstable();
    assert_eq!(ended, [1, 2]);
    fleet::timeout(worker.attached.closed()).await;
    worker.stop().await;
}

#[tokio::test]
async fn what_is_not_finished_in_time_is_cancelled() {
    let mut fleet = Fleet::start().await;
    let mut config =
        fleet.config(vec![fleet.address()], "d0", Role::Decode, EngineConfig::Sim(unhurried()));
    config.drain_timeout = Duration::from_millis(200);
    let running = fleet.spawn_as(config);
    let mut attached = fleet.next_attached().await;
    let body = completion(prompt(20), true, 4000);
    attached.command(vec![], vec![job(1, Leg::Aggregated, &body)]).await;
    attached.event().await;
    running.order_to_stop();
    fleet::timeout(attached.closed()).await;
    running.stop().await;
}

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn get(address: SocketAddr, path: &str) -> String {
    // It may not listen yet.
    let Ok(mut stream) = TcpStream::connect(address).await else { return String::new() };
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn until(address: SocketAddr, path: &str, says: [&str; 2]) {
    fleet::timeout(async {
        loop {
            let answer = get(address, path).await;
            if says.iter().all(|part| answer.contains(part)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn probes_hear_whether_it_can_be_given_requests() {
    let mut fleet = Fleet::start().await;
    let mut config =
        fleet.config(vec![fleet.address()], "d0", Role::Decode, EngineConfig::Sim(unhurried()));
    let health = free_address().await;
    let nobody = free_address().await;
    config.health_listen = Some(health);
    config.coordinators = vec![nobody.to_string()];
    let running = fleet.spawn_as(config.clone());
    until(health, "/ready", ["503", "waiting for a coordinator"]).await;
    assert!(get(health, "/health").await.contains("200 OK"), "it need not be started again");
    running.stop().await;

    config.coordinators = vec![fleet.address()];
    let running = fleet.spawn_as(config);
    let mut attached = fleet.next_attached().await;
    until(health, "/ready", ["200 OK", "ready"]).await;
    let body = completion(prompt(20), true, 4000);
    attached.command(vec![], vec![job(1, Leg::Aggregated, &body)]).await;
    attached.event().await;
    running.order_to_stop();
    attached.leaving().await;
    until(health, "/ready", ["503", "leaving"]).await;
    attached.command(vec![1], vec![]).await;
    running.stop().await;
}

#[tokio::test]
async fn a_name_can_stand_for_all_its_coordinators() {
    let mut fleet = Fleet::start().await;
    let mut config =
        fleet.config(vec![fleet.address()], "d0", Role::Decode, EngineConfig::Sim(fast()));
    config.every_address = true;
    config.coordinators = vec![format!("localhost:{}", fleet.port())];
    let running = fleet.spawn_as(config);
    let mut attached = fleet.next_attached().await;
    assert_eq!(attached.hello.worker_name, "d0");
    // One that hangs up, and whose address is still there, is come back to.
    attached.close();
    fleet.next_attached().await;
    running.stop().await;
}
