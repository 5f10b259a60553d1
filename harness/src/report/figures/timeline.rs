//! Arrivals, queues, KV and pools over one time axis.

use maud::{Markup, html};

use super::{
    super::{
        Contender, Moment, RunFindings, Scenario,
        number::{figures, percent, tick},
        plot::{Area, Axis, Chart, Series, chars_px, n},
    },
    Styles, Width, no_data, svg,
};

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
    let count = |moment: &Moment| tick(moment.fleet.requests_queued.ceil());
    match peaks.as_slice() {
        [] => "Over time: no data".to_owned(),
        [(_, peak), ..] if peak.fleet.requests_queued <= 1.0 => "Hardly a request waits".to_owned(),
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
    let knows_workers = |c: &Contender| c.run.as_ref().is_some_and(RunFindings::knows_workers);
    let fleets: Vec<_> = runs().filter(|(contender, _)| knows_workers(contender)).collect();
    let mut stack = Stack {
        left: 50.0,
        right: total - name_px,
        y: 0.0,
        x: &x,
        has_names: width == Width::Wide,
    };

    let mut panels = Vec::new();
    panels.push(stack.arrivals(longest, unit_s));
    let queues: Vec<_> =
        runs().map(|(c, moments)| line(c, moments, |m| m.fleet.requests_queued)).collect();
    let axis = fleets.is_empty().then_some(&tick as Label<'_>);
    let title = "requests without a first token yet";
    panels.push(stack.lines(title, &queues, None, axis, &tick));
    if !fleets.is_empty() {
        let kv: Vec<_> =
            fleets.iter().map(|(c, moments)| line(c, moments, |m| m.fleet.kv_used_ratio)).collect();
        let fullest = kv.iter().flat_map(|s| &s.points).map(|(_, used)| *used).fold(0.04, f64::max);
        // What is near to full is shown against full.
        let most = if fullest > 0.5 { 1.0 } else { fullest };
        let title = "KV blocks in use, of all workers";
        panels.push(stack.lines(title, &kv, Some(most), None, &percent));
    }
    for (i, (contender, moments)) in fleets.iter().enumerate() {
        panels.push(stack.pools(contender, moments, unit_s, i + 1 == fleets.len()));
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
type Label<'a> = &'a dyn Fn(f64) -> String;

fn workers(moment: &Moment) -> f64 {
    moment.fleet.workers_prefill + moment.fleet.workers_decode + moment.fleet.workers_mixed
}

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
        series: &[Series],
        most: Option<f64>,
        x_label: Option<Label<'_>>,
        label: Label<'_>,
    ) -> Markup {
        let area = self.next(100.0);
        let highest = series.iter().flat_map(|s| &s.points).map(|(_, y)| *y).fold(0.0, f64::max);
        let y =
            most.map_or_else(|| Axis::linear(highest.max(4.0), 4), |most| Axis::linear(most, 2));
        let chart = Chart { area, x: self.x, y: &y, series };
        html! {
            (self.title(area, title))
            (chart.grid(x_label, label))
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
        // "Under" says which shade is which role, to those too who tell no shades apart.
        let shown = match summary.as_slice() {
            [all] => format!("{}: {all} workers", contender.mode),
            pools => format!("{}: {}", contender.mode, pools.join(" under ")),
        };
        html! {
            (self.title(area, &shown))
            @for layer in &drawn { (layer) }
            (chart.grid(is_last.then_some(&tick as Label<'_>), &tick))
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
