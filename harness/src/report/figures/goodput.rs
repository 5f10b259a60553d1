//! Who serves how much: a bar a mode.

use maud::{Markup, html};

use super::{
    super::{
        Contender, Report, Scenario, float,
        number::{figures, more_or_less, tick},
        plot::{Area, Axis, Chart, chars_px, n, style_class},
    },
    Styles, Width, svg,
};

/// Requests per second within the SLOs: at the highest load that holds where that was searched, else
/// at the load that was run.
pub(crate) fn served(contender: &Contender) -> Option<f64> {
    match (&contender.goodput, &contender.run) {
        (Some(goodput), _) => Some(goodput.rps),
        (None, Some(run)) => Some(run.summary.goodput_rps),
        (None, None) => None,
    }
    .filter(|rps| rps.is_finite())
}

pub(crate) fn best(scenario: &Scenario) -> Option<(&Contender, f64)> {
    let served = scenario.contenders.iter().filter_map(|c| Some((c, served(c)?)));
    // Of equals, the first: the baseline before what it is compared with.
    served.rev().max_by(|a, b| a.1.total_cmp(&b.1)).filter(|(_, rps)| *rps > 0.0)
}

pub(crate) fn goodput_title(report: &Report) -> String {
    match report.scenarios.as_slice() {
        [scenario] => verdict(scenario),
        scenarios => {
            let mut wins: Vec<(&str, usize)> = Vec::new();
            for (winner, _) in scenarios.iter().filter_map(best) {
                match wins.iter_mut().find(|(mode, _)| *mode == winner.mode) {
                    Some((_, count)) => *count += 1,
                    None => wins.push((&winner.mode, 1)),
                }
            }
            wins.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            let wins: Vec<_> = wins.iter().map(|(mode, n)| format!("{mode} in {n}")).collect();
            if wins.is_empty() {
                "No mode serves any load within the SLOs".to_owned()
            } else {
                format!("Who serves most, in {} scenarios: {}", scenarios.len(), wins.join(", "))
            }
        }
    }
}

/// Who serves most, and how much more than the baseline.
pub(crate) fn verdict(scenario: &Scenario) -> String {
    let Some((winner, rps)) = best(scenario) else {
        return "No mode serves any load within the SLOs".to_owned();
    };
    let others = scenario.contenders.iter().filter(|c| c.mode != winner.mode);
    let next = others.filter_map(|c| Some((c, served(c)?))).max_by(|a, b| a.1.total_cmp(&b.1));
    let Some((next, next_rps)) = next else {
        return format!("{} serves {} requests/s within the SLOs", winner.mode, figures(rps));
    };
    let most = format!("{} serves most: {} requests/s", winner.mode, figures(rps));
    match more_or_less(rps, next_rps) {
        Some(more) => {
            let than = format!("{more} than {}", next.mode).replace("as much than", "as much as");
            format!("{most}, {than}")
        }
        None => format!("{most}; {} serves nothing within the SLOs", next.mode),
    }
}

pub(crate) fn goodput_bars(report: &Report, styles: &Styles, width: Width) -> Markup {
    const BAR: f64 = 18.0;
    let all = || report.scenarios.iter().flat_map(|scenario| &scenario.contenders);
    let most = all().filter_map(served).fold(0.0, f64::max);
    let axis = Axis::linear(most, if width == Width::Wide { 8 } else { 3 });
    let name_px = all().map(|c| chars_px(&c.mode)).fold(0.0, f64::max) + 8.0;
    // A narrow page has no room beside the bars: names stand above them.
    let (total, left, right, row, name_above) = match width {
        Width::Wide => (960.0, 12.0 + name_px.min(260.0), 130.0, 28.0, 0.0),
        Width::Narrow => (360.0, 8.0, 88.0, 44.0, 18.0),
    };
    let several = report.scenarios.len() > 1;
    let mut y = 4.0;
    let mut rows = Vec::new();
    for scenario in &report.scenarios {
        if several {
            rows.push(scenario_heading(scenario, &mut y, total));
        }
        let baseline = scenario.contenders.first().and_then(served);
        for (i, contender) in scenario.contenders.iter().enumerate() {
            let against = baseline.filter(|_| i > 0);
            let bar = Bar { y: y + name_above, height: BAR, from: left, to: total - right };
            rows.push(html! {
                @if width == Width::Wide {
                    text class="name" x=(n(left - 8.0)) y=(n(y + 13.5)) text-anchor="end" { (contender.mode) }
                } @else {
                    text class="name" x=(n(left)) y=(n(y + 13.0)) { (contender.mode) }
                }
                (bar.draw(contender, styles.of(contender), &axis, against, width))
            });
            y += row;
        }
        y += 8.0;
    }
    let area = Area { left, right: total - right, top: 0.0, bottom: y };
    let chart = Chart { area, x: &axis, y: &Axis::bare(), series: &[] };
    svg(
        total,
        y + 40.0,
        &goodput_title(report),
        &html! {
            (chart.grid(Some(&tick), &tick))
            text class="axis" x=(n(f64::midpoint(left, total - right))) y=(n(y + 35.0)) text-anchor="middle" { "requests/s" }
            @for row in &rows { (row) }
        },
    )
}

