//! Line charts as SVG: scales, axes, curves, and labels that keep out of each other's way.
//!
//! The marks carry classes and no colours, so that one style sheet draws them for light, dark and paper.
//! No charting library does that: they write colours into every mark.

use maud::{Markup, html};

/// Advance of an average character of the 12 px labels, generously.
pub(crate) const CHAR_PX: f64 = 6.6;
const LABEL_GAP_PX: f64 = 15.0;

/// Where data lies inside a drawing, in pixels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scale {
    Linear,
    Log,
}

/// From data to pixels, with the values to label.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    pub(crate) ticks: Vec<f64>,
}

impl Axis {
    /// From 0 to at least `high`.
    pub(crate) fn linear(high: f64, ticks: u32) -> Self {
        let high = if high.is_finite() && high > 0.0 { high } else { 1.0 };
        let step = round_step(high / f64::from(ticks));
        let count = (high / step - 1e-9).ceil().max(1.0);
        let ticks = counted(count).map(|i| i * step).collect();
        Self { scale: Scale::Linear, low: 0.0, high: count * step, ticks }
    }

    /// Of shares.
    pub(crate) fn quarters() -> Self {
        Self { scale: Scale::Linear, low: 0.0, high: 1.0, ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0] }
    }

    /// An axis that names no values.
    pub(crate) fn bare() -> Self {
        Self { scale: Scale::Linear, low: 0.0, high: 1.0, ticks: Vec::new() }
    }

    /// From 0 to exactly `high`.
    pub(crate) fn linear_to(high: f64, ticks: u32) -> Self {
        let mut axis = Self::linear(high, ticks);
        if high.is_finite() && high > 0.0 {
            axis.high = high;
            axis.ticks.retain(|tick| *tick <= high * (1.0 + 1e-9));
        }
        axis
    }

    /// Both ends above 0.
    pub(crate) fn log(low: f64, high: f64) -> Self {
        let (low, high) = (low.max(1e-6), high.max(low.max(1e-6) * 2.0));
        let decades = counted((high / low).log10().ceil() + 2.0)
            .map(|i| 10_f64.powf(low.log10().floor() + i));
        let digits: &[f64] = if high / low > 2_000.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let ticks = decades
            .flat_map(|decade| digits.iter().map(move |digit| digit * decade))
            .filter(|tick| (low * 0.999..=high * 1.001).contains(tick))
            .collect();
        Self { scale: Scale::Log, low, high, ticks }
    }

    /// The pixel of `value` where the axis runs from `from` to `to`; values beyond stop at the ends.
    pub(crate) fn place(&self, value: f64, from: f64, to: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        from + share.clamp(0.0, 1.0) * (to - from)
    }

    pub(crate) fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// 0, 1, 2 … `last`.
fn counted(last: f64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(0.0), |i| Some(i + 1.0)).take_while(move |i| *i <= last)
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(rough: f64) -> f64 {
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|s| *s >= rough * 0.999)
        .unwrap_or(rough)
}

/// One curve.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// Chooses colour, dashes and marker; one mode has the same in all charts.
    pub(crate) style: usize,
    pub(crate) points: Vec<(f64, f64)>,
    /// Places to mark, each with what it says when pointed at.
    pub(crate) marks: Vec<(f64, f64, String)>,
}

/// A line across the data, with its name.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    pub(crate) at: f64,
    pub(crate) name: String,
}

#[derive(Debug)]
pub(crate) struct Chart<'c> {
    pub(crate) area: Area,
    pub(crate) x: &'c Axis,
    pub(crate) y: &'c Axis,
    pub(crate) series: &'c [Series],
}

