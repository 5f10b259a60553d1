//! A worker goes over to the other pool: what it has it finishes, and it comes back in its new role.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod fleet;

use baton_proto::{Commands, Leg, Report, Role as WireRole, RoleChange};
use baton_types::Role;
use fleet::{Fleet, completion, fast, job, split};

fn order(role: WireRole) -> Commands {
    Commands { set_role: role.into(), ..Commands::default() }
}

fn release(change: &RoleChange) -> Commands {
    Commands { release: change.number, ..Commands::default() }
}

fn changes(report: &Report) -> bool {
    report.role_change.is_some()
}

#[tokio::test]
async fn it_finishes_what_it_has_and_comes_back_under_a_new_epoch() {
    let mut fleet = Fleet::start().await;
    // Slow enough to be still at work when the order comes.
    let sim = baton_config::SimConfig { time_scale: 0.2, ..fast() };
    let (mut prefill, mut decode) = fleet.pair(&sim).await;
    decode.attached.report(|report| report.leads).await;
    let body = completion(1..400, true, 60);
    let expected = {
        let whole = vec![job(1, Leg::Aggregated, &body)];
        decode.attached.command(Vec::new(), whole).await;
        decode.attached.whole().await.text
    };

    let (first, second) = split(2, &body, &prefill.attached.hello, &decode.attached.hello);
    prefill.attached.command(Vec::new(), vec![first]).await;
    decode.attached.command(Vec::new(), vec![second]).await;
    decode.attached.commands(order(WireRole::Prefill)).await;
    let change = decode.attached.report(changes).await.role_change.unwrap();
    assert_eq!(change.to(), WireRole::Prefill);
    // One more that was sent before the coordinator knew.
    let (first, second) = split(3, &body, &prefill.attached.hello, &decode.attached.hello);
    prefill.attached.command(Vec::new(), vec![first]).await;
    decode.attached.command(Vec::new(), vec![second]).await;
    let mut texts = decode.attached.all(2).await;
    for (_, text) in texts.drain() {
        assert_eq!(without_ids(&text), without_ids(&expected));
    }
    decode.attached.commands(release(&change)).await;
    decode.attached.closed().await;

    let back = fleet.next_attached().await;
    assert_eq!(back.hello.worker_name, "d0");
    assert_eq!((back.hello.role(), &back.hello.role_change), (WireRole::Prefill, &None));
    assert_ne!(back.hello.epoch, decode.attached.hello.epoch);
    assert_eq!(back.hello.epoch, back.hello.peer.as_ref().unwrap().epoch);
    decode.attached = back;

    // The other goes the other way, and they serve each other again.
    prefill.attached.commands(order(WireRole::Decode)).await;
    let change = prefill.attached.report(changes).await.role_change.unwrap();
    prefill.attached.commands(release(&change)).await;
    prefill.attached = fleet.next_attached().await;
    assert_eq!(prefill.attached.hello.role(), WireRole::Decode);
    let (first, second) = split(4, &body, &decode.attached.hello, &prefill.attached.hello);
    decode.attached.command(Vec::new(), vec![first]).await;
    prefill.attached.command(Vec::new(), vec![second]).await;
    let answer = prefill.attached.whole().await;
    assert_eq!(answer.first.fault, None);
    assert_eq!(without_ids(&answer.text), without_ids(&expected));
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn what_was_ordered_can_be_taken_back() {
    let mut fleet = Fleet::start().await;
    let mut worker = fleet.worker("d0", Role::Decode, fast()).await;
    worker.attached.commands(order(WireRole::Prefill)).await;
    let first = worker.attached.report(changes).await.role_change.unwrap();
    worker.attached.commands(order(WireRole::Decode)).await;
    worker.attached.report(|report| !changes(report)).await;
    // The leave of the change that was taken back is none for the next.
    worker.attached.commands(release(&first)).await;
    worker.attached.commands(order(WireRole::Prefill)).await;
    let second = worker.attached.report(changes).await.role_change.unwrap();
    assert_ne!(first.number, second.number);
    let body = completion(1..40, false, 5);
    worker.attached.command(Vec::new(), vec![job(1, Leg::Aggregated, &body)]).await;
    assert_eq!(worker.attached.whole().await.first.status, 200);
    worker.attached.commands(release(&second)).await;
    let back = fleet.next_attached().await;
    assert_eq!(back.hello.role(), WireRole::Prefill);
    worker.attached = back;
    worker.stop().await;
}

/// Each of several coordinators has to let go, and one of them leads.
#[tokio::test]
async fn every_coordinator_lets_go_first() {
    let (mut a, mut b) = (Fleet::start().await, Fleet::start().await);
    let running = a.spawn_for(&[&a.address(), &b.address()], "d0", Role::Decode, fast());
    let (mut of_a, mut of_b) = (a.next_attached().await, b.next_attached().await);
    let leads = |report: &Report| report.leads;
    // By which address comes first.
    if a.address() < b.address() {
        of_a.report(leads).await;
        of_b.report(|report| !leads(report)).await;
    } else {
        of_b.report(leads).await;
        of_a.report(|report| !leads(report)).await;
    }
    of_b.commands(order(WireRole::Prefill)).await;
    let change = of_a.report(changes).await.role_change.unwrap();
    assert_eq!(of_b.report(changes).await.role_change.unwrap(), change);
    of_b.commands(release(&change)).await;
    // The other still has a job for it.
    let body = completion(1..40, false, 5);
    of_a.command(Vec::new(), vec![job(1, Leg::Aggregated, &body)]).await;
    assert_eq!(of_a.whole().await.first.status, 200);
    of_a.commands(release(&change)).await;
    for fleet in [&mut a, &mut b] {
        assert_eq!(fleet.next_attached().await.hello.role(), WireRole::Prefill);
    }
    running.stop().await;
}

/// Answers differ in their ids and times.
fn without_ids(text: &str) -> String {
    let kept = |line: &str| {
        let data = line.strip_prefix("data: ")?;
        let json: serde_json::Value = serde_json::from_str(data).ok()?;
        Some(json["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
    };
    text.lines().filter_map(kept).collect()
}
