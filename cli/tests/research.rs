//! `baton simulate`, `goodput`, `compare` and `policies`, from outside.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// The repository's root: the paths in messages are as its reader would type them.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn baton(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null()).env("NO_COLOR", "1");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const SAMPLE: &str = "harness/samples/azure_conv.csv";
const PROFILE: &str = "engine/profiles/h100_llama31_70b_fp8_tp4.json";

/// The arguments of a simulation that is right, with some replaced.
fn arguments(verb: &'static str, changed: &[(&'static str, &'static str)]) -> Vec<&'static str> {
    let mut arguments = vec![verb];
    let right = [
        ("--trace", SAMPLE),
        ("--profile", PROFILE),
        ("--workers", "2"),
        ("--mode", "aggregated"),
        ("--slo-ttft-ms", "2000"),
        ("--slo-itl-ms", "50"),
    ];
    for (name, value) in right {
        let other = changed.iter().find(|(changed, _)| *changed == name);
        arguments.extend([name, other.map_or(value, |(_, value)| value)]);
    }
    for (name, value) in
        changed.iter().filter(|(name, _)| !arguments.contains(name)).copied().collect::<Vec<_>>()
    {
        arguments.extend([name, value]);
    }
    arguments
}

/// Whatever it says on stderr; it must fail, and say nothing on stdout.
fn refusal(output: &Output) -> String {
    assert!(!output.status.success(), "{}", text(&output.stdout));
    assert_eq!(text(&output.stdout), "");
    text(&output.stderr).replace("\n\nFor more information, try '--help'.", "").trim().to_owned()
}

#[test]
fn a_fleet_that_cannot_be_is_refused_with_what_would_be_right() {
    let wrong = [
        ("--workers", "0"),
        ("--mode", "static:0P2D"),
        ("--mode", "static:2P0D"),
        ("--mode", "static:3P1D"),
        ("--mode", "agregated"),
        ("--mode", "adaptive by slak"),
        ("--slo-ttft-ms", "0"),
        ("--slo-itl-ms", "NaN"),
        ("--slo-ttft-prefill-factor", "-1"),
        ("--scale", "0"),
        ("--late", "never"),
        ("--max-sequences", "0"),
        ("--link-latency-ms", "-1"),
        ("--policy", "fastest"),
        ("--trace", "no-such-file.csv"),
    ];
    let said: Vec<String> = wrong
        .iter()
        .map(|wrong| {
            let output = baton(root(), &arguments("simulate", &[*wrong]));
            format!("{} {}\n{}\n", wrong.0, wrong.1, refusal(&output))
        })
        .collect();
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn a_profile_that_predicts_negative_time_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let right = fs::read_to_string(root().join(PROFILE)).unwrap();
    let mut profile: Value = serde_json::from_str(&right).unwrap();
    profile["prefill_ms"][0] = (-25.0).into();
    fs::write(directory.path().join("negative.json"), profile.to_string()).unwrap();
    fs::copy(root().join(SAMPLE), directory.path().join("trace.csv")).unwrap();
    let changed = [("--profile", "negative.json"), ("--trace", "trace.csv")];
    let said = refusal(&baton(directory.path(), &arguments("simulate", &changed)));
    assert!(said.contains("negative.json") && said.contains("-25"), "{said}");
}

#[test]
fn json_is_one_object_and_the_same_each_time() {
    let changed = [("--mode", "static:1P1D"), ("--seed", "7")];
    let mut arguments = arguments("simulate", &changed);
    arguments.push("--json");
    let first = baton(root(), &arguments);
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert_eq!(text(&first.stdout).lines().count(), 1);
    let summary: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(summary["requests"], 2000);
    for field in [
        "/completed",
        "/rejected",
        "/unfinished",
        "/duration_s",
        "/goodput_rps",
        "/attainment",
        "/attainment_longest_input_decile",
        "/attainment_longest_output_decile",
        "/output_tokens_per_s",
        "/prefix_hit_ratio",
        "/flips",
        "/workers_seconds/prefill",
        "/workers_seconds/decode",
    ] {
        assert!(summary.pointer(field).is_some_and(Value::is_number), "{field}");
    }
    for latency in ["ttft_ms", "tbt_ms", "tpot_ms", "e2e_ms"] {
        for percentile in ["p50", "p90", "p99"] {
            assert!(summary[latency][percentile].is_number(), "{latency} {percentile}");
        }
    }
    assert!(
        summary["ttft_ms"]["p99"].as_f64().unwrap() > summary["ttft_ms"]["p50"].as_f64().unwrap()
    );
    assert!(summary["kv_bytes_moved"].as_u64().unwrap() > 0);
    assert!(!summary["by_minute"].as_array().unwrap().is_empty());
    assert_eq!(first.stdout, baton(root(), &arguments).stdout);
}

#[test]
fn every_policy_is_listed_and_can_be_asked_for() {
    let listed = text(&baton(root(), &["policies"]).stdout);
    let names: Vec<&str> =
        listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"round-robin") && names.contains(&"prefix-affinity"), "{listed}");
    for name in names {
        let changed = arguments("simulate", &[]);
        let output = baton(root(), &[changed.as_slice(), &["--policy", name]].concat());
        assert!(text(&output.stdout).contains(name), "{}", text(&output.stderr));
    }
}

