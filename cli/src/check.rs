//! `baton check FILE`.

use std::{path::Path, process::ExitCode};

use baton_config::{ClusterConfig, EngineConfig, VllmSource, WorkerConfig};
use baton_types::Role;

use crate::terminal::{Terminal, bad, faint, good, pending};

/// Answers success when nothing is wrong with the file.
pub(crate) fn run(file: &Path) -> ExitCode {
    let mut terminal = Terminal::stdout();
    match ClusterConfig::read(file) {
        Ok(cluster) => {
            for line in describe(&cluster) {
                terminal.say(&line);
            }
            let verdict = format!("{} is right", file.display());
            terminal.say(&good(&verdict).to_string());
            ExitCode::SUCCESS
        }
        Err(errors) => {
            terminal.say(&errors.to_string());
            let count = match errors.errors.len() {
                1 => "1 error".to_owned(),
                n => format!("{n} errors"),
            };
            terminal.say(&bad(&count).to_string());
            ExitCode::FAILURE
        }
    }
}

fn describe(cluster: &ClusterConfig) -> Vec<String> {
    let coordinator = &cluster.coordinator;
    let tls = match (&cluster.tls, cluster.insecure_plaintext) {
        (Some(_), _) => "mutual TLS",
        (None, true) => "no TLS (insecure_plaintext)",
        (None, false) => "no TLS (loopback only)",
    };
    let scheme = if coordinator.https.is_some() { "https" } else { "http" };
    let keys = match cluster.tenants.len() {
        0 => "no API keys".to_owned(),
        1 => "API keys of 1 tenant".to_owned(),
        tenants => format!("API keys of {tenants} tenants"),
    };
    let mut lines = vec![
        format!("coordinator   {scheme}://{} for clients, {keys}", coordinator.listen),
        format!("              {} for workers, {tls}", coordinator.advertise),
    ];
    if let Some(admin) = &cluster.admin {
        let scheme = if admin.https.is_some() { "https" } else { "http" };
        lines.push(format!("              {scheme}://{} for operators", admin.listen));
    }
    lines.extend([
        format!("SLO           TTFT {} ms, ITL {} ms", cluster.slo.ttft_ms, cluster.slo.itl_ms),
        String::new(),
    ]);
    let widest = |cell: fn(&WorkerConfig) -> String, least: usize| {
        cluster.workers.iter().map(|worker| cell(worker).len()).fold(least, usize::max)
    };
    let (name, address) = (widest(|worker| worker.name.clone(), 12), widest(transfer, 21));
    let row = |worker: &str, role: &str, transfer: &str, engine: &str| {
        format!("{worker:name$}  {role:7}  {transfer:address$}  {engine}")
    };
    lines.push(faint(&row("worker", "role", "transfer", "engine")).to_string());
    for worker in &cluster.workers {
        let (transfer, engine) = (transfer(worker), engine(worker));
        lines.push(row(&worker.name, worker.role.as_str(), &transfer, &engine));
    }
    lines.push(String::new());
    if !cluster.tenants.is_empty()
        && coordinator.https.is_none()
        && !coordinator.listen.ip().is_loopback()
    {
        let note = "API keys cross the network in plain text, unless a proxy with TLS stands in \
                    front: [coordinator.https] encrypts them";
        lines.push(pending(note).to_string());
    }
    for role in Role::ALL {
        if !cluster.workers.iter().any(|worker| worker.role == role) {
            let note =
                format!("no {role} worker in this file: /ready answers 503 until one attaches");
            lines.push(pending(&note).to_string());
        }
    }
    lines
}

/// Where other workers find this one.
fn transfer(worker: &WorkerConfig) -> String {
    if let Some(advertised) = &worker.transfer.advertise {
        return advertised.clone();
    }
    let listen = worker.transfer.listen;
    if worker.is_template() {
        format!("--advertise HOST:{}", listen.port())
    } else {
        listen.to_string()
    }
}

fn engine(worker: &WorkerConfig) -> String {
    match &worker.engine {
        EngineConfig::Sim(sim) => format!("sim, {:?}, time × {}", sim.model, sim.time_scale),
        EngineConfig::Vllm(vllm) => match &vllm.source {
            VllmSource::Url(url) => format!("vLLM at {url}"),
            VllmSource::Command { command, port, .. } => {
                format!("vLLM on port {port}: {}", command.join(" "))
            }
        },
    }
}
