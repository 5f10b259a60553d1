use baton_types::Role;

use crate::{
    cluster::{ClusterConfig, WorkerConfig},
    value::{NAME, host_and_port, is_name},
};

/// A worker that the file does not have, or that cannot be what the command line says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchWorker {
    #[error("the file has no worker {name:?}; its {role} workers: {}", list(known))]
    Unknown { name: String, role: Role, known: Vec<String> },
    #[error("{name:?} is a {role} worker: run it by `{role}-worker`")]
    OtherRole { name: String, role: Role },
    #[error("--name {0:?} is not {NAME}")]
    Name(String),
    #[error("--advertise {0:?} is not HOST:PORT, such as \"10.0.0.7:7100\"")]
    Advertise(String),
    #[error("{name:?} is one of several workers {template:?}: give its own --advertise HOST:PORT")]
    NoAddress { name: String, template: String },
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl WorkerConfig {
    /// It stands for any number of workers.
    pub fn is_template(&self) -> bool {
        self.name.ends_with('*')
    }

    fn has_name(&self, name: &str) -> bool {
        match self.name.strip_suffix('*') {
            Some(start) => name.strip_prefix(start).is_some_and(|rest| !rest.is_empty()),
            None => self.name == name,
        }
    }
}

impl ClusterConfig {
    /// The worker of this name, which must start in the pool `role`. Where the file has a template that
    /// the name fits, a worker of that kind. `advertise` (`host:port`) stands in for the file's
    /// `transfer.advertise`.
    ///
    /// # Errors
    /// No worker of the file has the name, or it is of the other pool; or what was given is no name or
    /// no address.
    pub fn worker(
        &self,
        name: &str,
        role: Role,
        advertise: Option<&str>,
    ) -> Result<WorkerConfig, NoSuchWorker> {
        let named = self.workers.iter().filter(|worker| worker.has_name(name));
        // Who is named in full, then the template that says most of the name.
        let chosen = named.max_by_key(|worker| (!worker.is_template(), worker.name.len()));
        let mut worker = chosen.cloned().ok_or_else(|| {
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
        if !is_name(name) {
            return Err(NoSuchWorker::Name(name.to_owned()));
        }
        if let Some(address) = advertise {
            host_and_port(address).ok_or_else(|| NoSuchWorker::Advertise(address.to_owned()))?;
            worker.transfer.advertise = Some(address.to_owned());
        } else if worker.is_template() && worker.transfer.listen.ip().is_unspecified() {
            return Err(NoSuchWorker::NoAddress { name: name.to_owned(), template: worker.name });
        }
        name.clone_into(&mut worker.name);
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
        assert_eq!(cluster.worker("decode-0", Role::Decode, None).unwrap().name, "decode-0");
        let message = |name, role| cluster.worker(name, role, None).unwrap_err().to_string();
        assert_eq!(
            message("decode-0", Role::Prefill),
            "\"decode-0\" is a decode worker: run it by `decode-worker`"
        );
        assert_eq!(
            message("x", Role::Prefill),
            "the file has no worker \"x\"; its prefill workers: prefill-0"
        );
    }

    const TEMPLATES: &str = r#"
        insecure_plaintext = true
        [coordinator]
        listen = "0.0.0.0:8000"
        workers_listen = "0.0.0.0:7000"
        advertise = "baton-workers:7000"
        [engine]
        kind = "sim"
        [transfer]
        listen = "0.0.0.0:7100"
        [[worker]]
        name = "baton-prefill-*"
        role = "prefill"
        [[worker]]
        name = "baton-decode-*"
        role = "decode"
        [[worker]]
        name = "baton-decode-big-*"
        role = "decode"
        drain_timeout_seconds = 600
    "#;

    #[test]
    fn a_template_stands_for_every_worker_whose_name_begins_like_it() {
        let cluster = ClusterConfig::parse(TEMPLATES, Path::new("/")).unwrap();
        let address = Some("10.0.0.7:7100");
        let worker = cluster.worker("baton-decode-6f-x2", Role::Decode, address).unwrap();
        assert_eq!(worker.name, "baton-decode-6f-x2");
        assert_eq!(worker.transfer.advertise.as_deref(), address);
        assert_eq!(worker.coordinators, ["baton-workers:7000"]);
        let big = cluster.worker("baton-decode-big-0", Role::Decode, address).unwrap();
        assert_eq!(big.drain_timeout.as_secs(), 600, "the template that says more");

        let message =
            |name, role, advertise| cluster.worker(name, role, advertise).unwrap_err().to_string();
        assert_eq!(
            message("baton-decode-6f-x2", Role::Decode, None),
            "\"baton-decode-6f-x2\" is one of several workers \"baton-decode-*\": give its own \
             --advertise HOST:PORT"
        );
        assert_eq!(
            message("baton-decode-6f-x2", Role::Decode, Some("10.0.0.7")),
            "--advertise \"10.0.0.7\" is not HOST:PORT, such as \"10.0.0.7:7100\""
        );
        let nobody = message("baton-prefill-", Role::Prefill, address);
        assert!(nobody.starts_with("the file has no worker"), "{nobody}");
        let odd = message("baton-prefill-a b", Role::Prefill, address);
        assert!(
            odd.starts_with("--name \"baton-prefill-a b\" is not a name of at most 63"),
            "{odd}"
        );
    }
}
