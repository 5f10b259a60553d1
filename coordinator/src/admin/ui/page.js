// Asks the coordinator once a second, and takes orders to it.
import { clock, duration, quantile, between } from "./measure.js";
import { drawDecisions, drawHandoffs, drawPools, drawRequests, drawTiles, drawWorkers, received }
  from "./panels.js";

const find = (selector) => document.querySelector(selector);
const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
const KEPT_READINGS = 120;
const WINDOW_READINGS = 30;

let token = sessionStorage.getItem("baton-token") ?? "";
let state = null;
const readings = [];
const samples = [];
const view = { filter: "", order: "name", rows: 25 };

// The coordinator -------------------------------------------------------------------------------

class WrongToken extends Error {}

async function ask(path, options = {}) {
  const response = await fetch(path,
    { ...options, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS), headers: { authorization: `Bearer ${token}`, ...options.headers } });
  if (response.status === 401) throw new WrongToken();
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? `${response.status}`);
  return body;
}

function stand(className, text) {
  find("#standing").className = className;
  find("#standing .text").textContent = text;
  document.body.classList.toggle("old", className === "lost");
}

async function look() {
  try {
    take(await ask("/admin/state"));
    stand("live", "live");
  } catch (error) {
    if (error instanceof WrongToken) {
      stand("lost", "no token");
      await askForToken(token !== "");
      return look();
    }
    // What is shown is old, and looks it.
    stand("lost", state === null ? "the coordinator does not answer"
      : `the coordinator does not answer: as it was at ${clock(state.at_unix_ms)}`);
  }
}

async function follow() {
  for (;;) {
    if (!document.hidden || state === null) await look();
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}

// What came --------------------------------------------------------------------------------------

/** What later readings are compared with. */
function essence(reading) {
  const { at_unix_ms, uptime_seconds, requests_ended, output_tokens, latency } = reading;
  return { at_unix_ms, uptime_seconds, requests_ended, output_tokens, latency,
    received_bytes: received(reading) };
}

function take(reading) {
  // One that started anew counts from zero.
  if (readings.length > 0 && reading.uptime_seconds < readings.at(-1).uptime_seconds) {
    readings.length = 0;
    samples.length = 0;
  }
  state = reading;
  const last = readings.at(-1);
  readings.push(essence(reading));
  if (readings.length > WINDOW_READINGS) readings.shift();
  if (last) {
    const seconds = Math.max((reading.at_unix_ms - last.at_unix_ms) / 1000, 0.001);
    const median = (name) => quantile(between(last.latency[name], reading.latency[name]), 0.5);
    samples.push({
      open: reading.requests_open,
      tokens: (reading.output_tokens - last.output_tokens) / seconds,
      bytes: Math.max(readings.at(-1).received_bytes - last.received_bytes, 0) / seconds,
      ttft: median("ttft"), itl: median("itl"),
    });
    if (samples.length > KEPT_READINGS) samples.shift();
  }
  draw();
}

function draw() {
  if (state === null) return;
  find("#about").textContent = `baton ${state.version}, up ${duration(state.uptime_seconds)}`;
  for (const button of document.querySelectorAll("#modes button")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
  }
  drawTiles(state, samples, readings[0]);
  drawPools(state);
  drawWorkers(state, view, orderWorker);
  drawRequests(state);
  drawHandoffs(state);
  drawDecisions(state);
}

// Orders -----------------------------------------------------------------------------------------

function said(text) {
  const box = find("#said");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(box.timer);
  box.timer = setTimeout(() => { box.hidden = true; }, 8000);
}

function closed(dialog) {
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
  });
}

async function askForToken(wasWrong) {
  const dialog = find("#token-dialog");
  dialog.querySelector(".wrong").hidden = !wasWrong;
  find("#token").value = "";
  await closed(dialog);
  token = find("#token").value.trim();
  sessionStorage.setItem("baton-token", token);
}

async function isSure(title, text, yes) {
  const dialog = find("#confirm-dialog");
  dialog.querySelector("h2").textContent = title;
  dialog.querySelector("p").textContent = text;
  dialog.querySelector(".primary").textContent = yes;
  dialog.returnValue = "no";
  return (await closed(dialog)) === "yes";
}

async function order(path, body) {
  try {
    await ask(path, { method: "POST", body: JSON.stringify(body),
      headers: { "content-type": "application/json" } });
    await look();
  } catch (error) {
    said(error instanceof WrongToken ? "The token is not the coordinator's any more." : error.message);
  }
}

async function orderWorker(worker, what) {
  const text = what === "drain"
    ? "It ends what it has, handoffs too, and is given nothing new until it is undrained or starts anew."
    : "It is given requests again.";
  if (await isSure(`${what} ${worker}?`, text, what)) {
    await order(`/admin/workers/${encodeURIComponent(worker)}/${what}`, {});
  }
}

const MODES = {
  aggregated: "From now on no request is split: each worker computes prompt and answer.",
  disaggregated: "From now on every request that can be is split between the two pools.",
  adaptive: "From now on it is decided by each request whether it is split.",
};

for (const button of document.querySelectorAll("#modes button")) {
  button.addEventListener("click", async () => {
    const { mode } = button.dataset;
    if (mode !== state?.mode
      && await isSure(`Switch to ${mode}?`, `${MODES[mode]} Those that run go on as they are.`, "switch")) {
      await order("/admin/mode", { mode });
    }
  });
}

find("#filter").addEventListener("input", (event) => { view.filter = event.target.value; draw(); });
find("#order").addEventListener("change", (event) => { view.order = event.target.value; draw(); });
find("#more").addEventListener("click", () => { view.rows += 100; draw(); });
find("#forget").addEventListener("click", () => {
  sessionStorage.removeItem("baton-token");
  location.reload();
});

// Light and dark ---------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = localStorage.getItem("baton-theme") ?? "auto";

function paint() {
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  find("#theme").textContent = `theme: ${theme}`;
}

find("#theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("baton-theme", theme);
  paint();
});
dark.addEventListener("change", paint);
paint();
follow();
