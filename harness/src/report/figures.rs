//! The five figures of a report. Each is drawn twice, for wide and for narrow pages, so that labels stay
//! readable on both; each has a title that says what is seen.

use maud::{Markup, html};

use super::{
    Contender, Distribution, Moment, Report, RunFindings, Scenario,
    number::{figures, more_or_less, percent, span, span_tick, tick},
    plot::{Area, Axis, Chart, Rule, Series, chars_px, marker, n, style_class},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Wide,
    Narrow,
}

/// The modes of a report in their order: a mode looks the same in every figure.
pub(crate) struct Styles(Vec<String>);

impl Styles {
    pub(crate) fn new(report: &Report) -> Self {
        let mut modes: Vec<String> = Vec::new();
        for contender in report.scenarios.iter().flat_map(|scenario| &scenario.contenders) {
            if !modes.contains(&contender.mode) {
                modes.push(contender.mode.clone());
            }
        }
        Self(modes)
    }

    pub(crate) fn of(&self, contender: &Contender) -> usize {
        self.0.iter().position(|mode| *mode == contender.mode).unwrap_or_default()
    }
}

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

fn svg(width: f64, height: f64, label: &str, content: &Markup) -> Markup {
    html! {
        svg viewBox=(format!("0 0 {} {}", n(width), n(height))) role="img" aria-label=(label) { (content) }
    }
}

fn no_data(width: f64, why: &str) -> Markup {
    svg(
        width,
        60.0,
        why,
        &html! {
            text class="nothing" x=(n(width / 2.0)) y="35" text-anchor="middle" { (why) }
        },
    )
}

