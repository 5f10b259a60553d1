use std::{fmt, str::FromStr, time::Duration};

use baton_core::{BalancerSettings, policy};
use baton_engine::sim::Profile;

use super::{Link, Mode, Trouble};
use crate::outcome::{Slo, SloError};

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setup {
    pub workers: u32,
    pub mode: Mode,
    pub profile: Profile,
    pub slo: Slo,
    pub late: Late,
    /// Tokens of prefill and decode in one step of a worker. Under [`Mode::Adaptive`] steps are sized
    /// by the slack that the ITL target leaves; this is their limit.
    pub chunk_tokens: u32,
    /// Of `baton policies`; the mode's own where none is given.
    pub policy: Option<String>,
    pub kv_capacity_tokens: u64,
    pub kv_bytes_per_token: u64,
    pub block_size_tokens: u32,
    /// Sequences in one step.
    pub max_seqs: u32,
    /// KV for prompt and answer is held from admission on, instead of as it is needed.
    pub reserves_output: bool,
    pub link: Link,
    /// The coordinator follows what workers tell of their prefix caches; otherwise it guesses, by what was routed
    /// where.
    pub precise: bool,
    /// How often workers report to the coordinator.
    pub report_interval: Duration,
    /// Each step takes up to this part longer or shorter than the profile says.
    pub step_noise: f64,
    /// What coordinator and workers believe a step to take at first, as a part of what the profile says.
    pub predicted_part: f64,
    /// Under [`Mode::Flip`].
    pub balancer: BalancerSettings,
    /// What a worker takes to come back in another role, once it has nothing left to do.
    pub relabel: Duration,
    pub trouble: Trouble,
    /// So many requests are under way at once: the next one of the trace comes when one is through, and
    /// their arrival times do not count. Without it they come when the trace says.
    pub concurrency: Option<u32>,
    /// How long after the last arrival the run goes on.
    pub patience: Duration,
    pub seed: u64,
}

/// What becomes of requests that are predicted to miss their TTFT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Late {
    /// Served as they come.
    #[default]
    Fifo,
    /// Served after all that can still make it.
    Last,
}

impl Late {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fifo => "fifo",
            Self::Last => "last",
        }
    }
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown order of late requests {0:?}: expected fifo or last")]
pub struct ParseLateError(String);

impl FromStr for Late {
    type Err = ParseLateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "fifo" => Ok(Self::Fifo),
            "last" => Ok(Self::Last),
            _ => Err(ParseLateError(text.to_owned())),
        }
    }
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SetupError {
    #[error("{field} is {value}: expected {expected}")]
    Field { field: &'static str, value: String, expected: String },
    #[error(transparent)]
    Slo(#[from] SloError),
}

/// vLLM's own default where prompts are cut for the decodes beside them; elsewhere a step takes what it is
/// given.
fn default_chunk_tokens(mode: Mode) -> u32 {
    if mode == Mode::Aggregated { 2048 } else { 8192 }
}

impl Setup {
    /// With everything that need not be said at its default.
    pub fn new(profile: Profile, workers: u32, mode: Mode, slo: Slo) -> Self {
        Self {
            workers,
            mode,
            slo,
            late: Late::default(),
            chunk_tokens: default_chunk_tokens(mode),
            policy: None,
            kv_capacity_tokens: profile.kv_capacity_tokens.unwrap_or(600_000),
            kv_bytes_per_token: profile.kv_bytes_per_token.unwrap_or(327_680),
            block_size_tokens: 64,
            max_seqs: 256,
            reserves_output: false,
            link: Link::default(),
            precise: true,
            report_interval: Duration::from_millis(100),
            step_noise: 0.0,
            predicted_part: 1.0,
            balancer: BalancerSettings::default(),
            relabel: Duration::from_millis(200),
            trouble: Trouble::default(),
            concurrency: None,
            patience: Duration::from_secs(1800),
            seed: 0,
            profile,
        }
    }

    /// The same fleet used in another way.
    #[must_use]
    pub fn in_mode(&self, mode: Mode) -> Self {
        Self { mode, chunk_tokens: default_chunk_tokens(mode), ..self.clone() }
    }

    /// # Errors
    /// The first field that cannot be.
    pub fn check(&self) -> Result<(), SetupError> {
        let refuse = |field, value: String, expected: &str| {
            Err(SetupError::Field { field, value, expected: expected.to_owned() })
        };
        self.slo.check()?;
        if self.workers == 0 {
            return refuse("workers", "0".to_owned(), "one at least");
        }
        if let Some((prefill, decode)) = self.mode.pools() {
            if prefill == 0 || decode == 0 {
                let expected = "one worker of each kind at least";
                return refuse("mode", self.mode.to_string(), expected);
            }
            if prefill.checked_add(decode) != Some(self.workers) {
                let expected = format!("pools that add up to the {} workers", self.workers);
                return refuse("mode", self.mode.to_string(), &expected);
            }
        }
        if self.workers > 10_000 {
            return refuse("workers", self.workers.to_string(), "10000 at most");
        }
        if self.concurrency == Some(0) {
            return refuse("concurrency", "0".to_owned(), "one at least");
        }
        let counts = [
            ("chunk_tokens", u64::from(self.chunk_tokens)),
            ("block_size_tokens", u64::from(self.block_size_tokens)),
            ("max_seqs", u64::from(self.max_seqs)),
        ];
        for (field, value) in counts {
            if value == 0 {
                return refuse(field, value.to_string(), "one at least");
            }
        }
        let blocks = self.kv_capacity_tokens / u64::from(self.block_size_tokens);
        if blocks == 0 || u32::try_from(blocks).is_err() {
            let expected = "room for one block at least, and for fewer than 2^32";
            return refuse("kv_capacity_tokens", self.kv_capacity_tokens.to_string(), expected);
        }
        let parts = [
            ("link.latency_ms", self.link.latency_ms, f64::MAX),
            ("link.us_per_token", self.link.us_per_token, f64::MAX),
            ("step_noise", self.step_noise, 0.99),
            ("trouble.reports_lost", self.trouble.reports_lost, 1.0),
        ];
        for (field, value, most) in parts {
            if !(value.is_finite() && (0.0..=most).contains(&value)) {
                return refuse(field, value.to_string(), "a number from 0 up");
            }
        }
        if !(self.predicted_part.is_finite() && self.predicted_part > 0.0) {
            let value = self.predicted_part.to_string();
            return refuse("predicted_part", value, "a number above 0");
        }
        if self.balancer.interval.is_zero() {
            return refuse("balancer.interval", "0".to_owned(), "some time");
        }
        if self.report_interval.is_zero() {
            return refuse("report_interval", "0".to_owned(), "some time");
        }
        if let Some(name) = &self.policy
            && policy::policy(name).is_none()
        {
            let names: Vec<_> = policy::POLICIES.iter().map(|entry| entry.name).collect();
            let expected = format!("one of {}", names.join(", "));
            return refuse("policy", name.clone(), &expected);
        }
        let model = &self.profile.model;
        if model.decode_ms[0] + model.decode_ms[1] <= 0.0 {
            let expected = "steps that take some time";
            return refuse("profile.decode_ms", format!("{:?}", model.decode_ms), expected);
        }
        Ok(())
    }

    pub fn policy_name(&self) -> &str {
        self.policy.as_deref().unwrap_or(match self.mode {
            Mode::Aggregated | Mode::Static { .. } | Mode::Flip { .. } => "prefix-affinity",
            Mode::Adaptive => "slack",
        })
    }
}
