/**
 * The hosted login page, live: carries out what login-state.js decides. Without this script the page is plain forms that reload.
 * Modules of this page alone; nothing of the dashboard.
 */

import { initial, reduce } from "./login-state.js";
import { readStream, retryAfter } from "./sse.js";

const WATCHDOG_MS = 2.5 * 15_000; // the server sends something at least every 15 s
const POST_MS = 15_000;
const RETURN_MS = 3_000;
const SLOW_MS = 45_000;
const WARNINGS = [120, 30]; // seconds left at which the remaining time is announced

const main = document.getElementById("hosted");
const base = `/login/${encodeURIComponent(main.dataset.connection)}`;
const streamUrl = `/auth/connections/${encodeURIComponent(main.dataset.connection)}/events`;
const csrf = document.querySelector("#csrf input").value;
/** The server's clock minus this device's, so that "time left" is right on a phone that is wrong. */
const clockAhead = Date.parse(main.dataset.now) - Date.now();
const policy = globalThis.trustedTypes?.createPolicy("switchboard", { createHTML: (html) => html });

const timers = new Map();
let stream = null; // AbortController of the stream that counts
let post = null; // AbortController of the answer on its way
let shownAt = Date.now();
let announced = new Set();
let state = initial(cardOf(currentCard()));

// ── small parts ──

function currentCard() {
  return document.getElementById("card");
}

/** The state of a card, read from its own attributes; null for a card without one (PRIME). */
function cardOf(element, html) {
  const data = element?.dataset;
  if (!data?.version) return null;
  return {
    version: Number(data.version), flow: data.flow, status: data.status, step: data.step, interaction: data.interaction,
    outcome: data.outcome, code: data.code, message: data.message, html,
  };
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = policy ? policy.createHTML(html) : html;
  return template.content.firstElementChild;
}

function cardFrom(body) {
  if (typeof body?.html !== "string") return null;
  const element = parse(body.html);
  const card = cardOf(element, body.html);
  return card ?? { html: body.html, version: 0, outcome: element?.dataset.outcome };
}

function later(name, delay, task) {
  cancel(name);
  timers.set(name, setTimeout(() => {
    timers.delete(name);
    task();
  }, delay));
}

function cancel(name) {
  clearTimeout(timers.get(name));
  timers.delete(name);
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Storage may be switched off or full; then the page merely remembers less. */
function remember(key) {
  try {
    if (sessionStorage.getItem(key)) return false;
    sessionStorage.setItem(key, "1");
  } catch {
    return true;
  }
  return true;
}

function announce(text) {
  document.getElementById("status").textContent = text;
}

async function call(path, { body = null, headers = {}, signal } = {}) {
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), POST_MS); // over headers and body
  signal?.addEventListener("abort", () => limit.abort(), { once: true });
  try {
    const response = await fetch(base + path, {
      method: body ? "POST" : "GET",
      body,
      headers: { Accept: "application/json", ...(body ? { "X-CSRFToken": csrf } : {}), ...headers },
      credentials: "same-origin",
      cache: "no-store",
      signal: limit.signal,
    });
    const isJson = (response.headers.get("Content-Type") ?? "").startsWith("application/json");
    // A 2xx that is not ours (a proxy's page) says nothing about what happened: as good as no answer.
    if (response.ok && !isJson) return { status: 0 };
    return { status: response.status, retryAfter: retryAfter(response), body: isJson ? await response.json() : {} };
  } catch {
    return { status: 0, aborted: signal?.aborted === true };
  } finally {
    clearTimeout(timer);
  }
}

// ── actions in, effects out ──

function dispatch(action) {
  const [next, effects] = reduce(state, action);
  state = next;
  for (const effect of effects) EFFECTS[effect.type](effect);
}

