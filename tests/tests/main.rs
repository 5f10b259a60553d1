//! The scenarios, one a file, over real processes: `cargo test -p baton-tests flips::` runs one.
//!
//! They are one program because most of a scenario is waiting: so some wait beside each other.

// A scenario says what must hold by panicking, and what it skips on the terminal.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used
)]

mod admission;
mod alerts;
mod api_keys;
mod bad_input;
mod bare_metal;
mod bench;
mod clients_that_go_away;
mod compare_live;
mod dashboards;
mod engines_end_with_their_workers;
mod faults_on_the_way;
mod flips;
mod kubernetes;
mod kubernetes_scaling;
mod legs_that_fail;
mod live_page;
mod logs;
mod mutual_tls;
mod one_process;
mod operators;
mod orders_from_a_terminal;
mod placement;
mod prefix_index;
mod prefix_pulls;
mod rollout;
mod split_equals_aggregated;
mod traces;
mod transports;
mod vllm;
mod vllm_prefix_index;
mod vllm_ranks;
mod what_is_not_split;
mod who_is_paired;

/// A file that is not named above would be a test that is never run.
#[test]
fn every_scenario_is_run() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let own_text = std::fs::read_to_string(here.join("main.rs")).unwrap();
    for entry in here.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            name == "main" || own_text.contains(&format!("\nmod {name};\n")),
            "tests/main.rs does not name {}",
            path.display()
        );
    }
}
