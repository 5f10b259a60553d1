//! What no key can be judged by on its own.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use crate::{
    cluster::{
        AdminConfig, ArenaConfig, BalancerConfig, ClusterConfig, CoordinatorConfig,
        KubernetesScaling, PlacementConfig, PlacementMode, TenantConfig, TransferConfig,
        WorkerConfig,
    },
    document::{Place, Reader},
    keys::EngineKeys,
    read::Engine,
    value::host_and_port,
};

/// Where a worker's values may come from: its own tables, then those for all workers.
pub(crate) struct Sources<'a, 'd> {
    pub(crate) worker: &'a Place<'d>,
    pub(crate) engine: [Option<&'a Place<'d>>; 2],
    pub(crate) arena: [Option<&'a Place<'d>>; 2],
    pub(crate) transfer: [Option<&'a Place<'d>>; 2],
}

/// A key's line and full path.
type Origin = (usize, String);

impl Sources<'_, '_> {
    /// The place that gives `key`. Where none does, it is missing from the worker's own table.
    fn origin(&self, table: &str, tables: &[Option<&Place<'_>>; 2], key: &str) -> Origin {
        let giver = tables.iter().flatten().find_map(|place| {
            place.get(key).map(|value| (value.span().start, place.key_path(key)))
        });
        giver.unwrap_or_else(|| {
            let own = tables[0].map_or(self.worker.offset, |own| own.offset);
            (own, format!("{}.{key}", self.worker.key_path(table)))
        })
    }
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Refuses one address that a table gives, if other machines reach it.
fn refuse_exposure(reader: &mut Reader<'_>, place: &Place<'_>, key: &str, host: &str) {
    let Some(value) = place.get(key) else { return };
    if !is_loopback(host) {
        let shown = reader.shown(value.span(), value.get_ref());
        let message = format!(
            "{shown} is no loopback address: give [tls], or set insecure_plaintext = true in a \
             network that you trust"
        );
        reader.add(value.span().start, place.key_path(key), message);
    }
}

fn refuse_peer_exposure(reader: &mut Reader<'_>, place: &Place<'_>, key: &str, peer: &str) {
    if let Some((host, _)) = host_and_port(peer) {
        refuse_exposure(reader, place, key, host);
    }
}

/// Clients' HTTP is not asked about: `[tls]` is between coordinator and workers, and whoever wants
/// HTTPS has a proxy in front.
pub(crate) fn coordinator_exposure(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    coordinator: &CoordinatorConfig,
) {
    let listen = coordinator.workers_listen.ip().to_string();
    refuse_exposure(reader, place, "workers_listen", &listen);
    refuse_peer_exposure(reader, place, "advertise", &coordinator.advertise);
}

/// Without certificates of its own the operators' listener speaks plain HTTP, whatever `[tls]` says.
pub(crate) fn admin_exposure(reader: &mut Reader<'_>, place: &Place<'_>, admin: &AdminConfig) {
    if let Some(value) = place.get("listen")
        && !admin.listen.ip().is_loopback()
    {
        let shown = reader.shown(value.span(), value.get_ref());
        let message = format!(
            "{shown} is no loopback address: give [admin.https], reach it over ssh or kubectl \
             port-forward, or set insecure_plaintext = true in a network that you trust"
        );
        reader.add(value.span().start, place.key_path("listen"), message);
    }
}

pub(crate) fn coordinators_exposure(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    coordinators: &[String],
) {
    for coordinator in coordinators {
        refuse_peer_exposure(reader, place, "coordinators", coordinator);
    }
}

pub(crate) fn transfer_exposure(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    transfer: &TransferConfig,
) {
    refuse_exposure(reader, place, "listen", &transfer.listen.ip().to_string());
    if let Some(advertise) = &transfer.advertise {
        refuse_peer_exposure(reader, place, "advertise", advertise);
    }
}

/// Bounds that exclude each other, and a balancer that has no pools to look at.
pub(crate) fn scaling(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    scaling: &KubernetesScaling,
    balancer: &BalancerConfig,
    placement: &PlacementConfig,
) {
    for (key, max, min_key, min) in [
        ("max_prefill", scaling.max_prefill, "min_prefill", balancer.min_prefill),
        ("max_decode", scaling.max_decode, "min_decode", balancer.min_decode),
    ] {
        if let Some(value) = place.get(key)
            && max < min
        {
            let message = format!("{max} is less than balancer.{min_key}, which is {min}");
            reader.add(value.span().start, place.key_path(key), message);
        }
    }
    if placement.mode != PlacementMode::Always {
        let message = "pools are scaled by what each has to do, which can be told under placement.mode = \
                       \"always\" alone: set that, or scale by KEDA or an HPA";
        reader.add(place.offset, place.path.clone(), message);
    }
}

/// A tenant that no key opens for, or that cannot be told from one before it.
pub(crate) fn tenant(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    tenant: &TenantConfig,
    before: &[TenantConfig],
) {
    if place.get("key_sha256").is_none() && place.get("key_file").is_none() {
        let message = "missing: give key_sha256, or key_file with a key a line";
        reader.add_missing(place.offset, place.key_path("key_sha256"), message);
    }
    let mut refuse_second = |key: &str, taken: Option<&TenantConfig>| {
        if let (Some(value), Some(taken)) = (place.get(key), taken) {
            let shown = reader.shown(value.span(), value.get_ref());
            let message = format!("{shown} is taken by tenant {:?}: give each its own", taken.name);
            reader.add(value.span().start, place.key_path(key), message);
        }
    };
    let named = !tenant.name.is_empty();
    refuse_second("name", before.iter().find(|other| named && other.name == tenant.name));
    let same_key = |other: &&TenantConfig| {
        tenant.key_sha256.is_some() && other.key_sha256 == tenant.key_sha256
    };
    refuse_second("key_sha256", before.iter().find(same_key));
}

fn url_address(url: &str) -> Option<(&str, u16)> {
    host_and_port(url.strip_prefix("http://")?)
}

/// A worker stands beside its engine: requests go there in plain HTTP, whatever `[tls]` says.
pub(crate) fn engine_exposure(
    reader: &mut Reader<'_>,
    place: &Place<'_>,
    engine: &Engine,
    insecure: bool,
) {
    let Engine::Known(EngineKeys::Vllm(vllm)) = engine else { return };
    let Some((host, _)) = vllm.url.as_deref().and_then(url_address) else { return };
    if let Some(value) = place.get("url")
        && !insecure
        && !is_loopback(host)
    {
        let shown = reader.shown(value.span(), value.get_ref());
        let message = format!(
            "{shown} is no loopback address: run the worker beside its engine, or set \
             insecure_plaintext = true in a network that you trust"
        );
        reader.add(value.span().start, place.key_path("url"), message);
    }
}

/// What can be said only of an engine with all that it inherits.
pub(crate) fn whole_engine(
    reader: &mut Reader<'_>,
    sources: &Sources<'_, '_>,
    engine: &EngineKeys,
    arena: &ArenaConfig,
) {
    match engine {
        EngineKeys::Vllm(vllm) => {
            if let Some((key, message)) = vllm.check() {
                let (offset, path) = sources.origin("engine", &sources.engine, key);
                // What was written but could not be read was complained of already.
                let given = sources.engine.iter().flatten().any(|place| place.get(key).is_some());
                if !(given && message.starts_with("missing")) {
                    reader.add_missing(offset, path, message);
                }
            }
        }
        EngineKeys::Sim(sim) => {
            // Of one layer group: that is what a slot holds.
            let block = u64::from(sim.block_size_tokens)
                .saturating_mul(u64::from(sim.kv_bytes_per_token))
                / u64::from(sim.layer_groups.max(1));
            let rooms =
                [("export_bytes", arena.export_bytes), ("import_bytes", arena.import_bytes)];
            for (key, room) in rooms.into_iter().filter(|(_, room)| *room < block) {
                let (offset, path) = sources.origin("arena", &sources.arena, key);
                let message = format!(
                    "{room} bytes have no room for one KV block of this engine, which has {block}"
                );
                reader.add_missing(offset, path, message);
            }
        }
    }
}

/// Names, ports and sockets that are taken.
pub(crate) struct Clashes {
    names: Vec<(String, Origin)>,
    listeners: Vec<(Listener, Origin)>,
    sockets: Vec<(String, PathBuf, Origin)>,
}

/// One port on one machine.
struct Listener {
    /// By which others call the machine; all loopback names are one.
    machine: String,
    address: SocketAddr,
}

impl Listener {
    fn clashes(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.address.ip(), other.address.ip());
        let same_machine = self.machine == other.machine
            || (ours == theirs && !ours.is_loopback() && !ours.is_unspecified());
        let overlap = ours == theirs || ours.is_unspecified() || theirs.is_unspecified();
        self.address.port() != 0
            && self.address.port() == other.address.port()
            && same_machine
            && overlap
    }
}

fn machine(listen: IpAddr, advertise: Option<&str>) -> String {
    let advertised = advertise.and_then(host_and_port).map(|(host, _)| host.to_owned());
    let host = advertised.unwrap_or_else(|| listen.to_string());
    if is_loopback(&host) { "loopback".to_owned() } else { host }
}

const ANYWHERE: &str = "every address of the host; give advertise, which others shall dial";

impl Clashes {
    pub(crate) fn of_coordinator(
        reader: &mut Reader<'_>,
        root: &Place<'_>,
        cluster: &ClusterConfig,
    ) -> Self {
        let coordinator = &cluster.coordinator;
        let mut clashes = Self { names: Vec::new(), listeners: Vec::new(), sockets: Vec::new() };
        let Some(place) = reader.table(root, "coordinator") else { return clashes };
        let advertise = Some(coordinator.advertise.as_str());
        let machine = machine(coordinator.workers_listen.ip(), advertise);
        let addresses =
            [("listen", coordinator.listen), ("workers_listen", coordinator.workers_listen)];
        for (key, address) in addresses {
            let Some(value) = place.get(key) else { continue };
            let origin = (value.span().start, place.key_path(key));
            if key == "workers_listen"
                && address.ip().is_unspecified()
                && place.get("advertise").is_none()
            {
                reader.add_missing(
                    origin.0,
                    origin.1.clone(),
                    format!("\"{address}\" is {ANYWHERE}"),
                );
            }
            clashes.add_listener(reader, Listener { machine: machine.clone(), address }, origin);
        }
        if let (Some(admin), Some(place)) = (&cluster.admin, reader.table(root, "admin")) {
            let offset = place.get("listen").map_or(place.offset, |value| value.span().start);
            let listener = Listener { machine, address: admin.listen };
            clashes.add_listener(reader, listener, (offset, place.key_path("listen")));
        }
        clashes
    }

