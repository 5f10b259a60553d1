use std::path::Path;

use toml::de::DeTable;

use crate::{
    cluster::{
        AdminConfig, ArenaConfig, ClusterConfig, EngineConfig, SimConfig, TransferConfig,
        WorkerConfig,
    },
    document::{Place, Reader},
    error::{ConfigError, ConfigErrors},
    keys::{self, EngineKeys, KIND, VllmKeys},
    rules,
};

const TABLES: [&str; 13] = [
    "coordinator",
    "slo",
    "balancer",
    "admin",
    "telemetry",
    "placement",
    "admission",
    "tls",
    "tenant",
    "engine",
    "arena",
    "transfer",
    "worker",
];

impl ClusterConfig {
    /// Reads a file. Relative paths in it are taken from the file's own directory.
    ///
    /// # Errors
    /// Everything that is wrong with it, at once; or that it cannot be read.
    pub fn read(path: &Path) -> Result<Self, ConfigErrors> {
        let fail = |errors| ConfigErrors { file: path.to_owned(), errors };
        let unreadable = |reason: std::io::Error| {
            let message = format!("cannot read: {reason}");
            fail(vec![ConfigError { line: None, key: String::new(), message }])
        };
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let file = std::path::absolute(path).map_err(unreadable)?;
        read_text(&text, file.parent().unwrap_or(Path::new("/"))).map_err(fail)
    }

    /// Reads a text as if it stood in the file `baton.toml` of `base_dir`. Looks there, and nowhere
    /// else, whether the files that it names exist.
    ///
    /// # Errors
    /// Everything that is wrong with it, at once.
    pub fn parse(text: &str, base_dir: &Path) -> Result<Self, ConfigErrors> {
        read_text(text, base_dir)
            .map_err(|errors| ConfigErrors { file: "baton.toml".into(), errors })
    }
}

fn read_text(text: &str, base: &Path) -> Result<ClusterConfig, Vec<ConfigError>> {
    let (document, syntax) = DeTable::parse_recoverable(text);
    let mut reader = Reader::new(text, base, &syntax);
    let root = Place { path: String::new(), offset: 0, table: document.get_ref() };
    let cluster = read_cluster(&mut reader, &root);
    if reader.is_empty() { Ok(cluster) } else { Err(reader.into_errors()) }
}

/// The tables that hold for all workers, and where they stand.
pub(crate) struct Defaults<'d> {
    pub(crate) engine: Engine,
    pub(crate) arena: ArenaConfig,
    pub(crate) transfer: TransferConfig,
    pub(crate) engine_place: Option<Place<'d>>,
    pub(crate) arena_place: Option<Place<'d>>,
    pub(crate) transfer_place: Option<Place<'d>>,
}

/// What is known of an engine.
#[derive(Clone, Debug)]
pub(crate) enum Engine {
    Absent,
    /// Its kind is not known, and that was said.
    Broken,
    Known(EngineKeys),
}

fn read_cluster(reader: &mut Reader<'_>, root: &Place<'_>) -> ClusterConfig {
    let mut cluster = keys::blank_cluster();
    reader.read_keys(root, keys::ROOT, &TABLES, &[], &mut cluster);
    read_coordinator(reader, root, &mut cluster);
    if let Some(place) = reader.table(root, "slo") {
        reader.read_keys(&place, keys::SLO, &[], &[], &mut cluster.slo);
    }
    if let Some(place) = reader.table(root, "placement") {
        reader.read_keys(&place, keys::PLACEMENT, &[], &[], &mut cluster.placement);
    }
    if let Some(place) = reader.table(root, "admission") {
        reader.read_keys(&place, keys::ADMISSION, &[], &[], &mut cluster.admission);
    }
    if let Some(place) = reader.table(root, "balancer") {
        reader.read_keys(&place, keys::BALANCER, &["kubernetes"], &[], &mut cluster.balancer);
        if let Some(place) = reader.table(&place, "kubernetes") {
            let scaling = cluster.kubernetes.insert(keys::blank_kubernetes());
            reader.read_keys(&place, keys::KUBERNETES, &[], &[], scaling);
            rules::scaling(reader, &place, scaling, &cluster.balancer, &cluster.placement);
        }
    }
    if let Some(place) = reader.table(root, "tls") {
        let tls = cluster.tls.insert(keys::blank_tls());
        reader.read_keys(&place, keys::TLS, &[], &[], tls);
    }
    for place in reader.tables(root, "tenant") {
        let mut tenant = keys::blank_tenant();
        reader.read_keys(&place, keys::TENANT, &[], &[], &mut tenant);
        rules::tenant(reader, &place, &tenant, &cluster.tenants);
        cluster.tenants.push(tenant);
    }
    if let Some(place) = reader.table(root, "telemetry") {
        reader.read_keys(&place, keys::TELEMETRY, &[], &[], &mut cluster.telemetry);
    }
    if let Some(place) = reader.table(root, "admin") {
        let admin = cluster.admin.insert(AdminConfig::default());
        reader.read_keys(&place, keys::ADMIN, &["https"], &[], admin);
        if let Some(https) = reader.table(&place, "https") {
            let files = admin.https.insert(keys::blank_https());
            reader.read_keys(&https, keys::HTTPS, &[], &[], files);
        } else if !cluster.insecure_plaintext {
            rules::admin_exposure(reader, &place, admin);
        }
    }
    let links = Links {
        secured: cluster.tls.is_some() || cluster.insecure_plaintext,
        insecure: cluster.insecure_plaintext,
    };
    if !links.secured
        && let Some(place) = reader.table(root, "coordinator")
    {
        rules::coordinator_exposure(reader, &place, &cluster.coordinator);
    }
    let defaults = read_defaults(reader, root, links);
    let mut clashes = rules::Clashes::of_coordinator(reader, root, &cluster);
    for place in reader.tables(root, "worker") {
        let mut worker = read_worker(reader, &place, &defaults, links, &mut clashes);
        worker.tls.clone_from(&cluster.tls);
        if worker.coordinators.is_empty() {
            worker.coordinators.push(cluster.coordinator.advertise.clone());
        }
        cluster.workers.push(worker);
    }
    cluster
}

