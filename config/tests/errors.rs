//! What a user sees of a file that is wrong.

#![allow(clippy::unwrap_used, reason = "tests say what must hold by panicking")]

use std::path::Path;

use baton_config::ClusterConfig;

fn errors(text: &str) -> String {
    ClusterConfig::parse(text, Path::new("/nowhere")).unwrap_err().to_string()
}

#[track_caller]
fn assert_errors(text: &str, expected: &str) {
    let found = errors(text);
    assert_eq!(found, expected.trim(), "found:\n{found}");
}

#[test]
fn every_error_is_told_at_once() {
    assert_errors(
        r#"insecure = true
[coordinator]
listen = "localhost:8000"
workers_listen = "10.0.0.1:7000"
[coordinator.limits]
max_body_bytes = "32 MiBs"
max_connections = 0
header_timeout_seconds = -1
[slo]
ttft = 200
itl_ms = "fast"
[engine]
kind = "sim"
port = 8100
[[worker]]
name = "p 0"
role = "prefil"
[[worker]]
name = "d"
role = "decode"
coordinators = ["10.0.0.1"]
[[worker]]
role = "decode"
name = "d"
[worker.transfer]
listen = "127.0.0.1"
max_mtu_bytes = 70000
"#,
        r#"
baton.toml:1: insecure: unknown key; did you mean "insecure_plaintext"?
baton.toml:3: coordinator.listen: "localhost:8000" is not an address IP:PORT, such as "127.0.0.1:8000"
baton.toml:4: coordinator.workers_listen: "10.0.0.1:7000" is no loopback address: give [tls], or set insecure_plaintext = true in a network that you trust
baton.toml:6: coordinator.limits.max_body_bytes: "32 MiBs" is not a size of 1 bytes or more: a whole number, or such as "256 MiB"
baton.toml:7: coordinator.limits.max_connections: 0 is not a whole number from 1 to 4294967295
baton.toml:8: coordinator.limits.header_timeout_seconds: -1 is not a number of seconds above 0, at most 31536000
baton.toml:10: slo.ttft: unknown key; did you mean "ttft_ms"?
baton.toml:11: slo.itl_ms: "fast" is not a number above 0
baton.toml:14: engine.port: belongs to kind = "vllm"; this engine's kind is "sim"
baton.toml:16: worker[0].name: "p 0" is not a name of at most 63 letters, digits, "-", "_" and ".", or the start of such names and "*"
baton.toml:17: worker[0].role: "prefil" is not "prefill" or "decode"
baton.toml:21: worker[1].coordinators: ["10.0.0.1"] is not a list of HOST:PORT, such as ["10.0.0.7:7000"]
baton.toml:24: worker[2].name: "d" is taken by worker[1].name (line 19): give each its own
baton.toml:26: worker[2].transfer.listen: "127.0.0.1" is not an address IP:PORT, such as "127.0.0.1:8000"
baton.toml:27: worker[2].transfer.max_mtu_bytes: 70000 is not a size from 1200 to 65527 bytes: a whole number, or such as "256 MiB"
"#,
    );
}

#[test]
fn an_empty_file_says_what_is_missing() {
    assert_errors(
        "",
        "baton.toml:1: coordinator: missing; give [coordinator] with listen and workers_listen",
    );
}

#[test]
fn missing_keys_are_told_at_their_table() {
    assert_errors(
        "\n[coordinator]\nlisten = '127.0.0.1:8000'\n[[worker]]\nname = 'a'\n[tls]\nca = 'ca.pem'\n",
        r#"
baton.toml:2: coordinator.workers_listen: missing; for example workers_listen = "127.0.0.1:7000"
baton.toml:4: worker[0].engine: missing; give [worker.engine], or [engine] for all workers, with its kind
baton.toml:4: worker[0].role: missing; for example role = "prefill"
baton.toml:6: tls.certificate: missing; for example certificate = "tls/host.pem"
baton.toml:6: tls.private_key: missing; for example private_key = "tls/host.key"
baton.toml:7: tls.ca: 'ca.pem' is not an existing file (looked for /nowhere/ca.pem)
"#,
    );
}

#[test]
fn a_table_where_a_value_belongs_and_the_other_way_round() {
    assert_errors(
        "slo = 5\nworker = 1\n[coordinator]\nlisten = { port = 1 }\nworkers_listen = [1]\n[engine]\nkind = 3\n[arena.directory]\n",
        r#"
baton.toml:1: slo: 5 is not a table
baton.toml:2: worker: 1 is not a list of tables, each under its own [[worker]]
baton.toml:4: coordinator.listen: a table is not an address IP:PORT, such as "127.0.0.1:8000"
baton.toml:5: coordinator.workers_listen: [1] is not an address IP:PORT, such as "127.0.0.1:8000"
baton.toml:7: engine.kind: 3 is not "sim" or "vllm"
baton.toml:8: arena.directory: a table is not a path
"#,
    );
}

