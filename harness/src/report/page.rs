//! The page around the figures.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    Contender, Report, RunFindings, Scenario,
    figures::{
        Latency, Styles, TBT, TTFT, Width, attainment, attainment_title, best, distribution,
        distribution_title, goodput_bars, goodput_title, swatch, timeline, timeline_title, verdict,
    },
    number::{bytes, figures, percent, span, span_tick, tick},
    plot::Rule,
};

const STYLE: &str = include_str!("style.css");

pub(super) fn page(report: &Report) -> String {
    let styles = Styles::new(report);
    html! {
        (DOCTYPE)
        html lang="en" xmlns="http://www.w3.org/1999/xhtml" {
            head {
                (PreEscaped(r#"<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/><meta name="color-scheme" content="light dark"/>"#))
                title { (report.title) " · Baton" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (report.title) }
                    p.lead { (lead(report)) }
                }
                main {
                    section {
                        (figure(&goodput_title(report), &goodput_note(report), |width| goodput_bars(report, &styles, width)))
                    }
                    @for scenario in &report.scenarios { (section(scenario, &styles)) }
                    (origin(report))
                }
            }
        }
    }
    .into_string()
}

fn lead(report: &Report) -> String {
    let scenarios = match report.scenarios.len() {
        1 => "One scenario".to_owned(),
        n => format!("{n} scenarios"),
    };
    let seeds = match report.origin.seeds.as_slice() {
        [seed] => format!("seed {seed}"),
        seeds => format!("{} seeds", seeds.len()),
    };
    let compares = report.scenarios.iter().any(|scenario| scenario.contenders.len() > 1);
    let same = if compares {
        " Each mode has the same workers, the same requests and the same SLOs."
    } else {
        ""
    };
    format!(
        "{scenarios}, {seeds}.{same} A request that was rejected, or not finished, misses its SLOs."
    )
}

/// One figure for both widths; the style sheet shows one of them.
fn figure(title: &str, note: &str, draw: impl Fn(Width) -> Markup) -> Markup {
    html! {
        figure {
            figcaption {
                h3 { (title) }
                @if !note.is_empty() { p.note { (note) } }
            }
            div.wide { (draw(Width::Wide)) }
            div.narrow { (draw(Width::Narrow)) }
        }
    }
}

fn goodput_note(report: &Report) -> String {
    let all = || report.scenarios.iter().flat_map(|scenario| &scenario.contenders);
    let mut found = all().filter_map(|contender| contender.goodput.as_ref()).peekable();
    let mut note = if found.peek().is_some() {
        "Goodput: the highest request rate at which at least 90 % of all requests meet both SLOs."
            .to_owned()
    } else {
        "Requests that met both SLOs, per second, at the load that was run.".to_owned()
    };
    if found.any(|found| found.rps_p99.is_some()) {
        note.push_str(" The line through a bar: at least 99 %.");
    }
    if report.scenarios.iter().any(|scenario| scenario.contenders.len() > 1) {
        note.push_str(" Percentages: against the first mode.");
    }
    if report.origin.seeds.len() > 1 {
        note.push_str(" Bars are means over the seeds, whiskers their range.");
    }
    note
}

fn section(scenario: &Scenario, styles: &Styles) -> Markup {
    let slo = scenario.slo;
    let ttft_rule = if slo.ttft_prefill_factor > 0.0 {
        let factor = figures(slo.ttft_prefill_factor);
        format!("SLO: {} + {factor} × prefill", span_tick(slo.ttft_ms))
    } else {
        format!("SLO: {}", span_tick(slo.ttft_ms))
    };
    let ttft_rule = Rule { at: slo.ttft_ms, name: ttft_rule };
    let itl_rule = Rule { at: slo.itl_ms, name: format!("SLO: {}", span_tick(slo.itl_ms)) };
    let has_runs = scenario.contenders.iter().any(|contender| contender.run.is_some());
    let share = "Share of all requests; marks at 50, 90 and 99 %. A curve that stays below 100 % lost the rest.";
    let draw = |latency: &'static Latency, rule: Rule| {
        figure(&distribution_title(scenario, latency), share, move |width| {
            distribution(scenario, styles, latency, &rule, width)
        })
    };
    html! {
        section {
            h2 { (scenario.name) }
            p { (verdict(scenario)) ". " (setting(scenario)) }
            ul.legend {
                @for contender in &scenario.contenders {
                    li { (swatch(styles.of(contender))) strong { (contender.mode) } " " span.setup { (contender.setup) } }
                }
            }
            @if let Some(title) = attainment_title(scenario) {
                (figure(&title, "Each mark is one run of the whole trace at that load.", |width| attainment(scenario, styles, width)))
            }
            @if has_runs {
                div.pair { (draw(&TTFT, ttft_rule)) (draw(&TBT, itl_rule)) }
            }
            @if has_runs {
                (figure(&timeline_title(scenario), "", |width| timeline(scenario, styles, width)))
            }
            (searched(scenario))
            h3 { "The numbers" }
            (numbers(scenario))
        }
    }
}

