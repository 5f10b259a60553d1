//! The five figures of a report. Each is drawn twice, for wide and for narrow pages, so that labels stay
//! readable on both; each has a title that says what is seen.

mod attainment;
mod distribution;
mod goodput;
mod timeline;

use maud::{Markup, html};

pub(crate) use self::{
    attainment::{attainment, attainment_title},
    distribution::{Latency, TBT, TTFT, distribution, distribution_title},
    goodput::{best, goodput_bars, goodput_title, verdict},
    timeline::{timeline, timeline_title},
};
use super::{
    Contender, Report,
    plot::{Area, Series, chars_px, marker, n, style_class},
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

/// Line and marker of a mode, for lists of names.
pub(crate) fn swatch(style: usize) -> Markup {
    html! {
        svg class=(format!("swatch {}", style_class(style))) viewBox="0 0 34 12" aria-hidden="true" {
            path class="curve" d="M0 6H34" {}
            (marker(style, 17.0, 6.0, None))
        }
    }
}
