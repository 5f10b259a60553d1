//! The file that says what is compared.

use std::{
    fs,
    path::{Path, PathBuf},
};

use baton_config::{ConfigError, ConfigErrors, unknown_key};
use baton_engine::sim::Profile;
use serde::Deserialize;
use serde_spanned::Spanned;
use toml::de::DeTable;

use super::way::{Way, WayKind};
use crate::{
    fleet::{Late, Link, Setup},
    outcome::Slo,
    profile,
    trace::Trace,
};

#[derive(Clone, Debug)]
pub struct Experiment {
    pub title: String,
    pub what: What,
    pub profile: (PathBuf, Profile),
    pub traces: Vec<TraceFile>,
    pub workers: Vec<u32>,
    pub slos: Vec<Slo>,
    /// Of each SLO the places of the traces that are held against it, where not all are.
    pub slo_traces: Vec<Option<Vec<usize>>>,
    /// The first is the baseline.
    pub ways: Vec<Way>,
    pub goals: Vec<Asked>,
    pub seeds: Vec<u64>,
    pub conditions: Conditions,
    /// How success falls with load is drawn, which takes runs at several loads.
    pub draws_loads: bool,
    /// The highest load with 99 % within the SLOs is sought too, which takes as long as that with 90 %.
    pub finds_p99: bool,
    /// KV for the whole answer is held from admission on.
    pub reserves_output: bool,
    /// The file's own text.
    pub text: String,
}

/// The order in which each cell is served, and what is asked of it beside its SLOs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    pub late: Late,
    pub min_decile: Option<f64>,
}

/// Where the world is not as the coordinator believes it to be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// Each step takes up to this part longer or shorter than the profile says.
    pub step_noise: f64,
    /// What is believed of steps at first is so much too optimistic, as a part.
    pub model_bias: f64,
    pub link: Link,
    /// The coordinator is not told what workers have cached.
    pub imprecise: bool,
}

impl Conditions {
    pub fn apply(&self, setup: &mut Setup) {
        setup.step_noise = self.step_noise;
        setup.predicted_part = 1.0 - self.model_bias;
        setup.link = self.link;
        setup.precise = !self.imprecise;
    }
}

#[derive(Clone, Debug)]
pub struct TraceFile {
    /// As the experiment names it.
    pub file: PathBuf,
    pub trace: Trace,
}

/// What is found out of each contender.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    /// The highest load that it serves within the SLOs.
    Goodput,
    /// How it does at `scale` times the trace's own load.
    Simulate { scale: f64 },
}

const KEYS: [&str; 20] = [
    "title",
    "what",
    "scale",
    "profile",
    "traces",
    "workers",
    "modes",
    "slo",
    "late",
    "min_decile",
    "seeds",
    "reserves_output",
    "goal",
    "draws_loads",
    "finds_p99",
    "step_noise",
    "model_bias",
    "link_us_per_token",
    "link_shared",
    "precise",
];
const SLO_KEYS: [&str; 4] = ["ttft_ms", "itl_ms", "ttft_prefill_factor", "traces"];
const GOAL_KEYS: [&str; 2] = ["late", "min_decile"];

/// As it is written.
#[derive(Deserialize)]
struct Written {
    title: Option<String>,
    #[serde(default)]
    what: Option<Spanned<String>>,
    scale: Option<Spanned<f64>>,
    profile: Spanned<PathBuf>,
    traces: Spanned<Vec<Spanned<PathBuf>>>,
    workers: Spanned<Vec<Spanned<u32>>>,
    modes: Spanned<Vec<Spanned<String>>>,
    slo: Spanned<Vec<Spanned<WrittenSlo>>>,
    late: Option<Spanned<Vec<Spanned<String>>>>,
    min_decile: Option<Spanned<f64>>,
    seeds: Option<Spanned<Vec<u64>>>,
    #[serde(default)]
    reserves_output: bool,
    goal: Option<Spanned<Vec<WrittenGoal>>>,
    draws_loads: Option<bool>,
    finds_p99: Option<bool>,
    step_noise: Option<Spanned<f64>>,
    model_bias: Option<Spanned<f64>>,
    link_us_per_token: Option<Spanned<f64>>,
    #[serde(default)]
    link_shared: bool,
    precise: Option<bool>,
}