#[test]
fn tenants_need_keys_and_are_told_apart() {
    let digest = "ab".repeat(32);
    assert_errors(
        &format!(
            "{COORDINATOR}[[tenant]]\nname = 'a'\nkey_sha256 = '{digest}'\n[[tenant]]\nname = 'a'\n\
             [[tenant]]\nname = 'c'\nkey_sha256 = '{digest}'\n[[tenant]]\nname = 'd'\nkey_sha256 \
             = 'abc'\npriority = 1.5\nmax_requests = 0\n"
        ),
        &format!(
            r#"
baton.toml:7: tenant[1].key_sha256: missing: give key_sha256, or key_file with a key a line
baton.toml:8: tenant[1].name: 'a' is taken by tenant "a": give each its own
baton.toml:11: tenant[2].key_sha256: '{}… is taken by tenant "a": give each its own
baton.toml:14: tenant[3].key_sha256: 'abc' is not the 64 hexadecimal digits of a SHA-256
baton.toml:15: tenant[3].priority: 1.5 is not a whole number from -10 to 10
baton.toml:16: tenant[3].max_requests: 0 is not a whole number from 1 to 4294967295
"#,
            &digest[..59]
        ),
    );
}

const COORDINATOR: &str =
    "[coordinator]\nlisten = '127.0.0.1:8000'\nworkers_listen = '127.0.0.1:7000'\n";

#[test]
fn ports_of_one_machine_are_its_own() {
    let vllm = |name: &str, keys: &str| {
        format!(
            "[[worker]]\nname = '{name}'\nrole = 'decode'\n[worker.engine]\nkind = 'vllm'\ncommand = ['vllm']\n{keys}\n"
        )
    };
    let text = format!(
        "{COORDINATOR}{}{}{}",
        vllm("a", "port = 8100\nconnector_socket = '/run/a.sock'"),
        vllm("b", "port = 8100\nconnector_socket = '/run/a.sock'"),
        vllm("c", "port = 8101\n[worker.transfer]\nlisten = '127.0.0.1:7000'"),
    );
    assert_errors(
        &text,
        r#"
baton.toml:18: worker[1].engine.port: "127.0.0.1:8100" is taken by worker[0].engine.port (line 10): give each its own
baton.toml:19: worker[1].engine.connector_socket: "/run/a.sock" is taken by worker[0].engine.connector_socket (line 11): give each its own
baton.toml:28: worker[2].transfer.listen: "127.0.0.1:7000" is taken by coordinator.workers_listen (line 3): give each its own
"#,
    );
}

#[test]
fn a_shared_port_of_the_defaults_is_told_once() {
    let worker = |name: &str| format!("[[worker]]\nname = '{name}'\nrole = 'decode'\n");
    let text = format!(
        "{COORDINATOR}[engine]\nkind = 'sim'\n[transfer]\nlisten = '127.0.0.1:7100'\n{}{}{}",
        worker("a"),
        worker("b"),
        worker("c"),
    );
    assert_errors(
        &text,
        r#"baton.toml:7: transfer.listen: "127.0.0.1:7100" holds for several workers of one machine: give each its own"#,
    );
}

#[test]
fn operators_are_listened_to_on_this_machine_alone_or_over_tls() {
    let admin = |listen: &str, before: &str| {
        format!("{before}{COORDINATOR}[admin]\nlisten = \"{listen}\"\ntoken = \"x\"\n")
    };
    let found = errors(&admin("10.0.0.1:9400", ""));
    assert!(found.contains("admin.listen: \"10.0.0.1:9400\" is no loopback address"), "{found}");
    assert!(found.contains("admin.token: unknown key; did you mean \"token_file\"?"), "{found}");
    let found = errors(&admin("10.0.0.1:9400", "insecure_plaintext = true\n"));
    assert!(!found.contains("loopback"), "{found}");
    let https = "[admin.https]\ncertificate = 'a.pem'\nprivate_key = 'a.key'\n";
    let found = errors(&(admin("10.0.0.1:9400", "") + https));
    assert!(!found.contains("loopback"), "{found}");
    let found = errors(&admin("127.0.0.1:7000", ""));
    assert!(found.contains("admin.listen: \"127.0.0.1:7000\" is taken by"), "{found}");
}

