//! The way to one consumer: an endpoint for all handoffs of one connection, and the regions behind it.

use std::{collections::HashMap, sync::Arc};

use baton_ucx::{Endpoint, RemoteRegion, Resource};
use bytes::Bytes;
use tokio::sync::Mutex;

use super::{Data, failed, names};
use crate::channel::TransferError;

/// More arenas than one worker has at a time.
const MAX_REGIONS: usize = 16;

#[derive(Debug)]
pub(crate) struct Lane {
    data: Arc<Data>,
    reached: Mutex<Option<Reached>>,
}

#[derive(Debug)]
struct Reached {
    address: Bytes,
    endpoint: Endpoint,
    regions: HashMap<(u64, u64, Bytes), RemoteRegion>,
    is_described: bool,
}

impl Lane {
    pub(crate) fn new(data: Arc<Data>) -> Self {
        Self { data, reached: Mutex::default() }
    }

    /// Whether what a network card does not write is not to be sent.
    pub(super) fn requires_rdma(&self) -> bool {
        self.data.require_rdma
    }

    /// The consumer's region, as this side may write into it.
    pub(super) async fn region(
        &self,
        address: &Bytes,
        base: u64,
        len_bytes: u64,
        key: Bytes,
    ) -> Result<RemoteRegion, TransferError> {
        let mut reached = self.reached.lock().await;
        let reached = match &mut *reached {
            Some(reached) if reached.address == *address => reached,
            other => {
                let endpoint =
                    self.data.ucx.connect(address.clone()).await.map_err(|e| failed(&e))?;
                other.insert(Reached {
                    address: address.clone(),
                    endpoint,
                    regions: HashMap::new(),
                    is_described: false,
                })
            }
        };
        let name = (base, len_bytes, key.clone());
        if let Some(known) = reached.regions.get(&name) {
            return Ok(known.clone());
        }
        let region =
            reached.endpoint.import(base, len_bytes, key).await.map_err(|error| failed(&error))?;
        if reached.regions.len() >= MAX_REGIONS {
            reached.regions.clear();
        }
        reached.regions.insert(name, region.clone());
        Ok(region)
    }

    /// Looks, once something was written, at what UCX picked to write it with.
    pub(super) async fn check(&self) -> Result<(), TransferError> {
        let mut reached = self.reached.lock().await;
        let Some(reached) = reached.as_mut().filter(|reached| !reached.is_described) else {
            return Ok(());
        };
        let lanes = reached.endpoint.lanes().await.map_err(|error| failed(&error))?;
        let writing: Vec<Resource> =
            lanes.into_iter().filter(|lane| lane.writes).map(|lane| lane.resource).collect();
        reached.is_described = true;
        tracing::info!(lanes = names(&writing), "UCX writes to a peer");
        let is_rdma = writing.iter().any(Resource::is_rdma);
        let found = names(&writing);
        self.data.picked.lock().extend(writing);
        if self.data.require_rdma && !is_rdma {
            reached.is_described = false;
            let reason = format!("rdma is required, and UCX picked {found}");
            return Err(TransferError::BrokeOff(reason));
        }
        Ok(())
    }

    /// Stops whatever is under way to the consumer. The next handoff connects anew.
    pub(super) async fn cut(&self) {
        if let Some(reached) = self.reached.lock().await.take() {
            reached.endpoint.close();
        }
    }
}
