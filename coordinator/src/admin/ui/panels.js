// Draws what the coordinator says. All words of others go in as text, never as markup.
import { amount, attained, between, bytes, clock, duration, milliseconds, quantile, total }
  from "./measure.js";

const find = (selector) => document.querySelector(selector);
// One for all: `localeCompare` makes one for each two names, which a thousand workers feel.
const inOrder = new Intl.Collator("en", { numeric: true }).compare;
const FEW_CELLS = 64;
const MATRIX = 24;
const BARS = 40;
const ENDED = 15;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Sets text only where it differs, so that what a person has selected stays. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keeps one child an item, in order; children are made once and changed afterwards. */
function keep(parent, items, key, create, change) {
  const known = parent.known ??= new Map();
  const seen = new Set();
  items.forEach((item, at) => {
    const name = key(item);
    seen.add(name);
    let child = known.get(name);
    if (!child) {
      child = create(item);
      known.set(name, child);
    }
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] ?? null);
    change(child, item);
  });
  for (const [name, child] of known) {
    if (!seen.has(name)) {
      child.remove();
      known.delete(name);
    }
  }
}

// Now, and the last minutes ---------------------------------------------------------------------

function tile(name) {
  const box = make("div", "tile");
  box.dataset.tile = name;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "line"),
    document.createElementNS(svg.namespaceURI, "polyline"));
  box.append(make("div", "name", name), make("div", "value"), make("div", "more"), svg);
  return box;
}

function line(box, values, limit) {
  const [rule, curve] = box.querySelector("svg").children;
  const most = Math.max(...values.filter((v) => v !== null), limit ?? 0, 1e-9);
  const y = (value) => (19 - 18 * (value / most)).toFixed(2);
  const step = 100 / Math.max(values.length - 1, 1);
  curve.setAttribute("points", values
    .map((value, at) => (value === null ? "" : `${(at * step).toFixed(2)},${y(value)}`)).join(" "));
  for (const [name, value] of [["x1", 0], ["x2", limit ? 100 : 0], ["y1", limit ? y(limit) : 0],
    ["y2", limit ? y(limit) : 0]]) rule.setAttribute(name, value);
}

/** `samples`: what each reading gave, oldest first; `window` is the one to compare with. */
export function drawTiles(state, samples, window) {
  const seconds = (state.at_unix_ms - window.at_unix_ms) / 1000;
  const rate = (of) => (seconds > 0 ? Math.max(of(state) - of(window), 0) / seconds : 0);
  const ended = (s) => Object.values(s.requests_ended).reduce((sum, count) => sum + count, 0);
  const ok = (s) => s.requests_ended.ok ?? 0;
  const latency = (name, slo) => {
    const buckets = between(window.latency?.[name], state.latency[name]);
    const [p50, p99] = [quantile(buckets, 0.5), quantile(buckets, 0.99)];
    const share = attained(buckets, slo / 1000);
    return {
      value: p50 === null ? "–" : milliseconds(p50 * 1000),
      more: p50 === null ? `SLO ${milliseconds(slo)}`
        : `p99 ${milliseconds(p99 * 1000)} · ${(share * 100).toFixed(1)} % within ${milliseconds(slo)}`,
      standing: share === null ? "" : share >= 0.99 ? "within" : share < 0.9 ? "over" : "",
      values: samples.map((s) => s[name]), limit: slo / 1000,
    };
  };
  const failed = rate((s) => ended(s) - ok(s));
  const tiles = [
    { name: "requests open", value: amount(state.requests_open),
      more: `${amount(rate(ended))}/s end${failed ? `, ${amount(failed)}/s not ok` : ""}`,
      values: samples.map((s) => s.open) },
    { name: "output tokens/s", value: amount(rate((s) => s.output_tokens)), more: "",
      values: samples.map((s) => s.tokens) },
    { name: "TTFT p50", ...latency("ttft", state.slo.ttft_ms) },
    { name: "ITL p50", ...latency("itl", state.slo.itl_ms) },
    { name: "handed over", value: `${bytes(rate((s) => s.received_bytes ?? received(s)))}/s`,
      more: `${amount(state.handoffs.pairs)} pairs of workers`,
      values: samples.map((s) => s.bytes) },
  ];
  keep(find("#tiles"), tiles, (t) => t.name, (t) => tile(t.name), (box, t) => {
    box.className = `tile ${t.standing ?? ""}`;
    say(box.children[1], t.value);
    say(box.children[2], t.more);
    line(box, t.values, t.limit);
  });
}