const EFFECTS = {
  ready() {
    history.replaceState(null, "", base);
    const button = document.querySelector("#prime button");
    button?.removeAttribute("aria-disabled");
  },
  patience() {
    setBusy(document.querySelector("#prime button"));
  },
  render({ card }) {
    render(parse(card.html));
  },
  template({ name, code, message }) {
    const element = document.getElementById(`card-${name}`).content.firstElementChild.cloneNode(true);
    if (message) element.querySelector(".message")?.replaceChildren(message);
    if (code) element.querySelector(".error-code")?.replaceChildren(code);
    render(element);
  },
  connect({ delay }) {
    later("connect", delay, connect);
  },
  reconnecting({ on }) {
    document.getElementById("reconnecting").hidden = !on;
  },
  get({ delay }) {
    later("get", delay, look);
  },
  news({ delay }) {
    later("news", delay, () => dispatch({ type: "quiet" }));
  },
  slow() {
    showSlow();
  },
  busy() {
    for (const form of answerForms()) {
      form.inert = true;
      form.setAttribute("aria-busy", "true");
    }
    cancel("news");
    showAlert("");
    announce("Sending…");
  },
  post({ delay, interaction, key }) {
    const { body } = answer;
    const send = () => {
      if (navigator.onLine === false) addEventListener("online", send, { once: true });
      else submit(body, interaction, key);
    };
    if (delay) later("post", delay, send);
    else send();
  },
  abort_post() {
    cancel("post");
    post?.abort();
    answer = null;
  },
  clear() {
    answer = null;
    for (const input of currentCard().querySelectorAll("input[name^='field.']")) input.value = "";
  },
  release() {
    for (const form of answerForms()) {
      form.inert = false;
      form.removeAttribute("aria-busy");
      for (const button of form.querySelectorAll("button")) unsetBusy(button);
    }
  },
  alert({ text, focus }) {
    showAlert(text);
    if (focus) currentCard().querySelector("input[name^='field.'], button")?.focus();
  },
  stop() {
    stream?.abort();
    stream = null;
    for (const name of [...timers.keys()]) cancel(name);
    post?.abort();
    answer = null;
  },
  callback({ outcome, code, message, flow }) {
    returnTo(outcome, { code, message }, flow);
  },
};

// ── the stream, and looks beside it ──

async function connect() {
  stream?.abort();
  const mine = (stream = new AbortController());
  const isMine = () => stream === mine;
  const watch = () => later("watchdog", WATCHDOG_MS, () => {
    mine.abort();
    if (isMine()) dispatch({ type: "ended", kind: "network" });
  });
  watch();
  const end = await readStream(streamUrl, {
    signal: mine.signal,
    on: {
      open: () => isMine() && dispatch({ type: "opened" }),
      alive: () => isMine() && watch(),
      event(name, data) {
        if (!isMine()) return; // a stream that was replaced has nothing to say
        if (name === "managed_auth_state") {
          const card = cardFrom(data);
          if (card?.version) dispatch({ type: "event", card });
        } else if (name === "sse_heartbeat") dispatch({ type: "heartbeat" });
        else if (name === "error") dispatch({ type: "fatal", ...data.error });
      },
    },
  });
  if (!isMine()) return;
  cancel("watchdog");
  dispatch({ type: "ended", ...end });
}

async function look() {
  const { status, body, retryAfter: wait } = await call("/state");
  const card = status === 200 ? cardFrom(body) : null;
  if (card) dispatch({ type: "snapshot", card });
  else dispatch({ type: "snapshot_failed", status: status === 200 ? 0 : status, retryAfter: wait });
}

// ── the start: the code is exchanged behind PRIME ──

async function start(form, attempt = 0) {
  const { status, body } = await call("/start", { body: new URLSearchParams(new FormData(form)) });
  const card = cardFrom(body);
  if (status === 200 && card?.version) return dispatch({ type: "started", card });
  if (status === 404 || status === 410 || status === 401) {
    history.replaceState(null, "", base);
    return dispatch({ type: "refused", status, card });
  }
  const passing = status === 0 || status === 429 || status >= 500;
  if (passing && attempt < 3) return later("start", 1000 * 2 ** attempt, () => start(form, attempt + 1));
  // By hand, then: the button is a plain form again.
  form.dataset.plain = "";
  const button = form.querySelector("button");
  button.removeAttribute("aria-disabled");
  unsetBusy(button);
  showAlert(body?.message ?? "This page could not reach the service. Please try again.");
}

