import assert from "node:assert/strict";
import { readFileSync, statSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { join } from "node:path";
import { afterEach, beforeEach, mock, test } from "node:test";

import { CID, SCRIPTS, START, locks, page, pass, settle, storage } from "./world.mjs";

const KEY = "switchboard.cid";
const OURS = "cid-0f0e0d0c-0b0a-4908-8706-050403020100";
const OTHER = "cid-11111111-2222-4333-8444-555555555555";

beforeEach(() => mock.timers.enable({ apis: ["setTimeout", "setInterval", "Date"], now: START }));
afterEach(() => mock.timers.reset());

async function open(options) {
  const world = page(options);
  world.live = await world.load("live.js");
  await settle();
  return world;
}

/** A second page of the same browser: its own storage and scripts; the locks are shared. What belongs to the first is not to be used any more. */
const copied = (kept) => storage(Object.fromEntries(kept.map));

test("the three modules of streams and sends weigh less than 15,000 bytes as they are served", () => {
  const sizes = ["live.js", "outbox.js", "client.js"].map((name) => statSync(join(SCRIPTS, name)).size);
  assert.ok(sizes.reduce((sum, size) => sum + size) < 15_000, sizes.join(" + "));
});

test("all modules of streams and sends together are less than 15,000 bytes when they are compressed", () => {
  const names = ["live", "client", "stream", "view", "locks", "post", "outbox", "sends"];
  const all = Buffer.concat(names.map((name) => readFileSync(join(SCRIPTS, `${name}.js`))));
  assert.ok(gzipSync(all).length < 15_000);
});

test("B01 the id of the tab is made once, kept in sessionStorage and sent with each stream", async () => {
  const kept = storage();
  const tab = await open({ storage: kept });
  assert.match(tab.cid(), CID);
  assert.equal(kept.getItem(KEY), tab.cid());
  assert.match(tab.stream.url.searchParams.get("page"), /^[\w-]{8,64}$/);
  assert.equal(tab.stream.url.searchParams.get("path"), "/tasks/tk_1");
  assert.equal(tab.stream.url.searchParams.get("topics"), "connections");
  tab.stream.live();
  tab.stream.end();
  await pass(5000);
  assert.equal(tab.streams.length, 2);
  assert.equal(tab.cid(), tab.streams[0].url.searchParams.get("cid"));
  assert.equal(tab.stream.url.searchParams.get("page"), tab.streams[0].url.searchParams.get("page"));
  assert.ok(![...kept.map.values()].join().includes(tab.stream.url.searchParams.get("page")), "the nonce is kept nowhere");
});

test("B01 without crypto.randomUUID, as on plain http, an id has the same form", async () => {
  const own = Object.getOwnPropertyDescriptor(crypto, "randomUUID");
  Object.defineProperty(crypto, "randomUUID", { value: undefined, configurable: true });
  try {
    assert.match((await open()).cid(), CID);
  } finally {
    delete crypto.randomUUID;
    if (own) Object.defineProperty(crypto, "randomUUID", own);
  }
});

test("B02 a storage that throws costs the reload its id and nothing else", async () => {
  const tab = await open({ storage: null });
  const cid = tab.cid();
  assert.match(cid, CID);
  tab.stream.live();
  assert.equal(tab.state, "live");
  tab.stream.end();
  await pass(5000);
  assert.equal(tab.cid(), cid);
});

test("B03 a reload keeps the id, and a new tab has another", async () => {
  const kept = storage();
  const shared = locks();
  const first = await open({ storage: kept, locks: shared });
  const cid = first.cid();
  for (let load = 0; load < 20; load += 1) {
    first.fire("pagehide");
    await settle();
    const again = await open({ storage: kept, locks: shared });
    assert.equal(again.cid(), cid);
    again.fire("pagehide");
  }
  assert.notEqual((await open({ locks: shared })).cid(), cid);
});

test("B03 a page that lets go of its lock late is waited for: its successor keeps the id", async () => {
  const kept = storage({ [KEY]: OURS });
  const shared = locks();
  const before = await open({ storage: kept, locks: shared });
  const leave = before.window;
  const after = page({ storage: kept, locks: shared });
  await after.load("live.js");
  await settle();
  assert.equal(after.streams.length, 0);
  leave.dispatchEvent(new Event("pagehide"));
  await settle();
  assert.equal(after.cid(), OURS);
});

test("B03 a tab that was duplicated finds the lock taken and makes an id of its own", async () => {
  const shared = locks();
  const kept = storage();
  const first = await open({ storage: kept, locks: shared });
  const cid = first.cid();
  const copy = copied(kept);
  const second = await open({ storage: copy, locks: shared });
  await pass(1000);
  assert.match(second.cid(), CID);
  assert.notEqual(second.cid(), cid);
  assert.equal(copy.getItem(KEY), second.cid());
  assert.equal(shared.held.size, 2);
});

test("B04 a stored id of another form is replaced", async () => {
  for (const bad of ["", "conn-1", `cid-${"-".repeat(36)}`, `${OURS}0`, "cid-0f0e0d0c0b0a49088706050403020100", `x${OURS}`, `${OURS}\n`]) {
    const kept = storage({ [KEY]: bad });
    const tab = await open({ storage: kept });
    assert.match(tab.cid(), CID, JSON.stringify(bad));
    assert.notEqual(tab.cid(), bad);
    assert.equal(kept.getItem(KEY), tab.cid());
  }
});

test("B05 two spellings of one id are one id", async () => {
  const kept = storage({ [KEY]: OURS.toUpperCase() });
  const tab = await open({ storage: kept });
  assert.equal(tab.cid(), OURS);
  tab.stream.live({ connection_id: OURS.toUpperCase() });
  tab.stream.end();
  await pass(5000);
  assert.equal(tab.cid(), OURS);
});

for (const reason of ["in_use", "malformed", "other_session"]) {
  test(`B06 an id that the server refused (${reason}) is given up for the one in the welcome, and the page is told`, async () => {
    const kept = storage({ [KEY]: OURS });
    const shared = locks();
    const tab = await open({ storage: kept, locks: shared });
    tab.stream.live({ connection_id: OTHER, cid_accepted: false, reason, resumed: false });
    await settle();
    assert.equal(tab.state, "live");
    assert.equal(kept.getItem(KEY), OTHER);
    assert.deepEqual([...shared.held.keys()], [`switchboard-${OTHER}`]);
    const [, detail] = tab.events.find(([name]) => name === "live:welcome");
    assert.equal(detail.reason, reason);
    tab.stream.end();
    await pass(5000);
    assert.equal(tab.cid(), OTHER);
  });
}

test("B10 an id in the welcome that is none is not adopted, and the stream is given up", async () => {
  const tab = await open({ storage: storage({ [KEY]: OURS }) });
  tab.stream.live({ connection_id: "cid-nonsense" });
  assert.equal(tab.state, "connecting");
  await pass(17_000);
  assert.equal(tab.streams.length, 2);
  assert.equal(tab.cid(), OURS);
  tab.stream.live();
  assert.equal(tab.state, "live");
});

test("B12 nothing is live before the welcome and the ready of the present stream", async () => {
  const tab = await open();
  tab.stream.open();
  tab.stream.frame("ready", { cursor: 7 });
  assert.equal(tab.state, "connecting");
  tab.stream.frame("welcome", { connection_id: tab.cid(), epoch: 1 });
  assert.equal(tab.state, "connecting");
  tab.stream.frame("ready", { cursor: 8 });
  assert.equal(tab.state, "live");
  // The welcome of the stream before says nothing about this one.
  tab.stream.end();
  await pass(5000);
  tab.stream.open();
  tab.stream.frame("ready", { cursor: 9 });
  assert.notEqual(tab.state, "live");
});

test("B12 a stream that never says welcome is given up after fifteen seconds, whatever else it says", async () => {
  const tab = await open();
  tab.stream.open();
  for (let second = 0; second < 17; second += 1) {
    tab.streams[0].frame("heartbeat", {});
    await pass(1000);
  }
  assert.equal(tab.streams.length, 2);
});

test("B23 a client that was not resumed has nothing to restore, and the page is told so", async () => {
  const tab = await open();
  tab.stream.live({ resumed: false });
  assert.equal(tab.state, "live");
  assert.equal(tab.events.find(([name]) => name === "live:welcome")[1].resumed, false);
});

test("B24 each stream goes on from the cursor of what is on the page", async () => {
  const tab = await open();
  assert.equal(tab.stream.headers["Last-Event-ID"], undefined);
  tab.stream.live();
  tab.stream.frame("", "<hx-partial>", "41");
  tab.stream.end();
  await pass(5000);
  assert.equal(tab.stream.headers["Last-Event-ID"], "41");
});

test("B27 a page that was superseded stops for good and says how to go on", async () => {
  const tab = await open();
  tab.stream.live();
  tab.stream.frame("superseded", { epoch: 2 });
  tab.stream.end();
  await pass(120_000);
  assert.equal(tab.streams.length, 1);
  assert.match(tab.text, /^This tab was taken over/);
  assert.equal(tab.elements["badge-act"].textContent, "Use it here");
  for (const back of ["online", "focus"]) tab.fire(back);
  tab.hide(false);
  await pass(60_000);
  assert.equal(tab.streams.length, 1);
  tab.elements["badge-act"].click();
  assert.equal(tab.reloads, 1);
});

test("B27 a 204 stops a page that was let in before, and only delays one that never was", async () => {
  const tab = await open();
  tab.stream.answer(204);
  await pass(5000);
  assert.equal(tab.state, "reconnecting");
  assert.ok(tab.streams.length > 1);
  tab.stream.live();
  tab.stream.end();
  await pass(5000);
  tab.stream.answer(204);
  const known = tab.streams.length;
  await pass(120_000);
  assert.equal(tab.state, "taken");
  assert.equal(tab.streams.length, known);
});

test("B27 disconnected by an operator: the reason is shown, and the page stays away until somebody wants it", async () => {
  const tab = await open();
  tab.stream.live();
  tab.stream.frame("end", { reason: "disconnected", message: "maintenance of <b>this</b>", reconnect: false });
  tab.stream.end();
  await pass(120_000);
  assert.equal(tab.streams.length, 1);
  assert.match(tab.text, /^Disconnected: maintenance of <b>this<\/b> · as\u00a0of/);
});

test("B28 a stream that is silent for two and a half heartbeats is dead: it is built anew from the cursor", async () => {
  const tab = await open();
  tab.stream.live({ heartbeat_seconds: 10 });
  await pass(20_000);
  tab.stream.frame("heartbeat", {});
  await pass(25_000);
  assert.equal(tab.streams.length, 1);
  await pass(2_000);
  assert.equal(tab.streams.length, 2);
  assert.equal(tab.stream.headers["Last-Event-ID"], "7");
});

for (const [name, come] of Object.entries({
  "becomes visible": (tab) => tab.hide(false),
  "is online again": (tab) => tab.fire("online"),
  "was frozen": (tab) => tab.document.dispatchEvent(new Event("resume")),
})) {
  test(`B29 a page that ${name} proves its stream by a nonce that comes back over it`, async () => {
    const tab = await open();
    tab.stream.live();
    tab.stream.frame("", "<hx-partial>", "41");
    come(tab);
    const [probe, ...more] = tab.posts(`/api/clients/${tab.cid()}/probe`);
    assert.deepEqual(more, []);
    assert.equal(probe.body.epoch, 1);
    assert.equal(probe.body.cursor, 41);
    assert.equal(probe.headers["X-CSRFToken"], "token-1");
    tab.stream.frame("probe", { nonce: probe.body.nonce });
    await pass(5000);
    assert.equal(tab.streams.length, 1);
    assert.equal(tab.state, "live");
  });
}

test("B29 an answer to the POST alone proves nothing: after a second the stream is built anew, from the cursor", async () => {
  const tab = await open({ fetch: async () => new Response("{}", { status: 202 }) });
  tab.stream.live();
  tab.hide(false);
  tab.stream.frame("probe", { nonce: "of-somebody-else" });
  await pass(900);
  assert.equal(tab.streams.length, 1);
  await pass(1000);
  assert.equal(tab.streams.length, 2);
  assert.equal(tab.stream.headers["Last-Event-ID"], "7");
});

test("B29 a server that does not know the stream, or cannot be reached, is not waited for", async () => {
  for (const fetch of [async () => new Response("{}", { status: 409 }), () => Promise.reject(new TypeError("down"))]) {
    const tab = await open({ fetch });
    tab.stream.live();
    tab.hide(false);
    await settle();
    assert.equal(tab.streams.length, 2);
    tab.fire("pagehide");
  }
});

test("B29 several reasons at once are one probe", async () => {
  const tab = await open();
  tab.stream.live();
  tab.hide(false);
  tab.fire("online");
  tab.document.dispatchEvent(new Event("resume"));
  assert.equal(tab.posts("/probe").length, 1);
});

test("B29 the question of the server is answered at once, also by a hidden page", async () => {
  const tab = await open();
  tab.stream.live();
  tab.hide(true);
  tab.stream.frame("probe", { nonce: "n-1", question: true });
  assert.deepEqual(tab.posts(`/api/clients/${tab.cid()}/answer`).map(({ body }) => body), [{ nonce: "n-1" }]);
});

test("B32 what comes of a probe of an older stream touches the present one not", async () => {
  let refuse;
  const tab = await open({ fetch: () => new Promise((resolve) => (refuse = () => resolve(new Response("{}", { status: 409 })))) });
  tab.stream.live();
  tab.hide(false);
  tab.stream.end();
  await pass(400);
  tab.stream.end();
  await pass(5000);
  tab.stream.live();
  const known = tab.streams.length;
  refuse();
  await pass(2000);
  assert.equal(tab.streams.length, known);
  assert.equal(tab.state, "live");
});

test("B32 frames of a connection that was given up are ignored", async () => {
  const tab = await open();
  tab.stream.welcome();
  const old = tab.stream;
  tab.fire("offline");
  old.over = false;
  old.frame("ready", { cursor: 99 });
  await settle();
  assert.equal(tab.state, "offline" in tab ? "offline" : tab.state);
  assert.notEqual(tab.state, "live");
});

test("B33 a connection has fifteen seconds to begin, and there is one at a time", async () => {
  const tab = await open();
  assert.equal(tab.stream.timeout, 15_000);
  for (const name of ["online", "focus"]) tab.fire(name);
  tab.document.dispatchEvent(new CustomEvent("live:reconnect"));
  await settle();
  assert.equal(tab.streams.filter(({ over }) => !over).length, 1);
});

test("B39 a page that is hidden says so once, with its cursor, and proves its stream when it returns", async () => {
  const tab = await open();
  tab.stream.live();
  tab.hide(true);
  tab.hide(true);
  const suspended = tab.posts(`/api/clients/${tab.cid()}/suspend`);
  assert.deepEqual(suspended.map(({ body, keepalive }) => [body, keepalive]), [[{ epoch: 1, cursor: 7 }, true]]);
  tab.fire("pagehide");
  assert.deepEqual(tab.beacons.map(([, body]) => body.leaving), ["true"], "leaving is more than being hidden");
});

test("B39 a page that was hidden, looked at and hidden again is suspended again", async () => {
  const tab = await open();
  tab.stream.live();
  for (const hidden of [true, false, true]) tab.hide(hidden);
  assert.equal(tab.posts("/suspend").length, 2);
});

test("B39 a page that is looked at again within the same second proves itself again, or it would stay suspended", async () => {
  const tab = await open();
  tab.stream.live();
  for (const hidden of [true, false, true, false]) tab.hide(hidden);
  assert.deepEqual(tab.asked.map(({ url }) => url.split("/").at(-1)), ["suspend", "probe", "suspend", "probe"]);
});

test("B39 a suspension that arrives after the probe of a page that is back is followed by another probe", async () => {
  let arrive;
  const late = new Promise((resolve) => (arrive = () => resolve(new Response(null, { status: 204 }))));
  const tab = await open({ fetch: (url) => (url.endsWith("/suspend") ? late : Promise.resolve(new Response(null, { status: 202 }))) });
  tab.stream.live();
  tab.hide(true);
  tab.hide(false);
  await settle();
  const [first] = tab.posts("/probe");
  tab.stream.frame("probe", { nonce: first.body.nonce });
  arrive();
  await settle();
  assert.equal(tab.posts("/probe").length, 2);
  tab.stream.frame("probe", { nonce: tab.posts("/probe")[1].body.nonce });
  await pass(1500);
  assert.equal(tab.state, "live");
});

test("B39 a tab that was opened in the background is suspended with its welcome, and gives its connection back", async () => {
  const tab = await open({ hidden: true });
  tab.stream.live();
  assert.deepEqual(tab.posts("/suspend").map(({ body }) => body.epoch), [1]);
  await pass(31_000);
  assert.equal(tab.stream.over, true);
});

test("B39 without locks a hidden tab gives its connection back at once, for nobody can ask for it", async () => {
  const tab = await open({ locks: null });
  tab.stream.live();
  tab.hide(true);
  await pass(1_500);
  assert.equal(tab.stream.over, true);
});

test("B51 each request says whose page it is, for somebody else may be signed in by now", async () => {
  const tab = await open({ user: "user:7" });
  tab.stream.live();
  tab.hide(true);
  tab.hide(false);
  const said = [tab.stream.headers, ...tab.asked.map(({ headers }) => headers)].map((headers) => headers["X-Page-User"]);
  assert.deepEqual(said, ["user:7", "user:7", "user:7"]);
});

test("B39 after half a minute in the background the connection is given back, and returning builds it anew", async () => {
  const tab = await open();
  tab.stream.live();
  tab.hide(true);
  await pass(29_000);
  assert.equal(tab.stream.over, false);
  await pass(2_000);
  assert.equal(tab.stream.over, true);
  tab.fire("online");
  await pass(60_000);
  assert.equal(tab.streams.length, 1);
  tab.hide(false);
  await settle();
  assert.equal(tab.streams.length, 2);
});

test("B40 a page that leaves says so by a beacon with everything in its body", async () => {
  const tab = await open();
  tab.stream.live();
  const cid = tab.cid();
  tab.fire("pagehide");
  assert.deepEqual(tab.beacons, [[`/api/clients/${cid}/suspend`, { epoch: "1", cursor: "7", leaving: "true", csrfmiddlewaretoken: "token-1" }]]);
  await pass(60_000);
  assert.equal(tab.streams.length, 1, "a page that left does not come back by itself");
});

test("B39 from the back-forward cache comes another page of the same tab", async () => {
  const shared = locks();
  const tab = await open({ locks: shared });
  tab.stream.live();
  const cid = tab.cid();
  tab.fire("pagehide");
  await settle();
  assert.equal(shared.held.size, 0);
  tab.fire("pageshow", { persisted: true });
  await settle();
  assert.equal(tab.streams.length, 2);
  assert.equal(tab.cid(), cid);
  assert.notEqual(tab.stream.url.searchParams.get("page"), tab.streams[0].url.searchParams.get("page"));
});

test("B49 asked to, the page connects again at once", async () => {
  const tab = await open();
  tab.stream.live();
  tab.document.dispatchEvent(new CustomEvent("live:reconnect"));
  await settle();
  assert.equal(tab.streams.length, 2);
});

test("B73 a server that names no client, and one that names another: the page works with both", async () => {
  const plain = await open();
  plain.stream.open();
  plain.stream.frame("welcome", { server_time: "now", heartbeat_seconds: 15 });
  plain.stream.frame("ready", { cursor: 7 });
  assert.equal(plain.state, "live");
  plain.hide(true);
  plain.hide(false);
  plain.fire("pagehide");
  assert.deepEqual([plain.posts("/probe"), plain.posts("/suspend"), plain.beacons], [[], [], []]);
  const other = await open();
  other.stream.live({ connection_id: OTHER });
  assert.equal(other.state, "live");
  other.hide(true);
  assert.equal(other.posts(`/api/clients/${OTHER}/suspend`).length, 1);
});

test("B75 no script asks for a token, makes an id or reads Retry-After but the one that is there for it", () => {
  const texts = ["app", "client", "live", "outbox", "sends", "stream", "view", "locks"].map((name) => readFileSync(join(SCRIPTS, `${name}.js`), "utf8")).join("\n");
  for (const again of ["csrftoken=", "randomUUID", "Retry-After\")) * 1000"]) assert.ok(!texts.includes(again), again);
});

test("a paused page stays paused, whatever the browser says", async () => {
  const tab = await open();
  tab.stream.live();
  tab.elements["badge-act"].click();
  await settle();
  assert.equal(tab.state, "paused");
  for (const name of ["offline", "online", "focus"]) tab.fire(name);
  tab.hide(true);
  tab.hide(false);
  await pass(60_000);
  assert.equal(tab.streams.length, 1);
  assert.equal(tab.state, "paused");
  tab.elements["badge-act"].click();
  await settle();
  assert.equal(tab.streams.length, 2);
});

test("over HTTP/1.1 four tabs have a stream; a fifth takes the place of one, which looks now and then until somebody turns to it", async () => {
  const shared = locks();
  const tabs = [];
  for (let number = 0; number < 5; number += 1) {
    const tab = await open({ locks: shared, protocol: "http/1.1" });
    tab.stream.live();
    tabs.push(tab);
  }
  await settle();
  assert.equal(tabs.filter(({ stream }) => !stream.over).length, 4);
  assert.equal(tabs[4].stream.over, false);
  const standing = tabs.find(({ stream }) => stream.over);
  const seats = () => [...shared.held.keys()].filter((name) => name.includes("seat")).length;
  assert.equal(seats(), 4);
  assert.equal(standing.state, "standby");
  // Nobody looks at it: it does not take a place back.
  await pass(30_000);
  assert.equal(tabs.filter(({ streams }) => !streams.at(-1).over).length, 4);
  standing.window.dispatchEvent(new Event("focus"));
  await settle();
  assert.equal(standing.streams.length, 2);
  assert.equal(seats(), 4);
  // A page that leaves leaves its place.
  tabs[4].window.dispatchEvent(new Event("pagehide"));
  standing.window.dispatchEvent(new Event("pagehide"));
  await settle();
  assert.ok(seats() < 4);
});