#[derive(Deserialize)]
struct WrittenGoal {
    late: Option<Spanned<String>>,
    min_decile: Option<Spanned<f64>>,
}

#[derive(Deserialize)]
struct WrittenSlo {
    ttft_ms: f64,
    itl_ms: f64,
    #[serde(default)]
    ttft_prefill_factor: f64,
    traces: Option<Vec<Spanned<PathBuf>>>,
}

impl Experiment {
    /// Reads a file and the traces and the profile that it names, relative to itself.
    ///
    /// # Errors
    /// Everything that is wrong with it, at once; or that it is no TOML or a value is of another kind
    /// than it must be, where nothing more can be said.
    pub fn read(file: &Path) -> Result<Self, ConfigErrors> {
        let text = fs::read_to_string(file).map_err(|reason| {
            let message = format!("cannot be read: {reason}");
            let errors = vec![ConfigError { line: None, key: String::new(), message }];
            ConfigErrors { file: file.to_owned(), errors }
        })?;
        let mut reader = Reader { text: &text, errors: Vec::new() };
        let base = file.parent().unwrap_or(Path::new(""));
        let experiment = reader.read(base, file);
        match experiment {
            Some(experiment) if reader.errors.is_empty() => Ok(experiment),
            _ => {
                reader.errors.sort();
                Err(ConfigErrors { file: file.to_owned(), errors: reader.errors })
            }
        }
    }
}

struct Reader<'t> {
    text: &'t str,
    errors: Vec<ConfigError>,
}

