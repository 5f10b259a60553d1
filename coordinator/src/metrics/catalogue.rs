use prometheus_client::registry::{Metric, Registry, Unit};

/// A registry that remembers what was registered: `docs/metrics.md` is made of it.
#[derive(Debug)]
pub(crate) struct Catalogue {
    registry: Registry,
    entries: Vec<Entry>,
}

#[derive(Debug)]
#[cfg_attr(not(test), allow(dead_code, reason = "a test makes the page of it"))]
struct Entry {
    /// Without the suffixes of a counter's and a histogram's samples.
    name: String,
    kind: String,
    help: String,
}

const PREFIX: &str = "baton";

impl Catalogue {
    pub(crate) fn new() -> Self {
        Self { registry: Registry::with_prefix(PREFIX), entries: Vec::new() }
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn register(&mut self, name: &str, help: &str, metric: impl Metric) {
        self.note(name, help, &metric, None);
        self.registry.register(name, help, metric);
    }

    /// The unit becomes the end of the name.
    pub(crate) fn register_with_unit(
        &mut self,
        name: &str,
        help: &str,
        unit: Unit,
        metric: impl Metric,
    ) {
        self.note(name, help, &metric, Some(&unit));
        self.registry.register_with_unit(name, help, unit, metric);
    }

    fn note(&mut self, name: &str, help: &str, metric: &impl Metric, unit: Option<&Unit>) {
        let unit = unit.map(|unit| format!("_{}", unit.as_str())).unwrap_or_default();
        self.entries.push(Entry {
            name: format!("{PREFIX}_{name}{unit}"),
            kind: metric.metric_type().as_str().to_owned(),
            help: help.to_owned(),
        });
    }
}

#[cfg(test)]
pub(super) use page::Row;

#[cfg(test)]
mod page {
    use std::collections::BTreeSet;

    use super::{Catalogue, Entry};

    /// A line of `docs/metrics.md`.
    #[derive(Debug)]
    pub(in crate::metrics) struct Row {
        /// As Prometheus stores it.
        pub(in crate::metrics) name: String,
        pub(in crate::metrics) kind: String,
        pub(in crate::metrics) labels: Vec<String>,
        pub(in crate::metrics) help: String,
    }

    impl Catalogue {
        /// `text` is the page of this registry, with a sample of each metric in it.
        pub(in crate::metrics) fn rows(&self, text: &str) -> Vec<Row> {
            self.entries.iter().map(|entry| row(entry, text)).collect()
        }
    }

    fn row(entry: &Entry, text: &str) -> Row {
        let Entry { name, kind, help } = entry;
        let (sample, stored) = match kind.as_str() {
            "counter" => (format!("{name}_total"), format!("{name}_total")),
            "histogram" => (format!("{name}_bucket"), name.clone()),
            _ => (name.clone(), name.clone()),
        };
        let is_sample = |line: &&str| {
            line.strip_prefix(&sample).is_some_and(|rest| rest.starts_with(['{', ' ']))
        };
        let mut samples = text.lines().filter(is_sample).peekable();
        assert!(samples.peek().is_some(), "{sample} has no sample: observe something in the test");
        let labels: BTreeSet<String> = samples.flat_map(labels).collect();
        Row {
            name: stored,
            kind: kind.clone(),
            labels: labels.into_iter().filter(|label| label != "le").collect(),
            help: help.clone(),
        }
    }

    /// The names in `metric{name="value",…} 1`; no value here holds a comma or a brace.
    fn labels(line: &str) -> Vec<String> {
        let inside = line.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
        let pairs = inside.map(|(pairs, _)| pairs.split(',')).into_iter().flatten();
        pairs.filter_map(|pair| Some(pair.split_once('=')?.0.to_owned())).collect()
    }
}
