//! One live run as a report, which looks like that of a simulation.

use super::BenchRun;
use crate::{
    outcome::Slo,
    report::{Contender, Input, Load, Origin, Report, RunFindings, Scenario},
    trace::Trace,
};

/// What was asked of whom.
#[derive(Clone, Debug)]
pub struct Asked {
    pub command: String,
    pub url: String,
    pub model: String,
    /// The trace's file; none where requests were made up.
    pub trace: Option<Input>,
    /// Of the trace's own load.
    pub scale: f64,
    pub slo: Slo,
    pub seed: u64,
}

impl BenchRun {
    /// `trace` is what was replayed, `findings` what came of it.
    pub fn report(&self, asked: Asked, trace: &Trace, findings: RunFindings) -> Report {
        let Asked { command, url, model, slo, seed, scale, .. } = asked;
        let offered_rps = trace.rate_rps();
        let mut setup = if findings.summary.disaggregated > 0 {
            format!("{} requests were split", findings.summary.disaggregated)
        } else {
            "one server".to_owned()
        };
        for warning in &self.client.warnings {
            setup.push_str("; the client was saturated: ");
            setup.push_str(warning);
        }
        let contender = Contender {
            mode: "live".to_owned(),
            setup,
            searched: Vec::new(),
            goodput: None,
            run: Some(findings),
        };
        let made_up = || Input {
            file: trace.name.clone(),
            sha256: String::new(),
            about: format!("{} requests", trace.requests.len()),
        };
        let scenario = Scenario {
            name: format!("{} on {model}", trace.name),
            trace: asked.trace.unwrap_or_else(made_up),
            workers: None,
            slo,
            late: None,
            min_decile: None,
            load: Some(Load { scale, offered_rps, reason: "as it was asked".to_owned() }),
            contenders: vec![contender],
        };
        Report {
            title: format!("{} on {url}", trace.name),
            origin: Origin {
                command,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                seeds: vec![seed],
                profile: None,
                endpoint: Some(format!("{url}, model {model}")),
                experiment: None,
            },
            scenarios: vec![scenario],
        }
    }
}
