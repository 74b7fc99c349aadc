// The outbox on the page: forms that go through it, and a line for each message that is on its way.

import { client } from "./client.js";
import { createOutbox } from "./outbox.js";
import { csrf, post, uuid } from "./post.js";

/**
 * The name of the event that tells of each failed try, on `document`; its detail is a Failure. It never holds what was written.
 *
 * @typedef {object} Failure
 * @property {string} id of the message
 * @property {string} object "task:tk_x"
 * @property {number} status of HTTP; 0: there was no answer, or not all of it
 * @property {string} [code] of the error body; "offline", "outbox_full"
 * @property {string} [text] of the error body, for people
 * @property {number} tries so far
 * @property {boolean} willRetry anything but true is final
 * @property {boolean} uncertain nobody tries any more, and it may have arrived
 */
export const FAILURE = "outbox:failure";

const QUICK = 3;
const SENT_SHOWN = 10_000;
const REASONS = {
  offline: "You are offline, and this is not sent later.",
  outbox_full: "Too many messages wait already. This one was not taken.",
  401: "You were signed out before this was sent.",
  403: "You may not do this.",
  404: "This does not exist any more.",
};

/** What a message says about itself. @returns {{tone: string, shape: string, text: string, acts: string[]}} */
export function words({ state, tries = 0, status, code, text, once }, online = true) {
  const away = "You are offline. This is sent when you are back.";
  const reason = text || REASONS[code] || REASONS[status] || "The server refused it.";
  const again = tries > QUICK ? "Trying again" : `Trying again (${tries} of ${QUICK})`;
  switch (state) {
    case "sent":
      return { tone: "done", shape: "✔", text: "Sent", acts: [] };
    case "sending":
      return { tone: "working", shape: "◌", text: tries ? `Not delivered yet. ${again}…` : "Sending…", acts: tries >= QUICK && !once ? ["retry", "discard"] : [] };
    case "retrying": {
      const acts = tries >= QUICK ? ["retry", "discard"] : [];
      if (!online || !tries) return { tone: "waiting", shape: "◆", text: away, acts };
      const later = tries > QUICK ? "Trying again every 30 seconds." : `${again}…`;
      return { tone: "waiting", shape: "◆", text: `Not delivered yet. ${later}`, acts };
    }
    case "failed":
      return { tone: "failed", shape: "✖", text: `Not sent. ${reason}`, acts: status === 401 && !once ? ["retry", "discard"] : ["discard"] };
    case "uncertain": {
      const safe = once ? "It is not sent again." : "Sending it again is safe.";
      return { tone: "failed", shape: "✖", text: `We could not confirm that this arrived. ${safe}`, acts: once ? ["discard"] : ["retry", "discard"] };
    }
    default:
      return { tone: "idle", shape: "◇", text: online ? "Waiting for its turn" : away, acts: [] };
  }
}

/** @param {object[]} messages @returns {boolean} whether the page may say that it is at work on them */
export const working = (messages) => messages.some(({ state }) => ["pending", "sending", "retrying"].includes(state));

// ── Lines ──

const ACTS = { retry: ["Retry now", (id) => outbox.retry(id)], discard: ["Discard", (id) => outbox.discard(id)] };
const lines = new Map(); // message id → {item, said}

function make(name, className, text) {
  const element = document.createElement(name);
  element.className = className;
  if (text) element.textContent = text;
  return element;
}

function build(message) {
  const item = make("li", "send");
  const { text, keys } = message.body ?? {};
  const written = message.secret ? "••••••" : (text ?? (keys ? `⌨ ${keys.join(" ")}` : Object.values(message.body ?? {}).join(" ")));
  const said = make("p", "send-state");
  said.setAttribute("role", "status");
  item.dataset.message = message.id;
  const [kind, id] = message.object.split(":");
  const where = make("a", "send-where small", `Open the ${kind}`);
  where.href = `/${kind}s/${id}`;
  item.append(make("p", "send-text mono", written), said, ...(kind === "draft" ? [] : [where]));
  return { item, said, shown: "" };
}

function button(message, label, run) {
  const element = make("button", "button small", label);
  element.type = "button";
  element.addEventListener("click", () => {
    run(message.id);
    // The button that had the focus is gone: the keyboard goes on where one writes.
    if (!element.isConnected) (formOf(message.object)?.querySelector?.("[name=text]:enabled") ?? document.getElementById("main")).focus?.();
  });
  return element;
}

function draw(message) {
  const line = lines.get(message.id) ?? build(message);
  lines.set(message.id, line);
  const { tone, shape, text, acts } = words(message, navigator.onLine);
  const shown = tone + text + acts;
  // What did not change stays as it is: a button keeps its focus, and nothing is read out twice.
  if (line.shown === shown) return line.item;
  line.shown = shown;
  line.item.dataset.state = message.state;
  line.said.className = `send-state tone-text-${tone}`;
  const sign = make("span", "send-shape", shape);
  sign.setAttribute("aria-hidden", "true");
  line.said.replaceChildren(sign, ` ${text}`);
  if (line.acts !== String(acts)) {
    line.acts = String(acts);
    line.item.querySelector(".send-acts")?.remove();
    const row = make("div", "send-acts");
    row.append(...acts.map((act) => button(message, ...ACTS[act])));
    if (acts.length) line.item.append(row);
  }
  if (message.state === "sent") setTimeout(() => outbox.discard(message.id), SENT_SHOWN);
  return line.item;
}

