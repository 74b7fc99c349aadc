// Who is at what: marks the reader among the people of a part, offers to take, take over and let go, and says that somebody looks or
// types. The parts themselves come with the page and with the stream, the same for everybody.

import { client, operate } from "./client.js";
import { csrf } from "./post.js";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

const RENEW = 15_000; // the server forgets after 30 s
const TYPING = 8_000; // after the last key
const TICK = 2_000;

const me = () => $(".menu-name")?.textContent ?? "";
// A page that was sent away, replaced or signed out is nobody any more.
const OUT = ["ended", "taken", "signed-out"];
const own = () => (client.known && !OUT.includes(document.body.dataset.live) ? client.cid : null);
// An id is a label that somebody else may use as well: two people can have the same one.
const isOwn = (cid, name) => Boolean(cid) && cid === own() && name === me();

function announce(text) {
  const region = $("#announce");
  if (region && text) region.textContent = text;
}

// ── Marking, and the buttons ──

const seen = new Map(); // subject → {holder, name}

const MODES = {
  free: ["I take it", "take"],
  mine: ["Let go", "leave"],
  elsewhere: ["Take it here", "take"],
  taken: ["Take over…", "ask"],
};

function modeOf(part) {
  const { holder, holderName } = part.dataset;
  if (!own()) return "";
  if (!holder) return "free";
  if (isOwn(holder, holderName)) return "mine";
  return holderName === me() ? "elsewhere" : "taken";
}

function mark() {
  for (const part of $$(".who")) {
    for (const person of $$("[data-person]", part)) {
      let text = "";
      if (isOwn(person.dataset.person, person.dataset.name)) text = " (you)";
      else if (person.dataset.name === me()) text = " (you, in another tab)";
      const place = $(".who-you", person);
      if (place.textContent !== text) place.textContent = text;
    }
    offer(part);
    notice(part);
  }
  for (const row of $$("[data-client]")) {
    const star = $(".client-star", row);
    const text = isOwn(row.dataset.client, row.dataset.clientName) ? "★ this tab" : "";
    if (star && star.textContent !== text) star.textContent = text;
  }
}

function offer(part) {
  const place = document.getElementById(`who-acts-${part.id.slice(4)}`);
  if (!place) return;
  // Where nothing is left to handle nobody begins to, but whoever came too late with it can let go.
  const found = modeOf(part);
  const mode = found === "free" && !("open" in place.dataset) ? "" : found;
  const before = $("button", place);
  if ((before?.dataset.mode ?? "") === mode) return;
  const focused = before && document.activeElement === before;
  before?.remove();
  if (!mode) return;
  const button = document.createElement("button");
  [button.textContent, button.dataset.who] = MODES[mode];
  Object.assign(button, { type: "button", className: mode === "taken" ? "button small" : "button small quiet" });
  button.dataset.mode = mode;
  button.dataset.subject = part.dataset.subject;
  place.prepend(button);
  if (focused) button.focus({ preventScroll: true });
}

// Somebody took over what this tab was handling: that must not go by unseen.
function notice(part) {
  const { subject, holder, holderName } = part.dataset;
  const before = seen.get(subject);
  seen.set(subject, { holder, name: holderName });
  if (!before || (before.holder === holder && before.name === holderName) || !own()) return;
  if (isOwn(before.holder, before.name) && holder) {
    say(subject, holderName === me() ? "You handle this in another tab now." : `${holderName} took this over from you.`);
  } else if (isOwn(holder, holderName)) say(subject, "");
}

function say(subject, text) {
  const place = document.getElementById(`who-acts-${subject.split(":")[1]}`);
  if (!place) return;
  let line = $(".who-said", place);
  if (!line) {
    line = document.createElement("span");
    line.className = "who-said";
    line.setAttribute("role", "status");
    place.append(line);
  }
  line.textContent = text;
}

// ── Taking and letting go ──

const taking = new Set();
const tried = new Map(); // subject → when it was last taken by typing
const AGAIN = 3_000;

async function take(subject, { takeover = false, quietly = false } = {}) {
  if (!own() || taking.has(subject)) return;
  taking.add(subject);
  say(subject, "");
  try {
    const answer = await operate("claims", { subject, takeover });
    if (answer.ok) {
      announce("You are handling this now.");
    } else if (!quietly) {
      const { code, message } = await answer.json().catch(() => ({}));
      say(subject, code === "connection_unknown" ? "Not connected right now. Please try again in a moment." : (message ?? "This was refused."));
    }
  } catch {
    if (!quietly) say(subject, "This did not arrive. Please try again.");
  } finally {
    taking.delete(subject);
  }
}

async function leave(subject) {
  const url = `/api/clients/${own()}/claims/${encodeURIComponent(subject)}`;
  try {
    const answer = await fetch(url, { method: "DELETE", headers: { "X-CSRFToken": csrf() } });
    if (answer.ok) announce("You are not handling this any more.");
    else say(subject, "This could not be let go. Please try again.");
  } catch {
    say(subject, "This did not arrive. Please try again.");
  }
}

function button(text, name, value = "") {
  const made = document.createElement("button");
  Object.assign(made, { type: "submit", textContent: text, className: `button ${name}`, value });
  return made;
}

