// What the pages do besides the stream: times, forms that answer a login, pills, keys, theme. Never builds HTML from text.

import { csrf, passing, retryAfter, uuid } from "./post.js";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function stored(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch {
    // No storage: the choice lasts as long as the page.
  }
  return value ?? null;
}

function announce(text) {
  const region = $("#announce");
  if (region && region.textContent !== text) region.textContent = text;
}

function notice(text, tone = "failed") {
  const region = $("#notices");
  if (!region) return;
  const item = document.createElement("p");
  item.className = `banner tone-${tone}`;
  item.textContent = text;
  region.replaceChildren(...(text ? [item] : []));
}

// ── Times: the server says when, the reader's own clock and zone say how ──

const time = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat([], { month: "short", day: "numeric" });
const full = new Intl.DateTimeFormat([], { dateStyle: "medium", timeStyle: "medium" });
const near = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "long" });

function ago(date, now) {
  const seconds = Math.round((date - now) / 1000);
  if (Math.abs(seconds) < 5) return "just now";
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= size) return near.format(Math.trunc(seconds / size), unit);
  }
  return near.format(seconds, "second");
}

function left(date, now) {
  const seconds = Math.max(0, Math.ceil((date - now) / 1000));
  if (!seconds) return "time is over";
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const minutes = h ? String(m).padStart(2, "0") : m;
  return `${h ? `${h}:` : ""}${minutes}:${String(s).padStart(2, "0")} left`;
}

