// The page of a task: its output as it is written, and the form that types into it. Never builds HTML from text.

import { Terminal } from "../vendor/xterm-headless-6.0.0.mjs";
import { outputSeat } from "./locks.js";
import { follow, piece } from "./output.js";
import { KEPT, Screen } from "./screen.js";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

const TAIL = 1 << 18; // what is shown at first, at most
const EARLIER = 1 << 17; // what one click shows more
const MOST = 4 * KEPT; // lines on the page, however often somebody asks for earlier ones
const NEAR = 24; // px from the end still count as the end
const { user } = document.body.dataset;

const card = $("[data-output]");
const url = card.dataset.output;
const box = $("[data-scroll]", card);
const list = $("[data-lines-of-output]", card);
const sizes = { rows: Number(card.dataset.rows), cols: Number(card.dataset.cols) };
const pinned = card.dataset.at === "" ? null : Number(card.dataset.at);

function announce(text) {
  $("#announce").textContent = text;
}

function note(text) {
  const place = $("[data-note]", card);
  place.textContent = text;
  place.hidden = !text;
}

// ── A line of the output as an element ──

function span({ text, style }) {
  const element = document.createElement("span");
  element.textContent = text;
  if (!style) return element;
  const names = ["bold", "dim", "italic", "underline", "strike", "hidden"].filter((name) => style[name]).map((name) => `t-${name}`);
  for (const [side, property] of [["fg", "color"], ["bg", "backgroundColor"]]) {
    const value = style[side];
    if (value === undefined) continue;
    // Colours of its own are set on the element: the policy refuses them in the HTML, and not here.
    if (String(value).startsWith("#")) element.style[property] = value;
    else names.push(`t-${side}-${value}`);
  }
  element.className = names.join(" ");
  return element;
}

function fill(item, line) {
  item.replaceChildren(...line.runs.map(span));
  item.classList.toggle("goes-on", line.more);
  if (line.at !== null) {
    item.dataset.at = line.at;
    item.id = `o${line.at}`;
    const link = document.createElement("a");
    Object.assign(link, { href: `?at=${line.at}#o${line.at}`, className: "line-link", tabIndex: -1, title: "Link to this line" });
    link.setAttribute("aria-hidden", "true");
    item.prepend(link);
  }
  item.key = line.key;
  return item;
}

const make = (line) => fill(document.createElement("li"), line);

/** The cursor of the program, where it waits: an empty mark that the style sheet draws. */
function mark(items, cursor) {
  for (const old of $$(".cursor", card)) {
    const around = old.parentNode;
    old.remove();
    around.normalize();
  }
  const item = cursor && items[cursor.line];
  if (!item) return;
  const place = document.createElement("i");
  place.className = "cursor";
  place.setAttribute("aria-hidden", "true");
  let left = cursor.column;
  for (const part of $$("span", item)) {
    const text = part.firstChild;
    if (text && left < text.length) {
      text.splitText(left);
      part.insertBefore(place, part.childNodes[1]);
      return;
    }
    left -= text ? text.length : 0;
  }
  // Behind the end of the line: blanks that nobody wrote are not there.
  place.style.marginLeft = `${Math.max(0, left)}ch`;
  item.append(place);
}

// ── Showing what the screen has ──

let screen = null;
let open = []; // the elements of the lines that may still change
let total = 0; // lines that there were since this page began
let seen = 0; // of them, when the reader left the end
let following = pinned === null;
let drawing = 0;
let pause = 0; // ms
let again = false; // something came since it was drawn
let ended = null;

const atEnd = () => box.scrollHeight - box.scrollTop - box.clientHeight <= NEAR;

function draw() {
  const began = performance.now();
  show();
  // What is expensive to draw is drawn less often: the reader gets the newest of it all the same.
  pause = Math.min(500, 3 * (performance.now() - began));
  drawing = 0;
  if (again) schedule();
}

