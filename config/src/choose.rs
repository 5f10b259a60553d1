use baton_types::Role;

use crate::cluster::{ClusterConfig, WorkerConfig};

/// A worker that the file does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchWorker {
    #[error("the file has no worker {name:?}; its {role} workers: {}", list(known))]
    Unknown { name: String, role: Role, known: Vec<String> },
    #[error("{name:?} is a {role} worker: run it by `{role}-worker`")]
    OtherRole { name: String, role: Role },
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl ClusterConfig {
    /// The worker of this name, which must start in the pool `role`.
    ///
    /// # Errors
    /// No worker of the file has the name, or it is of the other pool.
    pub fn worker(&self, name: &str, role: Role) -> Result<&WorkerConfig, NoSuchWorker> {
        let worker = self.workers.iter().find(|worker| worker.name == name).ok_or_else(|| {
            let known = self.workers.iter().filter(|worker| worker.role == role);
            NoSuchWorker::Unknown {
                name: name.to_owned(),
                role,
                known: known.map(|worker| worker.name.clone()).collect(),
            }
        })?;
        if worker.role != role {
            return Err(NoSuchWorker::OtherRole { name: name.to_owned(), role: worker.role });
        }
        Ok(worker)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_worker_is_found_by_its_name_and_role() {
        let cluster = ClusterConfig::parse(&crate::sample(), Path::new("/")).unwrap();
        assert_eq!(cluster.worker("decode-0", Role::Decode).unwrap().name, "decode-0");
        let message = |name, role| cluster.worker(name, role).unwrap_err().to_string();
        assert_eq!(
            message("decode-0", Role::Prefill),
            "\"decode-0\" is a decode worker: run it by `decode-worker`"
        );
        assert_eq!(
            message("x", Role::Prefill),
            "the file has no worker \"x\"; its prefill workers: prefill-0"
        );
    }
}
