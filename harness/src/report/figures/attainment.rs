//! Which share of the requests is within the SLOs at which load.

use maud::{Markup, html};

use super::{
    super::{
        Scenario,
        number::{figures, percent, tick},
        plot::{Axis, Chart, Rule, Series},
    },
    Styles, Width, axis_names, no_data, plot_area, svg,
};

pub(crate) fn attainment_title(scenario: &Scenario) -> Option<String> {
    let mut held: Vec<_> =
        scenario.contenders.iter().filter_map(|c| Some((c, c.goodput.as_ref()?.rps))).collect();
    held.sort_by(|a, b| b.1.total_cmp(&a.1));
    let (first, most) = held.first()?;
    let mut text =
        format!("{} keeps 90 % within both SLOs up to {} requests/s", first.mode, figures(*most));
    if let [_, .., (last, least)] = held.as_slice() {
        text.push_str(&format!(", {} up to {}", last.mode, figures(*least)));
    }
    Some(text)
}

pub(crate) fn attainment(scenario: &Scenario, styles: &Styles, width: Width) -> Markup {
    let found = || scenario.contenders.iter().filter_map(|c| Some((c, c.goodput.as_ref()?)));
    let most = found().map(|(_, goodput)| goodput.rps).fold(0.0, f64::max);
    let loads = found().flat_map(|(_, goodput)| &goodput.points).map(|point| point.offered_rps);
    // Far beyond what anyone holds, a search has probed, but there is nothing to see.
    let limit = if most > 0.0 { 1.6 * most } else { loads.fold(0.0, f64::max) };
    let series: Vec<Series> = found()
        .filter_map(|(contender, goodput)| {
            let shown = goodput.points.iter().filter(|point| point.offered_rps <= limit);
            let points: Vec<_> = shown.map(|point| (point.offered_rps, point.attainment)).collect();
            let says = |(rps, share): &(f64, f64)| {
                let text = format!(
                    "{} at {} requests/s: {} within both SLOs",
                    contender.mode,
                    figures(*rps),
                    percent(*share)
                );
                (*rps, *share, text)
            };
            (!points.is_empty()).then(|| Series {
                name: contender.mode.clone(),
                style: styles.of(contender),
                marks: points.iter().map(says).collect(),
                points,
            })
        })
        .collect();
    let (total, height) = match width {
        Width::Wide => (960.0, 290.0),
        Width::Narrow => (360.0, 270.0),
    };
    if series.is_empty() {
        return no_data(total, "no data: no load was searched");
    }
    let high = series.iter().flat_map(|s| &s.points).map(|(rps, _)| *rps).fold(0.0, f64::max);
    let x = Axis::linear(high, if width == Width::Wide { 9 } else { 4 });
    let y = Axis::quarters();
    let area = plot_area(total, height, &series, width);
    let chart = Chart { area, x: &x, y: &y, series: &series };
    svg(
        total,
        height,
        &attainment_title(scenario).unwrap_or_default(),
        &html! {
            (chart.grid(Some(&tick), &percent))
            (chart.horizontal_rule(&Rule { at: 0.9, name: "90 %".to_owned() }))
            (chart.curves())
            @if width == Width::Wide { (chart.names()) }
            (axis_names(area, "offered load, requests/s", "requests within both SLOs"))
        },
    )
}
