//! `baton bench`: load on a live endpoint, and what came of it.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use baton_harness::{
    bench::{
        self, Asked, BenchOptions, BenchRun, ClientHealth, Endpoint, Progress, Prompts, Surface,
    },
    compare::{TraceFile, inspect_trace},
    outcome::{Fate, Slo},
    report::{Input, RunFindings},
    summary::{Percentiles, Summary, Tally},
    trace::Trace,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    simulate::command_line,
    terminal::{Terminal, bad, faint, pending},
};

/// Loads an OpenAI-compatible endpoint and takes the time of each token. Requests go out when they are
/// due, whatever has been answered.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct BenchArguments {
    /// Of the server; /v1/completions is appended.
    #[arg(long, value_name = "URL")]
    url: String,
    /// Model to ask for [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Requests to replay: Mooncake or our JSONL, Azure or BurstGPT CSV.
    #[arg(long, value_name = "FILE", conflicts_with = "rate", required_unless_present = "rate")]
    trace: Option<PathBuf>,
    /// Poisson arrivals per second, in place of a trace.
    #[arg(long, value_name = "RPS", value_parser = above_zero, requires_all = ["input_tokens", "output_tokens"])]
    rate: Option<f64>,
    /// Of each request [with --rate].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "trace")]
    input_tokens: Option<u32>,
    /// Of each request [with --rate].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "trace")]
    output_tokens: Option<u32>,
    /// Times the trace's load: single traces run faster, composites repeat requests.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = above_zero)]
    scale: f64,
    /// Ends after so many requests [--rate: default 100].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests: Option<u32>,
    /// Leaves out what arrives later.
    #[arg(long, value_name = "S", value_parser = above_zero)]
    seconds: Option<f64>,
    /// TTFT that is promised, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2000.0, value_parser = above_zero)]
    slo_ttft_ms: f64,
    /// Gap between tokens that is promised, held against the mean of a request's longest tenth.
    #[arg(long, value_name = "MS", default_value_t = 50.0, value_parser = above_zero)]
    slo_itl_ms: f64,
    /// Requests that are answered before the first one counts.
    #[arg(long, value_name = "N", default_value_t = 4)]
    warmup: u32,
    /// Waits so long for answers after the last arrival.
    #[arg(long, value_name = "S", default_value_t = 600.0, value_parser = above_zero)]
    patience: f64,
    /// Of arrivals and prompts [default: another one each time, so that no prefix cache knows them].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Asks /v1/chat/completions with words, in place of /v1/completions with token ids.
    #[arg(long)]
    chat: bool,
    /// Token ids that prompts are drawn from: FIRST..END.
    #[arg(long, value_name = "RANGE", default_value = "1000..2000", value_parser = vocabulary)]
    vocabulary: std::ops::Range<u32>,
    /// More fields for each body, over ours; null removes one: {"ignore_eos":null}.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    body: Option<Map<String, Value>>,
    /// Environment variable that holds the API key.
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY")]
    api_key_env: String,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Writes report.html, bench.json, requests.csv, results.json and results.csv there.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    client: &'a ClientHealth,
    errors: &'a std::collections::BTreeMap<String, usize>,
    prompt_tokens_ratio: f64,
    url: &'a str,
    model: &'a str,
    trace: &'a str,
    scale: f64,
    seed: u64,
    slo_ttft_ms: f64,
    slo_itl_ms: f64,
    version: &'static str,
    command: String,
}