// ── the answer ──

let answer = null; // {body}: kept until it is decided, for sending it again unchanged

async function submit(body, interaction, key) {
  const mine = (post = new AbortController());
  const result = await call("/submit", { body, headers: { "Idempotency-Key": key }, signal: mine.signal });
  if (post !== mine || result.aborted) return;
  const card = cardFrom(result.body);
  if (result.status === 202) return dispatch({ type: "accepted", interaction, card: card?.version ? card : null });
  dispatch({
    type: "failed",
    interaction,
    status: result.status,
    code: result.body?.code,
    message: result.body?.message ?? "This could not be sent. Please reload the page.",
    card,
    retryAfter: result.retryAfter,
    offline: result.status === 0 && navigator.onLine === false,
  });
}

function answerForms() {
  return currentCard().querySelectorAll("form[data-answer]");
}

function setBusy(button) {
  if (!button || kept.has(button)) return;
  const spinner = document.createElement("span");
  spinner.className = "spinner";
  spinner.setAttribute("aria-hidden", "true");
  kept.set(button, [...button.childNodes]);
  button.replaceChildren(spinner, ` ${button.dataset.busy}`);
}

function unsetBusy(button) {
  if (!kept.has(button)) return;
  button.replaceChildren(...kept.get(button));
  kept.delete(button);
}

const kept = new Map(); // button → what it said before it was busy

// ── showing ──

function render(next) {
  const old = currentCard();
  const sameQuestion = next.dataset.interaction && next.dataset.interaction === old.dataset.interaction;
  const typed = sameQuestion ? takeTyped(old) : null;
  kept.clear();
  enhance(next);
  old.replaceWith(next);
  shownAt = Date.now();
  cancel("slow");
  cancel("news");
  if (next.dataset.kind === "discovering") later("slow", SLOW_MS, showSlow);
  document.title = next.dataset.title;
  announced = sameQuestion ? announced : new Set();
  announce(next.dataset.announce);
  if (typed) return giveTyped(next, typed);
  const first = ["form", "code"].includes(next.dataset.kind) && next.querySelector("input[name^='field.']");
  (first || next.querySelector("h1"))?.focus();
}

/** The same question drawn anew (another text, another number): what was typed stays, and so does the caret. */
function takeTyped(card) {
  const inputs = [...card.querySelectorAll("input[name^='field.']")];
  const active = document.activeElement;
  const caret = inputs.includes(active) ? [active.selectionStart, active.selectionEnd] : null;
  return { values: new Map(inputs.map((input) => [input.name, input.value])), focus: caret ? active.name : null, caret };
}

function giveTyped(card, { values, focus, caret }) {
  for (const input of card.querySelectorAll("input[name^='field.']")) {
    input.value = values.get(input.name) ?? "";
    if (input.name === focus) {
      input.focus();
      input.setSelectionRange(...caret);
    }
  }
}

/** What needs a script: the button that shows a password, times in the words of this device. */
function enhance(card) {
  for (const place of card.querySelectorAll(".reveal")) {
    const input = place.querySelector("input");
    const label = card.querySelector(`label[for="${CSS.escape(input.id)}"]`)?.textContent.trim() ?? "";
    const toggle = document.createElement("button");
    toggle.type = "button";
    toggle.className = "reveal-toggle";
    toggle.textContent = "Show";
    toggle.setAttribute("aria-label", `Show ${label}`);
    toggle.setAttribute("aria-pressed", "false");
    toggle.addEventListener("click", () => {
      const shown = input.type === "password";
      input.type = shown ? "text" : "password";
      toggle.textContent = shown ? "Hide" : "Show";
      toggle.setAttribute("aria-pressed", String(shown));
    });
    place.append(toggle);
  }
  for (const time of card.querySelectorAll("time[data-clock]")) {
    time.textContent = new Date(time.dateTime).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  }
  showTimeLeft(card);
}