function show() {
  again = false;
  const { settled, screen: below, full, cursor, lost } = screen.take();
  if (lost) {
    // More came than is kept: what was shown before has a gap behind it.
    list.replaceChildren();
    open = [];
  }
  const lines = [...settled, ...below];
  const added = document.createDocumentFragment();
  const items = lines.map((line, index) => {
    const item = open[index];
    if (!item) return added.appendChild(make(line));
    return item.key === line.key && (item.dataset.at ?? null) === (line.at === null ? null : String(line.at)) ? item : fill(item, line);
  });
  for (const item of open.slice(lines.length)) item.remove();
  list.append(added);
  open = items.slice(settled.length);
  total += settled.length;
  showFull(full, cursor);
  mark(open, full || ended ? null : cursor);
  trim();
  $("[data-empty]", card).hidden = list.childElementCount > 1 || Boolean(list.textContent) || Boolean(full);
  if (following) box.scrollTop = box.scrollHeight;
  else count();
  if (finder.value) later(find);
}

function schedule() {
  again = true;
  if (drawing) return;
  // A tab that nobody sees draws nothing, and a burst is drawn once.
  drawing = setTimeout(() => requestAnimationFrame(draw), pause);
}

function showFull(full, cursor) {
  const place = $("[data-full]", card);
  place.hidden = !full;
  list.classList.toggle("behind", Boolean(full));
  if (!full) return;
  const rows = full.map((line) => {
    const row = document.createElement("span");
    row.className = "full-row";
    row.append(...line.runs.map(span), "\n");
    return row;
  });
  $("[data-full-screen]", card).replaceChildren(...rows);
  mark(rows, cursor);
}

// Only the newest lines stay on the page, and it begins where an offset is known, so that the earlier ones can be asked for.
function trim() {
  const most = following ? KEPT : MOST;
  let extra = list.childElementCount - most;
  if (extra <= 0) return;
  for (let item = list.firstElementChild; item && (extra > 0 || !item.dataset.at); item = list.firstElementChild) {
    item.remove();
    extra -= 1;
  }
  earlierIs();
}

const firstAt = () => Number($("[data-at]", list)?.dataset.at ?? 0);

function earlierIs() {
  const place = $("[data-earlier]", card);
  place.hidden = !firstAt() || list.childElementCount >= MOST;
}

function count() {
  const more = total + open.length - seen;
  const button = $("[data-to-end]", card);
  button.hidden = more <= 0;
  const text = `${more} new line${more === 1 ? "" : "s"} ↓`;
  if (button.textContent !== text) button.textContent = text;
}

function setFollowing(on) {
  if (pinned !== null) return;
  following = on;
  $("[data-follow]", card).setAttribute("aria-pressed", String(on));
  if (on) {
    $("[data-to-end]", card).hidden = true;
    box.scrollTop = box.scrollHeight;
  } else seen = total + open.length;
}

box.addEventListener("scroll", () => {
  if (following && !atEnd()) setFollowing(false);
  else if (!following && atEnd()) setFollowing(true);
}, { passive: true });

// ── What comes ──

let through = 0; // up to where the screen was fed

async function start(from, size) {
  list.replaceChildren();
  open = [];
  screen = new Screen(Terminal, { ...sizes, at: from });
  through = from;
  if (from) {
    // It begins in the middle of a line, and perhaps of a colour: the first whole line is the first one.
    const { bytes } = await piece(url, from, 1 << 16, user);
    const feed = bytes.indexOf(10) + 1;
    if (feed && from + feed < size) through = from + feed;
    screen = new Screen(Terminal, { ...sizes, at: through });
  }
  return through;
}

function over(how) {
  ended = how;
  schedule();
  if (how.status) announce(`The task has ended: ${how.status}.`);
  else note(how.reason === "deleted" ? "This task was deleted." : `The output is not shown any more${how.message ? `: ${how.message}` : "."}`);
}

function cut({ dropped }) {
  const place = $("[data-cut]", card);
  place.textContent = `The output was cut here: ${dropped.toLocaleString("en")} more bytes were not kept.`;
  place.hidden = false;
}