// Asked in a dialog of its own, made here: without this script there is nothing to ask.
function ask(subject) {
  const part = document.getElementById(`who-${subject.split(":")[1]}`);
  const name = part?.dataset.holderName;
  if (!name) return;
  const dialog = document.createElement("dialog");
  const title = document.createElement("h2");
  const text = document.createElement("p");
  const form = document.createElement("form");
  title.id = "take-over-title";
  dialog.id = "take-over";
  dialog.setAttribute("aria-labelledby", title.id);
  title.textContent = `Take this over from ${name}?`;
  text.textContent = `${name} is handling it, and will see that you took it over. What ${name} has typed is not sent.`;
  form.method = "dialog";
  form.className = "row";
  form.append(button(`Leave it to ${name}`, ""), button("Take over", "primary", "yes"));
  dialog.append(title, text, form);
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "yes") take(subject, { takeover: true });
    dialog.remove();
    // The button that opened it may be another one by now.
    if (document.activeElement === document.body) document.getElementById(`who-acts-${subject.split(":")[1]}`)?.querySelector("button")?.focus();
  });
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const pressed = event.target.closest?.("button[data-who]");
  if (!pressed) return;
  const { who, subject } = pressed.dataset;
  if (who === "take") take(subject);
  else if (who === "leave") leave(subject);
  else ask(subject);
});

// ── Who looks, who types ──

const NOWHERE = { subject: null, doing: "", at: 0 };
let said = NOWHERE;
let typedAt = 0;

const FORMS = "form.answer, form[data-outbox]";

function subjectOf(element) {
  const form = element?.closest?.(FORMS);
  if (!form) return null;
  if (form.dataset.outbox) return form.dataset.outbox;
  return $(".who", form.closest(".state, .attn") ?? document)?.dataset.subject ?? null;
}

// On the page of one object its open form is being looked at; in a list, the one that has the focus.
function wanted() {
  if (document.hidden) return { subject: null, doing: "" };
  const at = subjectOf(document.activeElement);
  if (at) return { subject: at, doing: Date.now() - typedAt < TYPING ? "typing" : "looking" };
  const lone = ["connection", "task"].includes(document.body.dataset.page) ? subjectOf($(FORMS)) : null;
  return { subject: lone, doing: lone ? "looking" : "" };
}

// What does not arrive is said again with the next renewal, or with the next stream; that somebody left, with the next look.
const presence = (subject, doing, more) => operate("presence", { subject, doing }, more).catch(() => null);

// One after the other: two at once could arrive the other way round.
let syncing = false;
async function sync() {
  if (syncing) return;
  syncing = true;
  try {
    while (own()) {
      const { subject, doing } = wanted();
      const left = said.subject;
      if (subject === left && (!subject || (doing === said.doing && Date.now() - said.at < RENEW))) return;
      const leaving = left && left !== subject;
      const before = said;
      said = leaving ? NOWHERE : { subject, doing, at: Date.now() };
      const answer = await presence(leaving ? left : subject, leaving ? "" : doing, { signal: AbortSignal.timeout(10_000) });
      if (leaving && !(answer?.status < 500)) {
        said = before;
        return;
      }
    }
  } finally {
    syncing = false;
  }
}

setInterval(sync, TICK);
document.addEventListener("focusin", () => setTimeout(sync, 0));
document.addEventListener("focusout", () => setTimeout(sync, 0));
document.addEventListener("visibilitychange", sync);
document.addEventListener("input", (event) => {
  const subject = subjectOf(event.target);
  if (!subject) return;
  typedAt = Date.now();
  sync();
  const part = document.getElementById(`who-${subject.split(":")[1]}`);
  // Who begins to answer is handling it, if nobody is.
  if (!part || part.dataset.holder || part.closest(".read-only") || Date.now() - (tried.get(subject) ?? 0) < AGAIN) return;
  tried.set(subject, Date.now());
  take(subject, { quietly: true });
});
document.addEventListener("submit", (event) => {
  if (subjectOf(event.target)) typedAt = 0;
});
addEventListener("pagehide", () => {
  if (said.subject && own()) presence(said.subject, "", { keepalive: true });
  said = NOWHERE;
});

document.addEventListener("live:welcome", () => {
  // Another stream: what the server knew of this page may be gone.
  said = NOWHERE;
  mark();
  sync();
});
document.addEventListener("htmx:after:swap", () => {
  mark();
  setTimeout(sync, 0);
});
mark();
new MutationObserver(mark).observe(document.body, { attributeFilter: ["data-live"] });

// ── The page of clients ──

// New ones come through the pill, as everywhere: nothing moves under the reader.
const fresh = new Set();
document.addEventListener("live:absent", (event) => {
  const { part } = event.detail;
  const pill = $("#list[data-new-kind='client'] [data-pill]");
  if (!pill || !part?.id?.startsWith("client-") || part.classList.contains("gone") || location.search) return;
  if (isOwn(part.dataset.client, part.dataset.clientName)) {
    // This very tab, which was not connected yet when the page was made.
    const list = $("#list");
    fresh.clear();
    setTimeout(() => htmx.ajax("GET", location.pathname, { source: list, target: list, select: "#list", swap: "outerMorph" }), 0);
    return;
  }
  fresh.add(part.id);
  pill.textContent = `${fresh.size} new, show ↑`;
  pill.hidden = false;
});

document.addEventListener("click", (event) => {
  if (event.target.closest?.("[data-pill]")) fresh.clear();
  const link = event.target.closest?.("a[data-disconnect]");
  const dialog = $("dialog#disconnect");
  if (dialog && event.target.closest("[data-keep]")) {
    event.preventDefault();
    dialog.close();
  }
  if (!link || !dialog || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const row = link.closest("tr");
  $("form", dialog).action = link.getAttribute("href");
  $("[data-disconnect-name]", dialog).textContent = row.dataset.clientName;
  $("[data-disconnect-page]", dialog).textContent = $("[data-label='Page']", row).textContent;
  dialog.showModal();
  $("input[name=reason]", dialog).focus();
});
