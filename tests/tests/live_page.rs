//! The page `/ui` in a real browser: it asks for the token, its values change, orders work, and nothing
//! overflows, with four workers or a thousand.

use std::process::Command;

use baton_tests::{ADMIN_TOKEN, Browser, ClusterBuilder, chromium_or_skip};
use serde_json::json;

/// Script errors and what the page's policy forbade. A refused token is no error of the page.
fn no_complaints(browser: &mut Browser) {
    let complaints = browser.complaints();
    let real: Vec<_> = complaints.iter().filter(|text| !text.contains("401")).collect();
    assert!(real.is_empty(), "{real:#?}");
}

fn nothing_overflows(browser: &mut Browser, name: &str) {
    let wide = browser
        .evaluate(
            "[...document.querySelectorAll('body *')].filter((element) => {
               if (element.closest('.scroll, dialog, svg, .track, .gauge')) return false;
               const box = element.getBoundingClientRect();
               return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
             }).map((element) => element.outerHTML.slice(0, 120))",
        )
        .unwrap();
    assert_eq!(wide, json!([]), "{name}");
    let scrolls = browser
        .evaluate("document.scrollingElement.scrollWidth > document.documentElement.clientWidth")
        .unwrap();
    assert_eq!(scrolls, false, "{name}");
}

fn give_token(browser: &mut Browser, token: &str) {
    browser.until("it asks for the token", "document.querySelector('#token-dialog').open").unwrap();
    browser
        .evaluate(&format!(
            "document.querySelector('#token').value = {token:?};
             document.querySelector('#token-dialog .primary').click()"
        ))
        .unwrap();
}

