import assert from "node:assert/strict";
import { test } from "node:test";

import { createOutbox } from "../../project/static/js/outbox.js";
import { settle, storage } from "./world.mjs";

const UUID = /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/;
const KEY = "switchboard.outbox";
const TASK = "task:tk_1";
const json = (data, status = 200, headers = {}) => new Response(JSON.stringify(data), { status, headers });
const html = (status, headers = {}) => new Response("<h1>Bad gateway</h1>", { status, headers: { "Content-Type": "text/html", ...headers } });
const receipt = (id, task = "tk_1", more = {}) => json({ accepted: true, client_message_id: id, task_id: task, ...more }, 202);

/** A clock that only moves when it is told to. */
function clock() {
  let time = 1_000_000;
  let next = 1;
  const timers = new Map();
  return {
    now: () => time,
    timers: {
      set(work, ms) {
        timers.set(next, { at: time + ms, work });
        return next++;
      },
      clear: (number) => void timers.delete(number),
    },
    async pass(ms) {
      const end = time + ms;
      for (;;) {
        await settle();
        const due = [...timers].filter(([, { at }]) => at <= end).sort(([, one], [, other]) => one.at - other.at)[0];
        if (!due) break;
        timers.delete(due[0]);
        time = due[1].at;
        due[1].work();
      }
      time = end;
      await settle();
    },
  };
}

/** An outbox with a server that answers as `answers` say, one after the other; then with receipts. */
function outbox({ kept = storage(), user = "user:1", login, answers = [], time = clock(), online = true, mine = async () => true } = {}) {
  const seen = { posts: [], failures: [], changes: [], reconnects: 0, online, time, kept };
  const box = createOutbox({
    post(url, body, { headers, signal }) {
      const id = headers["Idempotency-Key"];
      seen.posts.push({ url, body, id, at: time.now(), signal });
      const answer = answers.shift() ?? receipt;
      return Promise.resolve().then(() => (typeof answer === "function" ? answer(id) : answer));
    },
    storage: () => {
      if (kept === null) throw new Error("SecurityError");
      return kept;
    },
    user,
    login,
    now: time.now,
    timers: time.timers,
    uuid: () => crypto.randomUUID(),
    online: () => seen.online,
    mine,
    reconnect: () => (seen.reconnects += 1),
    changed: (messages) => seen.changes.push(messages.map((message) => ({ ...message }))),
    failed: (failure) => seen.failures.push(failure),
  });
  let first = null;
  return Object.assign(seen, {
    box,
    say: (text, more = {}) => box.send({ object: TASK, url: "/api/tasks/tk_1/input", body: { text }, ...more }),
    texts: () => seen.posts.map(({ body }) => body.text),
    states: () => seen.changes.at(-1).map(({ state }) => state),
    gaps: () => seen.posts.map(({ at }) => at - (first ??= seen.posts[0].at)),
    stored: () => JSON.parse(kept.getItem(KEY)),
  });
}

const lost = () => Promise.reject(new TypeError("Failed to fetch"));

test("B43 only a receipt makes a message sent", async () => {
  let arrive;
  const { say, time, states, stored } = outbox({ answers: [(id) => new Promise((resolve) => (arrive = () => resolve(receipt(id))))] });
  const message = say("one");
  assert.match(message.id, UUID);
  await time.pass(0);
  assert.deepEqual(states(), ["sending"]);
  arrive();
  await time.pass(0);
  assert.deepEqual(states(), ["sent"]);
  assert.deepEqual(stored().messages, []);
});

for (const [name, answer] of Object.entries({
  "a network error": lost,
  "503": () => html(503),
  "500": () => json({ code: "internal_error", message: "x" }, 500),
  "an HTML 502": () => html(502),
  "429 without Retry-After": () => json({ code: "queue_full", message: "x" }, 429),
})) {
  test(`B47 after ${name} the message is kept and tried again with the same id`, async () => {
    const { say, time, states, posts, failures, gaps } = outbox({ answers: [answer] });
    say("one");
    await time.pass(0);
    assert.deepEqual(states(), ["retrying"]);
    assert.equal(failures[0].willRetry, true);
    await time.pass(2999);
    assert.equal(posts.length, 1);
    await time.pass(1);
    assert.deepEqual(gaps(), [0, 3000]);
    assert.equal(posts[0].id, posts[1].id);
    assert.deepEqual(states(), ["sent"]);
  });
}

