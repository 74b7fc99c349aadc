import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, mock, test } from "node:test";

import { Element, SCRIPTS, START, page, pass, settle, storage } from "./world.mjs";

beforeEach(() => mock.timers.enable({ apis: ["setTimeout", "setInterval", "Date"], now: START }));
afterEach(() => mock.timers.reset());

const TASK = "task:tk_1";

/** The page of a task: its form, its list, its mark; a server that answers as `answers` say, then with receipts. */
async function open({ answers = [], ...options } = {}) {
  const posts = [];
  const world = page({
    ...options,
    async fetch(url, { body, headers }) {
      const id = headers["Idempotency-Key"];
      posts.push({ url, id, headers, body: JSON.parse(body) });
      const answer = answers.shift();
      if (answer) return answer(id);
      const task = url.split("/")[3];
      return new Response(JSON.stringify({ accepted: true, client_message_id: id, task_id: task }), { status: 202 });
    },
  });
  const list = new Element("ol");
  const mark = new Element("span", { working: TASK });
  world.document.forms.push({ object: TASK });
  Object.assign(world.elements, { "[data-outbox-list]": list, "[data-working]": mark });
  const { outbox, words, FAILURE, working } = await world.load("sends.js");
  await settle();
  const lines = (of = list) => of.children.map((item) => item.find((element) => element.className.startsWith("send-state"))[0].textContent.replace(/^\S+ /, ""));
  const button = (label, of = list) => of.find((element) => element.name === "button" && element.textContent === label)[0];
  const say = (text, more = {}) => outbox.send({ object: TASK, url: "/api/tasks/tk_1/input", body: { text }, ...more });
  return Object.assign(world, { outbox, words, working, FAILURE, posts, list, mark, lines, button, say });
}

const refuse = (status, data = { code: "x", message: "Because." }, headers = {}) => () => new Response(JSON.stringify(data), { status, headers });
const lost = () => Promise.reject(new TypeError("Failed to fetch"));