const STATES = {
  live: "",
  polling: "Many tabs are open: the output is looked at every 2 seconds.",
  waiting: "The line to the server broke. The output goes on as soon as it is back.",
};
const REFUSED = { 401: "You are signed out. Sign in again to see more.", 403: "You may not see this output.", 404: "This task does not exist any more." };

let urgent = !document.hidden; // somebody just turned to this tab

async function live() {
  const size = Number(card.dataset.end);
  const from = await start(Math.max(0, size - TAIL), size);
  earlierIs();
  $("[data-earlier]", card).hidden = !from;
  const stream = follow(url, from, {
    async more(bytes) {
      await screen.feed(bytes);
      schedule();
    },
    over,
    cut,
    state: (name, status) => note(name === "refused" ? (REFUSED[status] ?? "The output cannot be read.") : STATES[name]),
    seat(lost) {
      const now = urgent;
      urgent = false;
      return outputSeat(now, lost);
    },
    user,
  });
  schedule();
  const turnedTo = () => {
    urgent = true;
    stream.back();
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? stream.rest() : turnedTo()));
  addEventListener("focus", turnedTo);
  addEventListener("online", () => stream.back());
  addEventListener("pagehide", () => stream.rest());
  addEventListener("pageshow", ({ persisted }) => persisted && stream.back());
}

/** The lines of a piece that stands for itself. */
async function linesOf(bytes, at) {
  const own = new Screen(Terminal, { ...sizes, at, kept: 2 * EARLIER });
  await own.feed(bytes);
  const { settled, screen: below } = own.take();
  own.dispose();
  const lines = [...settled, ...below];
  if (lines.length && !lines.at(-1).runs.length) lines.pop();
  return lines.map(make);
}

async function earlier() {
  const end = firstAt();
  if (!end) return;
  const from = Math.max(0, end - EARLIER);
  const { bytes } = await piece(url, from, end - from, user);
  const skip = from ? bytes.indexOf(10) + 1 : 0;
  const items = await linesOf(bytes.subarray(skip), from + skip);
  setFollowing(false);
  const before = box.scrollHeight - box.scrollTop;
  list.prepend(...items);
  box.scrollTop = box.scrollHeight - before;
  earlierIs();
  if (finder.value) find();
}

let shownThrough = 0;
async function onwards() {
  const { bytes, size } = await piece(url, shownThrough, EARLIER, user);
  const end = shownThrough + bytes.length < size ? bytes.lastIndexOf(10) + 1 || bytes.length : bytes.length;
  list.append(...(await linesOf(bytes.subarray(0, end), shownThrough)));
  shownThrough += end;
  $("[data-later] a", card).hidden = shownThrough >= size;
  $("[data-later]", card).hidden = false;
}

/** A page that was opened at one line of the output: a window of it, that does not move. */
async function around(at) {
  list.replaceChildren();
  shownThrough = at;
  await onwards();
  $("[data-follow]", card).hidden = true;
  await earlier();
  const line = document.getElementById(`o${at}`);
  line?.classList.add("meant");
  line?.scrollIntoView({ block: "center" });
}

card.addEventListener("click", (event) => {
  const link = event.target.closest("[data-earlier] a, [data-later] a[href*='at=']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const act = link.closest("[data-earlier]") ? earlier : onwards;
  act().catch(() => note("This did not arrive. Please try again."));
});
$("[data-to-end]", card).addEventListener("click", () => {
  setFollowing(true);
  box.focus({ preventScroll: true });
});
$("[data-follow]", card).addEventListener("click", () => setFollowing(!following));

function wrap(on) {
  list.classList.toggle("wraps", on);
  $("[data-wrap]", card).setAttribute("aria-pressed", String(on));
  if (following) box.scrollTop = box.scrollHeight;
}
$("[data-wrap]", card).addEventListener("click", () => {
  const on = !list.classList.contains("wraps");
  wrap(on);
  try {
    localStorage.setItem("switchboard.wrap", on ? "on" : "off");
  } catch {
    // No storage: it holds for this page.
  }
});
try {
  if (localStorage.getItem("switchboard.wrap") === "off") wrap(false);
} catch {
  // No storage: as it comes.
}

// ── Searching in what is shown ──

const finder = $("[data-find]", card);
const FOUND_MOST = 1_000;
let found = [];
let foundAt = -1;
let timer = 0;

function later(act) {
  clearTimeout(timer);
  timer = setTimeout(act, 150);
}

/** The ranges of a text in a line, also where its colours change in the middle. */
function rangesIn(item, wanted) {
  const text = item.textContent.toLowerCase();
  const ranges = [];
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    const range = document.createRange();
    let left = at;
    const walk = document.createTreeWalker(item, NodeFilter.SHOW_TEXT);
    let begun = false;
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      if (!begun && left < node.length) {
        range.setStart(node, left);
        begun = true;
        left = at + wanted.length - (at - left);
      }
      if (begun && left <= node.length) {
        range.setEnd(node, left);
        break;
      }
      left -= node.length;
    }
    ranges.push({ item, range });
  }
  return ranges;
}

