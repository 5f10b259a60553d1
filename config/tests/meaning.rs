//! What files mean, and that writing a cluster keeps it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests say what must hold by panicking")]

use std::{path::Path, time::Duration};

use baton_config::{
    AdminConfig, AdmissionConfig, ArenaConfig, BalancerConfig, ClusterConfig, CoordinatorConfig,
    EngineConfig, HttpsConfig, LateRequests, LimitsConfig, OnNoPrefill, PlacementConfig,
    PlacementMode, SimConfig, SloConfig, TelemetryConfig, TenantConfig, TransferConfig, VllmConfig,
    VllmSource, WorkerConfig, sample,
};
use baton_types::Role;
use proptest::prelude::*;

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/baton.sample.toml");

fn parse(text: &str) -> ClusterConfig {
    ClusterConfig::parse(text, Path::new("/base")).unwrap_or_else(|errors| panic!("{errors}"))
}

fn default_cluster() -> ClusterConfig {
    let worker = |name: &str, role| WorkerConfig {
        name: name.to_owned(),
        role,
        coordinators: vec!["127.0.0.1:7000".to_owned()],
        every_address: false,
        health_listen: None,
        drain_timeout: Duration::from_secs(30),
        tls: None,
        engine: EngineConfig::Sim(SimConfig::default()),
        arena: ArenaConfig::default(),
        transfer: TransferConfig::default(),
    };
    ClusterConfig {
        coordinator: CoordinatorConfig {
            listen: "127.0.0.1:8000".parse().unwrap(),
            workers_listen: "127.0.0.1:7000".parse().unwrap(),
            advertise: "127.0.0.1:7000".to_owned(),
            tokenizer: None,
            limits: LimitsConfig::default(),
            https: None,
        },
        slo: SloConfig::default(),
        placement: PlacementConfig::default(),
        admission: AdmissionConfig::default(),
        balancer: BalancerConfig::default(),
        kubernetes: None,
        admin: None,
        telemetry: TelemetryConfig::default(),
        tls: None,
        insecure_plaintext: false,
        tenants: Vec::new(),
        workers: vec![worker("prefill-0", Role::Prefill), worker("decode-0", Role::Decode)],
    }
}

#[test]
fn the_sample_is_current() {
    let sample = sample();
    if std::env::var_os("BATON_UPDATE").is_some() {
        std::fs::write(SAMPLE, &sample).unwrap();
    }
    let committed = std::fs::read_to_string(SAMPLE).unwrap_or_default();
    assert!(
        committed == sample,
        "config/baton.sample.toml is not what config/src/keys.rs says. Run:\n  BATON_UPDATE=1 cargo \
         test -p baton-config the_sample_is_current"
    );
}

#[test]
fn the_sample_means_the_defaults() {
    assert_eq!(parse(&sample()), default_cluster());
}

/// Uncomments each `#key = value` that `choose` takes; it is told whether the value is an example.
fn uncomment(text: &str, mut choose: impl FnMut(&str, bool) -> bool) -> String {
    let mut example = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        let is_key = line.strip_prefix('#').filter(|rest| rest.starts_with(char::is_alphabetic));
        match is_key {
            Some(rest) if choose(rest, example) => lines.push(rest),
            _ => lines.push(line),
        }
        example = line == "# Example:";
    }
    lines.join("\n")
}

#[test]
fn what_the_sample_shows_as_default_is_the_default() {
    let mut keys = 0;
    let text = sample().replace("#[admin]", "[admin]");
    let (sim, vllm) = text.split_once("# The keys of kind = \"vllm\":").unwrap();
    let (vllm, rest) = vllm.split_once("# Staging memory").unwrap();
    // Its defaults are those of a table that is not there.
    let (before, tenant) = sim.split_once("#[[tenant]]").unwrap();
    let (tenant, after) = tenant.split_once("\n# What computes").unwrap();
    assert!(tenant.contains("#weight = 1\n") && tenant.contains("#priority = 0\n"), "{tenant}");
    let sim = &format!("{before}\n# What computes{after}");
    let mut take_default = |_: &str, example: bool| {
        keys += usize::from(!example);
        !example
    };
    let with_sim = [uncomment(sim, &mut take_default), uncomment(rest, &mut take_default)];
    let with_admin = ClusterConfig { admin: Some(AdminConfig::default()), ..default_cluster() };
    assert_eq!(parse(&with_sim.join("\n# Staging memory")), with_admin);

    let with_vllm = uncomment(vllm, |key, example| {
        take_default(key, example) || ["command =", "port ="].iter().any(|k| key.starts_with(k))
    });
    let file = format!(
        "[coordinator]\nlisten = '127.0.0.1:8000'\nworkers_listen = '127.0.0.1:7000'\n[engine]\nkind \
         = 'vllm'\n{with_vllm}\n[[worker]]\nname = 'a'\nrole = 'decode'\n"
    );
    let expected = EngineConfig::Vllm(VllmConfig {
        source: VllmSource::Command {
            command: ["/opt/vllm/bin/vllm", "serve", "/models/llama"].map(String::from).into(),
            environment: [].into(),
            port: 8100,
        },
        connector_socket: None,
        engine_handoff: false,
        layer_groups: 1,
        start_timeout: Duration::from_secs(600),
        profile: None,
    });
    assert_eq!(parse(&file).workers[0].engine, expected);
    assert!(keys > 20, "only {keys} defaults found in the sample");
}