const EXPERIMENT: &str = r#"
profile = "profile.json"
traces = ["trace.jsonl"]
workers = [2]
modes = ["aggregated", "best-static", "adaptive", "aggregated:512 by round-robin"]
seeds = [1, 2]

[[slo]]
ttft_ms = 1000
itl_ms = 40
"#;

/// A directory with a short trace of two phases, a profile and an experiment.
fn laboratory(experiment: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (0..160_u32)
        .map(|i| {
            let (input, output, phase) =
                if i < 80 { (3_000 + 17 * i, 20, "code") } else { (700 + 3 * i, 120, "chat") };
            format!(
                r#"{{"timestamp":{},"input_length":{input},"output_length":{output},"phase":"{phase}"}}"#,
                i * 150
            )
        })
        .collect();
    fs::write(directory.path().join("trace.jsonl"), lines.join("\n")).unwrap();
    fs::copy(root().join(PROFILE), directory.path().join("profile.json")).unwrap();
    fs::write(directory.path().join("experiment.toml"), experiment).unwrap();
    directory
}

#[test]
fn an_experiment_gives_the_same_report_on_any_number_of_threads() {
    let run = |threads: &str| {
        let directory = laboratory(EXPERIMENT);
        let output = Command::new(env!("CARGO_BIN_EXE_baton"))
            .args(["compare", "--config", "experiment.toml", "--out", "out"])
            .current_dir(directory.path())
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let files = ["report.html", "results.json", "results.csv"];
        (
            output.stdout,
            files.map(|name| fs::read(directory.path().join("out").join(name)).unwrap()),
        )
    };
    let (table, files) = run("1");
    assert!(run("5") == (table.clone(), files.clone()));

    let results: Value = serde_json::from_slice(&files[1]).unwrap();
    let contenders = results["scenarios"][0]["contenders"].as_array().unwrap();
    assert_eq!(contenders.len(), 4);
    // The baseline is tuned: no budget that was tried serves more than the one it got.
    let tried = contenders[0]["searched"].as_array().unwrap();
    assert!(tried.len() > 3);
    let setup = &contenders[0]["setup"];
    let rate = |tried: &Value| tried["goodput_rps"].as_f64().unwrap();
    let chosen = tried.iter().find(|tried| tried["setup"] == *setup).map(rate).unwrap();
    assert!(tried.iter().all(|tried| rate(tried) <= chosen));
    for contender in contenders {
        let served = contender["goodput"]["rps"].as_f64().unwrap();
        assert!(served > 0.0, "{contender}");
        assert!(text(&table).contains(contender["mode"].as_str().unwrap()));
    }
}

#[test]
fn what_is_wrong_with_an_experiment_is_said_at_once_with_its_lines() {
    let wrong = EXPERIMENT
        .replace("modes = [\"aggregated\"", "modes = [\"agregated\", \"static:7P1D\"")
        .replace("workers = [2]", "workers = [2]\nmin_decil = 0.8\nlate = [\"lifo\"]")
        .replace("itl_ms = 40", "itl_ms = 0")
        .replace("\"trace.jsonl\"", "\"trase.jsonl\"");
    let directory = laboratory(&wrong);
    let output = baton(directory.path(), &["compare", "--config", "experiment.toml"]);
    insta::assert_snapshot!(refusal(&output));
    assert!(!directory.path().join("comparison").exists());

    let directory = laboratory("workers = [2\n");
    let broken = baton(directory.path(), &["compare", "--config", "experiment.toml"]);
    assert!(refusal(&broken).starts_with("baton: experiment.toml:1:"));
}