export const received = (state) =>
  state.workers.reduce((sum, worker) => sum + worker.handoffs.bytes_received, 0);

// Pools and workers -----------------------------------------------------------------------------

export function drawPools(state) {
  for (const pool of document.querySelectorAll(".pool")) {
    const workers = state.workers.filter((worker) => worker.role === pool.dataset.role);
    const out = workers.filter((worker) => worker.state !== "ready").length;
    say(pool.querySelector("small"),
      `${amount(workers.length)} attached${out ? `, ${out} draining or drained` : ""}`);
    pool.classList.toggle("many", workers.length > FEW_CELLS);
    keep(pool.querySelector(".cells"), workers, (w) => w.name, (w) => {
      const cell = make("div", "cell");
      cell.dataset.worker = w.name;
      cell.addEventListener("pointerenter", () => {
        const { name, state: standing, jobs, engine_load } = cell.worker;
        cell.title = `${name}: ${standing}, ${jobs} jobs, KV ${Math.round(engine_load.kv_used_ratio * 100)} %`;
      });
      return cell;
    }, (cell, w) => {
      cell.worker = w;
      const name = `cell ${w.state} ${w.jobs > 0 ? "busy" : ""}`;
      if (cell.className !== name) cell.className = name;
      const used = w.engine_load.kv_used_ratio.toFixed(2);
      if (cell.used !== used) cell.style.setProperty("--used", cell.used = used);
    });
  }
}

function gauge(cell, share, text) {
  if (!cell.firstChild) {
    const box = make("div", "gauge");
    box.append(make("i"), make("b"));
    cell.append(box);
  }
  const [fill, label] = cell.firstChild.children;
  fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  say(label, text);
}

/** Blocks to send and blocks that come have slots of their own. */
function fullerHalf({ slots, slots_used, import_slots, import_slots_used }) {
  return Math.max(import_slots_used / Math.max(import_slots, 1),
    (slots_used - import_slots_used) / Math.max(slots - import_slots, 1));
}

function roles(cell, spells, now) {
  const box = cell.firstChild ?? cell.appendChild(make("div", "roles"));
  const spans = spells.map((spell, at) =>
    ({ ...spell, ms: Math.max((spells[at + 1]?.since_unix_ms ?? now) - spell.since_unix_ms, 1) }));
  keep(box, spans, (s) => s.since_unix_ms, (s) => make("i", s.role), (part, s) => {
    part.style.flexGrow = s.ms;
    part.title = `${s.role} since ${clock(s.since_unix_ms)} (${duration(s.ms / 1000)})`;
  });
}

const moved = (worker) => worker.handoffs.bytes_sent + worker.handoffs.bytes_received;
const ORDERS = {
  name: (a, b) => inOrder(a.name, b.name),
  jobs: (a, b) => b.jobs - a.jobs,
  kv: (a, b) => b.engine_load.kv_used_ratio - a.engine_load.kv_used_ratio,
  bytes: (a, b) => moved(b) - moved(a),
};