function took(date, now) {
  const seconds = Math.max(0, Math.floor((now - date) / 1000));
  const [d, h, m, s] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60, seconds % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

function clock(date, now) {
  const today = date.toDateString() === now.toDateString();
  return today ? time.format(date) : `${day.format(date)} ${time.format(date)}`;
}

const SHAPES = { ago, left, took, clock, full: (date) => full.format(date), both: (date, now) => `${clock(date, now)} (${ago(date, now)})` };

function tick() {
  const now = new Date();
  for (const element of $$("time[data-time]")) {
    const date = new Date(element.dateTime);
    if (Number.isNaN(date.getTime())) continue;
    const text = SHAPES[element.dataset.time]?.(date, now) ?? "";
    if (text && element.textContent !== text) element.textContent = text;
    if (!element.title) element.title = full.format(date);
    if (element.dataset.time === "left") {
      const seconds = (date - now) / 1000;
      element.classList.toggle("urgent", seconds < 120);
      warn(element, seconds);
    }
  }
  // Nothing happens when something has waited for too long: the clock alone says so.
  for (const mark of $$(".stale")) mark.hidden = now < new Date(mark.dataset.from);
}

// A time limit is said at two minutes and at thirty seconds (WCAG 2.2.1), once for each deadline.
const warned = new Set();
function warn(element, seconds) {
  if (!element.closest(".state, .attn")) return;
  for (const [limit, text] of [[30, "30 seconds"], [120, "2 minutes"]]) {
    const key = `${element.dateTime}:${limit}`;
    if (seconds > 0 && seconds <= limit && seconds > limit - 10 && !warned.has(key)) {
      warned.add(key);
      announce(`${element.closest("[data-asks]") ? "This task" : "A login"} has ${text} left.`);
    }
  }
}

tick();
setInterval(tick, 1000);

function freshen() {
  tick();
  for (const button of $$(".reveal-toggle[hidden]")) button.hidden = false;
  const list = $("#attention");
  if (list) {
    const open = $$("[data-attention]", list).length;
    const count = $("[data-attention-count]", list);
    if (count) count.textContent = open ? `(${open})` : "";
  }
}
freshen();
document.addEventListener("htmx:after:swap", () => requestAnimationFrame(freshen));

// ── Focus: when the form that somebody was typing in is gone, they are put where it was, not on top of the page ──

let place = null;
let parked = null; // the heading that took the focus because there was no field
document.addEventListener("focusin", (event) => {
  if (event.target.closest?.("dialog")) return; // a visit: where it was opened from is where one is
  const part = event.target.closest?.(".state, .attn");
  place = part ? part.id : null;
});
const focusable = (element) => element.isConnected && element.checkVisibility() && !element.closest("[inert]") && !element.matches(":disabled");
document.addEventListener("focusout", ({ target }) =>
  queueMicrotask(() => {
    // Left on purpose, and not because it went, was hidden or was frozen: then it stays left.
    if (document.activeElement === document.body && focusable(target)) place = null;
    if (target !== parked || document.activeElement === parked || document.activeElement.closest("dialog")) return;
    parked.removeAttribute("tabindex"); // a heading again, which a click leaves alone
    parked = null;
  }),
);
document.addEventListener("htmx:after:swap", () => setTimeout(replace, 50));
function replace() {
  if (!place || ![document.body, parked].includes(document.activeElement)) return;
  const part = document.getElementById(place);
  const field = part && $("form.answer input:not([type=hidden])", part);
  if (field) field.focus({ preventScroll: true });
  else if (part && document.activeElement === document.body) {
    parked = $("h2, h3", part);
    parked?.setAttribute("tabindex", "-1");
    parked?.focus({ preventScroll: true });
  }
  const chip = part && $(".chip", part);
  if (chip) announce(chip.lastElementChild.textContent.trim());
}

// ── Forms that answer a login (design/dashboard.md, section 6) ──

const RETRY_AFTER = [1000, 2000, 4000];
const sends = new WeakMap(); // form → {tries, submitter, answered}
const names = new WeakMap(); // form → {id, values}: of what was sent and perhaps not taken

function say(form, text, tone = "failed") {
  const place = document.getElementById(`say-${form.dataset.answer}`);
  if (!place) {
    notice(text, tone);
    return;
  }
  place.classList.remove("tone-failed", "tone-waiting");
  place.classList.add(`tone-${tone}`);
  place.textContent = text;
}

function freeze(form, submitter) {
  form.setAttribute("hx-morph-skip", "");
  form.setAttribute("aria-busy", "true");
  form.inert = true; // not disabled: what is disabled is not sent, and a retry has to send it again
  submitter?.classList.add("pressed");
}

function release(form) {
  form.removeAttribute("hx-morph-skip");
  form.removeAttribute("aria-busy");
  form.inert = false;
  for (const button of $$(".pressed", form)) button.classList.remove("pressed");
  // Freezing took the focus away; it comes back to the button, if that is still there.
  const button = sends.get(form)?.submitter;
  if (button?.isConnected && document.activeElement === document.body) button.focus({ preventScroll: true });
  sends.delete(form);
  if (leaving.contains(form)) form.remove();
}

const acting = (target) => (target instanceof HTMLFormElement && target.matches("[data-answer], [data-action]") ? target : null);

document.addEventListener("htmx:before:request", (event) => {
  const form = acting(event.target);
  if (!form) return;
  const send = sends.get(form) ?? { tries: 0 };
  send.submitter = event.detail.ctx.request.submitter ?? send.submitter;
  send.answered = false;
  sends.set(form, send);
  if (!send.tries) say(form, "");
  freeze(form, send.submitter);
});

document.addEventListener("htmx:after:request", (event) => {
  const form = acting(event.detail.ctx.sourceElement);
  const send = form && sends.get(form);
  if (!send) return;
  const { status, raw } = event.detail.ctx.response;
  send.answered = true;
  if (passing(status)) {
    retry(form, retryAfter(raw.headers));
    return;
  }
  if (status >= 400 && !form.isConnected) {
    // Its question went while this was under way, and htmx shows nothing for what is not on the page.
    again(form, send);
    return;
  }
  // The server has decided about it. What is sent from here on is another message, also when it says the same.
  if (status !== 401) names.delete(form);
  if (status === 401 || raw.redirected) {
    // Not a mistake in the form: it stays frozen, with what was typed, until somebody signs in again.
    say(form, "You are signed out. Sign in again in another tab, then send it again.");
    release(form);
  } else {
    // What was said on top of the page, of a try, is over as well.
    if (status < 400 || isGone(form)) say(form, "");
    // The answer brings the parts as they are now. What is still on the page after that swap is free again.
    setTimeout(() => release(form), 0);
    // An answer of ours says why, in its own words; any other refusal must not stay silent.
    if (status >= 400 && !event.detail.ctx.text.includes("<hx-partial")) {
      say(form, status === 404 ? "This does not exist any more." : "This was refused. Please reload the page.");
    }
  }
});

document.addEventListener("htmx:finally:request", (event) => {
  const form = acting(event.detail.ctx.sourceElement);
  const send = form && sends.get(form);
  if (send && !send.answered) retry(form, 0);
});

/** The message id of what a form is about to send: the same as long as its values are, whatever came of them. */
function nameOf(form, body) {
  const values = JSON.stringify([...body]);
  const known = names.get(form);
  if (known?.values === values) return known.id;
  const id = uuid();
  names.set(form, { id, values });
  return id;
}

function retry(form, asked) {
  const send = sends.get(form);
  if (form.matches("[data-once]")) {
    // To stop something is meant for now. Said later by itself, it could stop something else.
    say(form, "We could not confirm that this arrived. It is not tried again.");
    release(form);
    return;
  }
  if (!navigator.onLine) {
    // While the browser knows that it is offline, tries are neither made nor counted.
    say(form, "You are offline. This is sent when you are back.", "waiting");
    addEventListener("online", () => again(form, send), { once: true });
    return;
  }
  const pause = RETRY_AFTER[send.tries];
  if (pause === undefined) {
    const safe = isGone(form) ? "Its question is over." : "Sending it again is safe.";
    say(form, `We could not confirm that this arrived. ${safe}`);
    release(form);
    $("input:not([type=hidden])", form)?.focus();
    return;
  }
  send.tries += 1;
  say(form, `Not delivered yet. Trying again (${send.tries} of ${RETRY_AFTER.length})…`, "waiting");
  setTimeout(() => again(form, send), Math.min(Math.max(pause, asked), 60_000));
}

// A form whose question went before it was known what became of the answer. It is sent from here, for its receipt.
const leaving = document.body.appendChild(document.createElement("div"));
leaving.hidden = true;
const isGone = (form) => !form.isConnected || leaving.contains(form);

function again(form, send) {
  if (sends.get(form) !== send) return;
  if (!form.isConnected) {
    leaving.append(form);
    htmx.process(form, true); // leaving the page took its handlers
  }
  if (navigator.onLine) form.requestSubmit(send.submitter?.isConnected ? send.submitter : undefined);
  else addEventListener("online", () => again(form, send), { once: true });
}

// A message for a place that is not on this page (any more) goes to the top of the page.
document.addEventListener("live:absent", (event) => {
  const { part, task } = event.detail;
  if (part?.matches?.("[data-say]")) {
    // Its question may come with the same answer: look again after the swap.
    setTimeout(() => {
      const place = document.getElementById(part.dataset.say);
      if (place) place.textContent = part.textContent;
      else notice(part.textContent);
    }, 0);
  }
  if (part?.matches?.("article[data-attention]") && $("#attention")) refreshAttention();
  const filters = new URLSearchParams(location.search);
  const narrow = ["q", "owner", "kind", "label", "page", "cursor"].some((name) => filters.get(name));
  const list = $("#list")?.dataset.newKind;
  if (list === "task" && part?.matches?.("tr[id^='task-'][data-filter]") && !narrow && fits(filters.get("status"), part.dataset.filter)) pill(part.id);
  // A row that begins to match the filter of this list.
  if (list === "connection" && filters.get("status") && part?.dataset?.filter === filters.get("status") && !narrow) pill(part.id);
  task.swapSpec = { style: "none" };
});

const OVER = ["completed", "failed", "killed"];
const fits = (wanted, status) => !wanted || wanted === status || (wanted === "open" && !OVER.includes(status));

// ── The home page: something new needs somebody ──

let attentionTimer = 0;
let attentionBusy = false;
let attentionAgain = false;

async function refreshAttention() {
  const list = $("#attention");
  if (attentionBusy) {
    attentionAgain = true; // what is being fetched may be older than this
    return;
  }
  attentionBusy = true;
  clearTimeout(attentionTimer);
  const keep = $$("article[id^='attn-']", list).map((item) => item.id.slice(5));
  try {
    await htmx.ajax("GET", `${list.dataset.refresh}?keep=${keep.slice(-50).join(",")}`, { source: list, target: list, swap: "outerMorph" });
  } finally {
    attentionBusy = false;
    if (attentionAgain) {
      attentionAgain = false;
      attentionTimer = setTimeout(refreshAttention, 150);
    }
  }
}

// ── Numbers ──

document.addEventListener("live:counts", (event) => {
  const counts = event.detail;
  for (const element of $$("[data-count]")) {
    const value = counts[element.dataset.count];
    if (value !== undefined && element.textContent !== String(value)) element.textContent = value;
  }
  const waiting = counts.waiting ?? 0;
  const link = $("#waiting-link");
  const before = Number(link?.dataset.waiting ?? 0);
  if (link) link.dataset.waiting = waiting;
  document.title = (waiting ? `(${waiting}) ` : "") + document.title.replace(/^\(\d+\) /, "");
  const icon = $("#favicon");
  if (icon) icon.href = icon.href.replace(/favicon(-waiting)?\.svg/, waiting ? "favicon-waiting.svg" : "favicon.svg");
  if (waiting > before) announce(waiting === 1 ? "One waits for input." : `${waiting} wait for input.`);
});

// ── New rows come through a pill, so that nothing moves under the reader ──

const fresh = new Set();

function pill(key) {
  const button = $("#list [data-pill]");
  if (!button) return;
  fresh.add(key);
  const kind = $("#list").dataset.newKind;
  button.textContent = kind === "event" ? "New events, show ↑" : `${fresh.size} new, show ↑`;
  button.hidden = false;
}

document.addEventListener("live:appeared", (event) => {
  const { kind, id } = event.detail;
  if (location.search.replace("?", "").replace(/sort=\w*/, "")) return;
  if ($("#list")?.dataset.newKind === kind && !document.getElementById(`row-${id}`)) pill(`row-${id}`);
});
document.addEventListener("live:news", (event) => {
  const list = $("#list[data-new-kind='event']");
  if (list && Number(event.detail) > Number(list.dataset.newest)) pill("event");
});

function showNew() {
  const list = $("#list");
  fresh.clear();
  return htmx.ajax("GET", location.pathname + location.search, { source: list, target: list, select: "#list", swap: "outerMorph" });
}

// ── Requests: the token of now, and no empty filter in the address ──

document.addEventListener("htmx:config:request", (event) => {
  const { ctx } = event.detail;
  // Signing in again in another tab makes a new token; the one that this page was made with is refused then.
  const token = csrf();
  // Whose page this is: the server refuses what it says when somebody else is signed in by now.
  ctx.request.headers["X-Page-User"] = document.body.dataset.user ?? "";
  if (token && ctx.request.method === "POST") {
    ctx.request.headers["X-CSRFToken"] = token;
    ctx.request.body?.delete?.("csrfmiddlewaretoken");
  }
  const form = acting(event.target);
  if (form && ctx.request.body) ctx.request.headers["Idempotency-Key"] = nameOf(form, ctx.request.body);
  if (!event.target.matches?.("form.filters")) return;
  for (const [name, value] of [...ctx.request.body]) if (!value) ctx.request.body.delete(name);
});

// ── Clicks ──

const THEMES = { auto: "automatic", light: "light", dark: "dark" };

function theme(next) {
  const names = Object.keys(THEMES);
  const now = stored("switchboard.theme") || "auto";
  const chosen = next ?? names[(names.indexOf(now) + 1) % names.length];
  stored("switchboard.theme", chosen);
  if (chosen === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  for (const label of $$("[data-theme-name]")) label.textContent = THEMES[chosen];
  return chosen;
}
for (const label of $$("[data-theme-name]")) label.textContent = THEMES[stored("switchboard.theme") || "auto"] ?? THEMES.auto;

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  if (!source) return;
  const text = source.value ?? source.textContent;
  try {
    await navigator.clipboard.writeText(text.trim());
    button.textContent = "Copied";
    announce("Copied.");
  } catch {
    // No clipboard (plain http): select it, so that the keyboard can copy.
    source.select?.();
    button.textContent = "Press Ctrl+C";
  }
  setTimeout(() => {
    button.textContent = "Copy";
  }, 2500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (!button) return;
  if (button.dataset.copy) copy(button);
  if (button.dataset.act === "theme") announce(`Theme: ${THEMES[theme()]}`);
  if (button.dataset.act === "help") help();
  if (button.matches("[data-pill]")) showNew();
  if (button.dataset.reveal) {
    const field = document.getElementById(button.dataset.reveal);
    const shown = field.type === "password";
    field.type = shown ? "text" : "password";
    button.textContent = shown ? "Hide" : "Show";
    button.setAttribute("aria-pressed", String(shown));
  }
});
document.addEventListener("click", (event) => {
  const menu = $("#menu[open]");
  if (menu && !menu.contains(event.target)) menu.open = false;
});

// ── Keys: only when nothing has the focus, and switchable off (WCAG 2.1.4) ──

function help() {
  const dialog = $("#help");
  $("#keys-on").checked = stored("switchboard.keys") !== "off";
  if ($("#menu")) $("#menu").open = false;
  dialog.showModal();
}
$("#keys-on")?.addEventListener("change", (event) => stored("switchboard.keys", event.target.checked ? "on" : "off"));

let going = 0;
const TYPING = 1500; // ms
let typed = 0; // when a key last went into a field
const FIELDS = "form.answer input:not([type=hidden]), form.answer button, form[data-lines] [name=text]:enabled, form.replies button";
const PLACES = { h: "/", c: "/connections", t: "/tasks", l: "/clients", e: "/events" };

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    const menu = $("#menu[open]");
    if (menu) {
      menu.open = false;
      $("summary", menu).focus();
    } else if (event.target.matches?.("[data-search]") && !event.target.value) event.target.blur();
    return;
  }
  if (event.target.matches?.("input, textarea, select")) typed = Date.now();
  // A heading that was given the focus for its reader is nothing that takes keys either.
  const idle = event.target === document.body || event.target.id === "main" || event.target === parked;
  if (!idle || event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (!$("#help") || stored("switchboard.keys") === "off") return;
  // Who was typing when their form went has not noticed yet: the rest of a password is no command.
  if (place && Date.now() - typed < TYPING) {
    typed = Date.now();
    return;
  }
  const key = event.key;
  if (going && Date.now() - going < 1500 && PLACES[key]) {
    location.assign(PLACES[key]);
    return;
  }
  going = key === "g" ? Date.now() : 0;
  if (key === "/" && $("[data-search]")) $("[data-search]").focus();
  else if (key === "/") location.assign("/connections");
  else if (key === "?") help();
  else if (key === "t") announce(`Theme: ${THEMES[theme()]}`);
  else if (key === "i") $(FIELDS)?.focus();
  else if (key === "r" && $("#list [data-pill]:not([hidden])")) showNew();
  else if (key === "p") $("#badge-act:not([hidden])")?.click();
  else return;
  event.preventDefault();
});
