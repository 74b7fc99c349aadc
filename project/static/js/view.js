// What a page does with its stream: it says how true it is, takes nothing older than what it shows, and fetches its view again.

const $ = (id) => document.getElementById(id);
const badge = $("badge");
const act = $("badge-act");

const POLL = 10_000;
const WORDS = {
  connecting: ["Connecting…"],
  live: ["● Live", "Pause"],
  paused: ["⏸ Paused", "Go on"],
  offline: ["⚡ Offline"],
  standby: ["◌ Many tabs, looking every 10 s", "Go live"],
  reconnecting: ["↻ Reconnecting", "Now"],
  "signed-out": ["Signed out", "Sign in"],
  taken: ["This tab was taken over", "Use it here"],
  ended: ["Disconnected", "Use it here"],
};

let freshAt = new Date(); // up to when this page is true
let countdown = 0;
let hadFocus = false; // the button that is hidden for now

/** The page heard from the server: what it shows is true as of now. */
export function fresh() {
  freshAt = new Date();
}

/**
 * @param {keyof WORDS} state
 * @param {{message?: string, until?: number}} [more] why; when it is tried again (ms since 1970)
 */
export function show(state, { message, until } = {}) {
  clearInterval(countdown);
  const fine = state === "live" || state === "connecting";
  const [words, action] = WORDS[state];
  badge.dataset.state = document.body.dataset.live = state;
  hadFocus ||= document.activeElement === act;
  act.hidden = !action;
  act.textContent = action || "";
  if (state === "live") act.setAttribute("aria-label", "Pause live updates");
  else act.removeAttribute("aria-label");
  $("stale-line").hidden = fine;
  const draw = () => {
    const at = freshAt.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
    const left = until ? ` in\u00a0${Math.max(0, Math.ceil((until - Date.now()) / 1000))}\u00a0s` : "";
    $("badge-text").textContent = `${words}${message ? `: ${message}` : ""}${left}${fine ? "" : ` · as\u00a0of\u00a0${at.replace(/\s/g, "\u00a0")}`}`;
  };
  draw();
  if (hadFocus && action) {
    if (document.activeElement === document.body) act.focus({ preventScroll: true });
    hadFocus = false;
  }
  if (until || state === "standby") countdown = setInterval(draw, 500);
}

/** The button beside the badge. What it does follows from the state. */
export function onAct(handler) {
  act.addEventListener("click", () => {
    const state = badge.dataset.state;
    if (state === "signed-out") location.assign(`/signin?next=${encodeURIComponent(location.pathname + location.search)}`);
    else if (state === "taken" || state === "ended") location.reload();
    else handler(state);
  });
}

/** The same view again, morphed in: what is being typed stays, and data-rev keeps newer parts from older ones. */
export function refetch() {
  const main = $("main");
  return htmx.ajax("GET", location.pathname + location.search, { source: main, target: main, select: "#main", swap: "outerMorph" });
}

// Row C38: without a stream (a proxy that buffers, too many tabs) the view is fetched again now and then. With one there is no need: it
// brings what was missed. Looked at first: an error page must not take the place of the view.
setInterval(async () => {
  const idle = ["reconnecting", "standby"].includes(badge.dataset.state);
  if (!idle || document.hidden || !navigator.onLine) return;
  try {
    const answer = await fetch(location.href, { redirect: "manual", signal: AbortSignal.timeout(9_000) });
    if (!answer.ok || badge.dataset.state === "live") return;
    await refetch();
    fresh();
  } catch {
    // Nobody there: the stream's loop says so, and goes on trying.
  }
}, POLL);

// ── Newer beats older ──

const rev = (element) => Number(element?.dataset?.rev ?? NaN);

htmx.registerExtension("rev", {
  // Within a morph: a part that is older than the one on the page stays out, wherever it came from.
  htmx_before_morph_node: (element, { oldNode, newNode }) => !(rev(newNode) < rev(oldNode)),
});
document.addEventListener("htmx:before:swap", ({ detail: { ctx, tasks } }) => {
  for (let i = tasks.length - 1; i >= 0; i -= 1) {
    const { target, fragment, type } = tasks[i];
    if (type !== "partial") continue;
    const part = fragment.firstElementChild;
    // A part of the stream that is not newer brings nothing, and could take away what a form just said.
    if (target && ctx.sourceElement === $("live") && rev(part) <= rev(target)) tasks.splice(i, 1);
    else if (!target) document.dispatchEvent(new CustomEvent("live:absent", { detail: { part, task: tasks[i] } }));
  }
});