impl Reader<'_> {
    fn add(&mut self, offset: usize, key: impl Into<String>, message: impl Into<String>) {
        let before = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        self.errors.push(ConfigError {
            line: Some(line),
            key: key.into(),
            message: message.into(),
        });
    }

    fn read(&mut self, base: &Path, file: &Path) -> Option<Experiment> {
        self.refuse_unknown_keys();
        let written: Written = match toml::from_str(self.text) {
            Ok(written) => written,
            Err(error) => {
                let offset = error.span().map_or(0, |span| span.start);
                self.add(offset, "", error.message());
                return None;
            }
        };
        let workers = self.workers(&written.workers);
        let ways = self.ways(&written.modes, &workers);
        let slos = self.slos(&written.slo);
        let slo_traces = self.slo_traces(&written);
        let goals = self.goals(&written);
        let conditions = self.conditions(&written);
        let what = self.what(&written);
        if let Some(seeds) = &written.seeds
            && seeds.get_ref().is_empty()
        {
            self.add(seeds.span().start, "seeds", "empty: one seed is needed");
        }
        let traces = self.traces(&written.traces, base);
        let profile = self.profile(&written.profile, base);
        let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        Some(Experiment {
            title: written.title.or(stem).unwrap_or_default(),
            what: what?,
            profile: profile?,
            traces,
            workers,
            slos,
            slo_traces,
            ways,
            goals,
            conditions,
            draws_loads: written.draws_loads.unwrap_or(true),
            finds_p99: written.finds_p99.unwrap_or(true),
            seeds: written.seeds.map_or(vec![0], Spanned::into_inner),
            reserves_output: written.reserves_output,
            text: self.text.to_owned(),
        })
    }

    fn refuse_unknown_keys(&mut self) {
        // What is no TOML is told by the reading that follows.
        let Ok(document) = DeTable::parse(self.text) else { return };
        for (name, value) in document.get_ref() {
            let key = name.get_ref().as_ref();
            if !KEYS.contains(&key) {
                self.add(name.span().start, key, unknown_key(key, KEYS));
            }
            let within: &[&str] = match key {
                "slo" => &SLO_KEYS,
                "goal" => &GOAL_KEYS,
                _ => continue,
            };
            let tables = value.get_ref().as_array();
            for (index, table) in tables.into_iter().flat_map(|tables| tables.iter()).enumerate() {
                for name in table.get_ref().as_table().into_iter().flat_map(|table| table.keys()) {
                    let inner = name.get_ref().as_ref();
                    if !within.contains(&inner) {
                        let path = format!("{key}[{index}].{inner}");
                        self.add(
                            name.span().start,
                            path,
                            unknown_key(inner, within.iter().copied()),
                        );
                    }
                }
            }
        }
    }

    /// Says so where a list that must hold something is empty.
    fn filled<'w, T>(&mut self, key: &str, list: &'w Spanned<Vec<T>>) -> &'w [T] {
        if list.get_ref().is_empty() {
            self.add(list.span().start, key, "empty: one is needed at least");
        }
        list.get_ref()
    }

    fn workers(&mut self, written: &Spanned<Vec<Spanned<u32>>>) -> Vec<u32> {
        for (index, workers) in self.filled("workers", written).iter().enumerate() {
            if !(1..=10_000).contains(workers.get_ref()) {
                let message = format!("{} is not a number from 1 to 10000", workers.get_ref());
                self.add(workers.span().start, format!("workers[{index}]"), message);
            }
        }
        written.get_ref().iter().map(|workers| *workers.get_ref()).collect()
    }

    fn ways(&mut self, written: &Spanned<Vec<Spanned<String>>>, workers: &[u32]) -> Vec<Way> {
        let mut ways: Vec<Way> = Vec::new();
        for (index, text) in self.filled("modes", written).iter().enumerate() {
            let key = format!("modes[{index}]");
            let (offset, text) = (text.span().start, text.get_ref());
            let way: Way = match text.parse() {
                Ok(way) => way,
                Err(error) => {
                    self.add(offset, key, format!("{error}"));
                    continue;
                }
            };
            if let Some(reason) = workers.iter().find_map(|workers| unsuitable(&way, *workers)) {
                self.add(offset, key, format!("{text:?} {reason}"));
            } else if ways.contains(&way) {
                self.add(offset, key, format!("{text:?} is named twice"));
            } else {
                ways.push(way);
            }
        }
        ways
    }

    fn slos(&mut self, written: &Spanned<Vec<Spanned<WrittenSlo>>>) -> Vec<Slo> {
        let mut slos = Vec::new();
        for (index, written) in self.filled("slo", written).iter().enumerate() {
            let WrittenSlo { ttft_ms, itl_ms, ttft_prefill_factor, .. } = *written.get_ref();
            let slo = Slo { ttft_ms, itl_ms, ttft_prefill_factor };
            if let Err(error) = slo.check() {
                self.add(written.span().start, format!("slo[{index}]"), error.to_string());
            }
            slos.push(slo);
        }
        slos
    }

    /// Where an SLO names its traces, their places among the experiment's.
    fn slo_traces(&mut self, written: &Written) -> Vec<Option<Vec<usize>>> {
        let all = written.traces.get_ref();
        let mut by_slo = Vec::new();
        for (index, slo) in written.slo.get_ref().iter().enumerate() {
            let named = slo.get_ref().traces.as_ref().map(|named| {
                let place = |name: &Spanned<PathBuf>| {
                    let place = all.iter().position(|file| file.get_ref() == name.get_ref());
                    if place.is_none() {
                        let message =
                            format!("{:?} is not one of the traces above", name.get_ref());
                        self.add(name.span().start, format!("slo[{index}].traces"), message);
                    }
                    place
                };
                named.iter().filter_map(place).collect()
            });
            by_slo.push(named);
        }
        by_slo
    }

    /// What `late` and `min_decile` say for all cells, or each `[[goal]]`.
    fn goals(&mut self, written: &Written) -> Vec<Asked> {
        let Some(goals) = &written.goal else {
            let min_decile = self.min_decile("min_decile", written.min_decile.as_ref());
            let late = self.late(written.late.as_ref());
            return late.into_iter().map(|late| Asked { late, min_decile }).collect();
        };
        let above = [
            ("late", written.late.as_ref().map(|late| late.span().start)),
            ("min_decile", written.min_decile.as_ref().map(|share| share.span().start)),
        ];
        for (key, offset) in above {
            if let Some(offset) = offset {
                self.add(offset, key, "is said in each [[goal]] where there is one");
            }
        }
        let mut asked = Vec::new();
        for (index, goal) in self.filled("goal", goals).iter().enumerate() {
            let late = self.order(&format!("goal[{index}].late"), goal.late.as_ref());
            let share = goal.min_decile.as_ref();
            let min_decile = self.min_decile(&format!("goal[{index}].min_decile"), share);
            asked.extend(late.map(|late| Asked { late, min_decile }));
        }
        asked
    }

    fn min_decile(&mut self, key: &str, written: Option<&Spanned<f64>>) -> Option<f64> {
        let written = written?;
        let share = *written.get_ref();
        if !(0.0..=1.0).contains(&share) {
            let message = format!("{share} is not a share from 0 to 1");
            self.add(written.span().start, key, message);
        }
        Some(share)
    }

    fn order(&mut self, key: &str, written: Option<&Spanned<String>>) -> Option<Late> {
        let Some(written) = written else { return Some(Late::default()) };
        match written.get_ref().parse() {
            Ok(order) => Some(order),
            Err(error) => {
                self.add(written.span().start, key, format!("{error}"));
                None
            }
        }
    }

    fn late(&mut self, written: Option<&Spanned<Vec<Spanned<String>>>>) -> Vec<Late> {
        let Some(written) = written else { return vec![Late::default()] };
        let list = self.filled("late", written).iter().enumerate();
        list.filter_map(|(index, text)| self.order(&format!("late[{index}]"), Some(text))).collect()
    }

    fn conditions(&mut self, written: &Written) -> Conditions {
        let plain = Conditions::default();
        let mut number = |key: &str, value: &Option<Spanned<f64>>, default: f64, below: f64| {
            let Some(value) = value else { return default };
            if !(0.0..below).contains(value.get_ref()) {
                let message =
                    format!("{} is not a number from 0 to below {below}", value.get_ref());
                self.add(value.span().start, key, message);
            }
            *value.get_ref()
        };
        Conditions {
            step_noise: number("step_noise", &written.step_noise, 0.0, 1.0),
            model_bias: number("model_bias", &written.model_bias, 0.0, 1.0),
            link: Link {
                us_per_token: number(
                    "link_us_per_token",
                    &written.link_us_per_token,
                    plain.link.us_per_token,
                    f64::INFINITY,
                ),
                shared: written.link_shared,
                ..plain.link
            },
            imprecise: written.precise == Some(false),
        }
    }

    fn what(&mut self, written: &Written) -> Option<What> {
        let scale = written.scale.as_ref();
        match written.what.as_ref().map(|what| (what.get_ref().as_str(), what.span().start)) {
            None | Some(("goodput", _)) => {
                if let Some(scale) = scale {
                    let message = "belongs to what = \"simulate\"; goodput finds the load itself";
                    self.add(scale.span().start, "scale", message);
                }
                Some(What::Goodput)
            }
            Some(("simulate", _)) => {
                let value = scale.map_or(1.0, |scale| *scale.get_ref());
                if value.is_finite() && value > 0.0 {
                    return Some(What::Simulate { scale: value });
                }
                let offset = scale.map_or(0, |scale| scale.span().start);
                self.add(offset, "scale", format!("{value} is not a number above 0"));
                None
            }
            Some((other, offset)) => {
                self.add(offset, "what", format!("{other:?} is not \"goodput\" or \"simulate\""));
                None
            }
        }
    }

    fn traces(&mut self, written: &Spanned<Vec<Spanned<PathBuf>>>, base: &Path) -> Vec<TraceFile> {
        let mut traces = Vec::new();
        for (index, file) in self.filled("traces", written).iter().enumerate() {
            let (offset, file) = (file.span().start, file.get_ref());
            match Trace::read(&base.join(file)) {
                Ok(trace) => traces.push(TraceFile { file: base.join(file), trace }),
                Err(errors) => self.add(offset, format!("traces[{index}]"), errors.to_string()),
            }
        }
        traces
    }

    fn profile(&mut self, written: &Spanned<PathBuf>, base: &Path) -> Option<(PathBuf, Profile)> {
        let file = base.join(written.get_ref());
        match profile::read(&file) {
            Ok(given) => Some((file, given.profile)),
            Err(error) => {
                self.add(written.span().start, "profile", error.to_string());
                None
            }
        }
    }
}

/// Why so many workers cannot be used this way.
fn unsuitable(way: &Way, workers: u32) -> Option<String> {
    match way.kind {
        WayKind::Static { prefill, decode } | WayKind::Flip { prefill, decode } => {
            let sum = prefill.checked_add(decode);
            (sum != Some(workers)).then(|| format!("does not add up to {workers} workers"))
        }
        WayKind::BestStatic => {
            (workers == 1).then(|| "needs two workers at least; one cannot be split".to_owned())
        }
        WayKind::Aggregated { .. } | WayKind::Adaptive => None,
    }
}
