//! What the coordinator's `/metrics` says, in the numbers that a person wants to see.

use std::collections::BTreeMap;

/// One reading of `/metrics`.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// A worker as the coordinator sees it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct WorkerReading {
    pub(super) role: String,
    pub(super) running: f64,
    /// Sent and received, since the worker started.
    pub(super) handoff_bytes: f64,
}

/// Observations by their upper bound, each bucket with those of the ones before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Histogram {
    buckets: Vec<(f64, f64)>,
}

impl Reading {
    /// Reads Prometheus' text format; lines that are none are passed over.
    pub(super) fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(sample).collect() }
    }

    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.name == name)
    }

    /// The worker of this name; `None` unless it is attached.
    pub(super) fn worker(&self, name: &str) -> Option<WorkerReading> {
        let of_worker = |metric: &'static str| {
            self.named(metric).find(|sample| sample.label_is("worker", |worker| worker == name))
        };
        let value = |metric| of_worker(metric).map_or(0.0, |sample| sample.value);
        let jobs = of_worker("baton_worker_jobs")?;
        Some(WorkerReading {
            role: jobs.labels.get("role").cloned().unwrap_or_default(),
            running: jobs.value,
            handoff_bytes: value("baton_worker_handoff_sent_bytes")
                + value("baton_worker_handoff_received_bytes"),
        })
    }

    pub(super) fn requests_ended(&self) -> f64 {
        total(self.named("baton_requests_total"))
    }

    /// Requests whose prompt was computed by one worker and whose answer by another.
    pub(super) fn requests_split(&self) -> f64 {
        let split = |sample: &&Sample| sample.label_is("path", |path| path == "disaggregated");
        total(self.named("baton_requests_total").filter(split))
    }

    /// Requests that did not end well.
    pub(super) fn requests_failed(&self) -> f64 {
        let failed = |sample: &&Sample| sample.label_is("outcome", |outcome| outcome != "ok");
        total(self.named("baton_requests_total").filter(failed))
    }

    pub(super) fn requests_open(&self) -> f64 {
        total(self.named("baton_requests_open"))
    }

    /// Handed over for requests that were answered.
    pub(super) fn handoff_bytes(&self) -> f64 {
        total(self.named("baton_handoff_bytes_total"))
    }

    pub(super) fn ttft(&self) -> Histogram {
        self.histogram("baton_ttft_seconds_bucket")
    }

    pub(super) fn itl(&self) -> Histogram {
        self.histogram("baton_itl_seconds_bucket")
    }

    /// Over all its other labels.
    fn histogram(&self, name: &str) -> Histogram {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for sample in self.named(name) {
            let Some(bound) = sample.labels.get("le").and_then(|le| number(le)) else { continue };
            match buckets.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((bound, sample.value)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        Histogram { buckets }
    }
}

impl Sample {
    fn label_is(&self, name: &str, wanted: impl Fn(&str) -> bool) -> bool {
        self.labels.get(name).is_some_and(|value| wanted(value))
    }
}

/// Of no samples it is 0, where `sum` would have -0.
fn total<'a>(samples: impl Iterator<Item = &'a Sample>) -> f64 {
    samples.fold(0.0, |sum, sample| sum + sample.value)
}

