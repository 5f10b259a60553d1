//! Which share of the requests had their tokens within which time.

use maud::{Markup, html};

use super::{
    super::{
        Distribution, RunFindings, Scenario,
        number::{percent, span, span_tick},
        plot::{Axis, Chart, Rule, Series},
    },
    Styles, Width, axis_names, no_data, plot_area, svg,
};

/// Which latency a figure is about.
pub(crate) struct Latency {
    pub(crate) short: &'static str,
    pub(crate) axis: &'static str,
    pub(crate) of: fn(&RunFindings) -> &Distribution,
}

pub(crate) const TTFT: Latency =
    Latency { short: "TTFT", axis: "time to first token, from arrival", of: |run| &run.ttft_ms };

pub(crate) const TBT: Latency = Latency {
    short: "ITL",
    axis: "TBT, mean of a request's longest tenth of gaps",
    of: |run| &run.tbt_ms,
};

pub(crate) fn distribution_title(scenario: &Scenario, latency: &Latency) -> String {
    let runs = scenario.contenders.iter().filter_map(|c| Some((c, c.run.as_ref()?)));
    let runs: Vec<_> = runs.map(|(c, run)| (c, (latency.of)(run).quantile(0.9))).collect();
    let mut held: Vec<_> = runs.iter().filter_map(|(c, q)| Some((c, (*q)?))).collect();
    held.sort_by(|a, b| a.1.total_cmp(&b.1));
    let short = latency.short;
    match held.as_slice() {
        [] if runs.is_empty() => format!("{short}: no data"),
        [] => format!("{short}: no mode answers nine requests in ten"),
        [(only, q)] => {
            let none = if runs.len() > 1 { ", in no other mode" } else { "" };
            format!("{short}: nine requests in ten within {} with {}{none}", span(*q), only.mode)
        }
        [(first, low), .., (last, high)] => {
            let lost = runs.len() - held.len();
            let none = if lost > 0 { ", never in the rest" } else { "" };
            format!(
                "{short}: nine requests in ten within {} with {}, {} with {}{none}",
                span(*low),
                first.mode,
                span(*high),
                last.mode
            )
        }
    }
}

pub(crate) fn distribution(
    scenario: &Scenario,
    styles: &Styles,
    latency: &Latency,
    slo: &Rule,
    width: Width,
) -> Markup {
    let series: Vec<Series> = scenario
        .contenders
        .iter()
        .filter_map(|contender| {
            let points = &(latency.of)(contender.run.as_ref()?).points;
            let at = |share| {
                let found = points.iter().find(|point| point.share >= share - 1e-9)?;
                let says = format!(
                    "{}: {} of requests within {}",
                    contender.mode,
                    percent(share),
                    span(found.ms)
                );
                Some((found.ms, found.share, says))
            };
            (!points.is_empty()).then(|| Series {
                name: contender.mode.clone(),
                style: styles.of(contender),
                points: points.iter().map(|point| (point.ms, point.share)).collect(),
                marks: [0.5, 0.9, 0.99].into_iter().filter_map(at).collect(),
            })
        })
        .collect();
    let (total, height) = half(width);
    if series.is_empty() {
        return no_data(total, "no data: no request was completed");
    }
    let values = || series.iter().flat_map(|s| &s.points).map(|(ms, _)| *ms);

    let high = values().fold(slo.at, f64::max);
    // Zeros are latencies too (one token has no gap): the log axis starts where its sense starts.
    let first = values().filter(|ms| *ms > 0.0).fold(f64::INFINITY, f64::min).min(slo.at);
    let x = if high / first.max(high / 1e6) > 20.0 {
        Axis::log((first * 0.9).max(high / 1e6), high * 1.02)
    } else {
        Axis::linear(high, if width == Width::Wide { 6 } else { 4 })
    };

    let y = Axis::quarters();
    let area = plot_area(total, height, &series, width);
    let chart = Chart { area, x: &x, y: &y, series: &series };
    let title = distribution_title(scenario, latency);
    svg(
        total,
        height,
        &title,
        &html! {
            (chart.grid(Some(&span_tick), &percent))
            (chart.vertical_rule(slo))
            (chart.curves())
            @if width == Width::Wide { (chart.names()) }
            (axis_names(area, latency.axis, "requests"))
        },
    )
}

fn half(width: Width) -> (f64, f64) {
    match width {
        Width::Wide => (480.0, 320.0),
        Width::Narrow => (360.0, 270.0),
    }
}
