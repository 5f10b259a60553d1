//! `baton compare`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use baton_harness::{
    compare::{self, Experiment, Progress},
    report::{
        Report, Scenario,
        number::{figures, percent, span},
    },
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    simulate::{command_line, told},
    terminal::{Terminal, faint, strong},
};

#[derive(clap::Args)]
pub(crate) struct CompareOptions {
    /// The experiment: see docs/research.md.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Writes report.html, results.json and results.csv here.
    #[arg(long, value_name = "DIR", default_value = "comparison")]
    out: PathBuf,
    /// Prints results.json and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &CompareOptions) -> anyhow::Result<ExitCode> {
    let experiment = Experiment::read(&options.config)?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    let bar =
        ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let report = compare::run(&experiment, &command_line(), &|progress: Progress| {
        bar.set_length(u64::try_from(progress.total).unwrap_or(u64::MAX));
        bar.set_position(u64::try_from(progress.done).unwrap_or(u64::MAX));
        bar.set_message(progress.doing);
    })?;
    bar.finish_and_clear();
    report
        .write(&options.out)
        .with_context(|| format!("cannot write to {}", options.out.display()))?;
    let mut terminal = Terminal::stdout();
    if options.json {
        terminal.say(&report.to_json()?);
    } else {
        show(&mut terminal, &report);
        show_ratios(&mut terminal, &report);
        terminal.say(&told(&options.out));
    }
    Ok(ExitCode::SUCCESS)
}

const COLUMNS: [&str; 7] =
    ["mode", "goodput", "99 %", "within SLOs", "TTFT p90", "TBT p90", "setup"];

fn show(terminal: &mut Terminal, report: &Report) {
    for (i, scenario) in report.scenarios.iter().enumerate() {
        if i > 0 {
            terminal.say("");
        }
        terminal.say(&strong(&scenario.name).to_string());
        if let Some(load) = &scenario.load {
            let text = format!(
                "SLOs and latencies at {} requests/s: {}",
                figures(load.offered_rps),
                load.reason
            );
            terminal.say(&faint(&text).to_string());
        }
        let rows = rows(scenario);
        let widths: Vec<usize> = (0..COLUMNS.len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for (i, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
                let width = *width;
                // Numbers stand to the right, words to the left.
                if (1..=5).contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:width$}")
                }
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            let line = line.trim_end();
            terminal.say(&if i == 0 { faint(line).to_string() } else { line.to_owned() });
        }
    }
}

/// All scenarios at a glance: what each mode serves, and the last mode against the best of the others.
fn show_ratios(terminal: &mut Terminal, report: &Report) {
    let rates = |scenario: &Scenario| -> Option<Vec<f64>> {
        let found =
            scenario.contenders.iter().map(|contender| Some(contender.goodput.as_ref()?.rps));
        found.collect::<Option<Vec<f64>>>().filter(|rates| rates.len() > 1)
    };
    let Some(first) = report.scenarios.first().filter(|_| report.scenarios.len() > 1) else {
        return;
    };
    let modes: Vec<&str> =
        first.contenders.iter().map(|contender| contender.mode.as_str()).collect();
    let Some((last, others)) = modes.split_last() else { return };
    terminal.say(&format!(
        "\n{}",
        strong(&format!("requests/s, and {last} against the better of {}", others.join(", ")))
    ));
    let width = report.scenarios.iter().map(|s| s.name.chars().count()).max().unwrap_or(0);
    for scenario in &report.scenarios {
        let Some(rates) = rates(scenario) else { continue };
        let Some((last, others)) = rates.split_last() else { continue };
        let best = others.iter().copied().fold(0.0, f64::max);
        let ratio = if best > 0.0 { format!("{:.2}", last / best) } else { "–".to_owned() };
        let rates: Vec<String> = rates.iter().map(|rps| format!("{:>7}", figures(*rps))).collect();
        terminal.say(&format!("{:width$}  {}  {ratio:>5}", scenario.name, rates.join("  ")));
    }
}

fn rows(scenario: &Scenario) -> Vec<[String; 7]> {
    let none = || "–".to_owned();
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    for contender in &scenario.contenders {
        let goodput = contender.goodput.as_ref();
        let run = contender.run.as_ref();
        let served = run.filter(|run| run.summary.completed > 0);
        rows.push([
            contender.mode.clone(),
            goodput.map_or_else(none, |found| figures(found.rps)),
            goodput.map_or_else(none, |found| figures(found.rps_p99)),
            run.map_or_else(none, |run| percent(run.summary.attainment)),
            served.map_or_else(none, |run| span(run.summary.ttft_ms.p90)),
            served.map_or_else(none, |run| span(run.summary.tbt_ms.p90)),
            contender.setup.clone(),
        ]);
    }
    rows
}
