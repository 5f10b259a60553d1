//! `baton compare`.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use baton_harness::{
    bench::BenchOptions,
    compare::{self, Experiment, Live, LiveError, LiveProgress, Progress},
    report::{
        Report, Scenario,
        number::{figures, percent, span},
    },
};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::{
    bench::{above_zero, any_seed, vocabulary},
    operators::AdminClient,
    simulate::{command_line, told},
    terminal::{Terminal, faint, note, strong},
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
    #[command(flatten)]
    live: LiveOptions,
}

/// A running Baton in place of simulated workers.
#[derive(clap::Args)]
struct LiveOptions {
    /// Runs the experiment on the Baton that serves clients there, switching its mode between runs.
    #[arg(long, value_name = "URL", requires_all = ["admin", "token_file"])]
    live: Option<String>,
    /// Its admin listener.
    #[arg(long, value_name = "URL", requires = "live")]
    admin: Option<String>,
    /// Holds the admin listener's token.
    #[arg(long, value_name = "FILE", requires = "live")]
    token_file: Option<PathBuf>,
    /// Runs each mode so often, in turns.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "live", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Leaves out what arrives later in the trace.
    #[arg(long, value_name = "S", requires = "live", value_parser = above_zero)]
    seconds: Option<f64>,
    /// Model to ask for [default: the first that the server lists].
    #[arg(long, value_name = "NAME", requires = "live")]
    model: Option<String>,
    /// Token ids that prompts are drawn from: FIRST..END.
    #[arg(long, value_name = "RANGE", default_value = "1000..2000", requires = "live", value_parser = vocabulary)]
    vocabulary: std::ops::Range<u32>,
    /// Environment variable that holds the API key.
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY", requires = "live")]
    api_key_env: String,
}

impl LiveOptions {
    fn read(&self) -> anyhow::Result<Option<(Live, AdminClient)>> {
        let (Some(url), Some(admin), Some(token_file)) =
            (&self.live, &self.admin, &self.token_file)
        else {
            return Ok(None);
        };
        let coordinator = AdminClient::new(admin, token_file)?;
        let live = Live {
            url: url.clone(),
            model: self.model.clone(),
            api_key: std::env::var(&self.api_key_env).ok().filter(|key| !key.is_empty()),
            rounds: self.rounds,
            seconds: self.seconds,
            prompt_seed: any_seed(),
            vocabulary: self.vocabulary.clone(),
            options: BenchOptions { warmup: 4, patience: Duration::from_secs(600) },
        };
        Ok(Some((live, coordinator)))
    }
}

pub(crate) fn run(options: &CompareOptions) -> anyhow::Result<ExitCode> {
    let experiment = Experiment::read(&options.config)?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
    let bar =
        ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let report = match options.live.read()? {
        None => compare::run(&experiment, &command_line(), &|progress: Progress| {
            bar.set_length(u64::try_from(progress.total).unwrap_or(u64::MAX));
            bar.set_position(u64::try_from(progress.done).unwrap_or(u64::MAX));
            bar.set_message(progress.doing);
            if let Some(found) = progress.found {
                say_beside(&bar, &found);
            }
        })?,
        Some((live, coordinator)) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run_on(&experiment, &live, &coordinator, &bar))?
        }
    };
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

/// Above the bar, or where there is none in lines that say how far it is.
fn say_beside(bar: &ProgressBar, found: &str) {
    if bar.is_hidden() {
        let (done, all) = (bar.position(), bar.length().unwrap_or_default());
        note(&format!("{done}/{all} {}  {found}", HumanDuration(bar.elapsed())));
    } else {
        bar.println(found);
    }
}

/// On a live cluster; Ctrl-C leaves the cluster in the mode that it had.
async fn run_on(
    experiment: &Experiment,
    live: &Live,
    coordinator: &AdminClient,
    bar: &ProgressBar,
) -> Result<Report, LiveError> {
    let stop = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let (watched, mut watching) = tokio::sync::watch::channel(None);
    let begun = |progress: LiveProgress<'_>| {
        bar.set_length(u64::try_from(progress.total * progress.requests).unwrap_or(u64::MAX));
        bar.set_message(format!("{} on {}", progress.mode, progress.trace));
        let before = progress.done * progress.requests;
        watched.send_replace(Some((before, progress.run.clone())));
    };
    let drawn = async {
        loop {
            tokio::time::sleep(Duration::from_millis(250)).await;
            if let Some((before, run)) = &*watching.borrow_and_update() {
                let ended = before + run.ended.load(std::sync::atomic::Ordering::Relaxed);
                bar.set_position(u64::try_from(ended).unwrap_or(u64::MAX));
            }
        }
    };
    let command = command_line();
    tokio::select! {
        report = compare::run_live(experiment, live, coordinator, &command, begun, stop) => report,
        never = drawn => never,
    }
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
            goodput.and_then(|found| found.rps_p99).map_or_else(none, figures),
            run.map_or_else(none, |run| percent(run.summary.attainment)),
            served.map_or_else(none, |run| span(run.summary.ttft_ms.p90)),
            served.map_or_else(none, |run| span(run.summary.tbt_ms.p90)),
            contender.setup.clone(),
        ]);
    }
    rows
}