/// Presses a button that asks back, and says yes.
fn order(browser: &mut Browser, button: &str) {
    browser.evaluate(&format!("document.querySelector({button:?}).click()")).unwrap();
    browser
        .until("it asks whether that is meant", "document.querySelector('#confirm-dialog').open")
        .unwrap();
    browser.evaluate("document.querySelector('#confirm-dialog .primary').click()").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_change_live_and_orders_work() {
    let Some(mut browser) = chromium_or_skip("values_change_live_and_orders_work") else { return };
    let cluster = ClusterBuilder::sim()
        .pools(2, 2)
        .engine("time_scale = 0.2")
        .balancer("actuator = \"advise\"")
        .start()
        .await
        .unwrap();
    browser.look(1400, 900, "light").unwrap();
    browser.open(&cluster.admin_url("/ui")).unwrap();
    give_token(&mut browser, "not the token");
    browser
        .until(
            "it says that the token was wrong",
            "document.querySelector('#token-dialog').open
             && !document.querySelector('#token-dialog .wrong').hidden",
        )
        .unwrap();
    give_token(&mut browser, ADMIN_TOKEN);
    browser.until("it is live", "document.querySelector('#standing.live') !== null").unwrap();
    browser
        .until(
            "all workers are there",
            "document.querySelectorAll('#workers tbody tr').length === 4",
        )
        .unwrap();
    assert_eq!(browser.evaluate("document.querySelectorAll('.cell').length").unwrap(), 4);

    // Live: short requests end, a long one stays.
    for number in 0..6 {
        let body = json!({"prompt": format!("Lap {number}. ").repeat(60), "max_tokens": 8,
            "stream": true, "ignore_eos": true});
        cluster.stream("/v1/completions", &body).await.unwrap();
    }
    let long = json!({"prompt": "Once more around. ".repeat(40), "max_tokens": 6000,
        "stream": true, "ignore_eos": true});
    let request = cluster.http.post(cluster.url("/v1/completions"));
    let stream =
        request.header("x-request-id", "<b>the long one</b>").json(&long).send().await.unwrap();
    let decode = stream.headers()["x-baton-decode-worker"].to_str().unwrap().to_owned();
    for (what, expression) in [
        (
            "a request is open",
            "document.querySelector('[data-tile=\"requests open\"] .value')
            .textContent === '1'",
        ),
        ("its bar decodes", "document.querySelector('#open .bar')?.dataset.phase === 'decode'"),
        (
            "an id is text, never markup",
            "document.querySelector('#open .bar .id').textContent
            === '<b>the long one</b>'",
        ),
        ("what ended has bars", "document.querySelectorAll('#ended .bar').length === 6"),
        (
            "TTFT is measured",
            "/ms|s/.test(document.querySelector('[data-tile=\"TTFT p50\"] .value')
            .textContent)",
        ),
        (
            "handoffs have a matrix",
            "document.querySelectorAll('#handoffs td.cell-value').length >= 1",
        ),
        (
            "its transport is named",
            "document.querySelector('#handoffs h2 small').textContent
            .includes('shm')",
        ),
        ("attachments are told", "document.querySelectorAll('#decisions tbody tr').length === 4"),
    ] {
        browser.until(what, expression).unwrap();
    }
    let width = "document.querySelector('#open .bar i.decode').getBoundingClientRect().width > 0";
    browser.until("the bar has a width", width).unwrap();

    // Orders.
    let row = format!("#workers tr[data-worker=\"{decode}\"]");
    order(&mut browser, &format!("{row} button"));
    let shown = format!("document.querySelector('{row} .state').textContent === 'draining'");
    browser.until("it drains", &shown).unwrap();
    let state = cluster.state().await;
    let worker = state["workers"].as_array().unwrap().iter().find(|w| w["name"] == decode.as_str());
    assert_eq!(worker.unwrap()["state"], "draining");
    drop(stream);
    let shown = format!("document.querySelector('{row} .state').textContent === 'drained'");
    browser.until("it has drained", &shown).unwrap();
    order(&mut browser, &format!("{row} button"));
    let shown = format!("document.querySelector('{row} .state').textContent === 'ready'");
    browser.until("it is back", &shown).unwrap();
    order(&mut browser, "[data-mode=aggregated]");
    let pressed = "document.querySelector('[data-mode=aggregated]').getAttribute('aria-pressed')
        === 'true'";
    browser.until("the mode is shown", pressed).unwrap();
    assert_eq!(cluster.state().await["mode"], "aggregated");

    for (scheme, width, height) in
        [("light", 1400, 900), ("dark", 1400, 900), ("light", 390, 844), ("dark", 390, 844)]
    {
        browser.look(width, height, scheme).unwrap();
        let themed = format!("document.documentElement.dataset.theme === '{scheme}'");
        browser.until("it follows the system", &themed).unwrap();
        nothing_overflows(&mut browser, &format!("{scheme} {width}"));
        let in_sight = "[...document.querySelectorAll('#workers tbody button')].every((button) => {
            const box = button.getBoundingClientRect();
            return box.left >= 0 && box.right <= document.documentElement.clientWidth; })";
        assert_eq!(
            browser.evaluate(in_sight).unwrap(),
            true,
            "who is at a phone can drain: {width}"
        );
        browser.screenshot(&format!("four-{scheme}-{width}")).unwrap();
    }
    no_complaints(&mut browser);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_old_looks_old() {
    let Some(mut browser) = chromium_or_skip("what_is_old_looks_old") else { return };
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    browser.look(1400, 900, "light").unwrap();
    browser.open(&cluster.admin_url("/ui")).unwrap();
    give_token(&mut browser, ADMIN_TOKEN);
    browser.until("it is live", "document.querySelector('#standing.live') !== null").unwrap();
    // It holds its connections and answers nothing.
    let coordinator = cluster.process_id("coordinator").unwrap().to_string();
    let signal = |name: &str| Command::new("kill").args([name, &coordinator]).status().unwrap();
    assert!(signal("-STOP").success());
    browser
        .until(
            "it says of when it is",
            "/does not answer: as it was at \\d\\d:/.test(document.querySelector('#standing').textContent)
             && getComputedStyle(document.querySelector('main')).opacity < 1",
        )
        .unwrap();
    assert!(signal("-CONT").success());
    browser
        .until(
            "it is live again",
            "document.querySelector('#standing.live') !== null
             && getComputedStyle(document.querySelector('main')).opacity === '1'",
        )
        .unwrap();
}