#[test]
fn an_experiment_of_several_goals_has_a_cell_for_each_and_an_slo_its_own_traces() {
    let several = EXPERIMENT.replace("[[slo]]", "draws_loads = false\nstep_noise = 0.1\n\n[[slo]]");
    let several = several.trim_end().to_owned()
        + "\ntraces = [\"trace.jsonl\"]\n\n[[goal]]\nlate = \"fifo\"\n\n\
           [[goal]]\nlate = \"last\"\nmin_decile = 0.5\n";
    let directory = laboratory(&several);
    let output =
        baton(directory.path(), &["compare", "--config", "experiment.toml", "--out", "out"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let results = fs::read(directory.path().join("out/results.json")).unwrap();
    let results: Value = serde_json::from_slice(&results).unwrap();
    let scenarios = results["scenarios"].as_array().unwrap();
    let asked: Vec<_> = scenarios.iter().map(|s| (&s["late"], &s["min_decile"])).collect();
    assert_eq!(asked, [(&"fifo".into(), &Value::Null), (&"last".into(), &0.5.into())]);
    assert!(text(&output.stdout).contains("against the better of"), "{}", text(&output.stdout));

    let wrong = several
        .replace("late = \"fifo\"", "lat = \"fifo\"\nmin_decile = 2.0")
        .replace("traces = [\"trace.jsonl\"]\n\n[[goal", "traces = [\"other.jsonl\"]\n\n[[goal")
        .replace("step_noise = 0.1", "step_noise = 1.0\nlate = [\"last\"]");
    let directory = laboratory(&wrong);
    let said = refusal(&baton(directory.path(), &["compare", "--config", "experiment.toml"]));
    for expected in [
        "goal[0].lat",
        "goal[0].min_decile: 2 is not a share from 0 to 1",
        "slo[0].traces: \"other.jsonl\" is not one of the traces above",
        "step_noise: 1 is not a number from 0 to below 1",
        "late: is said in each [[goal]] where there is one",
    ] {
        assert!(said.contains(expected), "{expected}\nin\n{said}");
    }
}

#[test]
fn goodput_is_found_and_reported() {
    let directory = laboratory(EXPERIMENT);
    let arguments = [
        "goodput",
        "--trace",
        "trace.jsonl",
        "--profile",
        "profile.json",
        "--workers",
        "2",
        "--mode",
        "best-static",
        "--slo-ttft-ms",
        "1000",
        "--slo-itl-ms",
        "40",
        "--min-decile",
        "0.5",
        "--json",
        "--out",
        "out",
    ];
    let output = baton(directory.path(), &arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["mode"], "static:1P1D");
    assert!(found["goodput_rps"].as_f64().unwrap() >= found["goodput_rps_p99"].as_f64().unwrap());
    assert!(found["attainment_by_phase"]["code"].is_number());
    let page = fs::read_to_string(directory.path().join("out/report.html")).unwrap();
    assert!(page.contains("static:1P1D keeps 90 % within both SLOs up to"));

    let arguments = [&arguments[..14], &["1.5"]].concat();
    assert_eq!(
        refusal(&baton(directory.path(), &arguments)),
        "baton: --min-decile is 1.5: expected a share from 0 to 1"
    );
}

/// What the page shows is what there is, and its commands run as they stand.
#[test]
fn the_researchers_page_is_true() {
    let page = fs::read_to_string(root().join("docs/research.md")).unwrap();
    let policies = root().join("coordinator/core/src/policy");
    assert!(page.contains(&fs::read_to_string(policies.join("least_load.rs")).unwrap()));
    let entries = fs::read_to_string(policies.join("mod.rs")).unwrap();
    let entry = page.split("```rust\n").nth(2).unwrap().split("```").next().unwrap();
    assert!(entries.contains(entry), "{entry}");

    let directory = tempfile::tempdir().unwrap();
    for folder in ["harness", "engine"] {
        std::os::unix::fs::symlink(root().join(folder), directory.path().join(folder)).unwrap();
    }
    // What needs a cluster stands in blocks of another kind, and is tested at one.
    let blocks = page.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let shown = blocks.flat_map(str::lines).filter(|line| line.starts_with("baton "));
    let mut count = 0;
    for line in shown {
        let arguments: Vec<&str> = line.split(' ').skip(1).collect();
        let output = baton(directory.path(), &arguments);
        assert!(output.status.success(), "{line}\n{}", text(&output.stderr));
        count += 1;
    }
    assert!(count >= 6, "{count} commands");
    assert!(directory.path().join("comparison/report.html").exists());
}