function find() {
  const wanted = finder.value.toLowerCase();
  const was = found[foundAt]?.item;
  found = [];
  if (wanted) for (const item of list.children) if (found.length < FOUND_MOST) found.push(...rangesIn(item, wanted));
  foundAt = Math.max(found.findIndex(({ item }) => item === was), found.length ? 0 : -1);
  light();
}

function light() {
  const place = $("[data-found]", card);
  const more = found.length >= FOUND_MOST ? "+" : "";
  place.textContent = !finder.value ? "" : found.length ? `${foundAt + 1} of ${found.length}${more}` : "none here";
  for (const button of $$("[data-find-step]", card)) button.hidden = !found.length;
  for (const item of $$(".hit", list)) item.classList.remove("hit");
  found[foundAt]?.item.classList.add("hit");
  if (!globalThis.CSS?.highlights) return;
  CSS.highlights.set("found", new Highlight(...found.map(({ range }) => range)));
  CSS.highlights.set("found-now", new Highlight(...(found[foundAt] ? [found[foundAt].range] : [])));
}

function step(by) {
  if (!found.length) return;
  foundAt = (foundAt + by + found.length) % found.length;
  light();
  setFollowing(false);
  found[foundAt].item.scrollIntoView({ block: "nearest" });
}

finder.addEventListener("input", () => later(() => {
  find();
  if (found.length) {
    // The newest is the likeliest to be meant.
    foundAt = found.length - 1;
    step(0);
  }
}));
finder.addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    step(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape" && finder.value) {
    event.stopPropagation();
    finder.value = "";
    find();
  }
});
for (const button of $$("[data-find-step]", card)) button.addEventListener("click", () => step(Number(button.dataset.findStep)));

// ── The form that types ──

const form = $("form[data-lines]");
const fields = form && { plain: $("[data-plain]", form), secret: $("[data-hidden-text]", form) };

/** A program that asks for a password has its echo off: then the page hides what is typed as well, and keeps it nowhere. */
function hideOrShow() {
  const asks = $(".state")?.dataset.asks;
  const secret = asks === "password";
  if (!form || fields.plain.hidden === secret) return;
  const typing = form.contains(document.activeElement);
  for (const [name, field] of Object.entries(fields)) {
    const on = (name === "secret") === secret;
    field.hidden = !on;
    const input = $("[name=text]", field);
    input.disabled = !on;
    // What was meant for the one question is not the answer to the other.
    if (!on) input.value = "";
    if (on && typing) input.focus({ preventScroll: true });
  }
}

if (form) {
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.name !== "text") return;
    event.preventDefault();
    form.requestSubmit($(".send-button", form));
  });
  // Sending empties the form; whether Enter goes along stays as somebody set it.
  const enter = $("[name=submit][type=checkbox]", form);
  form.addEventListener("submit", () => {
    const { checked } = enter;
    setTimeout(() => (enter.checked = checked), 0);
    if (pinned === null) setFollowing(true);
  });
  document.addEventListener("htmx:after:swap", hideOrShow);
  hideOrShow();
}

const begin = pinned === null ? live() : around(pinned);
begin.catch(() => note("The output cannot be read now. Please reload the page."));
