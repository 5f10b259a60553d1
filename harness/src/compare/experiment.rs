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
use crate::{fleet::Late, outcome::Slo, profile, trace::Trace};

#[derive(Clone, Debug)]
pub struct Experiment {
    pub title: String,
    pub what: What,
    pub profile: (PathBuf, Profile),
    pub traces: Vec<TraceFile>,
    pub workers: Vec<u32>,
    pub slos: Vec<Slo>,
    /// The first is the baseline.
    pub ways: Vec<Way>,
    pub late: Vec<Late>,
    pub min_decile: Option<f64>,
    pub seeds: Vec<u64>,
    /// KV for the whole answer is held from admission on.
    pub reserves_output: bool,
    /// The file's own text.
    pub text: String,
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

const KEYS: [&str; 12] = [
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
];
const SLO_KEYS: [&str; 3] = ["ttft_ms", "itl_ms", "ttft_prefill_factor"];

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
}

#[derive(Deserialize)]
struct WrittenSlo {
    ttft_ms: f64,
    itl_ms: f64,
    #[serde(default)]
    ttft_prefill_factor: f64,
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
        let late = self.late(written.late.as_ref());
        let what = self.what(&written);
        if let Some(share) = &written.min_decile
            && !(0.0..=1.0).contains(share.get_ref())
        {
            let message = format!("{} is not a share from 0 to 1", share.get_ref());
            self.add(share.span().start, "min_decile", message);
        }
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
            ways,
            late,
            min_decile: written.min_decile.map(Spanned::into_inner),
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
            if key == "slo"
                && let Some(tables) = value.get_ref().as_array()
            {
                for (index, table) in tables.iter().enumerate() {
                    for name in
                        table.get_ref().as_table().into_iter().flat_map(|table| table.keys())
                    {
                        let key = name.get_ref().as_ref();
                        if !SLO_KEYS.contains(&key) {
                            let path = format!("slo[{index}].{key}");
                            self.add(name.span().start, path, unknown_key(key, SLO_KEYS));
                        }
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
            let WrittenSlo { ttft_ms, itl_ms, ttft_prefill_factor } = *written.get_ref();
            let slo = Slo { ttft_ms, itl_ms, ttft_prefill_factor };
            if let Err(error) = slo.check() {
                self.add(written.span().start, format!("slo[{index}]"), error.to_string());
            }
            slos.push(slo);
        }
        slos
    }

    fn late(&mut self, written: Option<&Spanned<Vec<Spanned<String>>>>) -> Vec<Late> {
        let Some(written) = written else { return vec![Late::default()] };
        let mut late = Vec::new();
        for (index, text) in self.filled("late", written).iter().enumerate() {
            match text.get_ref().parse() {
                Ok(order) => late.push(order),
                Err(error) => {
                    self.add(text.span().start, format!("late[{index}]"), format!("{error}"));
                }
            }
        }
        late
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