test("B47 Retry-After is honoured, for 429 and for 503", async () => {
  const limited = (status) => () => json({ code: "busy", message: "x" }, status, { "Retry-After": "7" });
  const { say, time, gaps } = outbox({ answers: [limited(429), limited(503)] });
  say("one");
  await time.pass(20_000);
  assert.deepEqual(gaps(), [0, 7000, 14_000]);
});

test("B48 and B52 it is tried after 3, 6 and 12 seconds, then every 30, by a timer of its own", async () => {
  const { say, time, gaps, states, changes } = outbox({ answers: Array(6).fill(lost) });
  say("one");
  await time.pass(120_000);
  assert.deepEqual(gaps(), [0, 3000, 9000, 21_000, 51_000, 81_000, 111_000]);
  assert.deepEqual(states(), ["sent"]);
  assert.ok(changes.every(([message]) => message.id === changes[0][0].id));
});

test("B48 what is not delivered can be tried at once or discarded, by hand", async () => {
  const { say, box, time, posts, states } = outbox({ answers: Array(5).fill(lost) });
  const first = say("one");
  say("two");
  await time.pass(25_000);
  const known = posts.length;
  assert.equal(known, 4);
  box.retry(first.id);
  await time.pass(0);
  assert.equal(posts.length, known + 1);
  box.discard(first.id);
  await time.pass(0);
  assert.deepEqual(states(), ["sent"]);
  assert.equal(posts.at(-1).body.text, "two");
});

test("B48 of a message that was discarded while it was on its way nothing is told any more", async () => {
  let refuse;
  const { say, box, time, failures, texts } = outbox({ answers: [() => new Promise((resolve) => (refuse = () => resolve(json({ code: "forbidden", message: "x" }, 403))))] });
  const { id } = say("one");
  await time.pass(0);
  box.discard(id);
  say("two");
  refuse();
  await time.pass(0);
  assert.deepEqual([failures, texts()], [[], ["one", "two"]]);
});

test("B49 404 is final, an unknown connection heals by connecting again", async () => {
  const gone = outbox({ answers: [json({ code: "not_found", message: "x" }, 404)] });
  gone.say("one");
  await gone.time.pass(60_000);
  assert.deepEqual([gone.states(), gone.posts.length, gone.reconnects], [["failed"], 1, 0]);
  const unknown = outbox({ answers: [json({ code: "connection_unknown", message: "x" }, 409)] });
  unknown.say("one");
  await unknown.time.pass(0);
  assert.deepEqual([unknown.states(), unknown.reconnects, unknown.failures[0].willRetry], [["retrying"], 1, true]);
  unknown.box.healed();
  await unknown.time.pass(0);
  assert.deepEqual([unknown.states(), unknown.posts.length], [["sent"], 2]);
  assert.equal(unknown.posts[0].id, unknown.posts[1].id);
});

for (const [status, code] of [[400, "invalid_request"], [403, "forbidden"], [409, "idempotency_conflict"], [409, "task_over"], [413, "too_large"], [422, "invalid"]]) {
  test(`B50 ${status} ${code} is shown at once and releases the next message`, async () => {
    const { say, time, states, failures, texts } = outbox({ answers: [json({ code, message: "Because." }, status)] });
    say("one");
    say("two");
    await time.pass(0);
    assert.deepEqual(states(), ["failed", "sent"]);
    assert.deepEqual(texts(), ["one", "two"]);
    assert.deepEqual([failures.length, failures[0].status, failures[0].code, failures[0].text, failures[0].willRetry], [1, status, code, "Because.", false]);
  });
}

