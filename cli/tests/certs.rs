//! `baton certs`, as an operator uses it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    process::Command,
};

/// Runs in `directory`; answers whether it succeeded, and all that it said.
fn certs(directory: &Path, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    let output = command.arg("certs").args(arguments).current_dir(directory).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[track_caller]
fn made(directory: &Path, arguments: &[&str]) -> String {
    let (success, said) = certs(directory, arguments);
    assert!(success, "{said}");
    said
}

#[track_caller]
fn refused(directory: &Path, arguments: &[&str], why: &str) {
    let (success, said) = certs(directory, arguments);
    assert!(!success && said.contains(why), "{said}");
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).unwrap().mode() & 0o777
}

#[test]
fn a_ca_and_its_hosts() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let said = made(at, &["init"]);
    assert!(said.contains("CN=Baton CA ") && said.contains("a CA"), "{said}");
    assert!(said.contains("in 3649 days"), "{said}");
    assert_eq!([mode(&at.join("certs")), mode(&at.join("certs/ca.key"))], [0o700, 0o600]);

    let said = made(
        at,
        &[
            "issue",
            "prefill-0.internal",
            "10.77.0.11",
            "fd00::11",
            "--worker",
            "prefill-0",
            "--days",
            "20",
        ],
    );
    let names =
        "prefill-0.internal, 10.77.0.11, fd00::11, worker prefill-0, signed by CN=Baton CA ";
    assert!(said.contains(names) && said.contains("in 19 days"), "{said}");
    let host = at.join("certs/prefill-0.internal");
    let modes = ["ca.pem", "host.pem", "host.key"].map(|file| mode(&host.join(file)));
    assert_eq!(modes, [0o644, 0o644, 0o600]);
    assert_eq!(fs::read(host.join("ca.pem")).unwrap(), fs::read(at.join("certs/ca.pem")).unwrap());

    // Nothing is lost by a slip.
    let before = fs::read(host.join("host.key")).unwrap();
    refused(at, &["init"], "certs/ca.pem is there already");
    refused(at, &["issue", "prefill-0.internal"], "host.pem is there already: --renew replaces it");
    assert_eq!(fs::read(host.join("host.key")).unwrap(), before);
    made(at, &["issue", "prefill-0.internal", "--renew"]);
    assert_ne!(fs::read(host.join("host.key")).unwrap(), before);
    assert_eq!(mode(&host.join("host.key")), 0o600);

    // All of them at once; a key that others read is told of.
    fs::set_permissions(host.join("host.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let said = made(at, &["show"]);
    assert_eq!(said.matches("expires on ").count(), 3, "{said}");
    assert!(said.contains("host.key has mode 644: others than its owner may use it"), "{said}");
}

#[test]
fn what_is_wrong_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    refused(at, &["issue", "a"], "certs holds no CA: `baton certs init --out certs` makes one");
    refused(at, &["show", "certs"], "certs");
    made(at, &["init"]);
    refused(at, &["issue", "a_b"], "\"a_b\" is no name of a host and no address");
    refused(at, &["issue", "../up"], "is no name of a host");
    refused(at, &["issue", "a", "--worker", "p 0"], "--worker \"p 0\" is no worker's name");
    refused(at, &["issue", "a", "--days", "0"], "1..=36500");
    fs::write(at.join("x.pem"), "nothing").unwrap();
    refused(at, &["show", "x.pem"], "x.pem holds no certificate in PEM");
    let said = made(at, &["issue", "a", "--days", "9999"]);
    assert!(said.contains("the CA itself expires in 3649 days"), "{said}");
}

#[test]
fn a_ca_is_rotated_in_steps() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    made(at, &["init"]);
    made(at, &["issue", "a"]);
    let former = fs::read_to_string(at.join("certs/ca.pem")).unwrap();
    refused(at, &["retire"], "no rotation is under way");

    let said = made(at, &["rotate"]);
    assert!(said.contains("1. give every host the new ca.pem"), "{said}");
    let bundle = fs::read_to_string(at.join("certs/ca.pem")).unwrap();
    let new = bundle.strip_suffix(&former).unwrap();
    assert!(new != former && new.matches("BEGIN CERTIFICATE").count() == 1);
    assert_eq!(fs::read_to_string(at.join("certs/a/ca.pem")).unwrap(), bundle);
    refused(at, &["rotate"], "its rotation is under way");

    made(at, &["issue", "a", "--renew"]);
    made(at, &["retire"]);
    for ca in ["certs/ca.pem", "certs/a/ca.pem"] {
        assert_eq!(fs::read_to_string(at.join(ca)).unwrap().trim(), new.trim());
    }
    // Signed by the one that is left.
    let said = made(at, &["show"]);
    let names: Vec<_> = said.lines().filter_map(|line| line.split_once("CN=Baton CA ")).collect();
    assert_eq!(names.len(), 3, "{said}");
    let mark = |line: &(&str, &str)| line.1[..8].to_owned();
    assert!(names.iter().all(|line| mark(line) == mark(&names[0])), "{said}");
}