#[test]
fn other_machines_may_have_the_same_ports() {
    let worker = |name: &str, host: &str| {
        format!(
            "[[worker]]\nname = '{name}'\nrole = 'decode'\n[worker.engine]\nkind = 'vllm'\nurl = 'http://127.0.0.1:8100'\n[worker.transfer]\nlisten = '0.0.0.0:7100'\nadvertise = '{host}:7100'\n"
        )
    };
    let head = format!("insecure_plaintext = true\n{COORDINATOR}");
    let text = format!("{head}{}{}", worker("a", "node-1"), worker("b", "node-2"));
    let cluster = ClusterConfig::parse(&text, Path::new("/nowhere")).unwrap();
    assert_eq!(cluster.workers.len(), 2);

    let text = format!("{head}{}{}", worker("a", "node-1"), worker("b", "node-1"));
    assert_errors(
        &text,
        r#"
baton.toml:19: worker[1].engine.url: "127.0.0.1:8100" is taken by worker[0].engine.url (line 10): give each its own
baton.toml:21: worker[1].transfer.listen: "0.0.0.0:7100" is taken by worker[0].transfer.listen (line 12): give each its own
"#,
    );
}

#[test]
fn an_address_that_nobody_can_dial() {
    assert_errors(
        "insecure_plaintext = true\n[coordinator]\nlisten = '0.0.0.0:8000'\nworkers_listen = '0.0.0.0:7000'\n[engine]\nkind = 'sim'\n[[worker]]\nname = 'a'\nrole = 'decode'\ntransfer.listen = '[::]:0'\n",
        r#"
baton.toml:4: coordinator.workers_listen: "0.0.0.0:7000" is every address of the host; give advertise, which others shall dial
baton.toml:10: worker[0].transfer.listen: "[::]:0" is every address of the host; give advertise, which others shall dial
"#,
    );
}

#[test]
fn engines_that_contradict_themselves() {
    let worker = |name: &str, keys: &str| {
        format!(
            "[[worker]]\nname = '{name}'\nrole = 'decode'\nengine = {{ kind = 'vllm', {keys} }}\n"
        )
    };
    let text = [
        COORDINATOR.to_owned(),
        worker("neither", "engine_handoff = true"),
        worker("both", "url = 'http://127.0.0.1:1', command = ['vllm'], port = 2"),
        worker("portless", "command = ['vllm']"),
        worker("url-port", "url = 'http://127.0.0.1:3', port = 3"),
        worker("url-env", "url = 'http://127.0.0.1:4', environment = { A = 'b' }"),
        worker(
            "two-ways",
            "url = 'http://127.0.0.1:5', engine_handoff = true, connector_socket = 's'",
        ),
        worker("far", "url = 'http://gpu-3:8100'"),
        worker("no-url", "url = 'unix:/run/vllm.sock'"),
        worker("sim-key", "url = 'http://127.0.0.1:6', time_scale = 0"),
        worker(
            "url-groups",
            "url = 'http://127.0.0.1:7', connector_socket = 't', layer_groups = 2",
        ),
        worker("no-connector", "command = ['vllm'], port = 8, layer_groups = 2"),
        worker(
            "no-groups",
            "command = ['vllm'], port = 9, connector_socket = 'u', layer_groups = 0",
        ),
    ]
    .concat();
    assert_errors(
        &text,
        r#"
baton.toml:7: worker[0].engine.url: missing: give the url of a running vLLM, or command and port
baton.toml:11: worker[1].engine.url: excludes command: a vLLM is either running or started, not both
baton.toml:15: worker[2].engine.port: missing: command needs the loopback port to serve on, such as port = 8100
baton.toml:19: worker[3].engine.port: belongs to command, not to url
baton.toml:23: worker[4].engine.environment: belongs to command, not to url
baton.toml:27: worker[5].engine.connector_socket: excludes engine_handoff: only one of them moves the KV
baton.toml:31: worker[6].engine.url: 'http://gpu-3:8100' is no loopback address: run the worker beside its engine, or set insecure_plaintext = true in a network that you trust
baton.toml:35: worker[7].engine.url: 'unix:/run/vllm.sock' is not a URL http://HOST:PORT, such as "http://127.0.0.1:8100"
baton.toml:39: worker[8].engine.time_scale: belongs to kind = "sim"; this engine's kind is "vllm"
baton.toml:43: worker[9].engine.layer_groups: belongs to command, not to url: a running vLLM has it in its kv_connector_extra_config
baton.toml:47: worker[10].engine.layer_groups: needs connector_socket: our connector makes the groups
baton.toml:51: worker[11].engine.layer_groups: 0 is not a whole number from 1 to 4294967295
"#,
    );
}

#[test]
fn an_arena_holds_at_least_one_block() {
    assert_errors(
        &format!(
            "{COORDINATOR}[engine]\nkind = 'sim'\nkv_bytes_per_token = '1 MiB'\n[arena]\nexport_bytes = '1 MiB'\n[[worker]]\nname = 'a'\nrole = 'decode'\n"
        ),
        "baton.toml:8: arena.export_bytes: 1048576 bytes have no room for one KV block of this engine, which has 16777216",
    );
}

