// The one stream of a page: GET /live. htmx and its sse extension read it and swap what it brings; this file decides when to
// connect, what counts as live, and when to stop. The extension alone never retries a first connection, retries a 401 for ever
// and hammers a server that accepts and closes, so each connection here is a single one, and the loop around it is ours.

const box = document.getElementById("live");
const badge = document.getElementById("badge");
const words = document.getElementById("badge-text");
const act = document.getElementById("badge-act");
const line = document.getElementById("stale-line");

const BACKOFF_MAX = 30_000;
const HIDDEN_GRACE = 30_000;

let cursor = "";
let heartbeat = Number(box.dataset.heartbeat || 15) * 1000;
let lastSign = 0; // when anything was heard
let freshAt = new Date(); // up to when this page is true
let live = false;
let paused = false;
let over = false; // signed out, or told not to come back
let dormant = false; // hidden for long
let failures = 0;
let running = null; // {closing, status, redirected}
let wake = null; // ends the present wait
let hint = null; // retry: of the server, in ms
let countdown = 0;

// ── What the reader sees ──

function clock(date) {
  return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

function show(state, text, action) {
  badge.dataset.state = state;
  words.textContent = state === "live" || state === "connecting" ? text : `${text} · as of ${clock(freshAt)}`;
  act.hidden = !action;
  act.textContent = action || "";
  const stale = state !== "live" && state !== "connecting";
  line.hidden = !stale;
  document.body.dataset.live = state;
}

act.addEventListener("click", () => {
  if (over) location.assign(`/signin?next=${encodeURIComponent(location.pathname + location.search)}`);
  else if (live) pause(true);
  else if (paused) pause(false);
  else wake?.();
});

export function pause(on = !paused) {
  if (over || on === paused) return;
  paused = on;
  if (on) {
    drop();
    show("paused", "⏸ Paused", "Go on");
  } else {
    failures = 0;
    wake?.();
  }
}

// ── One connection ──

function drop() {
  // Ends the running connection, wherever it is: before its headers, or while it streams.
  if (!running) return;
  running.closing = true;
  box._htmx?.sse?.abortController?.abort();
  running.abort?.();
}

async function connect() {
  running = { closing: false, status: 0, redirected: false, streamed: false, ready: false };
  const mine = running;
  const headers = { Accept: "text/event-stream" };
  if (cursor) headers["Last-Event-ID"] = cursor;
  lastSign = Date.now();
  try {
    await htmx.ajax("GET", box.dataset.url, { source: box, target: box, swap: "none", headers, timeout: 15_000 });
  } catch (error) {
    console.warn("live:", error);
  }
  if (running === mine) running = null;
  live = false;
  return mine;
}

const on = (name, handler) => box.addEventListener(name, handler);

on("htmx:before:request", (event) => {
  const { ctx } = event.detail;
  if (running) running.abort = () => ctx.request.abort();
});
// Only answers that are no stream come here: nothing of them is ever swapped.
on("htmx:before:response", (event) => {
  const { raw } = event.detail.ctx.response;
  if (running) Object.assign(running, { status: raw.status, redirected: raw.redirected, retry: raw.headers.get("Retry-After") });
  event.preventDefault();
});
on("htmx:sse:after:connection", (event) => {
  if (running) Object.assign(running, { status: event.detail.connection.status, streamed: true });
});
on("htmx:sse:before:message", (event) => {
  lastSign = Date.now();
  freshAt = new Date();
  if (running?.closing) event.preventDefault();
});
on("htmx:sse:after:message", (event) => {
  // The cursor means "on the page", so it moves after the swap.
  if (event.detail.message.id) cursor = event.detail.message.id;
  if (!event.detail.message.event) document.dispatchEvent(new CustomEvent("live:news", { detail: event.detail.message.id }));
});

function data(event) {
  try {
    return JSON.parse(event.detail.data) ?? {};
  } catch {
    return {};
  }
}

on("welcome", (event) => {
  heartbeat = (data(event).heartbeat_seconds || 15) * 1000;
});
on("ready", (event) => {
  const { cursor: at } = data(event);
  if (Number.isInteger(at)) cursor = String(at);
  if (running) running.ready = true;
  failures = 0;
  live = true;
  show("live", "● Live", "Pause");
  act.setAttribute("aria-label", "Pause live updates");
});
on("counts", (event) => document.dispatchEvent(new CustomEvent("live:counts", { detail: data(event) })));
on("appeared", (event) => document.dispatchEvent(new CustomEvent("live:appeared", { detail: data(event) })));
on("reset", (event) => {
  const { cursor: at } = data(event);
  if (Number.isInteger(at)) cursor = String(at);
  refetch();
});
on("end", (event) => {
  const { reason, reconnect } = data(event);
  if (running) running.end = { reason, reconnect };
});
on("superseded", () => {
  if (running) running.end = { reason: "superseded", reconnect: false };
});

export function refetch() {
  // The same view again, morphed in: what is being typed stays, and data-rev keeps newer parts from older ones.
  const main = document.getElementById("main");
  return htmx.ajax("GET", location.pathname + location.search, { source: main, target: main, select: "#main", swap: "outerMorph" });
}

// ── The loop ──

function wait(ms) {
  return new Promise((resolve) => {
    const timer = ms === Infinity ? 0 : setTimeout(done, ms);
    function done() {
      clearTimeout(timer);
      clearInterval(countdown);
      wake = null;
      resolve();
    }
    wake = done;
  });
}

function finish(state, text, action) {
  over = true;
  show(state, text, action);
}

async function again(outcome) {
  if (paused) return wait(Infinity);
  if (dormant) return wait(Infinity);
  const gone = outcome.redirected || [401, 403, 410].includes(outcome.status);
  if (gone || ["session_over", "forbidden"].includes(outcome.end?.reason)) return finish("signed-out", "Signed out", "Sign in");
  if (outcome.end && outcome.end.reconnect === false) return finish("ended", "Ended", "Sign in");
  if (!navigator.onLine) {
    show("offline", "⚡ Offline");
    return wait(Infinity);
  }
  if (outcome.closing) return undefined;
  // Only a stream that said "ready" counts as having worked; a life of hours may end without a penalty.
  failures = outcome.ready ? 1 : failures + 1;
  let delay = Math.min(BACKOFF_MAX, 500 * 2 ** Math.min(failures, 7)) * (0.7 + Math.random() * 0.6);
  const asked = Number(outcome.retry) * 1000;
  if (asked > 0) delay = Math.min(asked, 120_000) * (1 + Math.random() * 0.2);
  if (outcome.end?.reconnect) delay = Math.min(hint ?? delay, 5_000) * Math.random();
  const until = Date.now() + delay;
  const tick = () => show("reconnecting", `↻ Reconnecting in ${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s`, "Now");
  tick();
  clearInterval(countdown);
  countdown = setInterval(tick, 500);
  return wait(delay);
}

async function run() {
  while (!over) {
    if (!failures) show("connecting", "Connecting…");
    const outcome = await connect();
    await again(outcome);
  }
}

// A connection can die without a word. Two and a half heartbeats of silence are enough.
setInterval(() => {
  if (running?.streamed && Date.now() - lastSign > heartbeat * 2.5) drop();
}, 1000);

addEventListener("online", () => wake?.());
addEventListener("offline", () => {
  drop();
  wake?.();
});

// A browser gives a host six connections over HTTP/1.1: a hidden tab gives its one back after a while.
let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) {
    hiding = setTimeout(() => {
      dormant = true;
      drop();
    }, HIDDEN_GRACE);
  } else if (dormant) {
    dormant = false;
    if (!paused) wake?.();
  }
});
addEventListener("pagehide", drop);
addEventListener("pageshow", (event) => {
  if (event.persisted) wake?.();
});

// ── Newer beats older ──

const rev = (element) => Number(element?.dataset?.rev ?? NaN);

htmx.registerExtension("rev", {
  // Within a morph: a part that is older than the one on the page stays out, wherever it came from.
  htmx_before_morph_node: (element, { oldNode, newNode }) => !(rev(newNode) < rev(oldNode)),
});
document.addEventListener("htmx:before:swap", (event) => {
  const { ctx, tasks } = event.detail;
  for (let i = tasks.length - 1; i >= 0; i -= 1) {
    const { target, fragment, type } = tasks[i];
    if (type !== "partial") continue;
    const part = fragment.firstElementChild;
    // A part of the stream that is not newer brings nothing, and could take away what a form just said.
    if (target && ctx.sourceElement === box && rev(part) <= rev(target)) tasks.splice(i, 1);
    else if (!target) document.dispatchEvent(new CustomEvent("live:absent", { detail: { part, task: tasks[i] } }));
  }
});

run();
