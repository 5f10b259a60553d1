use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::summary::Percentiles;

/// Later than this, at the 99th percentile, and latencies tell of the client.
const LAG_LIMIT_MS: f64 = 10.0;
const CPU_LIMIT_CORES: f64 = 0.9;
/// How often the runtime is asked whether it comes when it is called.
pub(super) const TICK: Duration = Duration::from_millis(10);
const CPU_SAMPLE: Duration = Duration::from_secs(1);

/// Whether the load generator itself kept up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClientHealth {
    /// From when a request was due to when it was sent.
    pub send_lag_ms: Percentiles,
    /// By how much a timer of the runtime came late: so late may a token's time be taken.
    pub event_loop_lag_ms: Percentiles,
    /// CPU of this process, in cores: mean of the run, and 95th percentile of its seconds.
    pub cpu_cores_mean: f64,
    pub cpu_cores_p95: f64,
    /// Latencies of this run tell of the client, not of the server alone.
    pub saturated: bool,
    /// Why, in words.
    pub warnings: Vec<String>,
}

/// Gathers what [`ClientHealth`] tells.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) send_lags_ms: Vec<f64>,
    loop_lags_ms: Vec<f64>,
    started: (Instant, Duration),
    sampled: (Instant, Duration),
    cpu_cores: Vec<f64>,
}

impl Watch {
    pub(super) fn start() -> Self {
        let now = (Instant::now(), cpu_time());
        Self {
            send_lags_ms: Vec::new(),
            loop_lags_ms: Vec::new(),
            started: now,
            sampled: now,
            cpu_cores: Vec::new(),
        }
    }

    /// A timer was due at `due`, and has come.
    pub(super) fn tick(&mut self, due: Instant) {
        let now = Instant::now();
        self.loop_lags_ms.push(ms(now.saturating_duration_since(due)));
        let (at, cpu) = self.sampled;
        if now.saturating_duration_since(at) >= CPU_SAMPLE {
            let spent = cpu_time();
            self.cpu_cores.push(cores(now - at, spent.saturating_sub(cpu)));
            self.sampled = (now, spent);
        }
    }

    pub(super) fn verdict(mut self) -> ClientHealth {
        let (at, cpu) = self.started;
        let cpu_cores_mean = cores(at.elapsed(), cpu_time().saturating_sub(cpu));
        self.cpu_cores.sort_unstable_by(f64::total_cmp);
        let rank = (self.cpu_cores.len() * 95).div_ceil(100);
        let cpu_cores_p95 =
            rank.checked_sub(1).map_or(cpu_cores_mean, |index| self.cpu_cores[index]);
        let send_lag_ms = Percentiles::of_values(&mut self.send_lags_ms);
        let event_loop_lag_ms = Percentiles::of_values(&mut self.loop_lags_ms);
        let mut warnings = Vec::new();
        if send_lag_ms.p99 > LAG_LIMIT_MS {
            warnings.push(format!(
                "1 % of the requests were sent {:.1} ms late or later: TTFT holds that wait",
                send_lag_ms.p99
            ));
        }
        if event_loop_lag_ms.p99 > LAG_LIMIT_MS {
            warnings.push(format!(
                "tokens may be timed up to {:.1} ms late: this machine gives the client too little CPU",
                event_loop_lag_ms.p99
            ));
        }
        if cpu_cores_p95 >= CPU_LIMIT_CORES {
            warnings.push(format!(
                "the client used {cpu_cores_p95:.2} cores and can use about one: spread the load over \
                 several clients"
            ));
        }
        ClientHealth {
            send_lag_ms,
            event_loop_lag_ms,
            cpu_cores_mean,
            cpu_cores_p95,
            saturated: !warnings.is_empty(),
            warnings,
        }
    }
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn cores(wall: Duration, cpu: Duration) -> f64 {
    if wall.is_zero() { 0.0 } else { cpu.as_secs_f64() / wall.as_secs_f64() }
}

/// Of this process, since it started.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_keeps_up_has_no_warnings() {
        let mut watch = Watch::start();
        watch.send_lags_ms = vec![0.1; 100];
        let health = watch.verdict();
        assert_eq!((health.send_lag_ms.p99, health.event_loop_lag_ms.p99), (0.1, 0.0));
        // What the test itself spends of the CPU is another matter.
        assert!(health.warnings.iter().all(|warning| warning.contains("cores")));
    }

    #[test]
    fn lateness_is_told() {
        let mut watch = Watch::start();
        watch.send_lags_ms = vec![0.1; 90];
        watch.send_lags_ms.extend([25.0; 10]);
        watch.tick(Instant::now() - Duration::from_millis(40));
        watch.cpu_cores = vec![0.95; 20];
        let health = watch.verdict();
        assert!(health.saturated);
        assert_eq!(health.warnings.len(), 3, "{health:?}");
        assert!(health.warnings[0].contains("25.0 ms late"));
    }

    #[test]
    fn cpu_time_is_spent() {
        let before = cpu_time();
        let mut sum = 0_u64;
        while cpu_time() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_time() > before);
    }
}
