//! `baton simulate`, and what it shares with `baton goodput`: how a simulated fleet is described.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use baton_harness::{
    compare::{Single, TraceFile, Way, WayKind},
    fleet::{Late, Link, Setup, simulate},
    outcome::Slo,
    profile,
    report::{
        RunFindings,
        number::{bytes, figures, percent, span, span_tick},
    },
    summary::{Percentiles, Summary},
    trace::Trace,
};

use crate::terminal::{Terminal, bad, faint, good, note, strong};

/// A simulated fleet and what it is asked.
#[derive(clap::Args)]
pub(crate) struct FleetOptions {
    /// Requests: Mooncake or Baton JSONL, Azure or BurstGPT CSV.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// How long the engine's steps take: coefficients (JSON), or measured points (CSV), which are fitted.
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: PathBuf,
    /// How many workers the fleet has.
    #[arg(long, value_name = "N")]
    workers: u32,
    /// aggregated, aggregated:CHUNK_TOKENS, static:xPyD as in static:7P1D, flip:xPyD as in
    /// flip:4P4D, or adaptive.
    #[arg(long)]
    mode: Way,
    /// Milliseconds from a request's arrival to its first token.
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    slo_ttft_ms: f64,
    /// Milliseconds between tokens, held against the mean of a request's longest tenth of gaps.
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    slo_itl_ms: f64,
    /// Allows each request so many times its own unloaded prefill in addition to its TTFT.
    #[arg(long, value_name = "K", default_value_t = 0.0, allow_negative_numbers = true)]
    slo_ttft_prefill_factor: f64,
    /// Multiplies the trace's load.
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) scale: f64,
    /// Equal seeds give equal bytes.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Requests predicted to miss their TTFT are served as they came (fifo), or after all that can
    /// still make it (last).
    #[arg(long, value_name = "fifo|last", default_value_t)]
    late: Late,
    /// Places requests by this one of `baton policies`.
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// Sequences in one step of a worker [default: 256].
    #[arg(long, value_name = "N")]
    max_sequences: Option<u32>,
    #[command(flatten)]
    robustness: RobustnessOptions,
    /// Writes report.html, results.json and results.csv here.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Prints one JSON object and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the world is not as the coordinator believes it to be.
#[derive(clap::Args)]
struct RobustnessOptions {
    /// Each step takes up to this part longer or shorter than the profile says: 0.2 is ±20 %.
    #[arg(long, value_name = "PART", default_value_t = 0.0, allow_negative_numbers = true)]
    step_noise: f64,
    /// What coordinator and workers believe of a step at first is so much too optimistic: 0.15 believes that
    /// steps take 85 % of what they take. Below 0 it is too pessimistic. Workers learn, as live ones do.
    #[arg(long, value_name = "PART", default_value_t = 0.0, allow_negative_numbers = true)]
    model_bias: f64,
    /// Microseconds to copy the KV of a token between workers: 8 is 400 Gbit/s with 320 KiB a token.
    #[arg(long, value_name = "US", default_value_t = Link::default().us_per_token, allow_negative_numbers = true)]
    link_us_per_token: f64,
    /// Milliseconds that each copy takes besides.
    #[arg(long, value_name = "MS", default_value_t = Link::default().latency_ms, allow_negative_numbers = true)]
    link_latency_ms: f64,
    /// Copies of one sender, and those of one receiver, take turns.
    #[arg(long)]
    link_shared: bool,
    /// The coordinator is not told what workers have cached, and guesses it by what was routed where.
    #[arg(long)]
    imprecise: bool,
}

#[derive(clap::Args)]
pub(crate) struct SimulateOptions {
    #[command(flatten)]
    fleet: FleetOptions,
}

impl FleetOptions {
    pub(crate) fn trace(&self) -> anyhow::Result<TraceFile> {
        if !(self.scale.is_finite() && self.scale > 0.0) {
            bail!("--scale is {}: expected a number above 0", self.scale);
        }
        let trace = Trace::read(&self.trace)?;
        Ok(TraceFile { file: self.trace.clone(), trace })
    }

    /// The setups that the mode may stand for, each of which can be run.
    pub(crate) fn candidates(&self) -> anyhow::Result<Vec<Setup>> {
        let profile::Given { profile, quality } = profile::read(&self.profile)?;
        if let Some(quality) = quality {
            note(&format!("prefill fitted on {}", quality.prefill));
            note(&format!("decode fitted on {}", quality.decode));
        }
        let slo = Slo {
            ttft_ms: self.slo_ttft_ms,
            itl_ms: self.slo_itl_ms,
            ttft_prefill_factor: self.slo_ttft_prefill_factor,
        };
        let mut way = self.mode.clone();
        if self.policy.is_some() {
            way.policy.clone_from(&self.policy);
        }
        let mut plain =
            Setup::new(profile, self.workers, baton_harness::fleet::Mode::Adaptive, slo);
        plain.late = self.late;
        plain.seed = self.seed;
        let RobustnessOptions {
            step_noise,
            model_bias,
            link_us_per_token,
            link_latency_ms,
            link_shared,
            imprecise,
        } = self.robustness;
        plain.precise = !imprecise;
        plain.step_noise = step_noise;
        plain.predicted_part = 1.0 - model_bias;
        plain.link = Link {
            latency_ms: link_latency_ms,
            us_per_token: link_us_per_token,
            shared: link_shared,
        };
        if let Some(max_sequences) = self.max_sequences {
            plain.max_seqs = max_sequences;
        }
        plain.check()?;
        let candidates = way.candidates(&plain);
        if candidates.is_empty() {
            bail!("--mode {way} parts the workers in two pools, and there is {}", self.workers);
        }
        for candidate in &candidates {
            candidate.check()?;
        }
        Ok(candidates)
    }

