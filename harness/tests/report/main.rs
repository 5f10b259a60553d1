//! The report as a reader's browser gets it.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod fixture;

use std::path::Path;

use baton_harness::{
    report::{Contender, Report, RunFindings, Scenario, to_csv},
    summary::WorkersSeconds,
};
use roxmltree::{Document, Node, ParsingOptions};

fn parse(html: &str) -> Document<'_> {
    Document::parse_with_options(
        html,
        ParsingOptions { allow_dtd: true, ..ParsingOptions::default() },
    )
    .unwrap_or_else(|error| panic!("{error}"))
}

fn named<'d>(document: &'d Document<'_>, name: &'static str) -> impl Iterator<Item = Node<'d, 'd>> {
    document.descendants().filter(move |node| node.tag_name().name() == name)
}

/// What must hold of every report: well-formed, on its own, and only numbers where numbers belong.
fn check(report: &Report) -> String {
    let html = report.to_html();
    let document = parse(&html);
    for node in document.descendants() {
        for attribute in node.attributes() {
            let (name, value) = (attribute.name(), attribute.value());
            assert!(!["src", "href", "onclick", "onload"].contains(&name), "{name}={value:?}");
            if ["x", "y", "x1", "x2", "y1", "y2", "width", "height"].contains(&name) {
                assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{name}={value:?}");
            }
            if ["d", "points", "transform", "viewBox"].contains(&name) {
                assert!(!value.contains("NaN") && !value.contains("inf"), "{name}={value:?}");
            }
        }
    }
    assert_eq!(named(&document, "script").count(), 0, "it must work without scripts");
    let without_namespaces = html.replace("http://www.w3.org/1999/xhtml", "");
    for needle in ["http:", "https:", "url(", "@import", "NaN", ">inf"] {
        assert!(!without_namespaces.contains(needle), "{needle}");
    }
    serde_json::from_str::<serde_json::Value>(&report.to_json().unwrap()).unwrap();
    html
}

fn write(report: &Report, name: &str) {
    report.write(&Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)).unwrap();
}

#[test]
fn a_full_report_is_one_well_formed_page_on_its_own() {
    let report = fixture::report();
    write(&report, "full");
    let html = check(&report);
    let document = parse(&html);
    // Bars; then three curves and a timeline for each scenario: all for wide and for narrow pages.
    let images = named(&document, "svg").filter(|svg| svg.attribute("role") == Some("img")).count();
    assert_eq!(images, 2 * (1 + 2 * 4));
    for contender in &report.scenarios[0].contenders {
        assert!(html.contains(&contender.setup), "{}", contender.setup);
    }
    assert!(html.contains(&report.origin.command.replace('"', "&quot;")));
}

#[test]
fn a_line_that_is_not_drawn_is_not_explained() {
    let mut report = fixture::report();
    assert!(report.to_html().contains("The line through a bar"));
    for contender in report.scenarios.iter_mut().flat_map(|scenario| &mut scenario.contenders) {
        contender.goodput.iter_mut().for_each(|found| found.rps_p99 = None);
    }
    assert!(!report.to_html().contains("The line through a bar"));
}

#[test]
fn labels_stay_inside_their_drawing() {
    let html = fixture::report().to_html();
    let document = parse(&html);
    for svg in named(&document, "svg").filter(|svg| svg.attribute("role") == Some("img")) {
        let right: f64 =
            svg.attribute("viewBox").unwrap().split(' ').nth(2).unwrap().parse().unwrap();
        for text in svg.descendants().filter(|node| node.tag_name().name() == "text") {
            let x: f64 = text.attribute("x").unwrap().parse().unwrap();
            let said: String =
                text.descendants().filter(Node::is_text).filter_map(|node| node.text()).collect();
            // Narrower than the 12 px letters of all common fonts are on average.
            let width = 6.0 * f64::from(u32::try_from(said.chars().count()).unwrap());
            let (from, to) = match text.attribute("text-anchor") {
                Some("end") => (x - width, x),
                Some("middle") => (x - width / 2.0, x + width / 2.0),
                _ => (x, x + width),
            };
            assert!(from >= -2.0 && to <= right + 2.0, "{said:?}: {from} to {to} of {right}");
        }
    }
}