// ── goodput ──

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
    let mut text = format!("{} serves most: {} requests/s", winner.mode, figures(rps));
    if let Some((next, next_rps)) = next {
        match more_or_less(rps, next_rps) {
            Some(more) => text.push_str(
                &format!(", {more} than {}", next.mode).replace("as much than", "as much as"),
            ),
            None => text.push_str(&format!("; {} serves nothing within the SLOs", next.mode)),
        }
    }
    text
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
    *y = first + 16.0 * super::float(lines.len()) - 6.0;
    html! {
        @for (i, line) in lines.iter().enumerate() {
            text class="heading" x="8" y=(n(first + 16.0 * super::float(i))) { (line) }
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

// ── distributions ──

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

fn plot_area(total: f64, height: f64, series: &[Series], width: Width) -> Area {
    let names = series.iter().map(|s| chars_px(&s.name)).fold(0.0, f64::max);
    let right = if width == Width::Wide { 31.0 + names.min(150.0) } else { 22.0 };
    Area { left: 50.0, right: total - right, top: 30.0, bottom: height - 44.0 }
}

fn axis_names(area: Area, x: &str, y: &str) -> Markup {
    html! {
        text class="axis" x=(n(f64::midpoint(area.left, area.right))) y=(n(area.bottom + 36.0)) text-anchor="middle" { (x) }
        text class="axis" x="4" y="12" { (y) }
    }
}

// ── attainment over load ──

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

// ── timeline ──

pub(crate) fn timeline_title(scenario: &Scenario) -> String {
    let peaks = scenario.contenders.iter().filter_map(|contender| {
        let moments = &contender.run.as_ref()?.timeline;
        let peak = moments
            .iter()
            .max_by(|a, b| a.fleet.requests_queued.total_cmp(&b.fleet.requests_queued))?;
        Some((contender, peak))
    });
    let mut peaks: Vec<_> = peaks.collect();
    peaks.sort_by(|a, b| b.1.fleet.requests_queued.total_cmp(&a.1.fleet.requests_queued));
    let count = |moment: &Moment| figures(moment.fleet.requests_queued.ceil());
    match peaks.as_slice() {
        [] => "Over time: no data".to_owned(),
        [(most, peak), ..] if peak.fleet.requests_queued < 1.0 => {
            format!("Hardly a request waits, in {} or elsewhere", most.mode)
        }
        [(only, peak)] => format!("The queue of {} peaks at {} requests", only.mode, count(peak)),
        [(most, peak), .., (least, low)] => format!(
            "The queue peaks at {} requests with {}, at {} with {}",
            count(peak),
            most.mode,
            count(low),
            least.mode
        ),
    }
}

pub(crate) fn timeline(scenario: &Scenario, styles: &Styles, width: Width) -> Markup {
    let (total, name_px) = match width {
        Width::Wide => (
            900.0,
            31.0 + scenario
                .contenders
                .iter()
                .map(|c| chars_px(&c.mode))
                .fold(0.0, f64::max)
                .min(170.0),
        ),
        Width::Narrow => (360.0, 12.0),
    };
    let runs = || scenario.contenders.iter().filter_map(|c| Some((c, &c.run.as_ref()?.timeline)));
    let Some((_, longest)) = runs()
        .filter(|(_, moments)| !moments.is_empty())
        .max_by(|a, b| end(a.1).total_cmp(&end(b.1)))
    else {
        return no_data(total, "no data: nothing was sampled over time");
    };
    let (unit_s, unit) = if end(longest) > 300.0 { (60.0, "minutes") } else { (1.0, "seconds") };
    let x = Axis::linear_to(end(longest) / unit_s, if width == Width::Wide { 12 } else { 5 });
    let line = |contender: &Contender, moments: &[Moment], of: fn(&Moment) -> f64| Series {
        name: contender.mode.clone(),
        style: styles.of(contender),
        points: moments.iter().map(|moment| (moment.at_s / unit_s, of(moment))).collect(),
        marks: peak(contender, moments, of, unit_s, unit).into_iter().collect(),
    };
    let lines = |of: fn(&Moment) -> f64| -> Vec<Series> {
        runs().map(|(c, moments)| line(c, moments, of)).collect()
    };
    let mut stack = Stack {
        left: 50.0,
        right: total - name_px,
        y: 0.0,
        x: &x,
        has_names: width == Width::Wide,
    };

    let mut panels = Vec::new();
    panels.push(stack.arrivals(longest, unit_s));
    let queues = lines(|moment| moment.fleet.requests_queued);
    panels.push(stack.lines("requests without a first token yet", 100.0, &queues, None, &tick));
    let kv = lines(|moment| moment.fleet.kv_used_ratio);
    let fullest = kv.iter().flat_map(|s| &s.points).map(|(_, used)| *used).fold(0.04, f64::max);
    // What is near to full is shown against full.
    let most = if fullest > 0.5 { 1.0 } else { fullest };
    panels.push(stack.lines("KV blocks in use, of all workers", 100.0, &kv, Some(most), &percent));
    let runs: Vec<_> = runs().collect();
    for (i, (contender, moments)) in runs.iter().enumerate() {
        panels.push(stack.pools(contender, moments, unit_s, i + 1 == runs.len()));
    }
    let bottom = stack.y + 22.0;
    svg(
        total,
        bottom,
        &timeline_title(scenario),
        &html! {
            @for panel in &panels { (panel) }
            text class="axis" x=(n(f64::midpoint(stack.left, stack.right))) y=(n(bottom - 4.0)) text-anchor="middle" {
                (unit) " since the first arrival"
            }
        },
    )
}

fn end(moments: &[Moment]) -> f64 {
    match moments {
        [first, .., last] => last.at_s + first.at_s,
        [only] => 2.0 * only.at_s,
        [] => 0.0,
    }
}

fn peak(
    contender: &Contender,
    moments: &[Moment],
    of: fn(&Moment) -> f64,
    unit_s: f64,
    unit: &str,
) -> Option<(f64, f64, String)> {
    let peak = moments.iter().max_by(|a, b| of(a).total_cmp(&of(b)))?;
    let value = of(peak);
    let shown = if value <= 1.0 { percent(value) } else { figures(value) };
    let at = figures(peak.at_s / unit_s);
    Some((peak.at_s / unit_s, value, format!("{}: peak of {shown} at {at} {unit}", contender.mode)))
}

type OfMoment = fn(&Moment) -> f64;

/// Panels below each other over one time axis.
struct Stack<'a> {
    left: f64,
    right: f64,
    y: f64,
    x: &'a Axis,
    has_names: bool,
}

impl Stack<'_> {
    const TITLE: f64 = 20.0;
    const GAP: f64 = 14.0;

    fn next(&mut self, height: f64) -> Area {
        let top = self.y + Self::TITLE;
        self.y = top + height + Self::GAP;
        Area { left: self.left, right: self.right, top, bottom: top + height }
    }

    fn title(&self, area: Area, text: &str) -> Markup {
        html! { text class="axis" x="4" y=(n(area.top - 8.0)) { (text) } }
    }

    fn arrivals(&mut self, moments: &[Moment], unit_s: f64) -> Markup {
        let area = self.next(64.0);
        let most = moments.iter().map(|moment| moment.arrivals_per_s).fold(0.0, f64::max);
        let y = Axis::linear(most, 2);
        let chart = Chart { area, x: self.x, y: &y, series: &[] };
        let mut d = format!("M{} {}", n(area.left), n(area.bottom));
        for moment in moments {
            let x = self.x.place(moment.at_s / unit_s, area.left, area.right);
            d.push_str(&format!(
                "L{} {}",
                n(x),
                n(y.place(moment.arrivals_per_s, area.bottom, area.top))
            ));
        }
        let last = moments
            .last()
            .map_or(area.left, |m| self.x.place(m.at_s / unit_s, area.left, area.right));
        d.push_str(&format!("L{} {}z", n(last), n(area.bottom)));
        html! {
            (self.title(area, "arrivals, requests/s"))
            (chart.grid(None, &tick))
            path class="arrivals" d=(d) { title { "Arrivals: at most " (figures(most)) " requests/s" } }
        }
    }

    fn lines(
        &mut self,
        title: &str,
        height: f64,
        series: &[Series],
        most: Option<f64>,
        label: &dyn Fn(f64) -> String,
    ) -> Markup {
        let area = self.next(height);
        let highest = series.iter().flat_map(|s| &s.points).map(|(_, y)| *y).fold(0.0, f64::max);
        let y =
            most.map_or_else(|| Axis::linear(highest.max(4.0), 4), |most| Axis::linear(most, 2));
        let chart = Chart { area, x: self.x, y: &y, series };
        html! {
            (self.title(area, title))
            (chart.grid(None, label))
            (chart.curves())
            @if self.has_names { (chart.names()) }
        }
    }

    /// Workers of each role, on top of each other.
    fn pools(
        &mut self,
        contender: &Contender,
        moments: &[Moment],
        unit_s: f64,
        is_last: bool,
    ) -> Markup {
        let area = self.next(44.0);
        let workers = |moment: &Moment| {
            moment.fleet.workers_prefill + moment.fleet.workers_decode + moment.fleet.workers_mixed
        };
        let y = Axis::linear_to(moments.iter().map(workers).fold(0.0, f64::max), 2);
        let chart = Chart { area, x: self.x, y: &y, series: &[] };
        let layers: [(&str, OfMoment); 3] = [
            ("prefill", |moment| moment.fleet.workers_prefill),
            ("decode", |moment| moment.fleet.workers_decode),
            ("mixed", |moment| moment.fleet.workers_mixed),
        ];
        let mut floor = vec![0.0; moments.len()];
        let mut drawn = Vec::new();
        for (role, of) in layers {
            let ceiling: Vec<f64> =
                floor.iter().zip(moments).map(|(base, moment)| base + of(moment)).collect();
            let lowest = moments.iter().map(of).fold(f64::INFINITY, f64::min);
            let highest = moments.iter().map(of).fold(0.0, f64::max);
            if highest > 0.0 {
                let says = format!("{}: {} {role} workers", contender.mode, range(lowest, highest));
                drawn.push(html! {
                    path class=(format!("pool {role}")) d=(self.band(area, &y, moments, &floor, &ceiling, unit_s)) { title { (says) } }
                });
            }
            floor = ceiling;
        }
        let summary: Vec<String> = layers
            .iter()
            .filter_map(|(role, of)| {
                let lowest = moments.iter().map(of).fold(f64::INFINITY, f64::min);
                let highest = moments.iter().map(of).fold(0.0, f64::max);
                (highest > 0.0).then(|| format!("{} {role}", range(lowest, highest)))
            })
            .collect();
        html! {
            (self.title(area, &format!("{}: {} workers", contender.mode, summary.join(", "))))
            @for layer in &drawn { (layer) }
            (chart.grid(is_last.then_some(&tick as &dyn Fn(f64) -> String), &tick))
        }
    }

    /// Steps: a pool changes at once.
    fn band(
        &self,
        area: Area,
        y: &Axis,
        moments: &[Moment],
        floor: &[f64],
        ceiling: &[f64],
        unit_s: f64,
    ) -> String {
        let half_s = moments.first().map_or(0.0, |moment| moment.at_s);
        let edge = |at_s: f64| n(self.x.place(at_s / unit_s, area.left, area.right));
        let mut there = String::new();
        let mut back = Vec::new();
        for ((moment, low), high) in moments.iter().zip(floor).zip(ceiling) {
            let (from, to) = (edge(moment.at_s - half_s), edge(moment.at_s + half_s));
            let (low, high) =
                (n(y.place(*low, area.bottom, area.top)), n(y.place(*high, area.bottom, area.top)));
            there.push_str(&format!(
                "{}{from} {high}H{to}",
                if there.is_empty() { "M" } else { "L" }
            ));
            back.push(format!("L{to} {low}H{from}"));
        }
        back.reverse();
        format!("{there}{}z", back.concat())
    }
}

/// "7", or "3–7".
fn range(low: f64, high: f64) -> String {
    let (low, high) = (low.round(), high.round());
    if low < high { format!("{}–{}", tick(low), tick(high)) } else { tick(high) }
}

/// Line and marker of a mode, for lists of names.
pub(crate) fn swatch(style: usize) -> Markup {
    html! {
        svg class=(format!("swatch {}", style_class(style))) viewBox="0 0 34 12" aria-hidden="true" {
            path class="curve" d="M0 6H34" {}
            (marker(style, 17.0, 6.0, None))
        }
    }
}
