use std::{collections::HashSet, net::SocketAddr, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use parking_lot::Mutex;
use tokio::{
    net::lookup_host,
    time::{Interval, MissedTickBehavior},
};

use crate::{
    attach::{Coordinator, TlsFiles, keep_attached},
    life::Life,
};

/// A coordinator that is new has its workers after so long.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);

/// Stays attached to every coordinator that `authority` (`host:port`) stands for by now: one for each
/// address of the name. One whose address is gone is kept until it hangs up, since names come and go
/// with less reason than connections.
pub(crate) async fn keep_attached_to_all(life: Arc<Life>, authority: &str, tls: Option<&TlsFiles>) {
    let name = authority.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
    let named: Mutex<HashSet<SocketAddr>> = Mutex::default();
    let keep = |address: SocketAddr| {
        let coordinator = Coordinator::At { address: address.to_string(), name: name.clone() };
        let (life, named) = (life.clone(), &named);
        async move {
            let wanted = || named.lock().contains(&address);
            keep_attached(life, &coordinator, tls, wanted).await;
            address
        }
    };
    let mut kept = HashSet::new();
    let mut attachments = FuturesUnordered::new();
    let mut lookups = tokio::time::interval(LOOKUP_INTERVAL);
    lookups.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            addresses = next_lookup(&mut lookups, authority) => {
                named.lock().clone_from(&addresses);
                for address in addresses {
                    if kept.insert(address) {
                        attachments.push(keep(address));
                    }
                }
            }
            Some(address) = attachments.next() => {
                kept.remove(&address);
            }
        }
    }
}

/// What the name stands for when its time has come, and it stands for anything.
async fn next_lookup(lookups: &mut Interval, authority: &str) -> HashSet<SocketAddr> {
    loop {
        lookups.tick().await;
        match lookup_host(authority).await {
            Ok(addresses) => return addresses.collect(),
            Err(error) => {
                tracing::warn!(coordinators = authority, %error, "no coordinator's address");
            }
        }
    }
}
