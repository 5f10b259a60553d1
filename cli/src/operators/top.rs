use std::process::ExitCode;

use baton_coordinator::admin::{ClusterState, InFlightRequest, WorkerState};
use console::style;
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Access, block_on, ended,
    status::{INTERVAL, WINDOW, heading, troubles, workers},
};
use crate::{
    quantity::{milliseconds, speed},
    reading::Readings,
    terminal::{Terminal, faint},
};

const BAR_CHARS: usize = 40;
const REQUESTS: usize = 8;
const DECISIONS: usize = 4;

/// Draws what the coordinator does, the busiest workers first, until it is stopped.
pub(crate) fn run(access: &Access) -> anyhow::Result<ExitCode> {
    let client = access.client()?;
    let mut terminal = Terminal::stdout();
    anyhow::ensure!(
        terminal.is_live(),
        "top draws on a terminal, which stdout is not: baton status --watch writes lines"
    );
    let mut readings = Readings::over(WINDOW);
    block_on(async {
        let mut looks = interval(INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            readings.add(client.state().await?);
            terminal.draw(screen(&readings));
        }
    })
}

/// What does not fit is cut off below: so the longest list comes last.
fn screen(readings: &Readings) -> Vec<String> {
    let Some(state) = readings.last() else { return Vec::new() };
    let mut lines = heading(readings);
    lines.push(format!(
        "{:.1} requests/s · {:.0} tokens/s · {} handed over",
        readings.rate(ended),
        readings.rate(|state| state.output_tokens),
        speed(readings.rate(received_bytes)),
    ));
    lines.extend(troubles(state));
    lines.push(String::new());
    lines.push(faint("requests: queue · prefill ▒ handoff ▓ decode █").to_string());
    lines.extend(bars(&state.requests));
    lines.push(String::new());
    for decision in state.decisions.iter().rev().take(DECISIONS) {
        let told = format!(
            "{} {}: {} ({})",
            decision.kind, decision.subject, decision.reason, decision.by
        );
        lines.push(faint(&told).to_string());
    }
    lines.push(String::new());
    lines.extend(workers(&ClusterState { workers: busiest_first(state), ..state.clone() }));
    lines
}

fn received_bytes(state: &ClusterState) -> u64 {
    state.workers.iter().map(|worker| worker.handoffs.bytes_received).sum()
}

fn busiest_first(state: &ClusterState) -> Vec<WorkerState> {
    let mut workers = state.workers.clone();
    workers.sort_by_key(|worker| std::cmp::Reverse((worker.jobs, worker.load.queued)));
    workers
}

fn total_ms(request: &InFlightRequest) -> f64 {
    let phases = &request.phases;
    phases.queue_ms + phases.prefill_ms + phases.handoff_ms + phases.decode_ms
}

/// The oldest requests, on one scale.
fn bars(requests: &[InFlightRequest]) -> Vec<String> {
    let shown = &requests[..requests.len().min(REQUESTS)];
    let longest_ms = shown.iter().map(total_ms).fold(1.0, f64::max);
    if shown.is_empty() {
        return vec![faint("none is open").to_string()];
    }
    shown
        .iter()
        .map(|request| {
            let id: String = request.id.chars().take(12).collect();
            let (bar, chars) = bar(request, longest_ms);
            let gap = " ".repeat(BAR_CHARS.saturating_sub(chars));
            let time = milliseconds(total_ms(request) / 1000.0);
            let workers = match request.prefill_worker.as_str() {
                "" => request.decode_worker.clone(),
                prefill => format!("{prefill} → {}", request.decode_worker),
            };
            format!("{id:12} {bar}{gap} {time:>9}  {workers}")
        })
        .collect()
}

/// In colour, and how many characters it takes.
fn bar(request: &InFlightRequest, longest_ms: f64) -> (String, usize) {
    let phases = &request.phases;
    let parts = [
        (phases.queue_ms, style("·").dim()),
        (phases.prefill_ms, style("▒").yellow()),
        (phases.handoff_ms, style("▓").magenta()),
        (phases.decode_ms, style("█").blue()),
    ];
    let (mut text, mut chars, mut until_ms) = (String::new(), 0, 0.0);
    for (ms, sign) in parts {
        until_ms += ms;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss
        )]
        let end = ((until_ms / longest_ms) * BAR_CHARS as f64).round() as usize;
        while chars < end.min(BAR_CHARS) {
            text.push_str(&sign.to_string());
            chars += 1;
        }
    }
    (text, chars)
}

#[cfg(test)]
mod tests {
    use baton_coordinator::admin::Phases;

    use super::*;

    #[test]
    fn a_bar_has_its_phases_in_order_and_no_more_than_its_room() {
        console::set_colors_enabled(false);
        let request = |decode_ms| InFlightRequest {
            id: "r".into(),
            model: "m".into(),
            phase: "decode".into(),
            path: "disaggregated".into(),
            reason: String::new(),
            prefill_worker: "p".into(),
            decode_worker: "d".into(),
            prompt_tokens: 1,
            attempts: 1,
            phases: Phases { queue_ms: 10.0, prefill_ms: 10.0, handoff_ms: 10.0, decode_ms },
        };
        let (text, chars) = bar(&request(10.0), 40.0);
        let ten = |sign: &str| sign.repeat(10);
        assert_eq!(text, [ten("·"), ten("▒"), ten("▓"), ten("█")].concat());
        assert_eq!(chars, BAR_CHARS);
        assert_eq!(bar(&request(1e9), 40.0).1, BAR_CHARS);
        assert_eq!(bars(&[]).len(), 1);
        let lines = bars(&[request(10.0), request(50.0)]);
        assert!(lines[0].contains("40 ms  p → d"), "{}", lines[0]);
    }
}
