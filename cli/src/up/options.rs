use std::path::PathBuf;

use clap::ValueEnum;

/// What `baton up` shall start.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct UpOptions {
    /// Prefill workers.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) prefill: u16,
    /// Decode workers.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) decode: u16,
    /// Loopback port for clients; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// What computes.
    #[arg(long, value_enum, default_value_t = EngineName::Sim)]
    pub(crate) engine: EngineName,
    /// Directory of the model [vllm; default: $BATON_MODEL].
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Virtual environment that vLLM is installed in [vllm; default: $BATON_VLLM].
    #[arg(long, value_name = "VENV")]
    pub(crate) vllm: Option<PathBuf>,
    /// Multiplies the embedded engine's step times; 0 is as fast as it can [sim].
    #[arg(long, value_name = "X", value_parser = time_scale)]
    pub(crate) time_scale: Option<f64>,
    /// Longest prompt plus output.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_model_len: Option<u32>,
    /// Layer groups in which a step's blocks leave while it is computed.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) layer_groups: u32,
    /// Element type of the model's computation [vllm].
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// One more argument for `vllm serve`; may be repeated [vllm].
    #[arg(long = "vllm-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) vllm_args: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineName {
    /// The embedded engine: needs no GPU and no model, moves real KV, answers in words.
    Sim,
    /// vLLM: needs a virtual environment with it, and a model.
    Vllm,
}

impl UpOptions {
    /// Refuses what would be silently without effect.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let (others, other) = match self.engine {
            EngineName::Sim => {
                let given = [
                    ("--model", self.model.is_some()),
                    ("--vllm", self.vllm.is_some()),
                    ("--dtype", self.dtype.is_some()),
                    ("--vllm-arg", !self.vllm_args.is_empty()),
                ];
                (given.to_vec(), "vllm")
            }
            EngineName::Vllm => (vec![("--time-scale", self.time_scale.is_some())], "sim"),
        };
        match others.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => anyhow::bail!("{flag} is for --engine {other}"),
            None => Ok(()),
        }
    }
}

fn time_scale(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|scale: &f64| scale.is_finite() && *scale >= 0.0)
        .ok_or_else(|| "give a number of 0 or more".to_owned())
}
