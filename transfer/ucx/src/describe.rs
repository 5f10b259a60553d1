//! What UCX prints about itself, read: its interface tells of transports in no other way on all versions.

/// A transport on a device that UCX may use.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// `rc_mlx5`, `tcp`, `cma`, …
    pub transport: String,
    /// `mlx5_0:1`, `eth0`, …
    pub device: String,
}

impl Resource {
    /// Whether a network card writes into memory by itself.
    pub fn is_rdma(&self) -> bool {
        ["rc", "dc", "ud", "srd", "gga"]
            .iter()
            .any(|kind| self.transport == *kind || self.transport.starts_with(&format!("{kind}_")))
    }
}

/// A resource that an endpoint uses, and what for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    pub resource: Resource,
    /// Whether writes go this way.
    pub writes: bool,
}

/// `#  resource 5  :  md 3  dev 2  flags -- tcp/lo`
pub(crate) fn resources(printed: &str) -> Vec<Resource> {
    let lines = printed.lines().map(|line| line.trim_start_matches('#').trim_start());
    let mut found: Vec<_> = lines
        .filter(|line| line.starts_with("resource "))
        .filter_map(|line| resource(line.split_whitespace().last()?))
        .collect();
    found.sort();
    found.dedup();
    found
}

/// `#  lane[1]:  5:tcp/lo.1 md[3]  -> md[3]/tcp/sysdev[255]  rma_bw#0 am am_bw#0`
pub(crate) fn lanes(printed: &str) -> Vec<Lane> {
    let lines = printed.lines().map(|line| line.trim_start_matches('#').trim_start());
    let mut lanes: Vec<_> = lines
        .filter_map(|line| {
            let (_, of) = line.strip_prefix("lane[")?.split_once("]:")?;
            let (place, uses) = of.trim_start().split_once(' ').unwrap_or((of, ""));
            let (_, name) = place.split_once(':')?;
            // The path's number behind the device.
            let name = name.rsplit_once('.').map_or(name, |(name, _)| name);
            Some((resource(name)?, uses.to_owned()))
        })
        .collect();
    // Where no lane writes into memory, messages do its work.
    let has_rma = lanes.iter().any(|(_, uses)| uses.contains("rma"));
    let kind = if has_rma { "rma" } else { "am" };
    lanes.drain(..).map(|(resource, uses)| Lane { resource, writes: uses.contains(kind) }).collect()
}

fn resource(name: &str) -> Option<Resource> {
    let (transport, device) = name.split_once('/')?;
    Some(Resource { transport: transport.to_owned(), device: device.to_owned() })
}
