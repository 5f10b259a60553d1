use std::collections::BTreeMap;

/// One reading of a Prometheus page.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<String, f64>,
}

impl Metrics {
    pub fn parse(page: &str) -> Self {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        Self { samples: lines.filter_map(sample).collect() }
    }

    /// The sum of all samples of `name` whose labels contain each of `labels` (`role="decode"`).
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let matches = |key: &str| {
            let (found, found_labels) = key.split_once('{').unwrap_or((key, ""));
            found == name && labels.iter().all(|label| found_labels.contains(label))
        };
        // From a positive zero: an empty sum is -0.
        self.samples.iter().filter(|(key, _)| matches(key)).fold(0.0, |sum, (_, value)| sum + value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_chosen_by_name_and_labels() {
        let page = "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{x=\"2\"} 4\nab 9\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.sum("a", &[]), 7.0);
        assert_eq!(metrics.sum("a", &["x=\"1\""]), 3.0);
        assert_eq!(metrics.sum("b", &[]), 0.0);
    }
}