impl Chart<'_> {
    fn px(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let area = self.area;
        (self.x.place(x, area.left, area.right), self.y.place(y, area.bottom, area.top))
    }

    /// Numbers and fine lines; `x_label` and `y_label` put values into words.
    pub(crate) fn grid(
        &self,
        x_label: Option<&dyn Fn(f64) -> String>,
        y_label: &dyn Fn(f64) -> String,
    ) -> Markup {
        let Area { left, right, top, bottom } = self.area;
        html! {
            @for tick in &self.y.ticks {
                @let y = self.y.place(*tick, bottom, top);
                line class="grid" x1=(n(left)) x2=(n(right)) y1=(n(y)) y2=(n(y)) {}
                text class="tick" x=(n(left - 6.0)) y=(n(y + 4.0)) text-anchor="end" { (y_label(*tick)) }
            }
            @for (x, label) in self.x_ticks(x_label) {
                line class="grid" x1=(n(x)) x2=(n(x)) y1=(n(top)) y2=(n(bottom)) {}
                @if let Some(label) = label {
                    text class="tick" x=(n(x)) y=(n(bottom + 16.0)) text-anchor="middle" { (label) }
                }
            }
        }
    }

    /// A label that would touch the one before it stays away.
    fn x_ticks(&self, label: Option<&dyn Fn(f64) -> String>) -> Vec<(f64, Option<String>)> {
        let mut free_from = f64::NEG_INFINITY;
        let place = |tick: &f64| {
            let x = self.x.place(*tick, self.area.left, self.area.right);
            let label = label.map(|label| label(*tick)).filter(|text| {
                let half = chars_px(text) / 2.0;
                let fits = x - half >= free_from;
                if fits {
                    free_from = x + half + 8.0;
                }
                fits
            });
            (x, label)
        };
        self.x.ticks.iter().map(place).collect()
    }

    /// A vertical line; its name stands above it.
    pub(crate) fn vertical_rule(&self, rule: &Rule) -> Markup {
        let Area { left, right, top, bottom } = self.area;
        let x = self.x.place(rule.at, left, right);
        let half = chars_px(&rule.name) / 2.0;
        let name_x = x.min(right - half).max(left + half + 20.0);
        html! {
            @if self.x.holds(rule.at) {
                line class="rule" x1=(n(x)) x2=(n(x)) y1=(n(top - 4.0)) y2=(n(bottom)) {}
                text class="rule-name" x=(n(name_x)) y=(n(top - 9.0)) text-anchor="middle" { (rule.name) }
            }
        }
    }

    /// A horizontal line, with its name below its left end.
    pub(crate) fn horizontal_rule(&self, rule: &Rule) -> Markup {
        let Area { left, right, top, bottom } = self.area;
        let y = self.y.place(rule.at, bottom, top);
        html! {
            line class="rule" x1=(n(left)) x2=(n(right)) y1=(n(y)) y2=(n(y)) {}
            text class="rule-name" x=(n(left + 5.0)) y=(n(y + 14.0)) { (rule.name) }
        }
    }

    pub(crate) fn curves(&self) -> Markup {
        html! {
            @for series in self.series {
                @let points: Vec<_> = series.points.iter().filter(|p| is_finite(p)).map(|p| self.px(*p)).collect();
                g class=(format!("series {}", style_class(series.style))) {
                    title { (series.name) }
                    @if points.len() > 1 { path class="curve" d=(path(&points)) {} }
                    @for (x, y, says) in series.marks.iter().filter(|(x, y, _)| is_finite(&(*x, *y))) {
                        @let (x, y) = self.px((*x, *y));
                        (marker(series.style, x, y, Some(says)))
                    }
                }
            }
        }
    }

    /// Names at the right ends of the curves.
    pub(crate) fn names(&self) -> Markup {
        let Area { right, top, bottom, .. } = self.area;
        let mut ends: Vec<(f64, f64, &Series)> = self
            .series
            .iter()
            .filter_map(|series| {
                let last = *series.points.iter().rfind(|p| is_finite(p))?;
                let (x, y) = self.px(last);
                Some((x, y, series))
            })
            .collect();
        ends.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.2.style.cmp(&b.2.style)));
        let wanted: Vec<f64> = ends.iter().map(|end| end.1).collect();
        let places = apart(&wanted, LABEL_GAP_PX, top + 2.0, bottom - 2.0);
        html! {
            @for ((x, y, series), label_y) in ends.iter().zip(places) {
                g class=(style_class(series.style)) {
                    polyline class="leader" points=(format!("{},{} {},{} {},{}", n(*x), n(*y), n(right + 3.0), n(*y), n(right + 12.0), n(label_y))) {}
                    (marker(series.style, right + 18.0, label_y, None))
                    text class="name" x=(n(right + 27.0)) y=(n(label_y + 4.0)) { (series.name) }
                }
            }
        }
    }
}