fn setting(scenario: &Scenario) -> String {
    let mut text = match &scenario.load {
        Some(load) => format!(
            "Latencies and timelines are of {} requests/s, {} times the trace's own load: {}. ",
            figures(load.offered_rps),
            figures(load.scale),
            load.reason,
        ),
        None => String::new(),
    };
    text.push_str(match scenario.late.as_deref() {
        Some("last") => {
            "Requests predicted to miss their TTFT are served after all that can still make it."
        }
        Some(_) => "Requests predicted to miss their TTFT are served as they came.",
        None => "",
    });
    if let Some(share) = scenario.min_decile {
        text.push_str(&format!(
            " Goodput also asks {} in the tenth with the longest inputs and in the tenth with the longest outputs.",
            percent(share)
        ));
    }
    text
}

/// What was tried for modes that stand for the best of several setups.
fn searched(scenario: &Scenario) -> Markup {
    html! {
        @for contender in scenario.contenders.iter().filter(|contender| !contender.searched.is_empty()) {
            @let tried = contender.searched.len();
            details {
                summary { "How " (contender.mode) " was tuned: best of " (tried) " setups, " (contender.setup) }
                p { "All are tried at the same loads; who does not hold one that another holds is out." }
                div.scroll {
                    table {
                        thead { tr { th { "setup" } th.number { "seen to hold, requests/s" } } }
                        tbody {
                            @for searched in &contender.searched {
                                tr {
                                    th { (searched.setup) }
                                    td.number {
                                        @if searched.goodput_rps > 0.0 { (figures(searched.goodput_rps)) } @else { "out at the first" }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Which of two values of a row is better.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Better {
    More,
    Less,
    Neither,
}

/// One line of the table: its name, and each contender's value, to compare and to show.
struct Row {
    name: &'static str,
    better: Better,
    cells: Vec<Option<(f64, String)>>,
}

fn rows(scenario: &Scenario) -> Vec<Row> {
    let contenders = &scenario.contenders;
    let row = |name, better, cell: &dyn Fn(&Contender) -> Option<(f64, String)>| Row {
        name,
        better,
        cells: contenders.iter().map(cell).collect(),
    };
    let goodput = |name, of: fn(&super::GoodputFindings) -> Option<f64>| {
        row(name, Better::More, &|contender| {
            let value = of(contender.goodput.as_ref()?)?;
            Some((value, figures(value)))
        })
    };
    let run = |name, better, of: fn(&RunFindings) -> f64, show: fn(f64) -> String| {
        row(name, better, &|contender| {
            let value = of(contender.run.as_ref()?);
            Some((value, show(value)))
        })
    };
    let latency = |name, of: fn(&RunFindings) -> f64| {
        row(name, Better::Less, &|contender| {
            let run = contender.run.as_ref().filter(|run| run.summary.completed > 0)?;
            Some((of(run), span(of(run))))
        })
    };
    let said = |name, of: fn(&RunFindings) -> String| {
        row(name, Better::Neither, &|contender| Some((0.0, of(contender.run.as_ref()?))))
    };
    let of_workers = |name, of: fn(&RunFindings) -> String| {
        row(name, Better::Neither, &|contender| {
            let run = contender.run.as_ref().filter(|run| run.knows_workers())?;
            Some((0.0, of(run)))
        })
    };
    let mut rows = vec![
        goodput("Goodput, 90 % within the SLOs, requests/s", |found| Some(found.rps)),
        goodput("Goodput, 99 % within the SLOs, requests/s", |found| found.rps_p99),
        run("Both SLOs met", Better::More, |run| run.summary.attainment, percent),
        run("TTFT met", Better::More, |run| run.summary.attainment_ttft, percent),
        run("ITL met", Better::More, |run| run.summary.attainment_tbt, percent),
        run(
            "Both met, longest tenth of inputs",
            Better::More,
            |run| run.summary.attainment_longest_input_decile,
            percent,
        ),
        run(
            "Both met, longest tenth of outputs",
            Better::More,
            |run| run.summary.attainment_longest_output_decile,
            percent,
        ),
        latency("TTFT p50", |run| run.summary.ttft_ms.p50),
        latency("TTFT p90", |run| run.summary.ttft_ms.p90),
        latency("TTFT p99", |run| run.summary.ttft_ms.p99),
        latency("TBT p50", |run| run.summary.tbt_ms.p50),
        latency("TBT p90", |run| run.summary.tbt_ms.p90),
        latency("TBT p99", |run| run.summary.tbt_ms.p99),
        latency("TPOT p50", |run| run.summary.tpot_ms.p50),
        latency("TPOT p90", |run| run.summary.tpot_ms.p90),
        latency("End to end p50", |run| run.summary.e2e_ms.p50),
        latency("End to end p90", |run| run.summary.e2e_ms.p90),
        said("Requests completed", |run| count(run.summary.completed)),
        said("Requests rejected", |run| count(run.summary.rejected)),
        said("Requests unfinished", |run| count(run.summary.unfinished)),
        run("Output tokens/s", Better::Neither, |run| run.summary.output_tokens_per_s, figures),
        run(
            "Prompt tokens found in prefix caches",
            Better::Neither,
            |run| run.summary.prefix_hit_ratio,
            percent,
        ),
        said("Requests split between two workers", |run| count(run.summary.disaggregated)),
        of_workers("KV moved between workers", |run| bytes(run.summary.kv_bytes_moved)),
        of_workers("Role flips", |run| run.summary.flips.to_string()),
        of_workers("Hours of prefill workers", |run| hours(run.summary.workers_seconds.prefill)),
        of_workers("Hours of decode workers", |run| hours(run.summary.workers_seconds.decode)),
        of_workers("Hours of workers that do both", |run| hours(run.summary.workers_seconds.mixed)),
    ];
    rows.retain(|row| row.cells.iter().any(Option::is_some));
    rows
}

fn count(requests: usize) -> String {
    tick(super::float(requests))
}

fn hours(seconds: f64) -> String {
    figures(seconds / 3_600.0)
}

impl Row {
    fn is_best(&self, value: f64) -> bool {
        let values = || self.cells.iter().flatten().map(|cell| cell.0);
        let differ = values().any(|other| other != value);
        differ
            && match self.better {
                Better::More => values().all(|other| other <= value),
                Better::Less => values().all(|other| other >= value),
                Better::Neither => false,
            }
    }
}

fn numbers(scenario: &Scenario) -> Markup {
    html! {
        div.scroll {
            table.numbers {
                thead {
                    tr { th { } @for contender in &scenario.contenders { th.number { (contender.mode) } } }
                }
                tbody {
                    @for row in rows(scenario) {
                        tr {
                            th { (row.name) }
                            @for cell in &row.cells {
                                @match cell {
                                    Some((value, shown)) => {
                                        td.number { @if row.is_best(*value) { strong { (shown) } } @else { (shown) } }
                                    }
                                    None => { td.number.nothing { "–" } }
                                }
                            }
                        }
                    }
                }
            }
        }
        @if scenario.contenders.len() > 1 && best(scenario).is_some() { p.note { "Bold: the best of its row." } }
    }
}

fn origin(report: &Report) -> Markup {
    let origin = &report.origin;
    let seeds: Vec<String> = origin.seeds.iter().map(u64::to_string).collect();
    let mut traces: Vec<&super::Input> = Vec::new();
    for scenario in &report.scenarios {
        if !traces.contains(&&scenario.trace) {
            traces.push(&scenario.trace);
        }
    }
    let input = |input: &super::Input| {
        html! {
            code { (input.file) } ": " (input.about)
            @if !input.sha256.is_empty() {
                br {}
                span.hash { "SHA-256 " (input.sha256) }
            }
        }
    };
    html! {
        section {
            h2 { "Run it again" }
            pre { code { (origin.command) } }
            dl {
                dt { "Version" } dd { "baton " (origin.version) }
                dt { (if seeds.len() == 1 { "Seed" } else { "Seeds" }) } dd { (seeds.join(", ")) }
                @if let Some(endpoint) = &origin.endpoint { dt { "Server" } dd { (endpoint) } }
                @if let Some(profile) = &origin.profile { dt { "Profile" } dd { (input(profile)) } }
                @for trace in traces { dt { "Trace" } dd { (input(trace)) } }
            }
            @if let Some(experiment) = &origin.experiment {
                details { summary { "The experiment's file" } pre { code { (experiment) } } }
            }
            p.note { "The same numbers lie beside this page, in results.json and results.csv." }
        }
    }
}