#[test]
fn the_same_experiment_gives_the_same_bytes() {
    let (first, second) = (fixture::report(), fixture::report());
    assert_eq!(first.to_html(), second.to_html());
    assert_eq!(first.to_json().unwrap(), second.to_json().unwrap());
    assert_eq!(to_csv(&first).unwrap(), to_csv(&second).unwrap());
}

#[test]
fn names_that_look_like_markup_are_text() {
    let mut report = fixture::report();
    report.title = "<b>5 < 6 & \"7\"</b>".to_owned();
    report.origin.command = "baton compare --config 'a<b>.toml'".to_owned();
    report.scenarios[0].name = "<script>alert(1)</script>".to_owned();
    let html = check(&report);
    assert!(html.contains("&lt;script&gt;"));
}

#[test]
fn csv_has_a_line_for_each_contender_and_a_cell_for_each_figure() {
    let report = fixture::report();
    let csv = String::from_utf8(to_csv(&report).unwrap()).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    let contenders: usize = report.scenarios.iter().map(|scenario| scenario.contenders.len()).sum();
    assert_eq!(lines.len(), 1 + contenders);
    assert!(lines[0].starts_with("trace,workers,slo_ttft_ms,"));
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    assert!(reader.records().all(|record| record.unwrap().len() == 46));
}

fn alone(contender: Contender) -> Report {
    let mut report = fixture::report();
    let scenario = Scenario { contenders: vec![contender], ..report.scenarios[0].clone() };
    report.scenarios = vec![scenario];
    report
}

#[test]
fn of_an_endpoint_no_workers_are_shown() {
    let mut contender = fixture::report().scenarios[0].contenders[0].clone();
    let of_workers = ["Role flips", "KV moved", "KV blocks in use", "Hours of prefill workers"];
    let html = check(&alone(contender.clone()));
    assert!(of_workers.iter().all(|figure| html.contains(figure)));

    contender.run.as_mut().unwrap().summary.workers_seconds = WorkersSeconds::default();
    let report = alone(contender);
    let html = check(&report);
    assert!(!of_workers.iter().any(|figure| html.contains(figure)));
    let csv = to_csv(&report).unwrap();
    let mut reader = csv::Reader::from_reader(csv.as_slice());
    let record = reader.records().next().unwrap().unwrap();
    assert_eq!(record.iter().rev().take(3).collect::<String>(), "");
}

#[test]
fn one_mode_alone_is_a_report_too() {
    let contender = fixture::report().scenarios[0].contenders[0].clone();
    let report = alone(contender);
    write(&report, "one-mode");
    let html = check(&report);
    assert!(html.contains("aggregated serves ") && !html.contains("serves most"));
}

#[test]
fn where_no_request_was_completed_the_report_says_no_data() {
    let lost = fixture::lost_run();
    let report = alone(Contender {
        mode: "static:1P1D".to_owned(),
        setup: "static:1P1D".to_owned(),
        searched: Vec::new(),
        goodput: None,
        run: Some(lost),
    });
    write(&report, "nothing-completed");
    let html = check(&report);
    assert!(html.contains("no data: no request was completed"));
    assert!(html.contains("No mode serves any load within the SLOs"));
}

#[test]
fn emptiness_of_every_kind_is_no_data() {
    let nothing = |run| {
        alone(Contender {
            mode: "aggregated".to_owned(),
            setup: "aggregated".to_owned(),
            searched: Vec::new(),
            goodput: None,
            run,
        })
    };
    check(&nothing(None));
    check(&nothing(Some(RunFindings::default())));
    let mut not_a_number = RunFindings::default();
    not_a_number.summary.attainment = f64::NAN;
    not_a_number.summary.goodput_rps = f64::INFINITY;
    not_a_number.summary.completed = 1;
    not_a_number.summary.ttft_ms.p50 = f64::NAN;
    check(&nothing(Some(not_a_number)));
    let mut report = fixture::report();
    report.scenarios.clear();
    check(&report);
    assert!(to_csv(&report).unwrap().is_empty());
}
