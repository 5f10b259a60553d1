//! The numbers as CSV: one line a contender.

use std::io;

use super::{Contender, Report, Scenario};

/// Empty cells are figures that the experiment did not ask for, or that an endpoint does not tell.
///
/// # Errors
/// None that writing to memory can meet.
pub fn to_csv(report: &Report) -> io::Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut has_header = false;
    for scenario in &report.scenarios {
        for contender in &scenario.contenders {
            let cells = cells(scenario, contender);
            if !has_header {
                writer.write_record(cells.iter().map(|(name, _)| *name))?;
                has_header = true;
            }
            writer.write_record(cells.iter().map(|(_, value)| value))?;
        }
    }
    writer.into_inner().map_err(|error| io::Error::other(error.to_string()))
}

fn cells(scenario: &Scenario, contender: &Contender) -> Vec<(&'static str, String)> {
    let text = str::to_owned;
    let goodput = |read: fn(&super::GoodputFindings) -> f64| {
        contender.goodput.as_ref().map(|found| read(found).to_string()).unwrap_or_default()
    };
    let load = |read: fn(&super::Load) -> f64| {
        scenario.load.as_ref().map(|load| read(load).to_string()).unwrap_or_default()
    };
    let run = |read: fn(&crate::summary::Summary) -> f64| {
        contender.run.as_ref().map(|run| read(&run.summary).to_string()).unwrap_or_default()
    };
    let of_workers = |read: fn(&crate::summary::Summary) -> f64| {
        let run = contender.run.as_ref().filter(|run| run.knows_workers());
        run.map(|run| read(&run.summary).to_string()).unwrap_or_default()
    };
    let requests = |read: fn(&crate::summary::Summary) -> usize| {
        contender.run.as_ref().map(|run| read(&run.summary).to_string()).unwrap_or_default()
    };
    vec![
        ("trace", text(&scenario.trace.file)),
        ("workers", scenario.workers.map(|workers| workers.to_string()).unwrap_or_default()),
        ("slo_ttft_ms", scenario.slo.ttft_ms.to_string()),
        ("slo_ttft_prefill_factor", scenario.slo.ttft_prefill_factor.to_string()),
        ("slo_itl_ms", scenario.slo.itl_ms.to_string()),
        ("late", scenario.late.clone().unwrap_or_default()),
        ("min_decile", scenario.min_decile.map(|share| share.to_string()).unwrap_or_default()),
        ("mode", text(&contender.mode)),
        ("setup", text(&contender.setup)),
        ("goodput_rps", goodput(|found| found.rps)),
        (
            "goodput_rps_p99",
            contender
                .goodput
                .as_ref()
                .and_then(|found| found.rps_p99)
                .map(|rps| rps.to_string())
                .unwrap_or_default(),
        ),
        ("goodput_rps_lowest_seed", goodput(|found| found.range[0])),
        ("goodput_rps_highest_seed", goodput(|found| found.range[1])),
        ("run_scale", load(|load| load.scale)),
        ("run_offered_rps", load(|load| load.offered_rps)),
        ("run_requests", requests(|s| s.requests)),
        ("run_completed", requests(|s| s.completed)),
        ("run_rejected", requests(|s| s.rejected)),
        ("run_unfinished", requests(|s| s.unfinished)),
        ("run_duration_s", run(|s| s.duration_s)),
        ("run_goodput_rps", run(|s| s.goodput_rps)),
        ("run_attainment", run(|s| s.attainment)),
        ("run_attainment_ttft", run(|s| s.attainment_ttft)),
        ("run_attainment_tbt", run(|s| s.attainment_tbt)),
        ("run_attainment_longest_input_decile", run(|s| s.attainment_longest_input_decile)),
        ("run_attainment_longest_output_decile", run(|s| s.attainment_longest_output_decile)),
        ("run_ttft_ms_p50", run(|s| s.ttft_ms.p50)),
        ("run_ttft_ms_p90", run(|s| s.ttft_ms.p90)),
        ("run_ttft_ms_p99", run(|s| s.ttft_ms.p99)),
        ("run_tbt_ms_p50", run(|s| s.tbt_ms.p50)),
        ("run_tbt_ms_p90", run(|s| s.tbt_ms.p90)),
        ("run_tbt_ms_p99", run(|s| s.tbt_ms.p99)),
        ("run_tpot_ms_p50", run(|s| s.tpot_ms.p50)),
        ("run_tpot_ms_p90", run(|s| s.tpot_ms.p90)),
        ("run_tpot_ms_p99", run(|s| s.tpot_ms.p99)),
        ("run_e2e_ms_p50", run(|s| s.e2e_ms.p50)),
        ("run_e2e_ms_p90", run(|s| s.e2e_ms.p90)),
        ("run_e2e_ms_p99", run(|s| s.e2e_ms.p99)),
        ("run_output_tokens_per_s", run(|s| s.output_tokens_per_s)),
        ("run_prefix_hit_ratio", run(|s| s.prefix_hit_ratio)),
        ("run_kv_bytes_moved", of_workers(|s| s.kv_bytes_moved as f64)),
        ("run_disaggregated", requests(|s| s.disaggregated)),
        ("run_flips", of_workers(|s| s.flips as f64)),
        ("run_worker_seconds_prefill", of_workers(|s| s.workers_seconds.prefill)),
        ("run_worker_seconds_decode", of_workers(|s| s.workers_seconds.decode)),
        ("run_worker_seconds_mixed", of_workers(|s| s.workers_seconds.mixed)),
    ]
}