    pub(crate) fn way(&self) -> &Way {
        &self.mode
    }
}

pub(crate) fn run(options: &SimulateOptions) -> anyhow::Result<ExitCode> {
    let fleet = &options.fleet;
    let mut candidates = fleet.candidates()?;
    let setup = match (fleet.way().kind, candidates.len()) {
        (_, 1) => candidates.remove(0),
        // A simulation of one setup searches nothing: vLLM's own default.
        (WayKind::Aggregated { .. }, _) => Setup { chunk_tokens: 2048, ..candidates.remove(0) },
        _ => bail!(
            "--mode best-static is what `baton goodput` finds; simulate one split, as static:7P1D"
        ),
    };
    let trace = fleet.trace()?;
    let load = trace.trace.at(fleet.scale, setup.seed);
    let run = simulate(load, &setup)?;
    let summary = run.summary();
    let mut terminal = Terminal::stdout();
    if fleet.json {
        terminal.say(&serde_json::to_string(&summary)?);
    } else {
        let offered = load.rate_rps();
        terminal.say(&heading(&trace.trace, &setup, offered));
        terminal.say(&describe(&summary, &setup));
    }
    if let Some(directory) = &fleet.out {
        let findings = RunFindings::new(&run.tally, &run.facts);
        let single = Single {
            trace: &trace,
            profile_file: &fleet.profile,
            setup: &setup,
            scale: fleet.scale,
            goodput: None,
            min_decile: None,
            run: Some(findings),
        };
        write(single, directory, fleet.json.then_some(()), &mut terminal)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the three files; says so, unless stdout belongs to JSON.
pub(crate) fn write(
    single: Single<'_>,
    directory: &Path,
    silent: Option<()>,
    terminal: &mut Terminal,
) -> anyhow::Result<()> {
    let report = single.into_report(&command_line())?;
    report.write(directory).with_context(|| format!("cannot write to {}", directory.display()))?;
    if silent.is_none() {
        terminal.say(&told(directory));
    }
    Ok(())
}

pub(crate) fn told(directory: &Path) -> String {
    format!("\n{}", faint(&format!("report: {}", directory.join("report.html").display())))
}

/// What was typed, fit to be typed again.
pub(crate) fn command_line() -> String {
    let plain = |text: &str| {
        !text.is_empty()
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c))
    };
    let quoted = |text: String| {
        if plain(&text) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
    };
    let typed = std::env::args_os().skip(1).map(|text| quoted(text.to_string_lossy().into_owned()));
    std::iter::once("baton".to_owned()).chain(typed).collect::<Vec<_>>().join(" ")
}

pub(crate) fn heading(trace: &Trace, setup: &Setup, offered_rps: f64) -> String {
    let workers = if setup.workers == 1 { "worker" } else { "workers" };
    format!(
        "{}  {} requests/s on {} {workers}, {}, {}",
        strong(&trace.name),
        figures(offered_rps),
        setup.workers,
        setup.mode,
        faint(&format!("{} tokens a step, by {}", setup.chunk_tokens, setup.policy_name())),
    )
}

pub(crate) fn describe(summary: &Summary, setup: &Setup) -> String {
    let slo = setup.slo;
    let attained = percent(summary.attainment);
    let attained = if summary.attainment >= 0.9 { good(&attained) } else { bad(&attained) };
    let plus = match slo.ttft_prefill_factor {
        0.0 => String::new(),
        factor => format!(" + {factor} × prefill"),
    };
    let row = |name: &str, values: &Percentiles| {
        let Percentiles { p50, p90, p99 } = *values;
        let [p50, p90, p99] = [p50, p90, p99]
            .map(|ms| if summary.completed == 0 { "no data".to_owned() } else { span(ms) });
        format!("{name:12}{p50:>10}{p90:>10}{p99:>10}")
    };
    let head = format!("{:12}{:>10}{:>10}{:>10}", "", "p50", "p90", "p99");
    [
        String::new(),
        format!(
            "within SLOs {attained:>10}   TTFT {}{plus}: {}, ITL {}: {}",
            span_tick(slo.ttft_ms),
            percent(summary.attainment_ttft),
            span_tick(slo.itl_ms),
            percent(summary.attainment_tbt),
        ),
        format!("{:12}{:>10} requests/s within both", "goodput", figures(summary.goodput_rps)),
        format!(
            "{:12}{:>10} of {}, {} rejected, {} unfinished",
            "completed", summary.completed, summary.requests, summary.rejected, summary.unfinished
        ),
        String::new(),
        faint(&head).to_string(),
        row("TTFT", &summary.ttft_ms),
        row("TBT", &summary.tbt_ms),
        row("TPOT", &summary.tpot_ms),
        row("end to end", &summary.e2e_ms),
        String::new(),
        format!(
            "{} tokens/s, {} of prompts cached, {} requests split, {} of KV moved, {} flips",
            figures(summary.output_tokens_per_s),
            percent(summary.prefix_hit_ratio),
            summary.disaggregated,
            bytes(summary.kv_bytes_moved),
            summary.flips,
        ),
    ]
    .join("\n")
}