impl Histogram {
    /// What was observed after `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let before = |bound: f64| {
            earlier.buckets.iter().find(|(b, _)| *b == bound).map_or(0.0, |(_, count)| *count)
        };
        let buckets = self.buckets.iter();
        Self { buckets: buckets.map(|&(bound, count)| (bound, count - before(bound))).collect() }
    }

    /// The value below which half of the observations lie, taken as evenly spread inside their
    /// bucket (as Prometheus' `histogram_quantile` does). `None` without observations.
    pub(super) fn median(&self) -> Option<f64> {
        let total = self.buckets.last().map(|(_, count)| *count).filter(|total| *total > 0.0)?;
        let half = total / 2.0;
        let mut lower = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if count >= half {
                if bound.is_infinite() {
                    return Some(lower.0);
                }
                let share = (half - lower.1) / (count - lower.1);
                return Some(lower.0 + (bound - lower.0) * share);
            }
            lower = (bound, count);
        }
        None
    }
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        text => text.parse().ok(),
    }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (name, labels, value) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, value) = labels(rest)?;
            (name, labels, value)
        }
        None => {
            let (name, value) = line.split_once(' ')?;
            (name, BTreeMap::new(), value)
        }
    };
    // A time, or an exemplar, may follow.
    let value = number(value.split_whitespace().next()?)?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// `a="x",b="y"} rest`
fn labels(mut text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        text = text.trim_start_matches(',');
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        loop {
            match chars.next()? {
                (end, '"') => {
                    text = &rest[end + 1..];
                    break;
                }
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        }
        labels.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# TYPE baton_requests counter
baton_requests_total{path="disaggregated",outcome="ok"} 7
baton_requests_total{path="aggregated",outcome="client_error"} 2
baton_requests_open 3
baton_handoff_bytes_total 4096
baton_worker_jobs{worker="prefill-0",role="prefill"} 2
baton_worker_handoff_sent_bytes{worker="prefill-0",role="prefill"} 100
baton_worker_handoff_received_bytes{worker="prefill-0",role="prefill"} 20
baton_ttft_seconds_bucket{le="0.1",path="disaggregated"} 2 # {trace="x"} 0.05
baton_ttft_seconds_bucket{le="0.2",path="disaggregated"} 6
baton_ttft_seconds_bucket{le="+Inf",path="disaggregated"} 6
baton_ttft_seconds_bucket{le="0.1",path="aggregated"} 0
baton_ttft_seconds_bucket{le="0.2",path="aggregated"} 2
baton_ttft_seconds_bucket{le="+Inf",path="aggregated"} 2
odd{label="a \"b\" {c}, \\ \n"} 1.5 1700000000
# EOF
"#;

    #[test]
    fn the_numbers_are_found() {
        let reading = Reading::parse(TEXT);
        assert_eq!(reading.requests_ended(), 9.0);
        assert_eq!(reading.requests_split(), 7.0);
        assert_eq!(reading.requests_failed(), 2.0);
        assert_eq!(reading.requests_open(), 3.0);
        assert_eq!(reading.handoff_bytes(), 4096.0);
        let worker = reading.worker("prefill-0").unwrap();
        assert_eq!((worker.running, worker.handoff_bytes), (2.0, 120.0));
        assert_eq!(worker.role, "prefill");
        assert_eq!(reading.worker("prefill-1"), None);
        assert_eq!(Reading::default().requests_ended().to_string(), "0");
        let odd = reading.named("odd").next().unwrap();
        assert_eq!(odd.labels["label"], "a \"b\" {c}, \\ \n");
        assert_eq!(odd.value, 1.5);
    }

    #[test]
    fn a_median_lies_inside_its_bucket() {
        let ttft = Reading::parse(TEXT).ttft();
        // 2 of 8 below 0.1, 8 of 8 below 0.2: the fourth is a third of the way through the bucket.
        assert!((ttft.median().unwrap() - (0.1 + 0.1 / 3.0)).abs() < 1e-9);
        assert_eq!(ttft.since(&ttft).median(), None);
        assert_eq!(ttft.since(&Histogram::default()), ttft);
        assert_eq!(Histogram::default().median(), None);
        let beyond = Histogram { buckets: vec![(1.0, 0.0), (f64::INFINITY, 4.0)] };
        assert_eq!(beyond.median(), Some(1.0));
    }

    #[test]
    fn lines_that_are_not_samples_are_passed_over() {
        let text = "x\nx{\nx{a=\"b} 1\nx{a=\"\\";
        assert_eq!(Reading::parse(text).samples, []);
    }
}
