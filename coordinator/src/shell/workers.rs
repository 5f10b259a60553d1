//! Workers as they come, tell of themselves, and go.

use std::sync::Arc;

use baton_core::{
    AnnouncedChange, Elsewhere, Event, Heard, WorkerDescription, WorkerKey, WorkerReport,
};
use baton_proto as wire;
use baton_types::{Role, StepModel};
use tracing::{info, warn};

use super::{Shell, State};
use crate::{
    fleet::{Link, PeerInfo},
    journal::unix_ms,
};

/// More than any engine takes, and few enough to be added up.
const MOST_JOBS: u32 = 1 << 24;

#[derive(Debug)]
pub(super) struct Attached {
    pub(super) link: Arc<Link>,
    pub(super) peer: Option<PeerInfo>,
    pub(super) models: Vec<String>,
    pub(super) max_model_tokens: u32,
    pub(super) kv_capacity_tokens: Option<u64>,
    pub(super) engine: String,
    pub(super) since_unix_ms: u64,
    pub(super) report: wire::Report,
    /// It said that it was told to stop.
    pub(super) leaves: bool,
}

/// A worker as status pages and metrics show it.
#[derive(Clone, Debug)]
pub(crate) struct WorkerStatus {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) jobs_running: u32,
    pub(crate) report: wire::Report,
    /// Blocks of its prefix cache that are known here.
    pub(crate) prefix_blocks: usize,
}

impl State {
    /// Says once, of the first, why workers of one model are not paired with this one.
    fn tell_of_mismatch(&mut self, description: &WorkerDescription, peer: &PeerInfo) {
        let of_this_model =
            |other: &&Attached| other.models.iter().any(|name| description.models.contains(name));
        let mismatch = self.links.values().filter(of_this_model).find_map(|other| {
            let other = other.peer.as_ref()?;
            let mismatch = peer.compatibility.check(&other.compatibility).err()?;
            Some((other.wire.worker_name.clone(), mismatch))
        });
        if let Some((other, mismatch)) = mismatch {
            warn!(worker = description.name, other, %mismatch, "KV cannot pass between these workers");
            let why = format!("KV cannot pass to or from {other}: {mismatch}");
            self.journal.decided("mismatch", &description.name, why, "coordinator");
        }
    }
}

impl Shell {
    pub(crate) fn attach(
        &self,
        description: WorkerDescription,
        link: Arc<Link>,
        peer: Option<PeerInfo>,
        hello: &wire::Hello,
    ) -> WorkerKey {
        let mut state = self.state.lock();
        let mut actions = std::mem::take(&mut state.actions);
        info!(worker = description.name, role = %description.role, epoch = %description.epoch,
            engine = hello.engine, models = ?description.models, "worker attached");
        if let Some(peer) = &peer {
            state.tell_of_mismatch(&description, peer);
        }
        let attached = Attached {
            link,
            peer,
            models: description.models.clone(),
            max_model_tokens: hello.max_model_tokens,
            kv_capacity_tokens: description.kv_capacity_tokens,
            engine: hello.engine.chars().take(128).collect(),
            since_unix_ms: unix_ms(),
            report: wire::Report::default(),
            leaves: false,
        };
        state.journal.role(&description.name, description.role);
        let epoch: String = description.epoch.to_string().chars().take(8).collect();
        let how = format!("as {}, epoch {epoch}…", description.role);
        state.journal.decided("attached", &description.name, how, "worker");
        let name = description.name.clone();
        let worker = state.core.attach(description, self.started.elapsed(), &mut actions);
        // Requests may have waited for this worker: it has its link before they are sent there.
        state.links.insert(worker, attached);
        state.prefixes.worker_attached(worker, hello);
        let State { placed, links, .. } = &mut *state;
        placed.worker_attached(worker, &name, |worker| links.contains_key(&worker));
        self.carry_out(&mut state, actions, None);
        self.role_change(&mut state, worker, hello.role_change.as_ref());
        worker
    }

    pub(crate) fn worker_lost(&self, worker: WorkerKey) {
        let mut state = self.state.lock();
        // Without a link it was hung up on from here.
        let leaves = state.links.remove(&worker).map(|attached| attached.leaves);
        if let Some(view) = state.core.worker(worker) {
            let (name, role) = (view.description.name.clone(), view.description.role);
            state.journal.worker_goes(worker, &name);
            match leaves {
                Some(true) => {
                    info!(worker = name, %role, "worker left");
                    state.journal.decided("left", name, "it was told to stop", "worker");
                }
                Some(false) => {
                    warn!(worker = name, %role, "worker lost");
                    state.journal.decided("lost", name, "its stream ended", "coordinator");
                }
                None => {}
            }
        }
        self.tell_core(&mut state, Event::WorkerLost { worker }, None);
        state.prefixes.worker_gone(worker);
        state.handoffs.worker_gone(worker);
    }