fn read_coordinator(reader: &mut Reader<'_>, root: &Place<'_>, cluster: &mut ClusterConfig) {
    let coordinator = &mut cluster.coordinator;
    let Some(place) = reader.table(root, "coordinator") else {
        if root.get("coordinator").is_none() {
            let message = "missing; give [coordinator] with listen and workers_listen";
            reader.add_missing(0, "coordinator".to_owned(), message);
        }
        return;
    };
    reader.read_keys(&place, keys::COORDINATOR, &["limits", "https"], &[], coordinator);
    if let Some(limits) = reader.table(&place, "limits") {
        reader.read_keys(&limits, keys::LIMITS, &[], &[], &mut coordinator.limits);
    }
    if let Some(https) = reader.table(&place, "https") {
        let files = coordinator.https.insert(keys::blank_https());
        reader.read_keys(&https, keys::HTTPS, &[], &[], files);
    }
    if coordinator.advertise.is_empty() {
        coordinator.advertise = coordinator.workers_listen.to_string();
    }
}

/// What may leave this machine.
#[derive(Clone, Copy)]
struct Links {
    /// Between coordinator and workers: there is TLS, or the operator does without.
    secured: bool,
    /// The operator does without. An engine is spoken to in plain text whatever `[tls]` says.
    insecure: bool,
}

fn read_defaults<'d>(reader: &mut Reader<'_>, root: &Place<'d>, links: Links) -> Defaults<'d> {
    let mut defaults = Defaults {
        engine: Engine::Absent,
        arena: ArenaConfig::default(),
        transfer: TransferConfig::default(),
        engine_place: reader.table(root, "engine"),
        arena_place: reader.table(root, "arena"),
        transfer_place: reader.table(root, "transfer"),
    };
    if let Some(place) = &defaults.engine_place {
        defaults.engine = read_engine(reader, place, &Engine::Absent);
        rules::engine_exposure(reader, place, &defaults.engine, links.insecure);
    }
    if let Some(place) = &defaults.arena_place {
        reader.read_keys(place, keys::ARENA, &[], &[], &mut defaults.arena);
    }
    if let Some(place) = &defaults.transfer_place {
        reader.read_keys(place, keys::TRANSFER, &[], &[], &mut defaults.transfer);
        if !links.secured {
            rules::transfer_exposure(reader, place, &defaults.transfer);
        }
    }
    defaults
}