test("B60 the banner of a message is removed by its own receipt, and by nothing else", async () => {
  const tab = await open({ answers: [lost] });
  tab.say("one");
  await settle();
  assert.deepEqual(tab.lines(), ["Not delivered yet. Trying again (1 of 3)…"]);
  tab.say("two", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  for (const name of ["live:welcome", "live:news", "live:counts"]) tab.document.dispatchEvent(new CustomEvent(name, { detail: {} }));
  await settle();
  assert.deepEqual(tab.lines(), ["Not delivered yet. Trying again (1 of 3)…"]);
  await pass(3000);
  assert.deepEqual(tab.lines(), ["Sent"]);
});

test("B59 after its receipt nothing of a failure is left, and the line itself goes a little later", async () => {
  const tab = await open({ answers: [lost] });
  tab.say("one");
  await pass(4000);
  assert.deepEqual(tab.lines(), ["Sent"]);
  await pass(10_000);
  assert.deepEqual(tab.lines(), []);
});

test("B61 the text says what happens: which try, and what can be done when it takes long", async () => {
  const tab = await open({ answers: Array(9).fill(lost) });
  tab.say("one");
  const seen = [];
  for (const ms of [0, 3000, 6000, 12_000]) {
    await pass(ms);
    await settle();
    seen.push([tab.lines()[0], Boolean(tab.button("Retry now")), Boolean(tab.button("Discard"))]);
  }
  assert.deepEqual(seen, [
    ["Not delivered yet. Trying again (1 of 3)…", false, false],
    ["Not delivered yet. Trying again (2 of 3)…", false, false],
    ["Not delivered yet. Trying again (3 of 3)…", true, true],
    ["Not delivered yet. Trying again every 30 seconds.", true, true],
  ]);
  assert.ok(!seen.join().includes("reconnect"));
});

test("B61 offline it says so, and when it will be sent", async () => {
  const tab = await open();
  navigator.onLine = false;
  tab.say("one");
  assert.deepEqual(tab.lines(), ["You are offline. This is sent when you are back."]);
  navigator.onLine = true;
  tab.fire("online");
  await settle();
  assert.deepEqual(tab.lines(), ["Sent"]);
});

test("B48 the buttons do what they say", async () => {
  const tab = await open({ answers: Array(4).fill(lost) });
  tab.say("one");
  tab.say("two");
  await pass(22_000);
  tab.button("Retry now").click();
  await settle();
  assert.deepEqual(tab.lines(), ["Sent", "Sent"]);
  assert.equal(tab.posts.length, 6);
  const other = await open({ answers: Array(9).fill(lost) });
  other.say("three");
  await pass(22_000);
  other.button("Discard").click();
  assert.deepEqual(other.lines(), []);
  await pass(60_000);
  assert.equal(other.posts.length, 4);
});

test("B62 the mark of work is set when something is sent, and taken back when it fails for good", async () => {
  const tab = await open({ answers: [refuse(409, { code: "task_over", message: "This task is over: it is killed." })] });
  tab.say("one");
  assert.equal(tab.mark.hidden, false);
  await settle();
  assert.equal(tab.mark.hidden, true);
  assert.deepEqual(tab.lines(), ["Not sent. This task is over: it is killed."]);
});

test("B62 the mark of one object is not that of another", async () => {
  const tab = await open({ answers: [() => new Promise(() => {})] });
  tab.say("one", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  await settle();
  assert.equal(tab.mark.hidden, true);
});

test("B63 each state has a sentence of its own", async () => {
  const { words } = await open();
  const states = [
    { state: "pending" },
    { state: "sending" },
    { state: "retrying", tries: 1 },
    { state: "retrying", tries: 4 },
    { state: "sent" },
    { state: "failed", status: 404 },
    { state: "uncertain" },
  ];
  const texts = states.map((message) => words(message).text);
  assert.equal(new Set(texts).size, texts.length);
  assert.equal(words({ state: "uncertain" }).text, "We could not confirm that this arrived. Sending it again is safe.");
  assert.equal(words({ state: "uncertain", once: true }).text, "We could not confirm that this arrived. It is not sent again.");
});

test("B64 and B74 a failure event without willRetry: true is final, and the event has a name that is exported", async () => {
  const tab = await open({ answers: [lost, refuse(403)] });
  const heard = [];
  tab.document.addEventListener(tab.FAILURE, ({ detail }) => heard.push(detail));
  tab.say("one");
  await pass(4000);
  assert.equal(tab.FAILURE, "outbox:failure");
  assert.deepEqual(heard.map(({ willRetry }) => willRetry), [true, false]);
  const text = readFileSync(join(SCRIPTS, "sends.js"), "utf8");
  const documented = [...text.matchAll(/@property \{\S+\} \[?(\w+)/g)].map(([, name]) => name);
  for (const detail of heard) assert.deepEqual(Object.keys(detail).sort(), [...documented].sort());
  // Whoever listens: what does not say that it goes on has ended.
  const final = (detail) => detail.willRetry !== true;
  assert.deepEqual([{}, { willRetry: "yes" }, { willRetry: undefined }, ...heard].map(final), [true, true, true, false, true]);
});

test("B65 the id of the tab goes along when the server knows it, and is left out when it said that it does not", async () => {
  const unknown = refuse(409, { code: "connection_unknown", message: "x" });
  const tab = await open({ answers: [null, null, unknown] });
  await tab.load("live.js");
  await settle();
  tab.say("before the welcome");
  await settle();
  tab.stream.live();
  const cid = tab.cid();
  tab.say("after it");
  await settle();
  tab.say("forgotten");
  await settle();
  // The stream is built anew, and the message waits for no stream.
  assert.equal(tab.streams.length, 2);
  await pass(4000);
  tab.stream.live();
  tab.say("known again");
  await settle();
  const sends = tab.posts.filter(({ url }) => url.endsWith("/input"));
  assert.deepEqual(
    sends.map(({ body, headers }) => [body.text, headers["X-Connection-ID"]]),
    [["before the welcome", undefined], ["after it", cid], ["forgotten", cid], ["forgotten", undefined], ["known again", cid]],
  );
});

test("B51 after somebody signed in in another tab, the page asks who it is before it sends", async () => {
  for (const [user, expected] of [["user:1", "Sent"], ["user:2", "Not sent. You were signed out before this was sent."]]) {
    const tab = await open();
    const { fetch } = globalThis;
    globalThis.fetch = (url, init) => (url === "/" ? Promise.resolve(new Response(`<body data-user="${user}">`)) : fetch(url, init));
    document.cookie = "other=1; csrftoken=token-2";
    tab.say("one");
    await settle();
    assert.deepEqual(tab.lines(), [expected]);
    assert.equal(tab.posts.length, user === "user:1" ? 1 : 0);
  }
});

test("B51 what has waited is not sent under the next login of the same person, but when they ask for it", async () => {
  const tab = await open({ answers: [lost] });
  const { fetch } = globalThis;
  globalThis.fetch = (url, init) => (url === "/" ? Promise.resolve(new Response('<body data-user="user:1" data-login="another">')) : fetch(url, init));
  tab.say("one");
  await settle();
  document.cookie = "other=1; csrftoken=token-2";
  await pass(4000);
  assert.deepEqual([tab.lines(), tab.posts.length], [["We could not confirm that this arrived. Sending it again is safe."], 1]);
  tab.say("two");
  await settle();
  assert.deepEqual(tab.posts.map(({ body }) => body.text), ["one", "two"]);
});

test("B47 a proxy's error page says nothing of who is signed in: the message is kept, and sent when the page answers again", async () => {
  for (const [status, text] of [[502, "<html><body>Bad Gateway"], [503, ""]]) {
    const tab = await open();
    const { fetch } = globalThis;
    const pages = [new Response(text, { status }), new Response('<body data-page="x" data-user="user:1">')];
    globalThis.fetch = (url, init) => (url === "/" ? Promise.resolve(pages.shift()) : fetch(url, init));
    document.cookie = "other=1; csrftoken=token-2";
    tab.say("one");
    await settle();
    assert.deepEqual([tab.lines(), tab.posts.length], [["Not delivered yet. Trying again (1 of 3)…"], 0]);
    await pass(4000);
    assert.deepEqual([tab.lines(), tab.posts.length], [["Sent"], 1]);
  }
});

test("B68 what was written before a reload is shown and sent after it; what is secret is shown as dots", async () => {
  const kept = storage();
  const before = await open({ storage: kept, answers: [lost] });
  before.say("one");
  before.say("hunter2", { secret: true });
  await settle();
  assert.deepEqual(before.list.find(({ className }) => className.includes("send-text")).map(({ textContent }) => textContent), ["one", "••••••"]);
  before.fire("pagehide");
  const after = await open({ storage: kept });
  assert.deepEqual(after.lines(), ["Not delivered yet. Trying again (1 of 3)…"]);
  await pass(3000);
  assert.deepEqual(after.posts.map(({ body }) => body.text), ["one"]);
  assert.equal(after.posts[0].id, before.posts[0].id);
});

test("B76 a message of another page is shown here only when something is wrong with it", async () => {
  const tab = await open({ answers: [refuse(503)] });
  tab.say("two", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  const rest = tab.elements["outbox-rest"];
  assert.deepEqual([tab.lines(), tab.lines(rest)], [[], []]);
  await settle();
  assert.deepEqual([tab.lines(), tab.lines(rest)], [[], ["Not delivered yet. Trying again (1 of 3)…"]]);
  await pass(3000);
  assert.deepEqual(tab.lines(rest), ["Sent"]);
});

test("B76 what does not change is not drawn again: a button that has the focus keeps it", async () => {
  const tab = await open({ answers: Array(9).fill(lost) });
  tab.say("one");
  await pass(22_000);
  const known = tab.button("Retry now");
  tab.say("two");
  await settle();
  assert.equal(tab.button("Retry now"), known);
});