test("B50 also when the refusal is a page of HTML", async () => {
  const { say, time, states, failures } = outbox({ answers: [html(413)] });
  say("one");
  say("two");
  await time.pass(0);
  assert.deepEqual(states(), ["failed", "sent"]);
  assert.deepEqual([failures[0].status, failures[0].code], [413, undefined]);
});

test("B51 signed out: what was not sent fails, what may have arrived is uncertain, and nothing more is sent", async () => {
  const out = json({ code: "unauthorized", message: "Sign in." }, 401);
  const { say, time, states, failures, texts } = outbox({ answers: [lost, out] });
  say("maybe");
  say("never");
  await time.pass(60_000);
  assert.deepEqual(states(), ["uncertain", "failed"]);
  assert.deepEqual(texts(), ["maybe", "maybe"]);
  const final = failures.filter(({ willRetry }) => !willRetry);
  assert.deepEqual(final.map(({ uncertain }) => uncertain), [true, false]);
});

test("B51 a login that changed in another tab is noticed before anything is sent under it", async () => {
  const { say, time, states, posts } = outbox({ mine: async () => false });
  say("one");
  await time.pass(60_000);
  assert.deepEqual([states(), posts], [["failed"], []]);
});

test("B51 what another user left in this tab is removed, and not sent", async () => {
  const kept = storage();
  const before = outbox({ kept, answers: Array(9).fill(lost) });
  before.say("of the first user");
  await before.time.pass(0);
  before.box.stop();
  const after = outbox({ kept, user: "user:2" });
  after.box.restore();
  after.box.resume();
  await after.time.pass(60_000);
  assert.deepEqual([after.posts, after.stored()], [[], { user: "user:2", messages: [] }]);
});

test("B51 what waited is shown after the next login of the same person, and not sent", async () => {
  const kept = storage();
  const before = outbox({ kept, login: () => "first", answers: Array(9).fill(lost) });
  before.say("perhaps");
  before.say("never");
  await before.time.pass(0);
  before.box.stop();
  const after = outbox({ kept, login: () => "second" });
  after.box.restore();
  after.box.resume();
  await after.time.pass(60_000);
  assert.deepEqual([after.states(), after.posts], [["uncertain", "failed"], []]);
});

test("B53 while offline nothing is tried and nothing is counted; back online it goes at once", async () => {
  const off = outbox({ online: false });
  const message = off.say("one");
  await off.time.pass(600_000);
  assert.deepEqual([off.posts.length, message.tries, message.state], [0, 0, "pending"]);
  off.online = true;
  off.box.resume();
  await off.time.pass(0);
  assert.equal(message.state, "sent");
});

test("B53 a try that the loss of the line broke off is not counted, and is made again", async () => {
  const drop = (seen) => () => {
    seen.online = false;
    return lost();
  };
  const seen = outbox();
  const flaky = outbox({ answers: [() => drop(flaky)()] });
  const message = flaky.say("one");
  await flaky.time.pass(60_000);
  assert.deepEqual([message.tries, message.state, flaky.posts.length], [0, "retrying", 1]);
  flaky.online = true;
  flaky.box.resume();
  await flaky.time.pass(0);
  assert.equal(message.state, "sent");
  assert.equal(flaky.posts[0].id, flaky.posts[1].id);
  assert.equal(seen.posts.length, 0);
});