#[test]
fn the_samples_examples_are_right() {
    let directory = tempfile::tempdir().unwrap();
    for file in [
        "tls/ca.pem",
        "tls/host.pem",
        "tls/host.key",
        "tls/front.pem",
        "tls/front.key",
        "keys/search",
        "profile.json",
        "admin.token",
    ] {
        let path = directory.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    std::fs::create_dir(directory.path().join("model")).unwrap();
    let text = sample();
    let (sim, vllm) = text.split_once("# The keys of kind = \"vllm\":").unwrap();
    let (_, rest) = vllm.split_once("# Staging memory").unwrap();
    let tables = [
        "[tls]",
        "[[tenant]]",
        "[coordinator.https]",
        "[balancer.kubernetes]",
        "[admin]",
        "[admin.https]",
    ];
    let sim =
        tables.iter().fold(sim.to_owned(), |sim, table| sim.replace(&format!("#{table}"), table));
    // Pools are scaled where there are pools.
    let sim = uncomment(&sim, |_, _| true).replace("mode = \"adaptive\"", "mode = \"always\"");
    let transfer_advertise = "advertise = \"127.0.0.1:7100\"";
    let rest = uncomment(rest, |_, _| true);
    let file = format!("{sim}\n# Staging memory{rest}");
    let cluster = ClusterConfig::parse(&file, directory.path()).unwrap();
    assert!(file.contains(transfer_advertise));
    assert_eq!(cluster.workers[0].transfer.advertise.as_deref(), Some("127.0.0.1:7100"));
    assert_eq!(cluster.tls.clone().unwrap().ca, directory.path().join("tls/ca.pem"));
    assert_eq!(cluster.workers[1].tls, cluster.tls);
    let https = cluster.coordinator.https.unwrap();
    assert_eq!(https.certificate, directory.path().join("tls/front.pem"));
    let [tenant] = cluster.tenants.try_into().unwrap();
    assert_eq!((tenant.name.as_str(), tenant.max_requests), ("search", Some(64)));
    assert_eq!(tenant.max_tokens_per_minute, Some(1_000_000));
    assert_eq!(tenant.key_sha256.map(|digest| digest[0]), Some(0x2b));
    let scaling = cluster.kubernetes.unwrap();
    assert_eq!(scaling.prefill_deployment, "baton-prefill");
    assert_eq!((scaling.max_decode, scaling.zero_after), (8, Some(Duration::from_secs(1800))));
    let admin = cluster.admin.unwrap();
    assert_eq!(admin.token_file, Some(directory.path().join("admin.token")));
    assert_eq!(admin.https.unwrap().certificate, https.certificate);
}

#[test]
fn a_workers_tables_change_the_defaults_key_by_key() {
    let cluster = parse(
        r#"
[coordinator]
listen = "127.0.0.1:8000"
workers_listen = "127.0.0.1:7000"
advertise = "localhost:7000"
[engine]
kind = "sim"
model = "m"
time_scale = 0.5
[arena]
import_bytes = "1 GiB"
directory = "arena"
[transfer]
stall_timeout_seconds = 2.5
[[worker]]
name = "a"
role = "prefill"
coordinators = ["localhost:7000", "[::1]:7001"]
[worker.engine]
time_scale = 0
[worker.arena]
export_bytes = 1_000_000
[[worker]]
name = "b"
role = "decode"
[worker.engine]
kind = "vllm"
url = "http://127.0.0.1:8100/"
[worker.transfer]
listen = "127.0.0.1:7100"
"#,
    );
    let [a, b] = cluster.workers.try_into().unwrap();
    let EngineConfig::Sim(sim) = a.engine else { panic!("{:?}", a.engine) };
    assert_eq!((sim.model.as_str(), sim.time_scale), ("m", 0.0));
    assert_eq!((a.arena.export_bytes, a.arena.import_bytes), (1_000_000, 1 << 30));
    assert_eq!(a.arena.directory, Path::new("/base/arena"));
    assert_eq!(a.coordinators, ["localhost:7000", "[::1]:7001"]);
    assert_eq!(a.transfer.stall_timeout, Duration::from_millis(2500));

    assert_eq!(b.coordinators, ["localhost:7000"]);
    let EngineConfig::Vllm(vllm) = b.engine else { panic!("{:?}", b.engine) };
    assert_eq!(vllm.source, VllmSource::Url("http://127.0.0.1:8100".to_owned()));
    assert_eq!(b.arena.export_bytes, ArenaConfig::default().export_bytes);
    assert_eq!(b.transfer.listen, "127.0.0.1:7100".parse().unwrap());
    assert_eq!(b.transfer.stall_timeout, Duration::from_millis(2500));
}

/// Text that needs care in TOML.
fn word() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,8}", "[ -~]{1,12}", "[ '\"\\\\\n\t\u{7f}é]{1,6}"]
}

