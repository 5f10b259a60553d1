//! `baton profile`: the step times of an engine, measured live or read from published points.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use baton_harness::{
    bench::{Endpoint, Prompts, Surface},
    profile::{
        Points,
        fit::{FitQuality, Fitted, fit},
        measure::{Sweep, measure},
    },
};
use serde_json::Map;

use crate::{
    bench::{any_seed, vocabulary},
    terminal::{Terminal, faint, pending},
};

/// Fits the step times of an engine, for `baton simulate` and the embedded engine: measured on a live
/// endpoint that does nothing else meanwhile, or from tables of points.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ProfileArguments {
    /// Endpoint to measure; /v1/completions is appended.
    #[arg(long, value_name = "URL", required_unless_present = "points")]
    url: Option<String>,
    /// CSV of points, in place of an endpoint; may be repeated. Columns: kind,sequences,tokens,ms, or
    /// those of Dynamo's and Splitwise's published sweeps.
    #[arg(long, value_name = "FILE", conflicts_with = "url")]
    points: Vec<PathBuf>,
    /// Name of the profile.
    #[arg(long, value_name = "NAME", default_value = "measured")]
    name: String,
    /// Writes the profile there, and the points beside it as .csv [default: prints the profile].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Leaves out points that the fit misses by more than so many percent.
    #[arg(long, value_name = "PERCENT", value_parser = crate::bench::above_zero)]
    drop_above: Option<f64>,
    /// Model to ask for [default: the first that the server lists].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Longest prompt plus output to measure.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(128..))]
    max_model_len: u32,
    /// Sequences that decode together, at most.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    max_sequences: u32,
    /// Token ids that prompts are drawn from: FIRST..END.
    #[arg(long, value_name = "RANGE", default_value = "1000..2000", value_parser = vocabulary)]
    vocabulary: std::ops::Range<u32>,
    /// Environment variable that holds the API key.
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY")]
    api_key_env: String,
}

pub(crate) fn run(arguments: &ProfileArguments) -> anyhow::Result<ExitCode> {
    let mut terminal = Terminal::stdout();
    let (points, source) = match &arguments.url {
        Some(url) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let points = runtime.block_on(measured(arguments, url, &mut terminal))?;
            (
                points,
                format!("Measured by baton profile {} from outside", env!("CARGO_PKG_VERSION")),
            )
        }
        None => {
            let mut points = Points::default();
            let mut names = Vec::new();
            for file in &arguments.points {
                points.read(file)?;
                names.push(file.file_name().unwrap_or_default().to_string_lossy());
            }
            (points, format!("Fitted on the points of {}", names.join(", ")))
        }
    };
    if let Some(file) = &arguments.out {
        // Measured points are dear: they are kept, whatever the fit makes of them.
        let table = file.with_extension("csv");
        fs::write(&table, points.to_csv())
            .with_context(|| format!("cannot write {}", table.display()))?;
    }
    let drop_above = arguments.drop_above.map(|percent| percent / 100.0);
    let Fitted { profile, prefill, decode } = fit(&points, &arguments.name, &source, drop_above)?;
    let [a, b, c] = profile.model.prefill_ms;
    terminal.say(&format!("prefill  {a:.4} + {b:.6}·tokens + {c:.4e}·tokens² ms"));
    terminal.say(&quality(&prefill));
    let [a, b, c] = profile.model.decode_ms;
    terminal.say(&format!("decode   {a:.4} + {b:.6}·sequences + {c:.4e}·context ms"));
    terminal.say(&quality(&decode));
    let json = serde_json::to_string_pretty(&profile)? + "\n";
    match &arguments.out {
        Some(file) => {
            fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
        }
        None => terminal.say(json.trim_end()),
    }
    Ok(ExitCode::SUCCESS)
}

async fn measured(
    arguments: &ProfileArguments,
    url: &str,
    terminal: &mut Terminal,
) -> anyhow::Result<Points> {
    let key = std::env::var(&arguments.api_key_env).ok().filter(|key| !key.is_empty());
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => Endpoint::first_model(url, key.as_deref()).await?,
    };
    let endpoint = Endpoint::new(url, &model, Surface::Completions, key.as_deref(), Map::new())?;
    let prompts = Prompts {
        seed: any_seed(),
        vocabulary: arguments.vocabulary.clone(),
        prefix_block_tokens: 1,
    };
    let sweep = Sweep::up_to(arguments.max_model_len, arguments.max_sequences);
    let told = |measured| terminal.say(&faint(&format!("{measured}")).to_string());
    Ok(measure(&endpoint, &prompts, &sweep, told).await?)
}

fn quality(of: &FitQuality) -> String {
    let mut line = format!("         {of}");
    if of.dropped > 0 {
        line += &pending(&format!("; {} left out", of.dropped)).to_string();
    }
    line
}