test("B54 stopping cancels the timers; a POST that is on its way may still report its receipt", async () => {
  let arrive;
  const { say, box, time, posts, states } = outbox({ answers: [(id) => new Promise((resolve) => (arrive = () => resolve(receipt(id)))), lost] });
  say("one");
  say("other", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  say("behind it");
  await time.pass(1000);
  box.stop();
  arrive();
  await time.pass(120_000);
  assert.deepEqual(states(), ["sent", "retrying", "pending"]);
  assert.equal(posts.length, 2);
});

test("B55 a message is in the queue once, whatever is done with it", async () => {
  const { say, box, time, posts, states } = outbox({ answers: [lost] });
  const message = say("one", { id: "id-1" });
  assert.equal(say("one", { id: "id-1" }), message);
  box.resume();
  box.resume();
  await time.pass(0);
  box.retry("id-1");
  box.retry("id-1");
  await time.pass(60_000);
  assert.deepEqual([posts.length, states()], [2, ["sent"]]);
});

test("B56 of a hundred and one the newest is refused, visibly, and those before are kept", async () => {
  const seen = outbox({ online: false });
  const { say, box, time, texts, failures } = seen;
  for (let number = 0; number < 100; number += 1) assert.ok(say(`line ${number}`));
  assert.equal(say("too much"), null);
  assert.deepEqual([failures.length, failures[0].code, failures[0].willRetry], [1, "outbox_full", false]);
  assert.ok(say("stop", { once: true }), "there is always room to stop something");
  assert.ok(say("of another task", { object: "task:tk_2", url: "/api/tasks/tk_2/input" }));
  seen.online = true;
  box.resume();
  for (let turn = 0; turn < 60; turn += 1) await time.pass(0);
  assert.deepEqual(texts().filter((text) => text.startsWith("line")), Array.from({ length: 100 }, (_, number) => `line ${number}`));
});

test("B57 messages go one at a time in the order in which they were written, past a failure that passes", async () => {
  let busy = 0;
  let most = 0;
  const slowly = (answer) => async (id) => {
    busy += 1;
    most = Math.max(most, busy);
    await settle();
    busy -= 1;
    return answer(id);
  };
  const { say, time, texts, states } = outbox({ answers: [slowly(receipt), slowly(() => html(502)), ...Array(6).fill(slowly(receipt))] });
  for (const text of ["a", "b", "c", "d", "e"]) say(text);
  await time.pass(2000);
  assert.deepEqual(texts(), ["a", "b"]);
  for (let second = 0; second < 20; second += 1) await time.pass(1000);
  assert.deepEqual(texts(), ["a", "b", "b", "c", "d", "e"]);
  assert.deepEqual(states(), Array(5).fill("sent"));
  assert.equal(most, 1);
});

test("B57 objects do not wait for each other", async () => {
  const { say, time, texts } = outbox({ answers: [() => new Promise(() => {})] });
  say("hangs");
  say("goes", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  await time.pass(0);
  assert.deepEqual(texts(), ["hangs", "goes"]);
});

test("B58 count and id survive stops, reloads and everything else", async () => {
  const kept = storage();
  const time = clock();
  const before = outbox({ kept, time, answers: [lost, lost] });
  const { id } = before.say("one");
  await time.pass(4000);
  before.box.stop();
  const after = outbox({ kept, time, answers: [lost] });
  after.box.restore();
  after.box.resume();
  await time.pass(5000);
  assert.deepEqual(after.failures.map((failure) => [failure.id, failure.tries]), [[id, 3]]);
});

test("B59 a try that succeeds tells of no failure", async () => {
  const { say, time, failures, states } = outbox({ answers: [lost] });
  say("one");
  await time.pass(4000);
  assert.deepEqual([failures.length, states()], [1, ["sent"]]);
});

test("B60 nothing but its own receipt changes a message: not a new stream, nor another message", async () => {
  const { say, box, time, states } = outbox({ answers: [lost] });
  say("one");
  await time.pass(0);
  say("other", { object: "task:tk_2", url: "/api/tasks/tk_2/input" });
  box.healed();
  box.resume();
  await time.pass(1000);
  assert.deepEqual(states()[0], "retrying");
});

test("B63 each message has a state of its own", async () => {
  const { say, time, states } = outbox({ answers: [receipt, json({ code: "forbidden", message: "x" }, 403), lost] });
  for (const text of ["a", "b", "c", "d"]) say(text);
  await time.pass(0);
  assert.deepEqual(states(), ["sent", "failed", "retrying", "pending"]);
});

test("B65 a message needs nothing but the POST", async () => {
  const { say, time, posts } = outbox();
  say("one");
  await time.pass(0);
  assert.deepEqual(posts.map(({ url, body }) => [url, body]), [["/api/tasks/tk_1/input", { text: "one" }]]);
});

test("B67 what stops or interrupts is tried once, at once, past the queue, and never later", async () => {
  const { say, box, time, texts, states, failures, stored } = outbox({ answers: [lost, lost] });
  say("one");
  await time.pass(0);
  say("stop", { once: true, url: "/api/tasks/tk_1/kill" });
  await time.pass(0);
  assert.deepEqual(texts(), ["one", "stop"]);
  assert.deepEqual(states(), ["retrying", "uncertain"]);
  assert.deepEqual(failures.map(({ willRetry, uncertain }) => [willRetry, uncertain]), [[true, false], [false, true]]);
  assert.deepEqual(stored().messages.map(({ body }) => body.text), ["one"]);
  box.retry(failures[1].id);
  box.resume();
  await time.pass(60_000);
  assert.deepEqual(texts().filter((text) => text === "stop"), ["stop"]);
});

test("B67 offline it is not sent at all, and not when the line is back", async () => {
  const seen = outbox({ online: false });
  seen.say("stop", { once: true });
  assert.deepEqual(seen.failures.map(({ code, willRetry, uncertain }) => [code, willRetry, uncertain]), [["offline", false, false]]);
  seen.online = true;
  seen.box.resume();
  await seen.time.pass(60_000);
  assert.deepEqual(seen.posts, []);
});

test("B67 any 2xx is enough for it, a receipt is not asked for", async () => {
  const { say, time, states } = outbox({ answers: [() => new Response(null, { status: 204 })] });
  say("stop", { once: true });
  await time.pass(0);
  assert.deepEqual(states(), ["sent"]);
});

test("B68 what is not acknowledged survives a reload in its order, with its ids, also in the middle of a POST", async () => {
  const kept = storage();
  const time = clock();
  const before = outbox({ kept, time, answers: [() => new Promise(() => {})] });
  const ids = ["a", "b", "c"].map((text) => before.say(text).id);
  await time.pass(0);
  before.box.stop();
  const after = outbox({ kept, time });
  after.box.restore();
  after.box.resume();
  await time.pass(0);
  assert.deepEqual(after.posts.map(({ id }) => id), ids);
  assert.deepEqual(after.texts(), ["a", "b", "c"]);
});

test("B68 what is secret is never in a storage, and is sent all the same", async () => {
  const writes = [];
  const kept = storage();
  const setItem = kept.setItem;
  kept.setItem = (key, value) => {
    writes.push(value);
    setItem(key, value);
  };
  const { say, time, states, failures, changes } = outbox({ kept, answers: [lost, () => json({ code: "x", message: "no" }, 503)] });
  const message = say("hunter2", { secret: true });
  say("plain");
  await time.pass(30_000);
  assert.deepEqual(states(), ["sent", "sent"]);
  assert.ok(!writes.join().includes("hunter2"));
  assert.ok(writes.join().includes("plain"));
  assert.ok(!JSON.stringify(failures).includes("hunter2"));
  assert.equal(message.body, null, "it is forgotten when it has arrived");
  assert.ok(changes.length > 0);
});

test("B68 a storage that throws, or is full, is replaced by memory, and keeps nothing old", async () => {
  const none = outbox({ kept: null, answers: [lost] });
  none.box.restore();
  none.say("one");
  await none.time.pass(4000);
  assert.deepEqual(none.states(), ["sent"]);
  const kept = storage();
  const setItem = kept.setItem;
  kept.setItem = (key, value) => {
    if (value.length > 500) throw new Error("QuotaExceededError");
    setItem(key, value);
  };
  const full = outbox({ kept, online: false });
  full.say("small");
  full.say("x".repeat(500));
  assert.equal(kept.getItem(KEY), null);
  full.online = true;
  full.box.resume();
  await full.time.pass(0);
  assert.deepEqual(full.states(), ["sent", "sent"]);
});

test("B68 a page that comes back from the back-forward cache takes up what the page after it left", async () => {
  const kept = storage();
  const time = clock();
  const first = outbox({ kept, time, answers: Array(9).fill(lost) });
  first.say("written first");
  first.say("a secret", { secret: true });
  await time.pass(0);
  first.box.stop();
  const second = outbox({ kept, time, answers: [receipt, lost] });
  second.box.restore();
  second.box.resume();
  await time.pass(3000);
  second.say("written then");
  await time.pass(0);
  second.box.stop();
  first.box.restore();
  assert.deepEqual(first.changes.at(-1).map(({ body }) => body.text), ["written then", "a secret"]);
});

for (const [name, answer] of Object.entries({
  "no answer": () => new Promise(() => {}),
  "a body that never ends": () => new Response(new ReadableStream({ start: (controller) => controller.enqueue(new TextEncoder().encode("{")) }), { status: 202 }),
})) {
  test(`B69 ${name} for fifteen seconds is a failure: the request is cut and made again with the same id`, async () => {
    const { say, time, posts, gaps, states } = outbox({ answers: [answer] });
    say("one");
    await time.pass(14_999);
    assert.deepEqual([states(), posts[0].signal.aborted], [["sending"], false]);
    await time.pass(1);
    assert.deepEqual([states(), posts[0].signal.aborted], [["retrying"], true]);
    await time.pass(3000);
    assert.deepEqual(gaps(), [0, 18_000]);
    assert.equal(posts[0].id, posts[1].id);
    assert.deepEqual(states(), ["sent"]);
  });
}

for (const [name, answer] of Object.entries({
  "HTML": () => html(200),
  "another id": () => receipt("something-else"),
  "another task": (id) => receipt(id, "tk_9"),
  "no task": (id) => receipt(id, null),
  "accepted: false": (id) => receipt(id, "tk_1", { accepted: false }),
  "accepted: 1": (id) => receipt(id, "tk_1", { accepted: 1 }),
  "null": () => json(null),
  "no body": () => new Response(null, { status: 204 }),
})) {
  test(`B70 a 2xx with ${name} is neither sent nor failed: it is tried again with the same id`, async () => {
    const { say, time, states, posts } = outbox({ answers: [answer] });
    say("one");
    await time.pass(0);
    assert.deepEqual(states(), ["retrying"]);
    await time.pass(3000);
    assert.equal(posts[0].id, posts[1].id);
    assert.deepEqual(states(), ["sent"]);
  });
}

test("B71 leaving drops what controls, and keeps what was written", async () => {
  const kept = storage();
  const time = clock();
  const before = outbox({ kept, time, answers: Array(2).fill(() => new Promise(() => {})) });
  before.say("written");
  before.say("stop", { once: true });
  await time.pass(0);
  before.box.stop();
  const after = outbox({ kept, time });
  after.box.restore();
  after.box.resume();
  await time.pass(60_000);
  assert.deepEqual(after.texts(), ["written"]);
});

test("B71 what follows a draft goes to the task of its first receipt, also what was written before that came", async () => {
  const { box, time, posts } = outbox({ answers: [lost, (id) => receipt(id, "tk_new"), (id) => receipt(id, "tk_new"), (id) => receipt(id, "tk_new")] });
  const draft = box.draft("/api/tasks");
  draft.send({ body: { text: "first" } });
  draft.send({ body: { text: "second" } });
  assert.match(draft.object, /^draft:/);
  await time.pass(4000);
  assert.equal(draft.object, "task:tk_new");
  draft.send({ body: { text: "third" } });
  await time.pass(0);
  assert.deepEqual(posts.map(({ url, body }) => [url, body.text]), [
    ["/api/tasks", "first"],
    ["/api/tasks", "first"],
    ["/api/tasks/tk_new/input", "second"],
    ["/api/tasks/tk_new/input", "third"],
  ]);
});

test("B74 a failure has one shape, and never what was written", async () => {
  const { say, time, failures } = outbox({ answers: [lost, json({ code: "forbidden", message: "No." }, 403)] });
  const { id } = say("written");
  await time.pass(4000);
  assert.deepEqual(failures, [
    { id, object: TASK, status: 0, code: undefined, text: undefined, tries: 1, willRetry: true, uncertain: false },
    { id, object: TASK, status: 403, code: "forbidden", text: "No.", tries: 2, willRetry: false, uncertain: false },
  ]);
});
