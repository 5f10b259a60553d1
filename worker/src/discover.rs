use std::{collections::HashSet, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{net::lookup_host, task::JoinSet, time::MissedTickBehavior};

use crate::{
    attach::{Coordinator, TlsPem, keep_attached},
    life::Life,
};

/// A coordinator that is new has its workers after so long.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);

/// Stays attached to every coordinator that `authority` (`host:port`) stands for by now: one for each
/// address of the name. One whose address is gone is kept until it hangs up, since names come and go
/// with less reason than connections.
pub(crate) async fn keep_attached_to_all(life: Arc<Life>, authority: &str, tls: Option<&TlsPem>) {
    let name = authority.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
    let named: Arc<Mutex<HashSet<SocketAddr>>> = Arc::default();
    let mut kept = HashSet::new();
    // Dropping it ends them all.
    let mut attachments = JoinSet::new();
    let mut lookups = tokio::time::interval(LOOKUP_INTERVAL);
    lookups.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        lookups.tick().await;
        while let Some(ended) = attachments.try_join_next() {
            if let Ok(address) = ended {
                kept.remove(&address);
            }
        }
        let addresses: HashSet<SocketAddr> = match lookup_host(authority).await {
            Ok(addresses) => addresses.collect(),
            Err(error) => {
                if !complained {
                    tracing::warn!(coordinators = authority, %error, "no coordinator's address");
                }
                complained = true;
                continue;
            }
        };
        complained = false;
        named.lock().clone_from(&addresses);
        for &address in addresses.difference(&kept) {
            let coordinator = Coordinator { address: address.to_string(), name: name.clone() };
            let (life, tls, named) = (life.clone(), tls.cloned(), named.clone());
            attachments.spawn(async move {
                let wanted = || named.lock().contains(&address);
                keep_attached(life, &coordinator, tls.as_ref(), wanted).await;
                address
            });
        }
        kept.extend(addresses);
    }
}