pub(crate) fn run(arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    let seed = arguments.seed.unwrap_or_else(any_seed);
    let trace = Arc::new(trace(arguments, seed)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(replay(arguments, &trace, seed))
}

fn trace(arguments: &BenchArguments, seed: u64) -> anyhow::Result<Trace> {
    let mut trace = match (&arguments.trace, arguments.rate) {
        (Some(file), _) => Trace::read(file)?.scaled(arguments.scale, seed),
        (None, Some(rate)) => {
            let rate = rate * arguments.scale;
            let requests = match (arguments.requests, arguments.seconds) {
                // All that can arrive; what is too late is left out below.
                (None, Some(seconds)) => {
                    (0..).take_while(|n| f64::from(*n) < 10.0 + 2.0 * rate * seconds).count()
                }
                (requests, _) => requests.unwrap_or(100) as usize,
            };
            let tokens =
                (arguments.input_tokens.unwrap_or(1), arguments.output_tokens.unwrap_or(1));
            Trace::poisson(rate, requests, tokens.0, tokens.1, seed)
        }
        (None, None) => bail!("give --trace or --rate"),
    };
    if let Some(seconds) = arguments.seconds {
        trace.requests.retain(|request| request.arrival.as_secs_f64() < seconds);
    }
    if let Some(requests) = arguments.requests {
        trace.requests.truncate(requests as usize);
    }
    Ok(trace)
}

/// The trace's file, for the report.
fn input(arguments: &BenchArguments) -> anyhow::Result<Option<Input>> {
    let Some(file) = &arguments.trace else { return Ok(None) };
    let trace = TraceFile { file: file.clone(), trace: Trace::read(file)? };
    Ok(Some(inspect_trace(&trace)?))
}

async fn replay(
    arguments: &BenchArguments,
    trace: &Arc<Trace>,
    seed: u64,
) -> anyhow::Result<ExitCode> {
    let key = std::env::var(&arguments.api_key_env).ok().filter(|key| !key.is_empty());
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => Endpoint::first_model(&arguments.url, key.as_deref()).await?,
    };
    let surface = if arguments.chat { Surface::Chat } else { Surface::Completions };
    let more = arguments.body.clone().unwrap_or_default();
    let endpoint = Endpoint::new(&arguments.url, &model, surface, key.as_deref(), more)?;
    let prompts = Prompts {
        seed,
        vocabulary: arguments.vocabulary.clone(),
        prefix_block_tokens: trace.prefix_block_tokens,
    };
    let options = BenchOptions {
        warmup: arguments.warmup as usize,
        patience: Duration::try_from_secs_f64(arguments.patience)?,
    };
    let progress = Arc::new(Progress::default());
    let bar = tokio::spawn(show(progress.clone(), trace.requests.len()));
    let stop = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let run = bench::run(&endpoint, trace, &prompts, &options, &progress, stop).await;
    bar.abort();
    let _ = bar.await;
    let slo = Slo {
        ttft_ms: arguments.slo_ttft_ms,
        ttft_prefill_factor: 0.0,
        itl_ms: arguments.slo_itl_ms,
    };
    let tally = Tally::of(&run.outcomes, &run.samples, &trace.phases, &slo, |_| 0.0);
    let findings = RunFindings::new(&tally, &run.facts);
    let report = Report {
        summary: &findings.summary,
        client: &run.client,
        errors: &run.errors,
        prompt_tokens_ratio: run.prompt_tokens_ratio,
        url: &arguments.url,
        model: &model,
        trace: &trace.name,
        scale: arguments.scale,
        seed,
        slo_ttft_ms: slo.ttft_ms,
        slo_itl_ms: slo.itl_ms,
        version: env!("CARGO_PKG_VERSION"),
        command: command_line(),
    };
    if let Some(directory) = &arguments.out {
        let asked = Asked {
            command: command_line(),
            url: arguments.url.clone(),
            model: model.clone(),
            trace: input(arguments)?,
            scale: arguments.scale,
            slo,
            seed,
        };
        run.report(asked, trace, findings.clone())
            .write(directory)
            .and_then(|()| write(directory, &report, &run, trace))
            .with_context(|| format!("cannot write to {}", directory.display()))?;
    }
    let mut terminal = Terminal::stdout();
    if arguments.json {
        terminal.say(&serde_json::to_string(&report)?);
    } else {
        for line in table(&report) {
            terminal.say(&line);
        }
    }
    let is_of_use = findings.summary.completed > 0;
    Ok(if is_of_use { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Draws how far the run is, on a terminal.
async fn show(progress: Arc<Progress>, requests: usize) {
    let bar = Bar(ProgressBar::with_draw_target(
        Some(requests as u64),
        ProgressDrawTarget::stderr_with_hz(4),
    ));
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}");
    bar.0.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let (sent, ended) = (of(&progress.sent), of(&progress.ended));
        bar.0.set_position(ended as u64);
        bar.0.set_message(if sent == 0 {
            "warming up".to_owned()
        } else {
            format!("{} in flight, {} failed", sent.saturating_sub(ended), of(&progress.failed))
        });
    }
}

/// Leaves the terminal as it was.
struct Bar(ProgressBar);

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn table(report: &Report<'_>) -> Vec<String> {
    let summary = report.summary;
    let percentiles = |name: &str, of: &Percentiles| {
        format!("{name:<10} {:>10.1} {:>10.1} {:>10.1}", of.p50, of.p90, of.p99)
    };
    let mut lines = vec![
        format!(
            "{} requests in {:.1} s: {} completed, {} rejected, {} unfinished",
            summary.requests,
            summary.duration_s,
            summary.completed,
            summary.rejected,
            summary.unfinished
        ),
        String::new(),
        faint(&format!("{:<10} {:>10} {:>10} {:>10}", "ms", "p50", "p90", "p99")).to_string(),
        percentiles("TTFT", &summary.ttft_ms),
        percentiles("TBT", &summary.tbt_ms),
        percentiles("TPOT", &summary.tpot_ms),
        percentiles("E2E", &summary.e2e_ms),
        String::new(),
        format!(
            "goodput {:.2} requests/s; {:.1} % meet TTFT ≤ {} ms and TBT ≤ {} ms",
            summary.goodput_rps,
            summary.attainment * 100.0,
            report.slo_ttft_ms,
            report.slo_itl_ms
        ),
        format!(
            "{:.1} output tokens/s; {:.1} % of prompt tokens cached; {} disaggregated",
            summary.output_tokens_per_s,
            summary.prefix_hit_ratio * 100.0,
            summary.disaggregated
        ),
        format!(
            "client: sent {:.2} ms late at p99, {:.2} cores, seed {}",
            report.client.send_lag_ms.p99, report.client.cpu_cores_mean, report.seed
        ),
    ];
    for warning in &report.client.warnings {
        lines.push(format!("{} {warning}", pending("saturated:")));
    }
    for (error, count) in report.errors {
        lines.push(format!("{} {count} × {error}", bad("error:")));
    }
    lines
}

fn write(
    directory: &Path,
    report: &Report<'_>,
    run: &BenchRun,
    trace: &Trace,
) -> std::io::Result<()> {
    fs::write(directory.join("bench.json"), serde_json::to_string_pretty(report)? + "\n")?;
    let mut csv = Vec::new();
    writeln!(
        csv,
        "arrival_s,phase,input_tokens,output_tokens,cached_tokens,disaggregated,fate,ttft_ms,tbt_ms,\
         tpot_ms,e2e_ms"
    )?;
    for outcome in &run.outcomes {
        let phase = outcome.phase.and_then(|phase| trace.phases.get(usize::from(phase)));
        write!(
            csv,
            "{:.6},{},{},{},{},{},",
            outcome.arrival.as_secs_f64(),
            phase.map_or("", String::as_str),
            outcome.input_tokens,
            outcome.output_tokens,
            outcome.cached_tokens,
            outcome.disaggregated
        )?;
        match &outcome.fate {
            Fate::Completed(l) => writeln!(
                csv,
                "completed,{:.3},{:.3},{:.3},{:.3}",
                l.ttft_ms, l.tbt_ms, l.tpot_ms, l.e2e_ms
            )?,
            Fate::Rejected => writeln!(csv, "rejected,,,,")?,
            Fate::Unfinished => writeln!(csv, "unfinished,,,,")?,
        }
    }
    fs::write(directory.join("requests.csv"), csv)?;
    Ok(())
}

/// Of the clock: nobody has to guess it, only to not meet it again.
pub(crate) fn any_seed() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    since.as_secs() ^ (u64::from(since.subsec_nanos()) << 32)
}

pub(crate) fn above_zero(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite() && *number > 0.0)
        .ok_or_else(|| "give a number above 0".to_owned())
}

pub(crate) fn vocabulary(text: &str) -> Result<std::ops::Range<u32>, String> {
    let ends = text
        .split_once("..")
        .and_then(|(first, end)| Some((first.parse().ok()?, end.parse().ok()?)));
    ends.map(|(first, end)| first..end)
        .filter(|range: &std::ops::Range<u32>| !range.is_empty())
        .ok_or_else(|| "give token ids like 1000..2000".to_owned())
}

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("give a JSON object: {error}"))
}