/// What the coordinator says, with each worker a hundred times, as the page gets it.
const A_THOUSAND: &str = r#"
  const real = window.fetch;
  window.fetch = async (path, options) => {
    const response = await real(path, options);
    if (path !== "/admin/state" || !response.ok) return response;
    const state = await response.json();
    const [prefill, decode] = ["prefill", "decode"].map((role) =>
      state.workers.find((worker) => worker.role === role));
    state.workers = [];
    for (let at = 0; at < 500; at += 1) for (const worker of [prefill, decode]) {
      state.workers.push({ ...worker, name: `${worker.role}-host-in-some-rack-${at}`,
        state: at % 97 === 5 ? "draining" : "ready", jobs: at % 4,
        load: { prefills: at % 5, prefill_tokens: 1000 * at, decodes: at, queued: at % 3 },
        engine_load: { ...worker.engine_load, kv_used_ratio: (at % 101) / 100 },
        roles: [{ role: "decode", since_unix_ms: state.at_unix_ms - 9e6 },
          { role: "prefill", since_unix_ms: state.at_unix_ms - 5e6 },
          { role: worker.role, since_unix_ms: state.at_unix_ms - 1e6 }] });
    }
    state.requests_open = 4321;
    state.requests = Array.from({ length: 300 }, (_, at) => ({ id: `${"request-".repeat(8)}${at}`,
      model: "m", phase: "decode", path: "disaggregated", reason: "",
      prefill_worker: `prefill-host-in-some-rack-${at}`,
      decode_worker: `decode-host-in-some-rack-${at}`, prompt_tokens: 100, attempts: 1 + at % 2,
      phases: { queue_ms: 5 * at, prefill_ms: 300, handoff_ms: 4 + at, decode_ms: 9000 - 20 * at } }));
    state.handoffs = { bytes: 1e13, pairs: 200000, busiest: Array.from({ length: 1024 }, (_, at) => ({
      from: `prefill-host-in-some-rack-${at % 500}`,
      to: `decode-host-in-some-rack-${(7 * at) % 500}`, handoffs: 10 + at, blocks: 1000,
      bytes: 1e9 * (1 + at % 7), micros: 1e5 * (1 + at % 11), transport: at % 5 ? "ucx" : "quic" })) };
    state.decisions = Array.from({ length: 200 }, (_, at) => ({ at_unix_ms: state.at_unix_ms - 1000 * at,
      kind: "flip", subject: `prefill-host-in-some-rack-${at}`, by: "balancer",
      reason: "TTFT was over its SLO in every prefill worker for 30 s while decode had 40 % slack ".repeat(2) }));
    return new Response(JSON.stringify(state),
      { headers: { "content-type": "application/json" } });
  };
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_workers_fit() {
    let Some(mut browser) = chromium_or_skip("a_thousand_workers_fit") else { return };
    let cluster = ClusterBuilder::sim().start().await.unwrap();
    browser.before_pages(A_THOUSAND).unwrap();
    browser.look(1400, 900, "light").unwrap();
    browser.open(&cluster.admin_url("/ui")).unwrap();
    give_token(&mut browser, ADMIN_TOKEN);
    browser
        .until("a cell for each", "document.querySelectorAll('.pool .cell').length === 1000")
        .unwrap();
    let rows = "document.querySelectorAll('#workers tbody tr').length";
    assert_eq!(browser.evaluate(rows).unwrap(), 25);
    assert_eq!(browser.evaluate("document.querySelectorAll('#open .bar').length").unwrap(), 40);
    browser.evaluate("document.querySelector('#more').click()").unwrap();
    assert_eq!(browser.evaluate(rows).unwrap(), 125);
    browser
        .evaluate(
            "const filter = document.querySelector('#filter');
             filter.value = 'decode draining'; filter.dispatchEvent(new Event('input'))",
        )
        .unwrap();
    assert_eq!(browser.evaluate(rows).unwrap(), 6);
    browser
        .evaluate(
            "const box = document.querySelector('#filter');
             box.value = ''; box.dispatchEvent(new Event('input'))",
        )
        .unwrap();
    for (scheme, width) in [("light", 1400), ("dark", 1400), ("dark", 390)] {
        browser.look(width, 900, scheme).unwrap();
        let themed = format!("document.documentElement.dataset.theme === '{scheme}'");
        browser.until("it follows the system", &themed).unwrap();
        nothing_overflows(&mut browser, &format!("{scheme} {width}"));
        browser.screenshot(&format!("thousand-{scheme}-{width}")).unwrap();
    }
    no_complaints(&mut browser);
}
