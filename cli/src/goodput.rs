//! `baton goodput`.

use std::{num::NonZero, process::ExitCode, thread};

use anyhow::bail;
use baton_harness::{
    compare::{Single, TraceFile},
    fleet::{Setup, simulate},
    goodput::{Goal, Goodput, LoadPoint, Sought, best_of, goodput},
    report::{
        RunFindings,
        number::{figures, percent},
    },
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    simulate::{FleetOptions, describe, heading, write},
    terminal::{Terminal, faint, strong},
};

#[derive(clap::Args)]
pub(crate) struct GoodputOptions {
    #[command(flatten)]
    fleet: FleetOptions,
    /// Asks this share within both SLOs also of the tenth of requests with the longest inputs, and of
    /// the tenth with the longest outputs.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    min_decile: Option<f64>,
}

pub(crate) fn run(options: &GoodputOptions) -> anyhow::Result<ExitCode> {
    let GoodputOptions { fleet, min_decile } = options;
    if let Some(share) = min_decile
        && !(0.0..=1.0).contains(share)
    {
        bail!("--min-decile is {share}: expected a share from 0 to 1");
    }
    let candidates = fleet.candidates()?;
    let mut trace = fleet.trace()?;
    if fleet.scale != 1.0 {
        trace.trace = trace.trace.scaled(fleet.scale, candidates[0].seed);
    }
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let goal = Goal { attainment: 0.9, min_decile: min_decile.unwrap_or(0.0) };

    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {elapsed} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    let tried = candidates.len();
    let (setup, near) = if tried == 1 {
        (candidates[0].clone(), None)
    } else {
        bar.set_message(format!("tuning {}: {tried} setups", fleet.way()));
        let tuned = best_of(&trace.trace, &candidates, goal, None, threads)?;
        let held = Some(tuned.held[tuned.best]).filter(|scale| *scale > 0.0);
        (candidates[tuned.best].clone(), held)
    };
    let sought = Sought { min_decile: goal.min_decile, p99: true, near };
    let found = goodput(&trace.trace, &setup, sought, threads, &|point: &LoadPoint| {
        let verdict = if point.is_met { "held" } else { "too much" };
        bar.set_message(format!("{} requests/s: {verdict}", figures(point.rps)));
    })?;
    bar.finish_and_clear();

    let mut terminal = Terminal::stdout();
    if fleet.json {
        let mut found = found.clone();
        found.scale *= fleet.scale;
        terminal.say(&serde_json::to_string(&found)?);
    } else {
        show(&mut terminal, &trace, &setup, &found, tried);
    }
    if let Some(directory) = &fleet.out {
        let single = Single {
            run: shown_run(&trace, &setup, &found)?,
            trace: &trace,
            profile_file: &fleet.profile,
            setup: &setup,
            scale: found.scale,
            goodput: Some(&found),
            min_decile: *min_decile,
        };
        write(single, directory, fleet.json.then_some(()), &mut terminal)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// At the highest load; none where no load is held.
fn shown_run(
    trace: &TraceFile,
    setup: &Setup,
    found: &Goodput,
) -> anyhow::Result<Option<RunFindings>> {
    if found.scale <= 0.0 {
        return Ok(None);
    }
    let run = simulate(trace.trace.at(found.scale, setup.seed), setup)?;
    Ok(Some(RunFindings::new(&run.tally, &run.facts)))
}

fn show(terminal: &mut Terminal, trace: &TraceFile, setup: &Setup, found: &Goodput, tried: usize) {
    terminal.say(&heading(&trace.trace, setup, found.goodput_rps));
    if tried > 1 {
        terminal.say(&faint(&format!("the best of {tried} setups")).to_string());
    }
    let rps = figures(found.goodput_rps);
    terminal.say(&format!(
        "\ngoodput     {:>10} requests/s with 90 % within both SLOs, {} times the trace's load\n{:12}{:>10} requests/s with 99 %",
        strong(&rps),
        figures(found.scale),
        "",
        found.goodput_rps_p99.map_or_else(String::new, figures),
    ));
    for (phase, share) in &found.attainment_by_phase {
        terminal.say(&format!("{phase:12}{:>10} within both", percent(*share)));
    }
    if let Some(summary) = &found.summary {
        terminal.say(&faint("\nat that load").to_string());
        terminal.say(describe(summary, setup).trim_start_matches('\n'));
    }
}