    pub(crate) fn add_worker(
        &mut self,
        reader: &mut Reader<'_>,
        sources: &Sources<'_, '_>,
        worker: &WorkerConfig,
        engine: Option<&EngineKeys>,
    ) {
        if let Some(value) = sources.worker.get("name").filter(|_| !worker.name.is_empty()) {
            let origin = (value.span().start, sources.worker.key_path("name"));
            self.add_name(reader, &worker.name, origin);
        }
        // Its workers stand on machines of their own, of which this file knows nothing.
        if worker.is_template() {
            return;
        }
        let transfer = &worker.transfer;
        let machine = machine(transfer.listen.ip(), transfer.advertise.as_deref());
        let origin = sources.origin("transfer", &sources.transfer, "listen");
        let advertised = sources.transfer.iter().flatten().any(|p| p.get("advertise").is_some());
        if transfer.listen.ip().is_unspecified() && !advertised {
            let message = format!("\"{}\" is {ANYWHERE}", transfer.listen);
            reader.add_missing(origin.0, origin.1.clone(), message);
        }
        let listener = Listener { machine: machine.clone(), address: transfer.listen };
        self.add_listener(reader, listener, origin);

        let Some(EngineKeys::Vllm(vllm)) = engine else { return };
        let engine_port = match (&vllm.url, vllm.port) {
            (_, Some(port)) => Some(("port", port)),
            (Some(url), None) => url_address(url)
                .filter(|(host, _)| is_loopback(host))
                .map(|(_, port)| ("url", port)),
            (None, None) => None,
        };
        if let Some((key, port)) = engine_port {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let origin = sources.origin("engine", &sources.engine, key);
            self.add_listener(reader, Listener { machine: machine.clone(), address }, origin);
        }
        if let Some(socket) = &vllm.connector_socket {
            let origin = sources.origin("engine", &sources.engine, "connector_socket");
            let taken = self.sockets.iter().find(|(m, path, _)| *m == machine && path == socket);
            match taken {
                Some((_, path, first)) => {
                    let message =
                        format!("\"{}\" {}", path.display(), taken_by(reader, first, &origin));
                    reader.add(origin.0, origin.1, message);
                }
                None => self.sockets.push((machine, socket.clone(), origin)),
            }
        }
    }

    fn add_name(&mut self, reader: &mut Reader<'_>, name: &str, origin: Origin) {
        match self.names.iter().find(|(taken, _)| taken == name) {
            Some((_, first)) => {
                let message = format!("{name:?} {}", taken_by(reader, first, &origin));
                reader.add(origin.0, origin.1, message);
            }
            None => self.names.push((name.to_owned(), origin)),
        }
    }

    fn add_listener(&mut self, reader: &mut Reader<'_>, listener: Listener, origin: Origin) {
        match self.listeners.iter().find(|(taken, _)| taken.clashes(&listener)) {
            Some((_, first)) => {
                let message =
                    format!("\"{}\" {}", listener.address, taken_by(reader, first, &origin));
                reader.add(origin.0, origin.1, message);
            }
            None => self.listeners.push((listener, origin)),
        }
    }
}

fn taken_by(reader: &Reader<'_>, first: &Origin, second: &Origin) -> String {
    if first == second {
        return "holds for several workers of one machine: give each its own".to_owned();
    }
    let (offset, path) = first;
    format!("is taken by {path} (line {}): give each its own", reader.line(*offset))
}