fn is_finite((x, y): &(f64, f64)) -> bool {
    x.is_finite() && y.is_finite()
}

/// The given places in their order, moved as little as a simple sweep needs to hold them `gap` apart
/// between `low` and `high`.
fn apart(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut places: Vec<f64> = Vec::with_capacity(wanted.len());
    for want in wanted {
        let least = places.last().map_or(low, |last| last + gap);
        places.push(want.max(least));
    }
    let mut most = high;
    for place in places.iter_mut().rev() {
        *place = place.min(most);
        most = *place - gap;
    }
    places
}

fn path(points: &[(f64, f64)]) -> String {
    let mut d = String::new();
    for (i, (x, y)) in points.iter().enumerate() {
        d.push(if i == 0 { 'M' } else { 'L' });
        d.push_str(&format!("{} {}", n(*x), n(*y)));
    }
    d
}

/// Colours, dashes and markers have different periods: 35 modes look different.
pub(crate) fn style_class(style: usize) -> String {
    format!("colour-{} dash-{}", style % 7, style % 5)
}

/// A shape of its own for each of seven styles.
pub(crate) fn marker(style: usize, x: f64, y: f64, says: Option<&str>) -> Markup {
    let d = match style % 7 {
        0 => "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
        1 => "M-3.8 -3.8h7.6v7.6h-7.6z",
        2 => "M0 -5L4.8 3.6H-4.8z",
        3 => "M0 -5.2L5.2 0L0 5.2L-5.2 0z",
        4 => "M0 5L4.8 -3.6H-4.8z",
        5 => "M-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
        _ => "M-5 -3L0 -5L5 -3L3 5H-3z",
    };
    html! {
        path class="marker" d=(d) transform=(format!("translate({} {})", n(x), n(y))) {
            @if let Some(says) = says { title { (says) } }
        }
    }
}

pub(crate) fn chars_px(text: &str) -> f64 {
    text.chars().map(|_| CHAR_PX).sum()
}

/// A coordinate: a tenth of a pixel is fine enough.
pub(crate) fn n(px: f64) -> String {
    let text = format!("{px:.1}");
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_labels_round_values_and_holds_the_data() {
        let axis = Axis::linear(27.8, 5);
        assert_eq!(axis.ticks, [0.0, 10.0, 20.0, 30.0]);
        assert!(axis.holds(27.8));
        assert_eq!(axis.place(15.0, 0.0, 100.0), 50.0);
        assert_eq!(Axis::linear(0.0, 4).ticks, [0.0, 0.5, 1.0]);
        assert_eq!(Axis::linear(f64::NAN, 4).ticks, [0.0, 0.5, 1.0]);
    }

    #[test]
    fn a_log_axis_has_more_labels_where_it_spans_less() {
        let near = |ticks: &[f64], wanted: &[f64]| {
            assert_eq!(ticks.len(), wanted.len(), "{ticks:?}");
            assert!(ticks.iter().zip(wanted).all(|(a, b)| (a / b - 1.0).abs() < 1e-9));
        };
        near(&Axis::log(30.0, 900.0).ticks, &[50.0, 100.0, 200.0, 500.0]);
        near(&Axis::log(3.0, 30_000.0).ticks, &[10.0, 100.0, 1_000.0, 10_000.0]);
        assert_eq!(Axis::log(1.0, 100.0).place(10.0, 0.0, 100.0), 50.0);
        assert_eq!(Axis::log(1.0, 100.0).place(0.0, 0.0, 100.0), 0.0, "off the scale, not NaN");
    }

    #[test]
    fn labels_keep_apart_and_inside() {
        assert_eq!(apart(&[10.0, 12.0, 50.0], 15.0, 0.0, 100.0), [10.0, 25.0, 50.0]);
        assert_eq!(apart(&[95.0, 96.0], 15.0, 0.0, 100.0), [85.0, 100.0]);
        assert!(apart(&[], 15.0, 0.0, 100.0).is_empty());
    }
}
