//! From the configuration to what the core is told of it.

use baton_config::{ClusterConfig, LateRequests, OnNoPrefill, PlacementMode};
use baton_core::{
    AdmissionSettings, Order, Settings, Split,
    policy::{self, POLICIES, Policy, Targets},
};
use baton_types::STEP_HEADROOM;

use crate::CoordinatorError;

/// A lender's engine comes to a copy when its step is over, and so does the puller's, which then computes one
/// token: some steps, of which none is to last longer than the target.
const PULL_STEPS: f64 = 2.0;

pub(crate) fn core_settings(config: &ClusterConfig) -> Settings {
    let (placement, admission, slo) = (&config.placement, &config.admission, &config.slo);
    let ttft = std::time::Duration::from_secs_f64(slo.ttft_ms / 1000.0);
    let order = match placement.late {
        LateRequests::Last => Order::LateLast,
        LateRequests::Fifo => Order::Arrival,
    };
    Settings {
        split: match placement.mode {
            PlacementMode::Adaptive => Split::PerRequest,
            PlacementMode::Always => Split::Always,
            PlacementMode::Never => Split::Never,
        },
        order,
        ttft,
        targets: Targets {
            step_ms: STEP_HEADROOM * slo.itl_ms,
            pull_ms: PULL_STEPS * slo.itl_ms,
            ..Targets::default()
        },
        first_token_timeout: config.coordinator.limits.first_token_timeout,
        on_no_prefill: match placement.on_no_prefill {
            OnNoPrefill::Local => baton_core::OnNoPrefill::Local,
            OnNoPrefill::Reject => baton_core::OnNoPrefill::Reject,
        },
        admission: Some(AdmissionSettings {
            max_waiting: admission.max_waiting_requests as usize,
            max_wait: admission.max_wait,
            backlog: AdmissionSettings::backlog_within(ttft, order),
            early_rejection: admission.early_rejection_priority,
        }),
        wait_for_worker: admission.wait_for_worker,
        keeps_decisions: true,
        role_change_timeout: config.balancer.drain_timeout,
        ..Settings::default()
    }
}

/// The policy of `[placement]`.
pub(crate) fn placement_policy(
    config: &ClusterConfig,
) -> Result<Box<dyn Policy>, CoordinatorError> {
    let placement = &config.placement;
    let own = match placement.mode {
        PlacementMode::Adaptive => "slack",
        PlacementMode::Always | PlacementMode::Never => "least-load",
    };
    let name = placement.policy.as_deref().unwrap_or(own);
    let entry = policy::policy(name).ok_or_else(|| {
        let known: Vec<&str> = POLICIES.iter().map(|entry| entry.name).collect();
        CoordinatorError::Policy { name: name.to_owned(), known: known.join(", ") }
    })?;
    // Coordinators that draw lots draw different ones.
    Ok((entry.make)(u64::from(std::process::id())))
}
