//! What a worker says of its engine's steps, and the pace that it has its engine keep.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod fleet;

use baton_config::SimConfig;
use baton_engine::sim::Profile;
use baton_proto::Leg;
use baton_types::{Role, StepModel};
use fleet::{Fleet, completion, fast, job};

#[tokio::test]
async fn the_hello_says_the_profile_and_reports_what_was_seen() {
    let mut fleet = Fleet::start().await;
    let sim = SimConfig { time_scale: 0.1, ..SimConfig::default() };
    let mut worker = fleet.worker("w", Role::Decode, sim).await;
    let told = worker.attached.hello.step_model.clone().expect("the profile is known");
    let told = StepModel::try_from(&told).unwrap();
    assert_eq!((told, 0), (Profile::demo().model.slowed(0.1), 0));

    let start = job(1, Leg::Aggregated, &completion(0..200, false, 200));
    worker.attached.command(vec![], vec![start]).await;
    assert_eq!(worker.attached.whole().await.first.status, 200);
    // On a busy machine some steps are taken for outliers.
    let seen = |report: &baton_proto::Report| {
        report.step_model.as_ref().is_some_and(|model| model.samples >= 30)
    };
    let report = worker.attached.report(seen).await;
    let fitted = StepModel::try_from(&report.step_model.unwrap()).unwrap();
    // Its steps cannot be shorter than its profile says; how much longer is the machine's affair.
    let (now_ms, profile_ms) = (fitted.decode_step_ms(1, 230), told.decode_step_ms(1, 230));
    assert!(now_ms > 0.8 * profile_ms, "{now_ms} ms, {profile_ms} ms by the profile");
    assert!(report.slowest_step_part > 0.0, "what is predicted is held against what is seen");
    worker.stop().await;
}

/// With time that does not pass there is no profile to begin with, and nothing is made up.
#[tokio::test]
async fn what_is_not_known_is_not_said() {
    let mut fleet = Fleet::start().await;
    let mut worker = fleet.worker("w", Role::Decode, fast()).await;
    assert_eq!(worker.attached.hello.step_model, None);
    let report = worker.attached.report(|_| true).await;
    assert_eq!((report.step_model, report.slowest_step_part), (None, 0.0));
    worker.stop().await;
}