fn engine() -> impl Strategy<Value = EngineConfig> {
    let sim = (word(), 1..u32::MAX, 0.0..1e9).prop_map(|(model, kv_blocks, time_scale)| {
        EngineConfig::Sim(SimConfig { model, kv_blocks, time_scale, ..SimConfig::default() })
    });
    let environment = prop::collection::btree_map("[A-Z '\"]{1,8}", word(), 0..3);
    let command = (prop::collection::vec(word(), 1..4), environment)
        .prop_map(|(command, e)| VllmSource::Command { command, environment: e, port: 8100 });
    let source = prop_oneof![Just(VllmSource::Url("http://127.0.0.1:8100".into())), command];
    let groups = 1..9_u32;
    let vllm = (source, word(), any::<bool>(), groups).prop_map(|(source, socket, own, groups)| {
        let engine_handoff = own;
        let is_ours = !own && matches!(source, VllmSource::Command { .. });
        let socket = (!engine_handoff).then(|| Path::new("/run").join(socket));
        let start_timeout = Duration::from_millis(1500);
        EngineConfig::Vllm(VllmConfig {
            source,
            connector_socket: socket,
            engine_handoff,
            layer_groups: if is_ours { groups } else { 1 },
            start_timeout,
            profile: None,
        })
    });
    prop_oneof![sim, vllm]
}

proptest! {
    #[test]
    fn a_written_cluster_reads_as_itself(
        engine in engine(),
        bytes in (1_u64..1 << 40).prop_map(|b| b.next_multiple_of(16 << 10)),
        milliseconds in 1_u64..10_000_000,
        insecure_plaintext: bool,
    ) {
        let mut cluster = default_cluster();
        cluster.tenants.push(TenantConfig {
            name: "t".into(),
            key_sha256: Some([7; 32]),
            key_file: None,
            weight: 0.5,
            priority: -3,
            max_requests: Some(2),
            max_tokens_per_minute: Some(90),
        });
        cluster.insecure_plaintext = insecure_plaintext;
        cluster.admin = insecure_plaintext.then(|| AdminConfig {
            listen: "10.0.0.1:9400".parse().unwrap(),
            token_file: None,
            https: Some(HttpsConfig {
                certificate: "/admin.pem".into(),
                private_key: "/admin.key".into(),
            }),
        });
        cluster.workers[0].engine = engine;
        cluster.workers[0].arena.export_bytes = bytes;
        cluster.workers[1].arena.import_bytes = bytes + 1;
        cluster.workers[1].transfer.stall_timeout = Duration::from_millis(milliseconds);
        cluster.coordinator.limits.max_body_bytes = bytes;
        cluster.placement = PlacementConfig {
            mode: PlacementMode::Never,
            policy: Some("random".to_owned()),
            on_no_prefill: OnNoPrefill::Reject,
            late: LateRequests::Fifo,
            precise: !insecure_plaintext,
        };
        cluster.admission.wait_for_worker = Duration::from_millis(milliseconds % 2);
        cluster.admission.early_rejection_priority = Some(-3);
        cluster.admission.tenant_header = Some("x-tenant".to_owned());
        let text = cluster.to_toml();
        match ClusterConfig::parse(&text, Path::new("/")) {
            Ok(read) => prop_assert_eq!(read, cluster, "{}", text),
            Err(errors) => prop_assert!(false, "{errors}\n{text}"),
        }
    }

    #[test]
    fn arbitrary_text_is_refused_without_a_panic(text: String) {
        let _ = ClusterConfig::parse(&text, Path::new("/nowhere"));
    }

    /// Files that are nearly right go deeper.
    #[test]
    fn a_damaged_sample_is_read_without_a_panic(
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..40, word()), 1..5),
    ) {
        let mut text = uncomment(&sample(), |_, _| true).replace("#[tls]", "[tls]").replace("#[admin]", "[admin]");
        for (at, length, put) in cuts {
            let indices: Vec<usize> = text.char_indices().map(|(index, _)| index).collect();
            let start = at.index(indices.len());
            let end = (start + length).min(indices.len() - 1);
            text.replace_range(indices[start]..indices[end], &put);
        }
        if let Err(errors) = ClusterConfig::parse(&text, Path::new("/nowhere")) {
            prop_assert!(!errors.errors.is_empty());
            prop_assert!(errors.errors.iter().all(|error| error.line.is_some()));
        }
    }
}