fn read_worker(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    defaults: &Defaults<'_>,
    links: Links,
    clashes: &mut rules::Clashes,
) -> WorkerConfig {
    let mut worker = keys::blank_worker();
    reader.read_keys(place, keys::WORKER, &["engine", "arena", "transfer"], &[], &mut worker);
    if !links.secured {
        rules::coordinators_exposure(reader, place, &worker.coordinators);
    }

    let engine_place = reader.table(place, "engine");
    let engine = match &engine_place {
        Some(own) => {
            let engine = read_engine(reader, own, &defaults.engine);
            rules::engine_exposure(reader, own, &engine, links.insecure);
            engine
        }
        None => defaults.engine.clone(),
    };
    if matches!(engine, Engine::Absent) && place.get("engine").is_none() {
        let message = "missing; give [worker.engine], or [engine] for all workers, with its kind";
        reader.add_missing(place.offset, place.key_path("engine"), message);
    }

    worker.arena = defaults.arena.clone();
    let arena_place = reader.table(place, "arena");
    if let Some(own) = &arena_place {
        reader.read_keys(own, keys::ARENA, &[], &[], &mut worker.arena);
    }

    worker.transfer = defaults.transfer.clone();
    let transfer_place = reader.table(place, "transfer");
    if let Some(own) = &transfer_place {
        reader.read_keys(own, keys::TRANSFER, &[], &[], &mut worker.transfer);
        if !links.secured {
            rules::transfer_exposure(reader, own, &worker.transfer);
        }
    }

    let sources = rules::Sources {
        worker: place,
        engine: [engine_place.as_ref(), defaults.engine_place.as_ref()],
        arena: [arena_place.as_ref(), defaults.arena_place.as_ref()],
        transfer: [transfer_place.as_ref(), defaults.transfer_place.as_ref()],
    };
    if let Engine::Known(engine) = engine {
        rules::whole_engine(reader, &sources, &engine, &worker.arena);
        clashes.add_worker(reader, &sources, &worker, Some(&engine));
        worker.engine = Option::<EngineConfig>::from(engine)
            .unwrap_or_else(|| EngineConfig::Sim(SimConfig::default()));
    } else {
        clashes.add_worker(reader, &sources, &worker, None);
    }
    worker
}

/// A table without a kind, or of the same kind, changes what it inherits key by key; a table of
/// another kind starts anew.
fn read_engine(reader: &mut Reader<'_>, place: &Place<'_>, inherited: &Engine) -> Engine {
    let start = match (place.get(KIND), inherited) {
        (None, Engine::Known(engine)) => engine.clone(),
        (None, Engine::Broken) => return Engine::Broken,
        (None, Engine::Absent) => {
            let message = "missing; give kind = \"sim\" or kind = \"vllm\"";
            reader.add_missing(place.offset, place.key_path(KIND), message);
            return Engine::Broken;
        }
        (Some(kind), inherited) => match (kind.get_ref().as_str(), inherited) {
            (Some("sim"), Engine::Known(EngineKeys::Sim(sim))) => EngineKeys::Sim(sim.clone()),
            (Some("vllm"), Engine::Known(EngineKeys::Vllm(vllm))) => EngineKeys::Vllm(vllm.clone()),
            (Some("sim"), _) => EngineKeys::Sim(SimConfig::default()),
            (Some("vllm"), _) => EngineKeys::Vllm(VllmKeys::default()),
            _ => {
                let shown = reader.shown(kind.span(), kind.get_ref());
                let message = format!("{shown} is not \"sim\" or \"vllm\"");
                reader.add(kind.span().start, place.key_path(KIND), message);
                return Engine::Broken;
            }
        },
    };
    let mut sim: Vec<&str> = keys::SIM.iter().map(|key| key.name).collect();
    let mut vllm: Vec<&str> = keys::VLLM.iter().map(|key| key.name).collect();
    let both: Vec<&str> = sim.iter().copied().filter(|name| vllm.contains(name)).collect();
    sim.retain(|name| !both.contains(name));
    vllm.retain(|name| !both.contains(name));
    Engine::Known(match start {
        EngineKeys::Sim(mut engine) => {
            refuse_keys_of(reader, place, &vllm, ["vllm", "sim"]);
            reader.read_keys(place, keys::SIM, &[KIND], &vllm, &mut engine);
            EngineKeys::Sim(engine)
        }
        EngineKeys::Vllm(mut engine) => {
            refuse_keys_of(reader, place, &sim, ["sim", "vllm"]);
            reader.read_keys(place, keys::VLLM, &[KIND], &sim, &mut engine);
            EngineKeys::Vllm(engine)
        }
    })
}

fn refuse_keys_of(reader: &mut Reader<'_>, place: &Place<'_>, keys: &[&str], kinds: [&str; 2]) {
    let [other, this] = kinds;
    for (name, _) in place.table {
        let (name, offset) = (name.get_ref().as_ref(), name.span().start);
        if keys.contains(&name) {
            let message = format!("belongs to kind = {other:?}; this engine's kind is {this:?}");
            reader.add(offset, place.key_path(name), message);
        }
    }
}