    pub(crate) fn worker_leaves(&self, worker: WorkerKey) {
        let mut state = self.state.lock();
        if let Some(view) = state.core.worker(worker) {
            info!(worker = view.description.name, role = %view.description.role, "worker leaves");
        }
        if let Some(attached) = state.links.get_mut(&worker) {
            attached.leaves = true;
        }
        self.tell_core(&mut state, Event::Drain { worker }, None);
    }

    pub(crate) fn report(&self, worker: WorkerKey, report: wire::Report) {
        let mut state = self.state.lock();
        let is_unheard = state.prefixes.is_unheard(worker, state.core.told());
        let elsewhere = Elsewhere {
            prefills: report.prefills_elsewhere.min(MOST_JOBS),
            decodes: report.decodes_elsewhere.min(MOST_JOBS),
        };
        self.tell_core(&mut state, Event::BusyElsewhere { worker, elsewhere }, None);
        self.tell_core(&mut state, Event::Heard { worker, follows: report.leads }, None);
        self.role_change(&mut state, worker, report.role_change.as_ref());
        let Some(attached) = state.links.get_mut(&worker) else { return };
        let capacity_tokens = attached.kv_capacity_tokens;
        let used_ratio = report.engine_kv_used_ratio;
        let model = report.step_model.as_ref().and_then(usable_model);
        let slowest_part = report.slowest_step_part;
        attached.report = report;
        if is_unheard {
            attached.link.restart_kv_events();
        }
        let view = state.core.worker(worker);
        if let Some(view) = view
            && let Some(capacity_tokens) = capacity_tokens
        {
            let kv_used_tokens = part_of(capacity_tokens, used_ratio);
            // What is not of prompts that are still computed is of sequences that decode.
            let decode_context_tokens = kv_used_tokens.saturating_sub(view.load.prefill_tokens);
            let report = WorkerReport { decode_context_tokens, kv_used_tokens };
            self.tell_core(&mut state, Event::Report { worker, report }, None);
        }
        if let Some(model) = model {
            let event = Event::ModelChanged { worker, model, slowest_part };
            self.tell_core(&mut state, event, None);
        }
    }

    /// What a worker says of its role.
    fn role_change(&self, state: &mut State, worker: WorkerKey, change: Option<&wire::RoleChange>) {
        let change = change.and_then(|change| {
            Some(AnnouncedChange { to: change.to().try_into().ok()?, number: change.number })
        });
        self.tell_core(state, Event::RoleChange { worker, change }, None);
    }

    /// What a worker says of its prefix cache.
    pub(crate) fn kv_events(&self, worker: WorkerKey, events: &wire::KvEvents) {
        let mut state = self.state.lock();
        let State { core, prefixes, links, .. } = &mut *state;
        let news = prefixes.news(worker, events);
        if news.is_some_and(|news| core.kv_told(worker, &news) == Heard::NeedsRestart)
            && let Some((attached, view)) = links.get(&worker).zip(core.worker(worker))
        {
            warn!(
                worker = view.description.name,
                "news of a worker's prefix cache were missed: it is asked to tell it anew"
            );
            self.metrics.prefixes.gap();
            attached.link.restart_kv_events();
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.state.lock().core.is_ready()
    }

    /// Each model once, with the shortest of its workers' limits.
    pub(crate) fn models(&self) -> Vec<(String, u32)> {
        let mut models: Vec<(String, u32)> = Vec::new();
        for attached in self.state.lock().links.values() {
            for name in &attached.models {
                match models.iter_mut().find(|(known, _)| known == name) {
                    Some((_, limit)) => *limit = (*limit).min(attached.max_model_tokens),
                    None => models.push((name.clone(), attached.max_model_tokens)),
                }
            }
        }
        models.sort();
        models
    }

    pub(crate) fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.state.lock();
        let mut workers: Vec<_> = state
            .core
            .workers()
            .filter_map(|view| {
                let attached = state.links.get(&view.key)?;
                Some(WorkerStatus {
                    name: view.description.name.clone(),
                    role: view.description.role,
                    jobs_running: view.jobs_running,
                    prefix_blocks: state.core.told().blocks_of(view.key),
                    report: attached.report.clone(),
                })
            })
            .collect();
        workers.sort_by(|a, b| a.name.cmp(&b.name));
        workers
    }
}

/// Of an engine whose steps take no time nothing could be predicted.
pub(crate) fn usable_model(model: &wire::StepModel) -> Option<StepModel> {
    let model = StepModel::try_from(model).ok()?;
    let takes_time = |times: [f64; 3]| times.iter().any(|time| *time > 0.0);
    (takes_time(model.prefill_ms) && takes_time(model.decode_ms)).then_some(model)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]
fn part_of(whole: u64, ratio: f32) -> u64 {
    // Saturates.
    (whole as f64 * f64::from(ratio.clamp(0.0, 1.0))) as u64
}
