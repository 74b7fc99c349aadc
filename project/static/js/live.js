// The one stream of a page: when to connect, what is live, when to stop. stream.js makes a connection, view.js shows it.

import { client, operate } from "./client.js";
import { rise, sit } from "./locks.js";
import { csrf, uuid } from "./post.js";
import { close, open } from "./stream.js";
import { fresh, onAct, refetch, show } from "./view.js";

export { refetch };

const HALF_MINUTE = 30_000;
const STANDBY = 10_000;
const NO_WELCOME = 15_000;

let cursor = "";
let heartbeat = Number(document.getElementById("live").dataset.heartbeat || 15) * 1000;
let paused = false;
let over = false; // told not to come back
let dormant = false; // hidden for long, or left
let failures = 0;
let running = null; // the connection
let wake = () => {}; // ends a wait
let urgent = !document.hidden; // somebody looks

const tell = (name, detail) => document.dispatchEvent(new CustomEvent(`live:${name}`, { detail }));

function drop() {
  if (running) running.closing = true;
  close();
}

// ── What comes in ──

const HEAR = {
  open: () => (running.open = true),
  welcome(data) {
    heartbeat = (data.heartbeat_seconds || 15) * 1000;
    running.epoch = data.epoch;
    running.welcome = client.welcome(data);
    if (running.welcome) tell("welcome", data);
    if (document.hidden) suspend();
  },
  ready(data) {
    jump(data);
    if (!running.welcome) return;
    running.ready = true;
    urgent = false;
    failures = 0;
    show("live");
  },
  reset(data) {
    jump(data);
    refetch();
  },
  end: (data) => (running.end = data),
  superseded: () => (running.end = { reason: "superseded" }),
  probe({ nonce, question }) {
    if (question) operate("answer", { nonce }).catch(() => {});
    else if (nonce === running.nonce) running.nonce = null;
  },
};

function jump({ cursor: at }) {
  if (Number.isInteger(at)) cursor = String(at);
}

function hear(name, data, id) {
  running.heard = Date.now();
  fresh();
  if (id) cursor = id; // it means "on the page"
  if (!name) tell("news", id);
  else if (Object.hasOwn(HEAR, name)) HEAR[name](data);
  else tell(name, data);
}

// ── Coming and going ──

onAct((state) => {
  failures = 0;
  paused = state === "live";
  if (!paused) return back();
  drop();
  show("paused");
});

function prove(anew) {
  // A nonce has to come back over the stream within a second: the POST's answer proves nothing.
  const mine = running;
  if (!mine.epoch || mine.closing || (!anew && Date.now() - mine.asked < 1000)) return;
  const nonce = (mine.nonce = uuid());
  mine.asked = Date.now();
  const failed = () => running === mine && mine.nonce === nonce && drop();
  setTimeout(failed, 1000);
  operate("probe", { epoch: mine.epoch, nonce, cursor: +cursor || undefined }).then(({ status }) => status === 409 && failed(), failed);
}

function suspend(leaving) {
  const mine = running;
  if (!mine?.epoch || (mine.suspended && !leaving)) return;
  mine.suspended = true;
  const body = { epoch: mine.epoch, ...(cursor && { cursor: +cursor }) };
  // The probe of a page that is back may have overtaken this.
  const settled = () => running === mine && !mine.suspended && prove(true);
  if (!leaving) operate("suspend", body, { keepalive: true }).then(settled, settled);
  else navigator.sendBeacon?.(`/api/clients/${client.cid}/suspend`, new URLSearchParams({ ...body, leaving, csrfmiddlewaretoken: csrf() }));
}

function back() {
  if (dormant && document.hidden) return;
  dormant = false;
  urgent = !document.hidden;
  if (!running) return wake();
  const was = running.suspended;
  running.suspended = false;
  prove(was);
}

let hiding = 0;
function hide() {
  clearTimeout(hiding);
  if (!document.hidden) return;
  suspend();
  const rest = () => drop((dormant = true));
  // Without locks others need its seat.
  hiding = setTimeout(rest, navigator.locks ? HALF_MINUTE : 1000);
}
document.addEventListener("visibilitychange", () => {
  hide();
  if (!document.hidden) back();
});
hide();
addEventListener("online", back);
document.addEventListener("resume", back);
addEventListener("focus", () => running || back());
addEventListener("offline", () => {
  drop();
  wake();
});
addEventListener("pagehide", () => {
  suspend(true);
  dormant = true;
  drop();
  rise();
  client.leave();
});
addEventListener("pageshow", (event) => event.persisted && back());
// The server does not know this client.
document.addEventListener("live:reconnect", () => {
  drop();
  back();
});

// ── The loop ──

const wait = (ms) =>
  new Promise((resolve) => {
    const timer = ms && setTimeout(resolve, ms);
    wake = () => resolve(clearTimeout(timer));
  });

function finish(state, more) {
  over = true;
  rise();
  show(state, more);
}

function again({ redirected, status, end, full, closing, ready, retry }) {
  const why = end?.reason;
  const out = [401, 403, 410, "session_over", "forbidden"];
  if (redirected || out.includes(status) || out.includes(why)) return finish("signed-out");
  if (end?.reconnect === false) return finish("ended", end);
  // A 204 tells a page that was replaced to stay away.
  if (why === "superseded" || (status === 204 && client.known)) return finish("taken");
  if (paused || dormant) {
    rise();
    return wait();
  }
  if (!navigator.onLine) {
    show("offline");
    return wait();
  }
  if (full) {
    show("standby");
    urgent = false;
    return wait(STANDBY);
  }
  if (closing) return;
  // Only a stream that said "ready" has worked.
  failures = ready ? 1 : failures + 1;
  let delay = Math.min(HALF_MINUTE, 500 * 2 ** Math.min(failures, 7)) * (0.7 + Math.random() * 0.6);
  if (retry > 0) delay = Math.min(retry * 1000, 120_000) * (1 + Math.random() * 0.2);
  if (end?.reconnect) delay = Math.min(delay, 5_000) * Math.random();
  show("reconnecting", { until: Date.now() + delay });
  return wait(delay);
}

async function connect() {
  const mine = (running = {});
  await client.settle();
  mine.full = !(await sit(urgent, () => {
    if (running) running.full = true;
    drop();
  }));
  if (!mine.full && !failures) show("connecting");
  mine.since = mine.heard = Date.now();
  const who = { cid: client.cid, page: client.page, path: location.pathname };
  if (!mine.full && !mine.closing) Object.assign(mine, await open(who, cursor, hear));
  running = null;
  return mine;
}

// A connection can die without a word.
setInterval(() => {
  if (!running?.open) return;
  const now = Date.now();
  if (now - running.heard > heartbeat * 2.5 || (!running.welcome && now - running.since > NO_WELCOME)) drop();
}, 1000);

async function run() {
  while (!over) await again(paused || dormant ? {} : await connect());
}

run();