/** `view`: { filter, order, rows }; `act(worker, order)` is called by a row's button. */
export function drawWorkers(state, view, act) {
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (w) => words.every((word) => `${w.name} ${w.role} ${w.state}`.includes(word));
  const fitting = state.workers.filter(fits)
    .sort((a, b) => ORDERS[view.order](a, b) || ORDERS.name(a, b));
  const shown = fitting.slice(0, view.rows);
  say(find("#workers h2 small"), `${amount(shown.length)} of ${amount(state.workers.length)} shown`);
  const more = find("#more");
  more.hidden = shown.length === fitting.length;
  say(more, `show ${amount(Math.min(100, fitting.length - shown.length))} more`);
  keep(find("#workers tbody"), shown, (w) => w.name, (w) => {
    const row = make("tr");
    row.dataset.worker = w.name;
    for (let at = 0; at < 15; at += 1) row.append(make("td"));
    row.children[0].className = "name";
    row.children[2].append(make("span"));
    for (const at of [3, 4, 5, 6, 9, 10, 11]) row.children[at].className = "n";
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", () => act(row.dataset.worker, button.dataset.order));
    row.children[14].append(button);
    return row;
  }, (row, w) => {
    const [name, role, standing, prefill, decode, queued, waiting, kv, arena, sent, got, failed,
      spells, epoch, order] = row.children;
    say(name, w.name);
    name.title = `${w.name}: ${w.engine}, ${w.models.join(", ")}`;
    say(role, w.role);
    role.className = `role-${w.role}`;
    standing.firstChild.className = `state ${w.state}`;
    say(standing.firstChild, w.state);
    say(prefill, amount(w.load.prefills));
    say(decode, amount(w.load.decodes));
    say(queued, amount(w.load.queued));
    say(waiting, amount(w.engine_load.waiting));
    gauge(kv, w.engine_load.kv_used_ratio, `${(w.engine_load.kv_used_ratio * 100).toFixed(0)} %`);
    gauge(arena, fullerHalf(w.arena),
      `${amount(w.arena.slots_used)}/${amount(w.arena.slots)}`);
    say(sent, bytes(w.handoffs.bytes_sent));
    say(got, bytes(w.handoffs.bytes_received));
    const errors = Object.entries(w.handoffs.errors);
    say(failed, amount(errors.reduce((sum, [, count]) => sum + count, 0)));
    failed.title = errors.map(([why, count]) => `${why}: ${count}`).join("\n");
    roles(spells, w.roles, state.at_unix_ms);
    say(epoch, w.epoch.slice(0, 8));
    epoch.title = w.epoch;
    const button = order.firstChild;
    button.dataset.order = w.state === "ready" ? "drain" : "undrain";
    say(button, button.dataset.order);
  });
}

// Requests --------------------------------------------------------------------------------------

const PHASES = ["queue", "prefill", "handoff", "decode"];

function bar(request) {
  const row = make("div", "bar");
  row.dataset.request = request.id;
  const track = make("div", "track");
  for (const phase of PHASES) track.append(make("i", phase));
  row.append(make("div", "id"), track, make("div", "time"));
  return row;
}

function drawBars(parent, requests, empty) {
  const longest = Math.max(...requests.map((r) => total(r.phases)), 1);
  // Ids are the clients' own, and may come twice.
  const items = requests.map((r, at) => ({ ...r, at }));
  keep(parent, items, (r) => r.at, bar, (row, r) => {
    const [id, track, time] = row.children;
    row.dataset.request = r.id;
    row.dataset.phase = r.phase ?? "";
    row.classList.toggle("not-ok", r.outcome !== undefined && r.outcome !== "ok");
    say(id, r.id);
    const way = r.prefill_worker ? `${r.prefill_worker} → ${r.decode_worker}` : r.decode_worker;
    row.title = `${r.id}\n${r.path || "not placed"}${r.reason ? ` (${r.reason})` : ""} ${way}\n`
      + PHASES.map((phase) => `${phase} ${milliseconds(r.phases[`${phase}_ms`])}`).join(" · ")
      + (r.attempts > 1 ? `\n${r.attempts} attempts` : "");
    PHASES.forEach((phase, at) => {
      track.children[at].style.width = `${(r.phases[`${phase}_ms`] / longest) * 100}%`;
    });
    say(time, r.outcome && r.outcome !== "ok" ? r.outcome : milliseconds(total(r.phases)));
  });
  let none = parent.nextElementSibling;
  if (!none?.classList.contains("empty")) {
    none = make("p", "empty", empty);
    parent.after(none);
  }
  none.hidden = requests.length > 0;
}