#[test]
fn lines_that_are_not_toml_do_not_hide_the_others() {
    assert_errors(
        "[coordinator\nlisten = 8000\n[slo]\nitl_ms = \nttft_ms = 0\nttft_ms = 5\n",
        "
baton.toml:1: unclosed table, expected `]`
baton.toml:4: string values must be quoted, expected literal string
baton.toml:5: slo.ttft_ms: 0 is not a number above 0
baton.toml:6: duplicate key
",
    );
}

#[test]
fn odd_keys_and_long_values_stay_on_one_line() {
    let found = errors(&format!("\"a\\nb\" = 1\nslo = '''\n{}'''\n", "long ".repeat(100)));
    assert_eq!(found.lines().count(), 3, "{found}");
    assert!(found.contains(r#"baton.toml:1: "a\nb": unknown key; known here:"#), "{found}");
    assert!(found.contains("… is not a table"), "{found}");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let path = Path::new("no-such-directory/baton.toml");
    let found = ClusterConfig::read(path).unwrap_err().to_string();
    assert!(found.starts_with("no-such-directory/baton.toml: cannot read: "), "{found}");
}

#[test]
fn a_file_is_named_as_the_user_named_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("b.toml");
    std::fs::write(&path, format!("{COORDINATOR}x = 1\n")).unwrap();
    let found = ClusterConfig::read(&path).unwrap_err().to_string();
    assert!(found.starts_with(&format!("{}:4: coordinator.x: ", path.display())), "{found}");
}

#[test]
fn choices_name_what_there_is() {
    assert_errors(
        "[coordinator]\nlisten = '127.0.0.1:8000'\nworkers_listen = '127.0.0.1:7000'\n[placement]\nmode \
         = 'sometimes'\nlate = 'first'\non_no_prefill = 1\n[admission]\nearly_rejection_priority = \
         11\ntenant_header = 'x tenant'\nwait_for_worker_seconds = -1\n",
        r#"
baton.toml:5: placement.mode: 'sometimes' is not "adaptive", "always" or "never"
baton.toml:6: placement.late: 'first' is not "last" or "fifo"
baton.toml:7: placement.on_no_prefill: 1 is not "reject" or "local"
baton.toml:9: admission.early_rejection_priority: 11 is not a whole number from -10 to 10
baton.toml:10: admission.tenant_header: 'x tenant' is not the name of a header, such as "x-tenant"
baton.toml:11: admission.wait_for_worker_seconds: -1 is not a number of seconds from 0 to 31536000
"#,
    );
}

#[test]
fn pools_are_scaled_within_bounds_that_make_sense() {
    let scaling = |placement: &str, keys: &str| {
        format!(
            "[coordinator]\nlisten = \"127.0.0.1:8000\"\nworkers_listen = \"127.0.0.1:7000\"\n\
             [placement]\nmode = \"{placement}\"\n[balancer]\nmin_decode = 4\n[balancer.kubernetes]\n\
             prefill_deployment = \"p\"\ndecode_deployment = \"d\"\nmax_prefill = 1\n{keys}"
        )
    };
    assert_errors(
        &scaling("always", "max_decode = 3\nmax_decod = 3"),
        r#"
baton.toml:12: balancer.kubernetes.max_decode: 3 is less than balancer.min_decode, which is 4
baton.toml:13: balancer.kubernetes.max_decod: unknown key; did you mean "max_decode"?
"#,
    );
    assert_errors(
        &scaling("adaptive", ""),
        r#"
baton.toml:8: balancer.kubernetes: pools are scaled by what each has to do, which can be told under placement.mode = "always" alone: set that, or scale by KEDA or an HPA
baton.toml:8: balancer.kubernetes.max_decode: missing; for example max_decode = 8
"#,
    );
}

#[test]
fn verification_cannot_be_turned_off() {
    let with = |key: &str| {
        format!(
            "[coordinator]\nlisten = \"127.0.0.1:0\"\n[transfer]\n{key}\n[[worker]]\nname = \"a\"\nrole = \"decode\"\n"
        )
    };
    for off in ["check = \"none\"", "check = \"off\"", "check = false"] {
        let told = errors(&with(off));
        let expected = "is not \"crc\" or \"blake3\"; verification cannot be turned off";
        assert!(told.contains("transfer.check") && told.contains(expected), "{told}");
    }
    for key in ["verify = false", "checksum = \"none\"", "skip_verification = true"] {
        let told = errors(&with(key));
        assert!(told.contains("unknown key"), "{told}");
    }
}