/// On as many lines as it needs.
fn scenario_heading(scenario: &Scenario, y: &mut f64, total: f64) -> Markup {
    let mut lines: Vec<String> = Vec::new();
    for word in scenario.name.split(' ') {
        match lines.last_mut() {
            Some(line) if chars_px(line) + chars_px(word) * 1.1 + 30.0 < total => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    let first = *y + 14.0;
    *y = first + 16.0 * float(lines.len()) - 6.0;
    html! {
        @for (i, line) in lines.iter().enumerate() {
            text class="heading" x="8" y=(n(first + 16.0 * float(i))) { (line) }
        }
    }
}

struct Bar {
    y: f64,
    height: f64,
    from: f64,
    to: f64,
}

impl Bar {
    fn draw(
        &self,
        contender: &Contender,
        style: usize,
        axis: &Axis,
        against: Option<f64>,
        width: Width,
    ) -> Markup {
        let Self { y, height, from, to } = *self;
        let Some(rps) = served(contender) else {
            return html! { text class="nothing" x=(n(from + 6.0)) y=(n(y + 13.5)) { "no data" } };
        };
        let end = axis.place(rps, from, to);
        let middle = y + height / 2.0;
        let change = against.and_then(|base| change(rps, base)).unwrap_or_default();
        let goodput = contender.goodput.as_ref();
        let stricter =
            goodput.and_then(|found| found.rps_p99).filter(|rps| rps.is_finite() && *rps > 0.0);
        let range = goodput.map(|found| found.range).filter(|[low, high]| low < high);
        let says = format!("{}: {} requests/s ({})", contender.mode, figures(rps), contender.setup);
        let value_x = range.map_or(end, |[_, high]| axis.place(high, from, to).max(end)) + 7.0;
        html! {
            g class=(style_class(style)) {
                rect class="bar" x=(n(from)) y=(n(y)) width=(n((end - from).max(1.0))) height=(n(height)) { title { (says) } }
                @if let Some(stricter) = stricter {
                    @let x = axis.place(stricter, from, to);
                    line class="stricter" x1=(n(x)) x2=(n(x)) y1=(n(y - 2.0)) y2=(n(y + height + 2.0)) {
                        title { "99 % within the SLOs up to " (figures(stricter)) " requests/s" }
                    }
                }
                @if let Some([low, high]) = range {
                    @let (low_x, high_x) = (axis.place(low, from, to), axis.place(high, from, to));
                    path class="whisker" d=(format!("M{} {m}H{}M{} {t}v6M{} {t}v6", n(low_x), n(high_x), n(low_x), n(high_x), m = n(middle), t = n(middle - 3.0))) {
                        title { "Seeds: " (figures(low)) " to " (figures(high)) " requests/s" }
                    }
                }
            }
            text class="value" x=(n(value_x)) y=(n(middle + 4.5)) {
                (figures(rps))
                @if !change.is_empty() {
                    tspan class="change" dx=(if width == Width::Wide { "8" } else { "5" }) { (change) }
                }
            }
        }
    }
}

/// "+11 %"
fn change(value: f64, than: f64) -> Option<String> {
    let change = ((value / than - 1.0) * 100.0).round();
    let sign = if change < 0.0 {
        "−"
    } else if change > 0.0 {
        "+"
    } else {
        "±"
    };
    change.is_finite().then(|| format!("{sign}{} %", tick(change.abs())))
}