// The form of lines first: quick answers and keys have forms of their own.
function formOf(object) {
  const form = `form[data-outbox="${CSS.escape(object)}"]`;
  return document.querySelector(`${form}[data-lines]`) ?? document.querySelector(form);
}

function changed(messages) {
  const here = document.querySelector("[data-outbox-list]");
  const rest = document.getElementById("outbox-rest");
  for (const [id, { item }] of lines) {
    if (messages.some((message) => message.id === id)) continue;
    item.remove();
    lines.delete(id);
  }
  for (const message of messages) {
    // A message of another page is shown here only when something is wrong with it.
    const own = formOf(message.object) && here;
    const list = own || (message.tries || message.state === "failed" ? rest : null);
    const item = list && draw(message);
    if (!item) continue;
    if (item.parentNode !== list) list.append(item);
  }
  for (const mark of document.querySelectorAll("[data-working]")) mark.hidden = !working(messages.filter(({ object }) => object === mark.dataset.working));
}

// ── The queue ──

// Signing in makes a new token. Then somebody else may be signed in here by now, and this page does not know it.
const { user } = document.body.dataset;
let { login } = document.body.dataset;
let token = csrf();
const pressed = new WeakMap(); // form of quick answers → the one that was given

async function mine(tries) {
  const present = csrf();
  if (present === token) return true;
  // A page that everybody has: this one may show what another user cannot see.
  const page = await fetch("/", { headers: { Accept: "text/html" } });
  const [, named, presentLogin] = /<body[^>]* data-user="([^"]*)"(?: data-login="([^"]*)")?/.exec(await page.text()) ?? [];
  // An error page says nothing of anybody: asked again with the next try.
  if (!page.ok) throw new Error(`HTTP ${page.status}`);
  if (named !== user) return false;
  // Another login of the same person: what has waited was not meant for it. What they send from here on is.
  const same = login === presentLogin;
  token = present;
  login = presentLogin;
  return same || !tries;
}

// The id of this tab goes along, unless the server just said that it does not know it: nothing shall wait for a stream.
let named = true;

export const outbox = createOutbox({
  post: (url, body, { headers, signal }) => post(url, body, { signal, headers: { ...headers, ...(named && client.known && { "X-Connection-ID": client.cid }) } }),
  storage: () => sessionStorage,
  user,
  login: () => login,
  now: () => Date.now(),
  timers: { set: (work, ms) => setTimeout(work, ms), clear: (timer) => clearTimeout(timer) },
  uuid,
  online: () => navigator.onLine,
  mine,
  reconnect() {
    named = false;
    document.dispatchEvent(new CustomEvent("live:reconnect"));
  },
  changed,
  /** @param {Failure} detail */
  failed(detail) {
    document.dispatchEvent(new CustomEvent(FAILURE, { detail }));
    for (const form of document.querySelectorAll("form[data-replies]")) {
      if (form.dataset.outbox !== detail.object) continue;
      form.inert = false;
      // Making it inert took the focus away, perhaps to the heading.
      if (document.activeElement.matches("body, h2, h3")) pressed.get(form)?.focus({ preventScroll: true });
    }
  },
});

outbox.restore();
outbox.resume();

// A list that was swapped for another one is empty: what waits is shown in it again.
document.addEventListener("htmx:after:swap", () => outbox.refresh());
addEventListener("online", () => outbox.resume());
addEventListener("offline", () => outbox.refresh());
addEventListener("pagehide", () => outbox.stop());
addEventListener("pageshow", ({ persisted }) => {
  if (!persisted) return;
  outbox.restore();
  outbox.resume();
});
document.addEventListener("live:welcome", () => {
  named = true;
  outbox.healed();
});

// ── Forms ──

const OWN = ["csrfmiddlewaretoken", "message_id"];
const SECRET = "[data-secret], :has([type=password]:enabled, [data-secret-field]:enabled, [autocomplete=one-time-code])";

/** What a form says, as the API wants it: keys are a list, and typing without Enter is said where it is meant. */
function bodyOf(form, submitter) {
  const fields = [...new FormData(form, submitter)].filter(([name]) => !OWN.includes(name));
  const body = Object.fromEntries(fields);
  if (body.keys) body.keys = body.keys.split(",");
  if ("submit" in body) {
    delete body.submit;
    if (!fields.some(([name, value]) => name === "submit" && value === "enter")) body.submit = false;
  }
  return body;
}

document.addEventListener("submit", (event) => {
  const { target: form, submitter } = event;
  if (!form.matches?.("form[data-outbox]")) return;
  event.preventDefault();
  const [kind, id] = form.dataset.outbox.split(":");
  const message = outbox.send({
    object: form.dataset.outbox,
    url: submitter?.dataset.url ?? form.dataset.url ?? `/api/${kind}s/${id}/input`,
    body: bodyOf(form, submitter),
    secret: form.matches(SECRET),
    once: form.matches("[data-once]") || Boolean(submitter?.matches("[data-once]")),
  });
  const full = form.querySelector(".send-full");
  full?.remove();
  // The question that it answers has one answer: until there is another question, or it did not get there.
  if (message && form.matches("[data-replies]")) {
    form.inert = true;
    pressed.set(form, submitter);
  }
  if (message) form.reset();
  else {
    const note = make("p", "banner tone-failed send-full", REASONS.outbox_full);
    note.setAttribute("role", "alert");
    form.append(note);
  }
});