export function drawRequests(state) {
  const open = state.requests.slice(0, BARS);
  say(find("#requests h2 small"), state.requests_open > open.length
    ? `the ${open.length} oldest of ${amount(state.requests_open)}` : amount(state.requests_open));
  drawBars(find("#open"), open, "None is open.");
  drawBars(find("#ended"), state.ended.slice(-ENDED).reverse(), "None has ended yet.");
}

// Handoffs --------------------------------------------------------------------------------------

const speed = (pair) => (pair.micros > 0 ? (1e6 * pair.bytes) / pair.micros : 0);
const told = (pair) => `${pair.from} → ${pair.to}: ${amount(pair.handoffs)} handoffs, `
  + `${bytes(pair.bytes)} over ${pair.transport}, ${bytes(speed(pair))}/s`
  + (pair.failed > 0 ? `; ${amount(pair.failed)} failed` : "");

function cell(pair, fastest) {
  const td = make("td", "cell-value", pair ? `${bytes(speed(pair))}/s` : "");
  if (pair) {
    td.title = told(pair);
    td.style.setProperty("--heat", (speed(pair) / fastest).toFixed(2));
    if (pair.failed > 0) td.append(make("b", "wrong", ` ${amount(pair.failed)} failed`));
  }
  return td;
}

export function drawHandoffs(state) {
  const pairs = state.handoffs.busiest;
  const named = (of) => [...new Set(pairs.map(of))].sort(inOrder);
  const [senders, receivers] = [named((p) => p.from), named((p) => p.to)];
  const carried = named((p) => p.transport).filter(Boolean).join(", ");
  const table = find("#handoffs table");
  const rows = [];
  const isMatrix = senders.length <= MATRIX && receivers.length <= MATRIX;
  const most = isMatrix ? pairs.length : 50;
  say(find("#handoffs h2 small"), pairs.length === 0 ? "none yet"
    : `${carried ? `over ${carried}` : "none got through"}${most < state.handoffs.pairs ? `; the busiest of ${amount(state.handoffs.pairs)} pairs` : ""}`);
  const header = (names) => {
    const row = make("tr");
    row.append(...names.map((name) => make("th", "", name)));
    return row;
  };
  const fastest = Math.max(...pairs.map(speed), 1e-9);
  if (pairs.length > 0 && isMatrix) {
    const at = new Map(pairs.map((pair) => [`${pair.from}\n${pair.to}`, pair]));
    rows.push(header(["", ...receivers]));
    for (const from of senders) {
      const row = make("tr");
      row.append(make("th", "", from),
        ...receivers.map((to) => cell(at.get(`${from}\n${to}`), fastest)));
      rows.push(row);
    }
  } else if (pairs.length > 0) {
    rows.push(header(["from", "to", "transport", "handoffs", "moved", "speed"]));
    for (const pair of [...pairs].sort((a, b) => b.bytes - a.bytes).slice(0, most)) {
      const row = make("tr");
      row.append(make("td", "name", pair.from), make("td", "name", pair.to),
        make("td", "", pair.transport), make("td", "n", amount(pair.handoffs)),
        make("td", "n", bytes(pair.bytes)), cell(pair, fastest));
      rows.push(row);
    }
  }
  table.replaceChildren(...rows);
}

// Decisions -------------------------------------------------------------------------------------

export function drawDecisions(state) {
  const newest = state.decisions.slice(-60).reverse();
  find("#decisions tbody").replaceChildren(...newest.map((decision) => {
    const row = make("tr");
    row.append(make("td", "", clock(decision.at_unix_ms)), make("td", "", decision.kind),
      make("td", "name", decision.subject), make("td", "why", decision.reason),
      make("td", "", decision.by));
    return row;
  }));
}