function showSlow() {
  const card = currentCard();
  const slow = card.querySelector(".slow");
  if (!slow?.hidden) return;
  slow.hidden = card.dataset.kind === "discovering" && Date.now() - shownAt < SLOW_MS;
  if (slow.hidden) return;
  for (const usual of card.querySelectorAll(".usual")) usual.hidden = true;
  announce(slow.textContent);
}

function showAlert(text) {
  const card = currentCard();
  let place = card.querySelector(".form-alert");
  if (!place && text) {
    place = document.createElement("p");
    place.className = "banner tone-failed form-alert";
    place.setAttribute("role", "alert");
    card.querySelector("h1").after(place);
  }
  place?.replaceChildren(...(text ? [text] : []));
}

function showTimeLeft(card) {
  let least = Infinity;
  for (const time of card.querySelectorAll("time[data-deadline]")) {
    const left = Math.max(0, Math.round((Date.parse(time.dateTime) - Date.now() - clockAhead) / 1000));
    time.textContent = `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")} left`;
    time.classList.toggle("urgent", left <= 30);
    least = Math.min(least, left);
  }
  return least;
}

/** Every second; said aloud once at each mark (WCAG 2.2.1). */
function tick() {
  const left = showTimeLeft(currentCard());
  const mark = WARNINGS.filter((seconds) => left <= seconds).at(-1);
  if (!mark || left === 0 || announced.has(mark)) return;
  announced.add(mark);
  announce(mark === 120 ? "Less than 2 minutes left." : "Less than 30 seconds left.");
}

// ── going back to where the visitor came from, once ──

function returnTo(outcome, values, flow) {
  const card = currentCard();
  const target = outcome === "success" ? main.dataset.successUrl : outcome === "error" ? main.dataset.errorUrl : "";
  if (!target) return;
  const url = new URL(target);
  const query = outcome === "success"
    ? { profile_name: card.dataset.profile, domain: card.dataset.domain }
    : values;
  for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
  const place = document.getElementById("return");
  const link = document.createElement("a");
  link.className = "button primary block";
  link.href = url.href;
  link.textContent = `Return to ${url.host}`;
  place.replaceChildren(link);
  place.hidden = false;
  // A reload of the finished page shows the link and stays.
  if (!remember(`switchboard.returned.${flow ?? main.dataset.connection}`)) return;
  for (const text of card.querySelectorAll(".afterwards")) text.textContent = `Returning to ${url.host} in a moment…`;
  setTimeout(() => location.assign(url.href), RETURN_MS);
}

// ── the visitor ──

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.id === "prime" && form.dataset.plain === undefined) {
    event.preventDefault();
    dispatch({ type: "continue" });
  } else if (form.matches("form[data-answer]")) {
    event.preventDefault();
    if (state.pending || state.over) return;
    const body = new URLSearchParams(new FormData(form, event.submitter));
    body.delete("csrfmiddlewaretoken");
    answer = { body };
    dispatch({ type: "submit", interaction: body.get("interaction_id"), key: newKey() });
    if (state.pending) setBusy(event.submitter ?? form.querySelector("button[type=submit]"));
  }
});
document.addEventListener("input", () => dispatch({ type: "edited" }));
addEventListener("online", () => dispatch({ type: "wake" }));
document.addEventListener("visibilitychange", () => document.hidden || dispatch({ type: "wake" }));
addEventListener("pagehide", () => {
  const open = stream;
  stream = null; // leaving is silent: what its reader says from here on is not listened to
  open?.abort();
});
addEventListener("pageshow", (event) => event.persisted && !state.over && state.started && dispatch({ type: "resume" }));
setInterval(tick, 1000);

enhance(currentCard());
const prime = document.getElementById("prime");
if (prime) {
  prime.querySelector("button").setAttribute("aria-disabled", "true");
  start(prime);
} else if (state.card?.outcome) {
  // Opened, or reloaded, when everything was over.
  returnTo(state.card.outcome, { code: state.card.code, message: state.card.message }, state.card.flow);
  state = { ...state, over: { outcome: state.card.outcome } };
} else {
  document.title = currentCard().dataset.title;
  if (state.card.step === "DISCOVERING") later("slow", SLOW_MS, showSlow);
  dispatch({ type: "resume" });
}
